r"""Runs of both programs on K samples of the noise for each row, with one value y of the targets: the teacher's under sample 1.

In an outer plate of K samples, or in a loop of K runs where a program does not broadcast. Both give every conditional distribution
:math:`p(y_j | y_{<j}, \epsilon_k)`, also where later latents and targets depend on earlier targets.
:mod:`pyro_kd.losses.multi_sample` makes a bound of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.errors import PlateMismatchError
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.program_pair import Program
from pyro_kd.losses.proposals import Proposed, in_samples, targets_for
from pyro_kd.losses.recording import Taught, record_teacher
from pyro_kd.losses.rows import check_targets
from pyro_kd.losses.targets import TargetMessenger
from pyro_kd.noise.messengers import SampleMessenger
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.sites.pairing import SitePair
from pyro_kd.sites.weighting import compared_elements
from pyro_kd.utils import guards

__all__ = ["SampledRun", "loop_run", "plate_run"]


@dataclass
class SampledRun(PairedRun):
    """A run of both programs, with several samples of the noise for each row.

    Attributes:
        scored: the pairs under all samples; ``pairs`` compares sample 1 alone.
        sample_dim: the batch dimension of the samples; None where they are the rows of the batch, or further runs.
        others: the runs of samples 2 to K, where each has its own.
        proposed: the trace of the proposal, where it has drawn the student's latents.
    """

    scored: list[SitePair] = field(default_factory=list)
    sample_dim: int | None = None
    others: list[PairedRun] = field(default_factory=list)
    proposed: Trace | None = None

    @classmethod
    def of(cls, run: PairedRun, **more: Any) -> "SampledRun":
        """A run with what is known about its samples."""
        check_targets(run)
        return cls(**(vars(run) | {"scored": run.pairs} | more))


def plate_run(
    student: Program,
    teacher: Program,
    args: Any,
    kwargs: Any,
    num_samples: int,
    dim: int,
    proposal: Program | None = None,
    **options: Any,
) -> SampledRun:
    """Run both programs in an outer plate of K samples.

    Args:
        student, teacher: the programs.
        args, kwargs: arguments of both.
        num_samples: the number K of samples.
        dim: a batch dimension on the left of all that the programs use, a negative number.
        proposal: draws the student's latents, see :class:`~pyro_kd.losses.proposals.Proposed`; None for the shared noise.
        **options: the other arguments of :func:`~pyro_kd.losses.paired_run.run_pair`.

    Raises:
        PlateMismatchError: which elements a mask hides depends on latents.
    """

    def first(name: str, tensor: Tensor, event_dim: int) -> Tensor:
        at = dim - event_dim
        return tensor.narrow(at, 0, 1).expand_as(tensor) if -at <= tensor.dim() else tensor

    sampled = partial(in_samples, num_samples=num_samples, dim=dim)
    record = partial(options.get("record", record_teacher), around=lambda finder: _SharedTargets(finder, first, first))
    if proposal is not None:
        return _proposed_run(
            Proposed(sampled(student), sampled(proposal)), sampled(teacher), args, kwargs, dim, record, options
        )
    run = run_pair(sampled(student), sampled(teacher), args, kwargs, **(options | {"record": record}))
    found = SampledRun.of(run, sample_dim=dim)
    is_first = torch.arange(num_samples).reshape(-1, *[1] * (-dim - 1)) == 0
    found.pairs = [_compared_at_first(pair, is_first.to(pair.value.device)) for pair in run.pairs]
    return found


def _proposed_run(
    student: Proposed,
    teacher: Program,
    args: Any,
    kwargs: Any,
    dim: int,
    record: Callable[..., Taught],
    options: Mapping[str, Any],
) -> SampledRun:
    """A run whose student has the latents of a proposal, which sees the targets."""

    def recorded(*call: Any) -> Taught:
        taught = record(*call)
        student.draw(targets_for(taught, options["site_map"]), args, kwargs)
        return taught

    run = run_pair(student, teacher, args, kwargs, **{**options, "record": recorded})
    student.check(run.student)
    for name, site in student.drawn.nodes.items():
        if site["type"] == "param" and name not in run.student.nodes:  # SVI trains them with the student's
            run.student.add_node(name, **site)
    found = SampledRun.of(run, sample_dim=dim, proposed=student.drawn)
    found.pairs = [pair for pair in run.pairs if pair.is_target]  # latents do not share the noise
    return found


def _compared_at_first(pair: SitePair, is_first: Tensor) -> SitePair:
    """The pair with a mask that hides all samples but the first: the others have the targets of the first."""
    mask = is_first if pair.mask is None else is_first & pair.mask
    return pair._replace(mask=mask, teacher_mask=mask)


def loop_run(student: Program, teacher: Program, args: Any, kwargs: Any, num_samples: int, **options: Any) -> SampledRun:
    """Run both programs once for each of K samples; arguments as for :func:`plate_run`."""
    run = run_pair(student, teacher, args, kwargs, **options)
    sites: Mapping[str, Any] = run.teacher.nodes

    def value(name: str, tensor: Tensor, event_dim: int) -> Tensor:
        found: Tensor = sites[name]["value"]
        return found

    def mask(name: str, tensor: Tensor, event_dim: int) -> Any:
        return compared_elements(sites[name])

    record = partial(options.get("record", record_teacher), around=lambda finder: _SharedTargets(finder, value, mask))
    others = [run_pair(student, teacher, args, kwargs, **(options | {"record": record})) for _ in range(num_samples - 1)]
    for other in others:
        other.noise = NoiseRecord()  # nothing needs it
    return SampledRun.of(run, others=others)


class _SharedTargets(SampleMessenger):
    """Replaces the values of the teacher's targets, in the elements that are compared, by those of sample 1.

    Args:
        finder: the handler that finds the targets, inside this one.
        value_of: ``f(name, value, event_dim)`` returns the values of sample 1, of the shape of ``value``.
        mask_of: likewise for the elements that are compared.
    """

    def __init__(
        self,
        finder: TargetMessenger,
        value_of: Callable[[str, Tensor, int], Tensor],
        mask_of: Callable[[str, Tensor, int], Any],
    ) -> None:
        super().__init__()
        self._finder = finder
        self._value_of, self._mask_of = value_of, mask_of

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        name, value = str(msg["name"]), msg["value"]
        if name not in self._finder.names or not isinstance(value, Tensor):
            return
        compared = compared_elements(msg)
        if compared is False:
            return
        event_dim = len(getattr(msg["fn"], "event_shape", ()))
        shared = self._value_of(name, value, event_dim)
        if isinstance(compared, Tensor):
            if not guards.equal(self._mask_of(name, compared, event_dim), compared, "the masks of all samples are equal"):
                raise PlateMismatchError(
                    f"which elements of target {name!r} a mask hides depends on latents. MultiSampleKD scores one value of the "
                    "target under several samples of the latents, so all must have one mask: make the latents that decide on it "
                    "targets."
                )
            shared = torch.where(compared, shared, value)
        msg["value"] = shared
