"""A teacher with parameters of its own: frozen, and out of reach of Pyro's global parameter store.

Two programs that call ``pyro.module("decoder", ...)`` or ``pyro.param("w", ...)`` with one name share one entry of the
global store, and the student then trains the teacher's tensor, or none at all. :func:`freeze` copies what a program
reaches, and runs the copy on a parameter store of its own. :func:`quiet` is the weaker promise that the losses give to
a teacher that was not frozen: a run changes nothing of it.

Nothing here knows sites, noise or losses.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import _bound_partial
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_kd.errors import InvalidProgramError

__all__ = ["FrozenProgram", "freeze", "quiet"]

_LIBRARIES = frozenset({"builtins", "numpy", "pyro", "pyro_kd", "scipy", "torch"})


class FrozenProgram:
    """A program that runs as it was when :func:`freeze` made it. Call it like the original.

    Attributes:
        program: the copy: its modules in eval mode, its parameters without ``requires_grad``.
    """

    def __init__(self, program: Callable[..., Any], params: dict[str, Tensor], constraints: dict[str, Any]) -> None:
        self.program = program
        self._store = pyro.params.param_store.ParamStoreDict()
        self._store._params = params
        self._store._param_to_name = {value: name for name, value in params.items()}
        self._store._constraints = constraints

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy, on its own parameter store and without gradients."""
        known = len(self._store)
        with _swapped_store(self._store), torch.no_grad():
            result = self.program(*args, **kwargs)
        if len(self._store) > known:  # Pyro asks for gradients of whatever enters a store
            for value in self._store._params.values():
                value.requires_grad_(False)
        return result

    def __repr__(self) -> str:
        return f"freeze({self.program!r})"

    def to(self, *args: Any, **kwargs: Any) -> "FrozenProgram":
        """Move the copied modules and parameters, as ``torch.nn.Module.to`` does. Returns ``self``."""
        for module in _modules(self.program):
            module.to(*args, **kwargs)
        store = self._store
        store._params = {name: value.to(*args, **kwargs) for name, value in store._params.items()}
        store._param_to_name = {value: name for name, value in store._params.items()}
        return self


def freeze(model: Callable[..., Any]) -> FrozenProgram:
    """Copy a program together with its parameters, for use as a teacher.

    The copy holds the modules and tensors that the program reaches (itself, if it is an ``nn.Module``; the object of a
    bound method; the arguments of a ``functools.partial``; what a function's closure and globals name), in eval mode
    and without gradients, and the entries that Pyro's parameter store has now. It never writes to the global store. So
    the original may go on training, under the same parameter names: ``teacher = freeze(model); student = model`` is
    how continual learning starts.

    Args:
        model: a function with Pyro primitives, an ``nn.Module`` or a ``PyroModule``, or one of their methods.

    Returns:
        The frozen program. Its values carry no gradient.

    Raises:
        InvalidProgramError: ``model`` is not callable.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_kd import freeze
        >>> def model():
        ...     return pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(5.0)), 1e-6))
        >>> pyro.clear_param_store(); _ = model()
        >>> teacher = freeze(model)
        >>> pyro.get_param_store()["loc"] = torch.tensor(-5.0)
        >>> round(teacher().item()), round(model().item())
        (5, -5)
    """
    if isinstance(model, FrozenProgram):
        return model
    require_callable(model, "the model to freeze")
    store = pyro.get_param_store()
    params = {name: value.detach().clone() for name, value in store._params.items()}
    program = _copy(model, {})
    for module in _modules(program):
        module.eval()
        module.requires_grad_(False)
    return FrozenProgram(program, params, dict(store._constraints))


@contextmanager
def quiet() -> Iterator[None]:
    """Run a program without changing it: no gradients, and every module that is called is in eval mode meanwhile."""
    touched: list[nn.Module] = []

    def to_eval(module: nn.Module, args: Any) -> None:
        if module.training:
            module.training = False
            touched.append(module)

    hook = register_module_forward_pre_hook(to_eval)
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
        for module in touched:
            module.training = True


@contextmanager
def without_grad(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Treat leaf tensors as constants meanwhile."""
    active = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in active:
        leaf.requires_grad_(False)
    try:
        yield
    finally:
        for leaf in active:
            leaf.requires_grad_(True)


def require_callable(program: Any, role: str) -> None:
    """Raise InvalidProgramError, naming the role and the remedy, where ``program`` cannot be called."""
    if not callable(program):
        raise InvalidProgramError(
            f"{role} is {type(program).__name__} {program!r:.80}, which cannot be called. Pass a Pyro model: a function "
            "with pyro.sample statements, an nn.Module or PyroModule, or a bound method such as vae.model (no parentheses)."
        )


@contextmanager
def _swapped_store(own: Any) -> Iterator[None]:
    # ParamStoreDict.scope() does this too, but drops the back-references to unconstrained values that SVI needs.
    store = pyro.get_param_store()
    names = ("_params", "_param_to_name", "_constraints")
    saved = [getattr(store, name) for name in names]
    for name in names:
        setattr(store, name, getattr(own, name))
    try:
        yield
    finally:
        for name, value in zip(names, saved, strict=True):
            setattr(own, name, getattr(store, name))
            setattr(store, name, value)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Deep-copy what a program owns: unlike ``copy.deepcopy``, also what plain functions reach."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        return _copy_function(value, memo)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _copy(value.__self__, memo))
    if isinstance(value, _bound_partial):  # a program under a Pyro handler
        return _bound_partial(_copy(value.func, memo))
    if isinstance(value, functools.partial):
        args = [_copy(argument, memo) for argument in value.args]
        keywords = {key: _copy(argument, memo) for key, argument in value.keywords.items()}
        return functools.partial(_copy(value.func, memo), *args, **keywords)
    if type(value) in (list, tuple):
        return type(value)(_copy(item, memo) for item in value)
    if type(value) is dict:
        return {key: _copy(item, memo) for key, item in value.items()}
    if isinstance(value, nn.Module) or _owns_parameters(value):
        return copy.deepcopy(value, memo)
    return value


def _copy_function(fn: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    if _is_library(fn) and fn.__closure__ is None:
        return fn
    cells = None if fn.__closure__ is None else tuple(types.CellType() for _ in fn.__closure__)
    new = types.FunctionType(fn.__code__, dict(fn.__globals__), fn.__name__, fn.__defaults__, cells)
    memo[id(fn)] = new  # before its contents: functions may refer to each other
    new.__kwdefaults__ = fn.__kwdefaults__
    functools.update_wrapper(new, fn)
    vars(new).pop("__wrapped__", None)
    vars(new).update(vars(fn))
    for old_cell, new_cell in zip(fn.__closure__ or (), new.__closure__ or (), strict=True):
        try:
            content = old_cell.cell_contents
            new_cell.cell_contents = _copy(content, memo) if _owns_parameters(content) else content
        except ValueError:
            continue  # an empty cell: the name is not bound yet
    for name in _global_names(fn.__code__):
        if name in fn.__globals__ and _owns_parameters(fn.__globals__[name]):
            new.__globals__[name] = _copy(fn.__globals__[name], memo)
    return new


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _owns_parameters(value: Any, seen: set[int] | None = None) -> bool:
    """Whether a value may hold parameters; imported modules, classes, data and library functions do not."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module | types.MethodType | functools.partial):
        return True
    if isinstance(value, types.FunctionType):
        return value.__closure__ is not None or not _is_library(value)
    if isinstance(value, list | tuple):
        return any(_owns_parameters(item, seen) for item in value)
    if isinstance(value, dict):
        return any(_owns_parameters(item, seen) for item in value.values())
    if isinstance(value, type | types.ModuleType) or _is_library(type(value)):
        return False
    return hasattr(value, "__dict__") and any(_owns_parameters(item, seen) for item in vars(value).values())


def _is_library(definition: Any) -> bool:
    return (definition.__module__ or "").split(".")[0] in _LIBRARIES


def _modules(program: Any, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """The modules that a copied program holds."""
    seen = set() if seen is None else seen
    if id(program) in seen:
        return
    seen.add(id(program))
    inner: list[Any] = []
    if isinstance(program, nn.Module):
        yield program
    elif isinstance(program, types.FunctionType):
        for cell in program.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:
                continue
        names = _global_names(program.__code__)
        inner += [value for name, value in program.__globals__.items() if name in names and _owns_parameters(value)]
    elif isinstance(program, types.MethodType):
        inner = [program.__self__, program.__func__]
    elif isinstance(program, functools.partial):
        inner = [program.func, *program.args, *program.keywords.values()]
    elif isinstance(program, list | tuple):
        inner = list(program)
    elif isinstance(program, dict):
        inner = list(program.values())
    elif hasattr(program, "__dict__") and not isinstance(program, type | types.ModuleType):
        inner = list(vars(program).values())
    for value in inner:
        yield from _modules(value, seen)
