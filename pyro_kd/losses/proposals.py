r"""Samples of the student's latents from a proposal, such as an encoder q(z | y), instead of from the student itself.

    teacher --> y --> proposal: K draws of z --> the student at these z and y --> log weights

Each draw has the importance weight :math:`w_k = p_\theta(y, z_k) / q(z_k | y)`, whose mean is an unbiased estimate of
:math:`p_\theta(y)`: the importance-weighted bound of Burda et al., ICLR 2016, on draws of the teacher. A good proposal needs few
draws.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.errors import UnpairedSiteError, listing
from pyro_kd.losses.program_pair import Program, ProgramPair
from pyro_kd.losses.recording import Taught, record_teacher
from pyro_kd.losses.rows import batch_depth, drawn_sites, summed
from pyro_kd.losses.targets import Targets
from pyro_kd.noise.messengers import SampleMessenger
from pyro_kd.sites.pairing import names_in_student
from pyro_kd.sites.tracing import get_trace
from pyro_kd.sites.weighting import unmask
from pyro_kd.utils.user_code import require_taken

__all__ = ["SAMPLES", "Proposed", "in_samples", "proposal_densities", "proposal_run", "targets_for"]

SAMPLES = "num_samples_vectorized"
"""The name of the outer plate of samples."""


def in_samples(program: Program, *, num_samples: int, dim: int) -> Program:
    """A program in an outer plate of samples, at a batch dimension on the left of all that it uses, a negative number."""
    wrapped: Program = pyro.plate(SAMPLES, num_samples, dim=dim)(program)
    return wrapped


def targets_for(taught: Taught, site_map: Mapping[str, str]) -> dict[str, Tensor]:
    """The targets of a run of the teacher by the student's names, each of shape ``batch_shape + event_shape``."""
    to_student = names_in_student(site_map)
    return {to_student.get(name, name): taught.sites[name]["value"] for name in taught.finder.names}


def proposal_run(
    proposal: Program,
    student: Program,
    teacher: Program,
    args: Any,
    kwargs: Any,
    *,
    targets: Targets,
    site_map: Mapping[str, str],
    num_samples: int,
) -> tuple[Program, Any, Any]:
    """A proposal in its plate of samples, with its arguments: targets that the teacher has drawn, and the arguments of both programs.

    Args:
        proposal: as for :class:`Proposed`.
        student, teacher: the programs.
        args, kwargs: their arguments.
        targets, site_map, num_samples: as for :class:`~pyro_kd.losses.multi_sample.MultiSampleKD`.
    """
    known = ProgramPair(student, teacher)
    dim = -1 - batch_depth(record_teacher(teacher, targets, args, kwargs, known).trace)
    sampled = partial(in_samples, num_samples=num_samples, dim=dim)
    taught = record_teacher(sampled(teacher), targets, args, kwargs, known)
    return sampled(proposal), (targets_for(taught, site_map), *args), kwargs


class Proposed:
    """A student whose latents have the values that a proposal draws for given targets.

    Args:
        student: the student, in its plate of samples.
        proposal: the proposal ``f(values, *args, **kwargs)``, in the same plate; ``values`` has the targets by the student's names.

    Attributes:
        drawn: the trace of the proposal's last run.
    """

    def __init__(self, student: Callable[..., Any], proposal: Callable[..., Any]) -> None:
        self._student = student
        self._proposal = proposal
        self.drawn = Trace()

    def draw(self, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> None:
        """Draw latents for these targets, each of shape ``batch_shape + event_shape`` with the dimension of samples."""
        args = (dict(values), *args)
        try:
            self.drawn = get_trace(self._proposal, args, kwargs)
        except TypeError as error:
            require_taken(self._proposal, "the proposal", "f(values, *args, **kwargs)", args, kwargs, error)
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student with the latents that were drawn."""
        with _Drawn({name: site["value"] for name, site in drawn_sites(self.drawn)}):
            return self._student(*args, **kwargs)

    def check(self, student: Trace) -> None:
        """Raise UnpairedSiteError where the proposal and a run of the student draw at different sites."""
        mine, drawn = ({name for name, _ in drawn_sites(trace)} for trace in (student, self.drawn))
        if mine != drawn:
            raise UnpairedSiteError(
                f"the proposal must draw the latents of the student, and nothing else: it lacks {listing(sorted(mine - drawn))}, and "
                f"has {listing(sorted(drawn - mine))} besides. Give it pyro.sample statements with the student's names."
            )


class _Drawn(SampleMessenger):
    """Gives a program the values of its latents."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if msg["name"] in self._values and not msg["is_observed"]:
            msg["value"] = self._values[str(msg["name"])]


def proposal_densities(
    student: Trace, drawn: Trace, kept: Sequence[int], *, trains_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """The densities of the draws of a proposal, by sample and row.

    Args:
        student: the student's trace at the draws.
        drawn: the proposal's trace.
        kept: the dimensions of samples and rows, see :func:`~pyro_kd.losses.rows.summed`.
        trains_bits: whether the density of draws without a derivative is differentiated where it enters a weight. Unbiased
            gradients need that; posterior-weighted ones train it by the scores alone.

    Returns:
        log p(z) - log q(z | y), and the log q of draws without a derivative, which are scores, or None. The dimensions are those of
        ``kept``.
    """
    ratio: Any = 0.0
    scores: Any = None
    for _, site in drawn_sites(student):
        fn, _ = unmask(site["fn"], None)
        ratio = ratio + summed(fn.log_prob(site["value"]), kept)
    for _, site in drawn_sites(drawn):
        fn, _ = unmask(site["fn"], None)
        log_prob = summed(fn.log_prob(site["value"]), kept)
        is_bit = not site["value"].requires_grad
        if is_bit and log_prob.requires_grad:
            scores = log_prob if scores is None else scores + log_prob
        ratio = ratio - (log_prob.detach() if is_bit and not trains_bits else log_prob)
    return ratio, scores
