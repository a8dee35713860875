"""Every private name of Pyro that this package uses, so that a release which renames one is met here and nowhere else."""

import pyro
from pyro.poutine.runtime import _PYRO_STACK as HANDLER_STACK
from torch import Tensor

__all__ = ["HANDLER_STACK", "unconstrained_params"]


def unconstrained_params() -> dict[str, Tensor]:
    """The unconstrained values in Pyro's parameter store, by name: the dictionary itself, which ``clear()`` replaces."""
    params: dict[str, Tensor] = pyro.get_param_store()._params
    return params
