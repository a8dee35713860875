"""Every private name of Pyro's that the package uses, each behind a function that says what it is for."""

from typing import Any

import pyro
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import nn

__all__ = ["constraint_in_store", "constraints_of_module", "dotted_name", "guess_plate_nesting"]


def constraint_in_store(key: str) -> Any:
    """The constraint of a parameter in Pyro's store, by its key there."""
    return pyro.get_param_store()._constraints[key]


def constraints_of_module(module: nn.Module) -> dict[str, Any]:
    """The constraints of the ``PyroParam`` attributes that a module has itself, by name."""
    own = module._pyro_params if isinstance(module, PyroModule) else {}
    return {name: constraint for name, (constraint, _) in own.items()}


def dotted_name(key: str) -> str:
    """A key of Pyro's store as a dotted name: ``pyro.module`` puts ``$$$`` between the module's name and the parameter's."""
    return key.replace("$$$", ".")


def guess_plate_nesting(elbo: Any, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set ``max_plate_nesting`` of an ELBO as its first call would, by running the programs; nothing where no call would."""
    needs_depth = isinstance(elbo, TraceEnum_ELBO) or getattr(elbo, "vectorize_particles", False)
    if needs_depth and elbo.max_plate_nesting == float("inf"):
        elbo._guess_max_plate_nesting(model, guide, args, kwargs)
