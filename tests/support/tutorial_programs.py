"""The programs of tests/programs, for tests of several rooms."""

import importlib
import pkgutil

import pyro
import torch
from pyro import poutine
from torch import nn

from tests import programs

__all__ = ["MODULES", "NAMES", "READ_VALUES", "measured", "modules_in", "parameters_of_student", "run"]

MODULES = [importlib.import_module(f"{programs.__name__}.{found.name}") for found in pkgutil.iter_modules(programs.__path__)]


NAMES = [module.__name__.rpartition(".")[2] for module in MODULES]


READ_VALUES = ("attend_infer_repeat", "discrete_hmm", "neural_topics", "spline_flow")
"""Programs whose path, or whose shapes, depend on drawn or given values: they are not captured."""


def measured(loss, program, params):
    """The loss, the gradients, and the next number of the random stream."""
    pyro.set_rng_seed(3)
    for param in params.values():
        param.grad = None
    value = loss.loss_and_grads(program.student, program.teacher, *program.args)
    grads = {name: None if param.grad is None else param.grad.clone() for name, param in params.items()}
    return torch.tensor(value), grads, torch.rand(())


def parameters_of_student(program):
    """Unconstrained, by name: what a run leaves in Pyro's parameter store, and whatever else its modules train."""
    run(program.student, program.args)
    found = {name: value.unconstrained() for name, value in pyro.get_param_store().items()}
    stored = {id(value) for value in found.values()}
    for module in modules_in(program.student):
        found |= {name: v for name, v in module.named_parameters() if v.requires_grad and id(v) not in stored}
    return found


def run(model, args, seed=7):
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        return poutine.trace(model).get_trace(*args)


def modules_in(program):
    """The modules that a program is, or a function holds. Not that of a bound method, which may have a guide as well."""
    if isinstance(program, nn.Module):
        return [program]
    cells = [cell.cell_contents for cell in getattr(program, "__closure__", None) or ()]
    return [module for held in cells for module in modules_in(held)]
