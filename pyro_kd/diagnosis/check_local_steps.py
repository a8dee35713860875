"""What fails only in the local steps of a fit: where a loss leaves teacher forcing open, they give every latent that can be compared.

Input: a loss and two programs, which have passed the other checks of :mod:`pyro_kd.diagnosis.check`. Output: the problem, if there
is one.
"""

import copy
import warnings
from typing import Any

from pyro_kd.diagnosis.check_report import Problem
from pyro_kd.errors import PyroKDError
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.constraints import check_parameters
from pyro_kd.losses.evaluation import Evaluator
from pyro_kd.losses.finite import check_finite_loss
from pyro_kd.losses.interface import terms_in
from pyro_kd.losses.program_pair import ProgramPair
from pyro_kd.utils.display import first_line

__all__ = ["problems_of_local_steps"]


def problems_of_local_steps(loss: DistillationLoss, known: ProgramPair, args: Any, kwargs: Any) -> list[Problem]:
    """Run the pair as in the first quarter of the steps of a fit.

    Args:
        loss: the loss.
        known: the two programs.
        args, kwargs: arguments of both.
    """
    if loss.teacher_forcing is not None:
        return []
    local = copy.copy(loss)
    local.local_first = 1.0
    evaluator = Evaluator(local, known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run that comes before has warned
        try:
            particles = evaluator.particles(args, kwargs, report=False)
            for particle in particles:
                check_parameters(particle.run.student)
            check_finite_loss(evaluator.combined(particles), terms_in(particles))
        except Exception as error:
            text, page = f"{type(error).__name__}: {first_line(error)}", ""
            if isinstance(error, PyroKDError):
                text, page = error.message, f" See {error.page}."
            when = _WHEN.format(type(loss).__name__)
            return [Problem(True, f"{text.rstrip(' .:')}. {when}{page}", error)]
    return []


_WHEN = (
    "This happens in the first quarter of the steps of a Distiller, in which the student is given every latent that can be "
    "compared. {}(teacher_forcing=0.0) has no such steps."
)
