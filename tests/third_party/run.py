"""Distils the programs of one package, which must be importable: `python -m tests.third_party.run MODULE` prints a line of JSON a program."""

import importlib
import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass

import pyro
import torch

from pyro_kd import Distiller, freeze
from tests.support.losses import SurrogateKD
from tests.third_party.cases import Case

STEPS = 200


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Attributes:
        package: with its version.
        program: in words.
        sites: that the loss compares.
        equal: the terms of the teacher against another copy of itself, added up without their signs.
        first: the loss of the student before training.
        last: after ``STEPS`` steps.
    """

    package: str
    program: str
    sites: int
    equal: float
    first: float
    last: float


def run(case: Case) -> Result:
    """Distil the student of a case."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    programs = case.make()
    loss = SurrogateKD(programs.targets, **programs.options)
    teacher = freeze(programs.teacher)
    copies = loss.terms(freeze(programs.teacher), teacher, *programs.args)
    equal = sum(abs(float(term.value)) for term in copies.values())
    pyro.clear_param_store()
    sites = len(loss.terms(programs.student, teacher, *programs.args))
    distiller = Distiller(programs.student, teacher, lambda params: torch.optim.Adam(params, lr=1e-2), loss)
    losses = distiller.fit(*programs.args, steps=STEPS, seed=0, progress=False)["loss"]
    version = importlib.metadata.version(case.package)
    return Result(f"{case.package} {version}", case.program, sites, equal, losses[0], losses[-1])


if __name__ == "__main__":
    for case in importlib.import_module(f"tests.third_party.{sys.argv[1]}").CASES:
        try:
            print(json.dumps(asdict(run(case))), flush=True)
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            print(
                json.dumps(
                    {"package": case.package, "program": case.program, "error": f"{type(error).__name__}: {first_line}"}
                ),
                flush=True,
            )
