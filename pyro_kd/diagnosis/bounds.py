"""Both bounds on the KL between two programs, and the KL itself where it can be computed.

Input: two programs and their targets. Output: :class:`BoundReport`. It shows how loose the bounds are for these programs, which
cannot be seen from a loss.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace

from pyro_kd.errors import PlateMismatchError, SupportMismatchError, UnknownTargetError, UnsupportedDivergenceError, listing
from pyro_kd.isolation.effects import undisturbed
from pyro_kd.losses import LocalKD, SurrogateKD
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.targets import Targets
from pyro_kd.metrics import Estimate, marginal_kl
from pyro_kd.noise.point_masses import is_point
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.noise.statements import is_bookkeeping, is_statement
from pyro_kd.utils.tables import format_table, html_table, plus_minus

__all__ = ["BoundReport", "bound_report"]

Program = Callable[..., Any]
MAX_STATES = 2**24
"""The exact KL is computed up to this number of joint states of all latents, times rows: tensors of 64 MiB."""

_HEADER = ["KL(teacher || student)", "nats per row"]
_TITLES = {"surrogate": "surrogate bound", "local": "local bound", "exact": "exact"}


@dataclass(frozen=True)
class BoundReport:
    """The table that :func:`bound_report` returns. Its figures are in nats per row.

    Attributes:
        surrogate: the surrogate bound on KL(teacher || student), the target terms of SurrogateKD.
        local: the local bound, the KL of the joint distributions; None where latents cannot be compared.
        exact: KL(teacher || student) of the targets; None where latents cannot be summed out.
        rows: number of rows per call: the product of the sizes of the plates that hold every site; 1 where there is none.
        reasons: why a figure is None, by the figure's name.
    """

    surrogate: Estimate
    local: Estimate | None
    exact: Estimate | None
    rows: int
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([format_table(_HEADER, self._cells()), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._cells(), self._notes())

    def _cells(self) -> list[list[str]]:
        return [[title, plus_minus(getattr(self, name))] for name, title in _TITLES.items()]

    def _notes(self) -> list[str]:
        runs = f"± standard error over {self.surrogate.num_samples} runs of {self.rows} row{'s' * (self.rows != 1)}"
        return [runs, *[f"{_TITLES[name]}: {reason}" for name, reason in self.reasons.items()]]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for ``json.dump``."""
        return asdict(self)


def bound_report(
    student: Program,
    teacher: Program,
    targets: Targets,
    *args: Any,
    num_samples: int = 20,
    site_map: Mapping[str, str] | None = None,
    fresh: Collection[str] = (),
    **kwargs: Any,
) -> BoundReport:
    r"""Compare the two bounds on :math:`KL(p_\phi(y|x) \| p_\theta(y|x))` with the exact value.

    .. math:: KL \le L_{surrogate}, \qquad KL \le L_{local}

    The surrogate bound is Proposition 3.1 of the paper, the local bound follows from the chain rule; neither dominates the other. The
    exact KL is computed where every latent of both programs is discrete (:func:`~pyro_kd.metrics.marginal_kl`).

    Args:
        student, teacher: the programs.
        targets: the teacher's names of the target sites, or, as for a loss, a predicate or None.
        *args, **kwargs: arguments of both programs.
        num_samples: number of runs; each figure is the mean over these runs.
        site_map: student's site name -> teacher's, where they differ.
        fresh: latent sites of either program without a counterpart.

    Returns:
        The report. Its ``str`` is a table. A figure that cannot be computed is None, and ``reasons`` has the reason.

    Raises:
        UnsupportedDivergenceError: a target is a point mass in both programs.
        PyroKDError: as for :class:`~pyro_kd.losses.surrogate.SurrogateKD`.

    References:
        Chen, Liang, Zeng, Yao and Shao, A Unified Knowledge Distillation Framework for Deep Directed Graphical Models,
        CVPR 2023.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd.diagnosis.bounds import bound_report
        >>> def coin(heads):
        ...     def model():
        ...         with pyro.plate("rows", 500):
        ...             z = pyro.sample("z", dist.Bernoulli(heads))
        ...             pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))
        ...     return model
        >>> pyro.set_rng_seed(0)
        >>> print(bound_report(coin(0.7), coin(0.5), ["y"]))
        KL(teacher || student)      nats per row
        ----------------------------------------
        surrogate bound          0.1703 ± 0.0021
        local bound                  0.08718 ± 0
        exact                   0.02878 ± 0.0027
        ± standard error over 20 runs of 500 rows
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    options: dict[str, Any] = {"site_map": site_map, "fresh": fresh}
    surrogate = SurrogateKD(targets, latent_weight=0.0, teacher_forcing=0.0, **options)
    with torch.no_grad(), poutine.block():
        run = run_pair(
            student, teacher, args, kwargs, targets=surrogate.targets, known=surrogate._pairs.of(student, teacher), **options
        )
    names = [pair.name for pair in run.pairs if pair.is_target]
    _require_densities(run)
    rows = _num_rows(run.teacher)
    reasons = dict[str, str]()

    def over_runs(loss: DistillationLoss) -> Estimate:
        with poutine.block():
            return Estimate.of(
                torch.tensor([loss.loss(student, teacher, *args, **kwargs) / rows for _ in range(num_samples)]).double()
            )

    bound, local, exact = over_runs(surrogate), None, None
    try:
        local = over_runs(LocalKD(targets, **options))
    except (SupportMismatchError, UnsupportedDivergenceError) as error:
        reasons["local"] = _first_line(error)
    try:
        states = max(_num_states(run.teacher, names), _num_states(run.student, names))
        if states * rows > MAX_STATES:
            raise UnsupportedDivergenceError(
                f"the latents have {states:.3g} joint states per row, too many to sum over (number of rows: {rows})"
            )
        with undisturbed(student, teacher):
            kls = [marginal_kl(student, teacher, names, *args, site_map=site_map, **kwargs).mean for _ in range(num_samples)]
        exact = Estimate.of(torch.tensor(kls).double())
    except UnknownTargetError as error:
        reasons["exact"] = f"which targets a run has depends on its draws: {_first_line(error)}"
    except (UnsupportedDivergenceError, PlateMismatchError) as error:
        reasons["exact"] = _first_line(error)
    except (RuntimeError, ValueError, IndexError) as error:
        # Both programs have just run without an error, so it is due to the dimensions added for the enumeration of latents.
        reasons["exact"] = (
            f"a program does not broadcast over dimensions on the left ({type(error).__name__}: {_first_line(error)})"
        )
    return BoundReport(bound, local, exact, rows, reasons)


def _require_densities(run: PairedRun) -> None:
    """Raise where a target is a point mass in both programs."""
    draws = [
        name
        for name, site in run.teacher.nodes.items()
        if site["type"] == "sample" and not is_point(site["fn"]) and not is_statement(site)
    ]
    for pair in run.pairs:
        if pair.is_target and is_point(pair.p) and is_point(pair.q):
            raise UnsupportedDivergenceError(
                f"target {pair.name!r} is a point mass (Delta) in both programs, so the KL is 0 or infinite. The losses compare "
                "point masses by their distance, which does not bound the KL. Use as targets the draws that the point mass is a "
                f"function of; the teacher draws {listing(draws)}."
            )


def _first_line(error: Exception) -> str:
    """The message without the shapes that Pyro adds to it."""
    return str(error).strip().split("\n")[0]


def _num_rows(trace: Trace) -> int:
    """The product of the sizes of the plates that hold every site."""
    held: list[dict[str, int]] = [
        {frame.name: frame.full_size or frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
        for site in trace.nodes.values()
        if site["type"] == "sample" and not is_bookkeeping(site)
    ]
    return prod(size for name, size in held[0].items() if all(name in plates for plates in held))


def _num_states(trace: Trace, targets: Collection[str]) -> float:
    """The number of joint states of the discrete latents. A latent that cannot be enumerated counts as one state."""
    states = 1.0
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name in targets or is_bookkeeping(site):
            continue
        fn = unwrapped(site["fn"])
        if getattr(fn, "has_enumerate_support", False):
            copies = max(torch.Size(site["fn"].event_shape).numel() // max(torch.Size(fn.event_shape).numel(), 1), 1)
            states *= float(len(fn.enumerate_support(expand=False))) ** copies
    return states
