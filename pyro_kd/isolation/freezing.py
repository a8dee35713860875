"""A teacher with its own parameters: frozen, and independent of Pyro's global parameter store.

Two programs that call ``pyro.module("decoder", ...)`` or ``pyro.param("w", ...)`` with the same name share one entry of the
global store. The student then trains the teacher's tensor, or none at all. :func:`freeze` copies what a program
reaches (:mod:`pyro_kd.isolation.copying`), and runs the copy on its own parameter store. A teacher that is not frozen runs in
:func:`~pyro_kd.isolation.modes.evaluation_mode`, which only promises that a run does not change it.

Knows programs, modules and parameters; no sites, noise or losses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer import Predictive
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_kd.errors import InvalidProgramError
from pyro_kd.isolation.copying import Copier
from pyro_kd.isolation.modes import keeping_buffers
from pyro_kd.isolation.predictive import as_program
from pyro_kd.isolation.programs import owners, require_callable
from pyro_kd.isolation.reaching import Reached
from pyro_kd.utils.display import as_html, name_of
from pyro_kd.utils.pyro_internals import copy_param, prefix_of, swap_contents, unconstrained_params
from pyro_kd.utils.torch_internals import parse_to, pytree

__all__ = ["FrozenProgram", "freeze", "frozen_tensors", "is_frozen"]


class FrozenProgram:
    """A program that stays as it was when :func:`freeze` copied it. It is called like the original.

    Attributes:
        program: the copy. Its modules are in eval mode, or in the modes that they had, and its tensors require no gradients.
        differentiates: whether the program differentiates inside, so that a run turns autograd on.
        stays: whether it has a device of its own, to which a program that holds it does not move with it.
    """

    is_frozen = True  # a copy of a program that reaches this one shares it
    stays = False

    def __init__(self, program: Callable[..., Any], store: ParamStoreDict, copier: Copier) -> None:
        self.program = program
        self._store = store
        self._modules = dict.fromkeys(copier.modules())
        self._parts = list(dict.fromkeys(part for module in self._modules for part in module.modules()))
        inner = {child for module in self._parts for child in module.children()}
        self._outer = [module for module in self._parts if module not in inner]
        self._tensors = copier.tensors()
        self._trainable = copier.tensors(trainable=True)
        copied_whole = [
            param for module in self._parts for param in module._parameters.values()
        ]  # by their own __deepcopy__
        further = {id(param): param for param in copied_whole if param is not None and param.requires_grad}
        self._trainable += further.values()
        _stop_gradients(further.values())
        self._inner = copier.frozen
        self.differentiates = Reached(program).differentiates
        self._moves = True  # whether a run changes buffers; the first one shows it
        self._settled = False
        self._traced = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy, on its own parameter store and without gradients."""
        if not self._settled:
            # pyro.module and PyroModule register or load only trainable parameters. So they are trainable in the first run.
            for tensor in self._trainable:
                tensor.requires_grad_(True)
        try:
            with (
                _swapped_store(self._store),
                keeping_buffers(self._parts) if self._may_move else nullcontext() as kept,
                self._autograd(),
            ):
                result = self.program(*args, **kwargs)
        finally:
            if not self._settled:
                _stop_gradients(self._trainable)
            _stop_gradients(unconstrained_params(self._store).values())  # what enters a store requires gradients
        self._settled = True
        if kept is not None:
            self._moves = kept.moved or self.training
        if self.differentiates and not self._traced:
            return pytree.tree_map_only(Tensor, Tensor.detach, result)
        return result

    @property
    def _may_move(self) -> bool:
        """Whether a run may write to buffers: the first one, and those that follow one that did, or are in train mode."""
        return self._moves or any(getattr(module, "training", False) for module in self._outer)

    @property
    def training(self) -> bool:
        """Whether any of its modules is in train mode."""
        return any(getattr(module, "training", False) for module in self._parts)

    def _autograd(self) -> Any:
        if self._traced:
            return nullcontext()
        return torch.enable_grad() if self.differentiates else torch.no_grad()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenProgram":
        return _copy_frozen(self.program, self._store, keep_modes=True)

    def __reduce__(self) -> Any:
        raise InvalidProgramError(
            f"{self!r} cannot be pickled: it holds copies of functions. Save the state_dict of the teacher's module, or Pyro's "
            "parameter store, and freeze the program again after loading."
        )

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Let autograd trace the program inside the context: tensors that then require gradients were not copied."""
        self._traced = True
        try:
            with keeping_buffers(self._parts):
                yield
        finally:
            self._traced = False

    @property
    def modules_held(self) -> list[nn.Module]:
        """The copied modules."""
        return list(self._modules)

    def tensors(self) -> list[Tensor]:
        """The copied tensors: parameters, buffers, and other tensors that the program reaches, also in frozen programs."""
        found = [*self._own_tensors(), *(tensor for inner in self._inner for tensor in inner.tensors())]
        return list({id(tensor): tensor for tensor in found}.values())

    def _own_tensors(self) -> list[Tensor]:
        found = [*self._tensors, *unconstrained_params(self._store).values()]
        found += [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        return list({id(tensor): tensor for tensor in found}.values())

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.tensors())
        return f"freeze({name_of(self.program)}), of size {size:,}, in {'train' if self.training else 'eval'} mode"

    def _repr_html_(self) -> str:
        shapes = {name: str(tuple(tensor.shape)) for tensor, name in Reached(self.program).all_tensors().items()}
        return as_html(repr(self), shapes)

    def to(self, *args: Any, **kwargs: Any) -> "FrozenProgram":
        """Move or cast the copied tensors, as ``torch.nn.Module.to`` does. Returns ``self``."""
        device, dtype, non_blocking, _ = parse_to(*args, **kwargs)

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        return self._apply(convert)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> "FrozenProgram":
        for tensor in self._own_tensors():
            tensor.data = fn(tensor.data)
        for inner in self._inner:
            if not inner.stays:
                inner._apply(fn)
        return self


def freeze(model: Callable[..., Any], *, keep_modes: bool = False) -> FrozenProgram:
    """Copy a program together with its parameters, for use as a teacher.

    The copy has everything that the program reaches: the program itself, if it is an ``nn.Module`` or a different object; the object
    of a bound method; arguments of a ``functools.partial``; defaults, closure and globals of a function, and of the functions that
    it calls; and the current entries of Pyro's parameter store. Its modules are in eval mode unless ``keep_modes``, its tensors
    require no gradients, and it never writes to the global store. So the original can be trained further under the same parameter
    names: ``teacher = freeze(model); student = model`` is how continual learning starts. The global store keeps the original's
    entries. Call ``pyro.clear_param_store()`` before you make a *new* student with the same parameter names, or Pyro gives it those.

    Not copied, but shared with the original: classes with their attributes and methods, imported modules, and objects that
    Python cannot copy (locks, files, generators). If teacher and student share a tensor through one of these, a loss raises
    SharedParameterError.

    Args:
        model: a function with Pyro primitives, an ``nn.Module`` or a ``PyroModule``, or one of their methods; or a
            ``pyro.infer.Predictive``, of which each run is one draw from its posterior, and one from its model given that.
        keep_modes: whether modules keep their current modes. Use it for programs that differ in eval mode: an exact
            Gaussian process is its prior in one mode and its posterior in the other.

    Returns:
        The frozen program. Its values carry no gradients, and a run changes no buffers, not even in train mode.

    Raises:
        InvalidProgramError: ``model`` is not a program, or a lazy module in it has no values yet.

    Like Pyro's parameter store, frozen programs must not run in several threads at once.

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
    if isinstance(model, Predictive):
        model = as_program(model)
    require_callable(model, "the model to freeze")
    return _copy_frozen(model, pyro.get_param_store(), keep_modes)


@torch.inference_mode(False)  # later runs could not differentiate tensors made in inference mode
def _copy_frozen(model: Callable[..., Any], source: ParamStoreDict, keep_modes: bool) -> FrozenProgram:
    """Copy a program and the entries of the store that it runs on."""
    copier = Copier()
    program = copier.copy(model)
    for module in () if keep_modes else copier.modules():
        module.eval()
    foreign = _names_of_others(copier, source)
    store = ParamStoreDict()
    for name, value in unconstrained_params(source).items():
        if name not in foreign:
            copied = copier.copy(value)  # the parameter of the copied module, if the store holds a module's
            copy_param(name, copied, source, store)
    return FrozenProgram(program, store, copier)


def is_frozen(program: Callable[..., Any]) -> bool:
    """Whether a program is frozen, also inside Pyro's handlers."""
    return isinstance(unwrap(program), FrozenProgram)


def _stop_gradients(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.requires_grad_(False)


@contextmanager
def without_grad(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Treat leaf tensors as constants inside the context."""
    active = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in active:
        leaf.requires_grad_(False)
    try:
        yield
    finally:
        for leaf in active:
            leaf.requires_grad_(True)


@contextmanager
def _swapped_store(own: ParamStoreDict) -> Iterator[None]:
    store = pyro.get_param_store()
    swap_contents(store, own)
    try:
        yield
    finally:
        swap_contents(store, own)


def _names_of_others(copier: Copier, store: ParamStoreDict) -> set[str]:
    """Names of the copied PyroModules' parameters under which the store holds a different program's tensor."""
    names = set()
    for module in copier.modules():
        if isinstance(module, PyroModule):
            for name in module._parameters:
                full = prefix_of(module) + name.removesuffix("_unconstrained")
                if full in store and not copier.has_copied(unconstrained_params(store)[full]):
                    names.add(full)
    return names


def frozen_tensors(program: Callable[..., Any]) -> list[Tensor]:
    """The tensors, of any shapes, of the frozen programs that a program is or calls."""
    return [tensor for owner in owners(program) if isinstance(owner, FrozenProgram) for tensor in owner.tensors()]
