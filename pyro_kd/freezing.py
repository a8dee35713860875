"""A teacher with parameters of its own: frozen, and out of reach of Pyro's global parameter store.

Two programs that call ``pyro.module("decoder", ...)`` or ``pyro.param("w", ...)`` with one name share one entry of the
global store, and the student then trains the teacher's tensor, or none at all. :func:`freeze` copies what a program
reaches (:mod:`pyro_kd.copying`), and runs the copy on a parameter store of its own. :func:`quiet` is the weaker promise that
the losses give to a teacher that was not frozen: a run changes nothing of it.

Nothing here knows sites, noise or losses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_kd.copying import Copier
from pyro_kd.errors import InvalidProgramError
from pyro_kd.registration import passing_over

__all__ = ["FrozenProgram", "freeze", "quiet"]


class FrozenProgram:
    """A program that runs as it was when :func:`freeze` made it. Call it like the original.

    Attributes:
        program: the copy: its modules in eval mode, its tensors without ``requires_grad``.
    """

    is_frozen = True  # freezing a program that reaches this one shares it

    def __init__(self, program: Callable[..., Any], store: ParamStoreDict, copier: Copier) -> None:
        self.program = program
        self._store = store
        self._modules = dict.fromkeys(copier.modules())
        self._tensors = copier.tensors()
        self._trainable = copier.tensors(trainable=True)
        self._settled = False
        self._traced = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy, on its own parameter store and without gradients."""
        if not self._settled:
            # pyro.module and PyroModule register, or load, trainable parameters only: so they are, in the first run.
            for tensor in self._trainable:
                tensor.requires_grad_(True)
        try:
            with (
                _swapped_store(self._store),
                passing_over(self._is_registered) if self._settled else nullcontext(),
                nullcontext() if self._traced else torch.no_grad(),
            ):
                result = self.program(*args, **kwargs)
        finally:
            if not self._settled:
                _stop_gradients(self._trainable)
            _stop_gradients(self._store._params.values())  # Pyro asks for those of whatever enters a store
        self._settled = True
        return result

    def _is_registered(self, name: str, module: nn.Module) -> bool:
        """Its parameters are in the program's own store, and will not change."""
        return module in self._modules

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenProgram":
        return _copy_frozen(self.program, self._store)

    def __reduce__(self) -> Any:
        raise InvalidProgramError(
            f"{self!r} cannot be pickled: it holds copies of functions. Save the state_dict of the teacher's module, or Pyro's "
            "parameter store, and freeze the program again after loading."
        )

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Let autograd trace the program meanwhile: what then has a gradient was not copied."""
        self._traced = True
        try:
            yield
        finally:
            self._traced = False

    @property
    def modules_held(self) -> list[nn.Module]:
        """The copied modules."""
        return list(self._modules)

    def tensors(self) -> list[Tensor]:
        """The copied tensors: parameters, buffers, and what else the program reaches."""
        found = [*self._tensors, *self._store._params.values()]
        found += [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        return list({id(tensor): tensor for tensor in found}.values())

    def __repr__(self) -> str:
        return f"freeze({self.program!r})"

    def to(self, *args: Any, **kwargs: Any) -> "FrozenProgram":
        """Move or cast the copied tensors, as ``torch.nn.Module.to`` does. Returns ``self``."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        return self._apply(convert)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> "FrozenProgram":
        for tensor in self.tensors():
            tensor.data = fn(tensor.data)
        return self


def freeze(model: Callable[..., Any]) -> FrozenProgram:
    """Copy a program together with its parameters, for use as a teacher.

    The copy holds whatever the program reaches: itself, if it is an ``nn.Module`` or another object; the object of a bound
    method; arguments of a ``functools.partial``; defaults, closure and globals of a function, and of the functions that it
    calls; and the entries that Pyro's parameter store has now. Its modules are in eval mode, its tensors have no gradient,
    and it never writes to the global store. So the original may go on training, under the same parameter names:
    ``teacher = freeze(model); student = model`` is how continual learning starts. The global store keeps the original's
    entries: before a *new* student of the same parameter names, ``pyro.clear_param_store()``, or Pyro hands it those.

    Not copied, but shared with the original: classes with their attributes and methods, imported modules, and objects that
    Python cannot copy (locks, files, generators). A loss raises SharedParameterError where teacher and student meet in a
    tensor reached through one of these.

    Args:
        model: a function with Pyro primitives, an ``nn.Module`` or a ``PyroModule``, or one of their methods.

    Returns:
        The frozen program. Its values carry no gradient.

    Raises:
        InvalidProgramError: ``model`` is not callable, or a lazy module in it has no values yet.

    Like Pyro's parameter store, frozen programs are not for several threads at once.

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
    return _copy_frozen(model, pyro.get_param_store())


@torch.inference_mode(False)  # which would make tensors that later runs cannot differentiate
def _copy_frozen(model: Callable[..., Any], source: ParamStoreDict) -> FrozenProgram:
    """Copy a program, with the entries of the store that it runs on."""
    copier = Copier()
    program = copier.copy(model)
    for module in copier.modules():
        module.eval()
    foreign = _names_of_others(copier, source)
    store = ParamStoreDict()
    for name, value in source._params.items():
        if name not in foreign:
            copied = copier.copy(value)  # the copied module's own parameter, where the store holds a module's
            store._params[name] = copied
            store._param_to_name[copied] = name
            store._constraints[name] = source._constraints[name]
    return FrozenProgram(program, store, copier)


def _stop_gradients(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.requires_grad_(False)


@contextmanager
def quiet(program: Any = None) -> Iterator[None]:
    """Run a program without changing it: no gradients, and modules in eval mode meanwhile.

    Args:
        program: the program that will run. If it is a module, or a method of one, that module is in eval mode from the
            start; so is every other module that is called.
    """
    touched: list[nn.Module] = []

    def to_eval(module: nn.Module, args: Any) -> None:
        if module.training:
            module.training = False
            touched.append(module)

    program = unwrap(program)
    for owner in (program, getattr(program, "__self__", None)):
        if isinstance(owner, nn.Module):
            for module in owner.modules():
                to_eval(module, None)
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


def _names_of_others(copier: Copier, store: ParamStoreDict) -> set[str]:
    """Names under which the copied PyroModules look up parameters, and the store holds another program's tensor."""
    names = set()
    for module in copier.modules():
        if isinstance(module, PyroModule):
            prefix = module._pyro_name + "." if module._pyro_name else ""
            for name in module._parameters:
                full = prefix + name.removesuffix("_unconstrained")
                if full in store and not copier.has_copied(store._params[full]):
                    names.add(full)
    return names
