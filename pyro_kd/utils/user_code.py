"""Functions and subclasses that users write: what they forget is an error that names it, and the line that mends it.

A function of the wrong number of arguments raises a bare TypeError of Python, without the site. An object whose constructor does not
call that of its base class fails later, at the first attribute that it lacks.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pyro.poutine.messenger import unwrap

from pyro_kd.errors import InvalidProgramError
from pyro_kd.utils.display import name_of

__all__ = ["NeedsConstructor", "called", "require_taken"]

_T = TypeVar("_T")


def called(function: Callable[..., _T], what: str, form: str, *args: Any, **kwargs: Any) -> _T:
    """Call a function of the user's.

    Args:
        function: the function.
        what: what it is, with its site: ``site 'z': the divergence``.
        form: how it is called: ``d(p, q, value)``.
        *args, **kwargs: the arguments.

    Raises:
        InvalidProgramError: it does not take these arguments. All other errors are those of the function.
    """
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        require_taken(function, what, form, args, kwargs, error)
        raise


def require_taken(
    function: Callable[..., Any], what: str, form: str, args: Any, kwargs: Mapping[str, Any], error: TypeError
) -> None:
    """Raise InvalidProgramError if a function does not take the arguments with which it has raised an error; see :func:`called`."""
    try:
        signature = inspect.signature(unwrap(function))
    except (TypeError, ValueError):  # as of some functions written in C
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as reason:
        raise InvalidProgramError(
            f"{what} is called as {form}, and {name_of(function)}{signature} does not take that: {reason}."
        ) from error


class NeedsConstructor:
    """Base of a class that users subclass: an attribute that its constructor would have set is missed with an error that says so."""

    _set_too: tuple[str, ...] = ()
    """What the constructor sets besides its arguments."""

    if not TYPE_CHECKING:  # which would then allow every attribute

        def __getattr__(self, name: str) -> Any:
            """Raise InvalidProgramError for what a constructor that was not called would have set."""
            kind = type(self).__name__
            base = next(base for base in type(self).__mro__ if NeedsConstructor in base.__bases__)
            own = [each for each in inspect.signature(base.__init__).parameters if each != "self"]
            if name in own or name in base._set_too:
                raise InvalidProgramError(
                    f"{kind}.__init__ does not call the constructor of its base class, so that the object has no {name!r}. Begin it "
                    f"with super().__init__({own[0]}, ...)."
                )
            raise AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=self)
