r"""Surrogate distillation: the method of the paper."""

from collections.abc import Collection, Mapping
from typing import Any

from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.targets import Targets, Weight

__all__ = ["SurrogateKD"]


class SurrogateKD(DistillationLoss):
    r"""Surrogate distillation loss plus weighted latent distillation loss.

    The teacher draws noise :math:`\epsilon` and the targets y. The student runs on the same noise, with the teacher's values at the
    targets, and its conditional distributions are compared with the teacher's:

    .. math::
        L = E_{\epsilon, x, y \sim p_\phi} \Big[ \sum_j d\big(p_\phi(y_j | \epsilon_{\le j}, y_{<j}, x),
            p_\theta(y_j | \epsilon_{\le j}, y_{<j}, x)\big)
            + \lambda \sum_i d_z\big(p_\phi(z_i | \epsilon_{<i}, y_{<i}, x), p_\theta(z_i | \epsilon_{<i}, y_{<i}, x)\big) \Big]

    The first sum is Eq. 4 of the paper. For d = KL it bounds :math:`KL(p_\phi(y|x) \| p_\theta(y|x))` from above
    (Proposition 3.1). The second sum is Eq. 6, and the whole is Eq. 7. No gradient passes through discrete latents, whose parameters
    are trained by the latent terms, unless ``discrete_gradient`` asks for it.

    Args:
        targets: names of the target sites, a predicate on Pyro's site dictionaries, or None for the sites that the
            teacher observes.
        latent_weight: :math:`\lambda`: a number, a mapping by site name, or a function of the site name.
        **options: see :class:`~pyro_kd.losses.base.DistillationLoss`.

    References:
        Chen, Liang, Zeng, Yao and Shao, A Unified Knowledge Distillation Framework for Deep Directed Graphical Models,
        CVPR 2023.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import SurrogateKD, freeze
        >>> def model(loc):
        ...     with pyro.plate("data", 100):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0))
        >>> def student():
        ...     model(pyro.param("loc", torch.tensor(0.0)))
        >>> pyro.clear_param_store()
        >>> loss = SurrogateKD(targets=["x"], latent_weight=0.0)
        >>> round(loss.loss(student, lambda: model(1.0)), 4)  # 100 rows, (1 - 0)^2 / 2 nats each
        50.0
    """

    def __init__(self, targets: Targets = None, *, latent_weight: Weight = 0.1, **options: Any) -> None:
        super().__init__(targets, latent_weight=latent_weight, **options)

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """The targets: latents become functions of the shared noise."""
        return targets
