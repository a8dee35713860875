r"""Local distillation: the baseline that matches each conditional distribution on the teacher's own values."""

from collections.abc import Collection, Mapping
from typing import Any

from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.targets import Targets, Weight

__all__ = ["LocalKD"]


class LocalKD(DistillationLoss):
    r"""Local distillation loss: the student is given the teacher's latent values, not its noise.

    .. math::
        L = E_{z, y \sim p_\phi} \Big[ \sum_j d\big(p_\phi(y_j | z_{\le j}, y_{<j}, x), p_\theta(y_j | z_{\le j}, y_{<j}, x)\big)
            + \lambda \sum_i d_z\big(p_\phi(z_i | z_{<i}, y_{<i}, x), p_\theta(z_i | z_{<i}, y_{<i}, x)\big) \Big]

    With d = KL and :math:`\lambda = 1`, the default, it is by the chain rule the KL between the joint distributions of all latents
    and targets, and so also bounds :math:`KL(p_\phi(y|x) \| p_\theta(y|x))` from above. Each conditional is trained
    on inputs that the student itself will not produce, so errors may accumulate along the program. A value whose distribution has no
    term (a latent of weight 0, or a masked element) is not given: it is a function of the shared noise, as in
    :class:`~pyro_kd.losses.surrogate.SurrogateKD`, and the loss is still a bound. Neither this bound nor that of
    :class:`~pyro_kd.losses.surrogate.SurrogateKD` dominates the other.

    Args:
        targets: as for :class:`~pyro_kd.losses.surrogate.SurrogateKD`.
        latent_weight: :math:`\lambda`: a number, a mapping by site name, or a function of the site name.
        **options: see :class:`~pyro_kd.losses.base.DistillationLoss`. There is no ``discrete_gradient``: the student's latents are
            given values.

    Example:
        With z ~ N(0, 1), y ~ N(z, s^2) and a student whose mean of z is off by delta, the exact KL is
        delta^2 / (2 (1 + s^2)), the local bound delta^2 / 2, and the surrogate bound delta^2 / (2 s^2).
    """

    refused_options = ("discrete_gradient",)

    def __init__(self, targets: Targets = None, *, latent_weight: Weight = 1.0, **options: Any) -> None:
        if options.get("discrete_gradient", "cut") != "cut":
            raise ValueError(
                "LocalKD gives the student the teacher's latent values, and no gradient passes through given values: omit "
                "discrete_gradient, or use SurrogateKD."
            )
        super().__init__(targets, latent_weight=latent_weight, **options)

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """All sites of the teacher, except the fresh ones, which have no counterpart."""
        return [name for name in teacher if name not in self.fresh]
