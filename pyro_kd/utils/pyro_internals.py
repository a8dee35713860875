"""Every private name of Pyro that the package uses, and what it is used for.

The other modules import them from here, so that a release of Pyro that renames one breaks a single file.
``tests/utils/test_pyro_internals.py`` has a test for each name. Attributes of modules and of single families of distributions
are used where they are needed, and are listed in the same test.
"""

from typing import Any

import pyro
from pyro.distributions import stable as stable_laws
from pyro.infer import TraceEnum_ELBO
from pyro.infer.reparam import stable as stable_reparam
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import _bound_partial as BoundPartial  # noqa: N812
from pyro.poutine.runtime import _PYRO_STACK as HANDLER_STACK
from pyro.poutine.subsample_messenger import _Subsample as Subsample
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

__all__ = [
    "HANDLER_STACK",
    "BoundPartial",
    "Subsample",
    "collects_params",
    "constraint_in_store",
    "constraints_of_module",
    "copy_param",
    "dotted_name",
    "forget_waiting_moments",
    "guess_plate_nesting",
    "is_deterministic",
    "options_for",
    "prefix_of",
    "stable_laws",
    "stable_reparam",
    "swap_contents",
    "unconstrained_params",
    "waiting_states",
]

# HANDLER_STACK: the active handlers, from the outermost.
# BoundPartial: the type of a program inside a handler, ``handler(program)``.
# Subsample: the distribution from which a plate draws its indices.
# stable_laws, stable_reparam: the modules with the maps of stable laws, which an export replaces.


def collects_params(handler: Any) -> bool:
    """Whether a handler collects the parameters that it sees in ``pyro.param`` statements, as SVI's does."""
    return isinstance(handler, TraceMessenger) and handler.param_only


def unconstrained_params(store: ParamStoreDict) -> dict[str, Tensor]:
    """The leaf tensors that a parameter store holds, by name, before their constraints apply. This is the store's own dictionary."""
    params: dict[str, Tensor] = store._params
    return params


def copy_param(name: str, value: Tensor, source: ParamStoreDict, target: ParamStoreDict) -> None:
    """Add a parameter to a store with the constraint that it has in a different store.

    Args:
        name: of the parameter in both stores.
        value: the unconstrained tensor to add.
        source: the store with the constraint.
        target: the store to change.
    """
    target._params[name] = value
    target._param_to_name[value] = name
    target._constraints[name] = source._constraints[name]


def swap_contents(first: ParamStoreDict, second: ParamStoreDict) -> None:
    """Swap the parameters of two stores.

    ``ParamStoreDict.scope()`` does this too, but drops the references from constrained to unconstrained values that SVI needs.
    """
    for name in ("_params", "_param_to_name", "_constraints"):
        contents = getattr(first, name)
        setattr(first, name, getattr(second, name))
        setattr(second, name, contents)


def prefix_of(module: PyroModule) -> str:
    """The prefix of the names of a module's own parameters in the parameter store."""
    return f"{module._pyro_name}." if module._pyro_name else ""


def is_deterministic(site: Any) -> bool:
    """Whether a sample site is a ``pyro.deterministic``."""
    return bool((site["infer"] or {}).get("_deterministic"))


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
    """Set ``max_plate_nesting`` of an ELBO by running the programs, if its first call would do so."""
    needs_depth = isinstance(elbo, TraceEnum_ELBO) or getattr(elbo, "vectorize_particles", False)
    if needs_depth and elbo.max_plate_nesting == float("inf"):
        elbo._guess_max_plate_nesting(model, guide, args, kwargs)


def options_for(optim: Any, param: Any) -> dict[str, Any]:
    """The options of a Pyro optimiser for a parameter in Pyro's store, which may depend on its name there."""
    options: dict[str, Any] = optim._get_optim_args(param)
    return options


def waiting_states(optim: Any) -> dict[str, Any]:
    """What a Pyro optimiser was loaded with and has not used yet, by parameter: its ``get_state`` leaves that out."""
    return dict(optim._state_waiting_to_be_consumed)


def forget_waiting_moments(optim: Any) -> None:
    """Of what a Pyro optimiser was loaded with and has not used yet, keep learning rates and schedules alone."""
    for state in optim._state_waiting_to_be_consumed.values():
        state.get("optimizer", state)["state"] = {}
