"""What counts as a program: a callable that runs ``pyro.sample`` statements when it is called."""

import functools
import inspect
import types
from typing import Any

import torch
from pyro.infer import ELBO, MCMC, SVI, Predictive
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger, unwrap
from torch import nn
from torch.distributions import Transform

from pyro_kd.errors import InvalidProgramError
from pyro_kd.isolation.copying import is_library

__all__ = ["owners", "require_callable"]


def require_callable(program: Any, role: str) -> None:
    """Raise if an object is not a program, even if Python can call it.

    Args:
        program: the object.
        role: its role, for the message.

    Raises:
        InvalidProgramError: it is not a program. The message says what it is, and what to pass instead.
    """
    reason = _reason(program)
    if reason is not None:
        shown = " ".join(repr(program).split())
        raise InvalidProgramError(
            f"{role} is {type(program).__name__} {shown:.80}, {reason}. Pass a Pyro model: a function with pyro.sample statements, "
            "an nn.Module or PyroModule, or a bound method such as vae.model (no parentheses)."
        )


def _reason(program: Any) -> str | None:
    """Why an object is not a program; None if it may be one."""
    if not callable(program):
        return "which cannot be called"
    inner = unwrap(program)
    while isinstance(inner, functools.partial):
        inner = unwrap(inner.func)
    if isinstance(inner, type):
        return f"a class: calling it makes an object. Make one, {inner.__name__}(...), and pass that or its method"
    for held in (inner, getattr(inner, "__self__", None)):
        if isinstance(held, GuideMessenger):  # a guide, which runs its model when it is called
            return None
        for kind, reason in _NO_PROGRAMS.items():
            if isinstance(held, kind):
                return reason
    if isinstance(inner, nn.Module):
        if not getattr(type(inner), "is_program", True):
            return "a loss with its two programs"
        return None if _has_forward(inner) else f"a module without forward(). Pass a method of it{_suggestion(inner)}"
    function = getattr(inner, "__func__", inner)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return "whose call makes a coroutine or a generator and runs nothing"
    return None


_NO_PROGRAMS: dict[type, str] = {
    Predictive: (
        "which runs its model many times in one call. For a teacher, pass freeze(Predictive(model, samples)): each of its runs is "
        "one draw from the posterior, and one from the model given it"
    ),
    torch.distributions.Distribution: "a distribution, which has no named site. Name one: lambda: pyro.sample('x', distribution)",
    Transform: "a transform, which draws nothing",
    ELBO: "a loss, which takes programs",
    ELBOModule: "a loss with its two programs",
    SVI: "an algorithm, which takes programs",
    MCMC: "an algorithm, which takes a program",
    Messenger: "a handler or plate without a program in it. Write handler(model), or enter the plate in a model",
    PyroOptim: "an optimiser",
    types.BuiltinFunctionType: "a builtin function, which has no pyro.sample statement",
}


def _has_forward(module: nn.Module) -> bool:
    forward = getattr(module, "forward", None)
    own_call = any("__call__" in vars(cls) for cls in type(module).__mro__ if not is_library(cls.__module__))
    return own_call or (forward is not None and getattr(forward, "__func__", None) is not nn.Module.forward)


def _suggestion(module: nn.Module) -> str:
    names = [name for name in ("model", "guide") if callable(getattr(module, name, None))]
    return f": {type(module).__name__.lower()}.{names[0]}" if names else ""


def owners(program: Any) -> list[Any]:
    """A program with what it wraps: under Pyro's handlers, a partial, or a bound method."""
    owners = []
    while program is not None:
        owners.append(program)
        inner: Any = unwrap(program)
        if inner is program:
            inner = getattr(program, "__self__", None) or (program.func if isinstance(program, functools.partial) else None)
        program = inner
    return owners
