r"""Distillation from a teacher that is known by its draws only: the cross-entropy."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyro_kd.divergences import cross_entropy
from pyro_kd.errors import SupportMismatchError
from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.targets import Targets, Weight
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.noise.point_masses import support_of
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.utils import guards

__all__ = ["DrawsKD"]


class DrawsKD(DistillationLoss):
    r"""Cross-entropy of the student at the teacher's draws, for a teacher without densities at its targets.

    .. math::
        L = -E_{\epsilon, y \sim p_\phi} \sum_j \log p_\theta(y_j | \epsilon_{\le j}, y_{<j}, x)

    For a student without latents this is the cross-entropy of the two laws, the KL up to a constant of the teacher:

    .. math::
        L = KL(p_\phi(y|x) \| p_\theta(y|x)) + H(p_\phi(y|x)).

    So its gradient is that of the KL. The value itself says nothing about the distance: it may be negative, since the entropy H of a
    density may be. For a student with latents L is an upper bound of that cross-entropy, by Jensen's inequality:
    :math:`-E_\epsilon \log p_\theta(y|\epsilon) \ge -\log E_\epsilon\, p_\theta(y|\epsilon)`.

    The teacher's targets may be points (``dist.Delta``, as those of :func:`~pyro_kd.stored_draws` and of a simulator), or have any
    distribution that can be sampled. Their draws must lie in the student's support. A latent of the student runs on the noise of the
    teacher's latent of that name, if there is one, and otherwise on its own noise. So no ``fresh`` is needed.

    Args:
        targets: as for :class:`~pyro_kd.SurrogateKD`.
        latent_weight: weight of the KL at latents that both programs have; by default they have no term. Discrete latents of the
            student are trained by such a term only.
        **options: see :class:`~pyro_kd.losses.base.DistillationLoss`. ``divergence`` is fixed.

    Raises:
        SupportMismatchError: in a call, a draw lies outside of the student's support.
        UnsupportedNoiseError: in a call, the teacher has no draws: the distribution at a target cannot be sampled.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import DrawsKD
        >>> def simulator(rows):
        ...     with pyro.plate("rows", rows):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Delta(z.exp()))
        >>> def student(rows):
        ...     with pyro.plate("rows", rows):
        ...         pyro.sample("y", dist.LogNormal(pyro.param("loc", torch.tensor(0.5)), 1.0))
        >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
        >>> loss = DrawsKD(["y"])(student, simulator)
        >>> loss(10_000).backward()
        >>> round(pyro.param("loc").grad.item() / 10_000, 1)  # of the KL, (0.5 - 0)^2 / 2
        0.5
    """

    refused_options = ("divergence",)

    def __init__(
        self,
        targets: Targets = None,
        *,
        latent_weight: Weight = 0.0,
        fresh: Collection[str] = "*",
        **options: Any,
    ) -> None:
        if "divergence" in options:
            raise TypeError(
                "DrawsKD takes no divergence: a teacher without densities has a cross-entropy only. For a teacher with densities use "
                "SurrogateKD(..., divergence=...)."
            )
        super().__init__(targets, latent_weight=latent_weight, divergence=cross_entropy, fresh=fresh, **options)

    def compare(self, run: PairedRun, *, report: bool, comparable: set[tuple[Any, ...]]) -> list[SiteTerm]:
        """The terms of a run. Each call checks that the draws lie in the student's support: outside of it, densities mean nothing."""
        for pair in run.pairs:
            support = support_of(pair.q) if pair.is_target else None
            if support is constraints.boolean and not pair.value.is_floating_point():
                raise SupportMismatchError(
                    f"site {pair.name!r}: the teacher's draws are {str(pair.value.dtype).removeprefix('torch.')}, and the student's "
                    f"{type(unwrapped(pair.q)).__name__} takes bits as floating-point numbers: pass draws.float()."
                )
            if support is not None and hasattr(support, "check"):
                inside = support.check(pair.value)
                if isinstance(pair.mask, Tensor):
                    inside = inside | ~pair.mask.reshape([*pair.mask.shape, *[1] * len(pair.q.event_shape)])
                if not guards.holds(inside, f"the draws of target {pair.name!r} are in the student's support"):
                    p, q = (type(unwrapped(fn)).__name__ for fn in (pair.p, pair.q))
                    raise SupportMismatchError(
                        f"site {pair.name!r}: the teacher's draw, from {p}, is outside the support of the student's {q}. Give the "
                        "student a distribution over the same values at this site."
                    )
        return super().compare(run, report=report, comparable=comparable)

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """The targets: latents become functions of the shared noise, or of their own."""
        return targets
