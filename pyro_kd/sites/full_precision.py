"""Sample sites in float32 in a program that runs under autocast.

Under autocast, networks return bfloat16 or float16. Distributions made of that would round noise, draws, densities, divergences and
sums over sites to three digits or less. So at each site the parameters are converted to float32, and autocast is off until the draw
is made. What is lost is then what the networks have rounded.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical, Distribution, Transform

from pyro_kd.utils.autocast import AutocastModes, modes_of_programs
from pyro_kd.utils.tensors import tensors_in

__all__ = ["FullPrecisionMessenger", "in_float32", "in_full_precision"]

_LOW = (torch.bfloat16, torch.float16)


class FullPrecisionMessenger(Messenger):
    """Runs a program under autocast, and its sample sites in float32. It must be the innermost handler.

    Args:
        modes: the modes of autocast.
    """

    def __init__(self, modes: AutocastModes) -> None:
        super().__init__()
        self._modes = modes
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        torch.clear_autocast_cache()  # a copy of a weight that was made without gradients must not serve with them
        for device, dtype in self._modes:
            self._stack.enter_context(torch.autocast(device, dtype))
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._stack.close()
        torch.clear_autocast_cache()
        return super().__exit__(*error)

    def _pyro_sample(self, msg: Any) -> None:
        self._switch(False)
        msg["fn"] = in_float32(msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        self._switch(True)

    def _switch(self, on: bool) -> None:
        for device, _ in self._modes:
            torch.set_autocast_enabled(device, on)


def in_full_precision(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program under a handler for its sites, where programs run under autocast; the same program where they do not."""
    modes = modes_of_programs()
    wrapped: Callable[..., Any] = FullPrecisionMessenger(modes)(program) if modes else program
    return wrapped


def in_float32(fn: Any) -> Any:
    """A distribution with float32 in place of bfloat16 and float16; the same object where it has none of them."""
    return _converted(fn) if any(tensor.dtype in _LOW for tensor in tensors_in(fn)) else fn


def _converted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _LOW else value
    if isinstance(value, dict):
        return type(value)((key, _converted(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(_converted, value))
    if not isinstance(value, Distribution | Transform):
        return value
    made: Any = copy.copy(value)
    vars(made).update({name: _converted(part) for name, part in vars(value).items() if name != "_inv"})
    if isinstance(made, Categorical):
        _normalise(made, is_by_logits=vars(value)["_param"] is vars(value).get("logits"))
    return made


def _normalise(fn: Any, *, is_by_logits: bool) -> None:
    """Normalise a categorical distribution again, which was normalised with three digits."""
    if "logits" in vars(fn):
        fn.logits = fn.logits.log_softmax(-1)
    if "probs" in vars(fn):
        fn.probs = fn.probs / fn.probs.sum(-1, keepdim=True)
    fn._param = fn.logits if is_by_logits else fn.probs
