"""The programs of tests/programs, and the parameters of their students."""

import importlib
import pkgutil

import pyro
import torch
from pyro import poutine
from torch import nn

from tests import programs

MODULES = [importlib.import_module(f"{programs.__name__}.{found.name}") for found in pkgutil.iter_modules(programs.__path__)]
NAMES = [module.__name__.rpartition(".")[2] for module in MODULES]


def run(model, args, seed=7):
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        return poutine.trace(model).get_trace(*args)


def sites(trace, kind):
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == kind and site["value"] is not None}


def modules_in(program):
    """The modules that a program is, or a function holds. Not that of a bound method, which may have a guide as well."""
    if isinstance(program, nn.Module):
        return [program]
    cells = [cell.cell_contents for cell in getattr(program, "__closure__", None) or ()]
    return [module for held in cells for module in modules_in(held)]


def unconstrained(value):
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def parameters_of_student(program):
    """Unconstrained, by name: what a run leaves in Pyro's parameter store, and whatever else its modules train."""
    run(program.student, program.args)
    found = {name: value.unconstrained() for name, value in pyro.get_param_store().items()}
    stored = {id(value) for value in found.values()}
    for module in modules_in(program.student):
        found |= {name: v for name, v in module.named_parameters() if v.requires_grad and id(v) not in stored}
    return found
