"""Skip ``pyro.module`` where it would do nothing.

In each run of a program it sends a message for every parameter of a module, which in small models takes a tenth of a step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import pyro
from pyro.params import param_with_module_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from torch import Tensor, nn

from pyro_kd.utils.pyro_internals import HANDLER_STACK, unconstrained_params

__all__ = ["Registered", "skipping_registration"]

Reference = Callable[[], Any]


@contextmanager
def skipping_registration(
    is_known: Callable[[str, nn.Module], bool], learn: Callable[[str, nn.Module], None] | None = None
) -> Iterator[None]:
    """Let ``pyro.module`` skip some modules. As with Pyro's handlers, only one thread at a time can use this.

    Args:
        is_known: whether to skip a module, by name and module.
        learn: called with each module that ``pyro.module`` has registered.
    """
    register = pyro.module

    def module(name: str, nn_module: Any, update_module_params: bool = False) -> Any:
        if is_known(name, nn_module) and not update_module_params:
            return nn_module
        register(name, nn_module, update_module_params)
        if learn is not None:
            learn(name, nn_module)
        return nn_module

    pyro.module = module
    try:
        yield
    finally:
        pyro.module = register


class _Registration(NamedTuple):
    """The state of a module when it was registered, without keeping it alive.

    Attributes:
        parts: of each part of the module, a reference, its parameters and its own parts.
        params: the parameters in the store, by name.
    """

    parts: Sequence[tuple[Reference, Mapping[str, Any], Mapping[str, Reference]]]
    params: Sequence[tuple[str, Tensor]]

    def holds(self) -> bool:
        stored = unconstrained_params(pyro.get_param_store())
        for name, param in self.params:
            if stored.get(name) is not param or not param.requires_grad:
                return False
        for reference, params, parts in self.parts:
            part: Any = reference()
            if part is None or len(part._parameters) != len(params) or len(part._modules) != len(parts):
                return False
            own, children = part._parameters, part._modules  # not dictionaries in TorchScript
            for key, value in params.items():
                if key not in own or own[key] is not value:
                    return False
            for key, child in parts.items():
                if key not in children or children[key] is not child():
                    return False
        return True


class Registered:
    """Modules that have not changed since an earlier run put all their parameters into Pyro's store.

    Args:
        handlers: classes of handlers. Only programs count that run inside of exactly these, from the outermost, and of plates:
            other handlers may wait for parameters, as ``poutine.lift`` does.
    """

    def __init__(self, *handlers: type[Messenger]) -> None:
        self._handlers = handlers
        self._modules: WeakKeyDictionary[nn.Module, dict[str, _Registration]] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return Registered, self._handlers  # without what it knows

    def skipped(self) -> Any:
        """Let ``pyro.module`` skip these modules."""
        return skipping_registration(self._is_known, self._learn)

    def _is_known(self, name: str, module: nn.Module) -> bool:
        registration = self._modules.get(module, {}).get(name)
        return registration is not None and self._counts() and registration.holds()

    def _learn(self, name: str, module: nn.Module) -> None:
        if self._counts() and all(param.requires_grad for param in module.parameters()):  # pyro.module warns about others
            parts = [(ref(part), dict(part._parameters.items()), _references(part._modules)) for part in module.modules()]
            params = [(param_with_module_name(name, key), param) for key, param in module.named_parameters()]
            registration = _Registration(parts, params)
            self._modules.setdefault(module, {})[name] = registration

    def _counts(self) -> bool:
        """Whether the program that is running counts."""
        count = len(self._handlers)
        around, inside = HANDLER_STACK[:count], HANDLER_STACK[count:]
        return tuple(map(type, around)) == self._handlers and all(isinstance(handler, PlateMessenger) for handler in inside)


def _references(modules: Mapping[str, Any]) -> dict[str, Reference]:
    return {name: (lambda: None) if module is None else ref(module) for name, module in modules.items()}
