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

    **Teacher forcing.** With ``teacher_forcing`` :math:`\rho > 0`, a coin is tossed for each latent site and row, where a row is an
    element of the site's batch shape. With probability :math:`\rho` the student is given the teacher's value there, as in
    :class:`~pyro_kd.losses.local.LocalKD`, and the term has the weight ``given_weight``. Otherwise the value is a function of the
    noise, and the term has the weight :math:`\lambda`. Given values count as targets. So for d = KL at latents too, summed over their
    events, and ``given_weight`` of at least 1, the loss is a bound for every :math:`\rho`. At 0 it is the paper's loss, at 1 it is
    local distillation. A schedule from 1 to 0 first trains each conditional on its own, and then all together:
    ``Distiller(..., teacher_forcing=linear(1.0, 0.0, 1000))``. A latent that would then have no gradient and no term stays given.

    **The default**, ``teacher_forcing=None``, is what docs/objectives.md advises. A latent without a derivative in one of the
    programs, such as a count, is given, since no gradient would pass through it. Any other latent is given in the first quarter of
    the steps of a :class:`~pyro_kd.Distiller`'s first ``fit``, and is a function of the noise after that, and wherever there is no
    ``fit``. The paper's loss is ``SurrogateKD(targets, latent_weight=0.1, teacher_forcing=0.0)``.

    Args:
        targets: names of the target sites, a predicate on Pyro's site dictionaries, or None for the sites that the
            teacher observes.
        latent_weight: :math:`\lambda`: a number, a mapping by site name, or a function of the site name.
        teacher_forcing: :math:`\rho`, the probability with which the student is given the teacher's value of a latent: a number, a
            mapping by site name, or a function of the site name. None for the default described above.
        given_weight: weight of the terms of given latents: likewise. A latent of weight 0 is not given.
        **options: see :class:`~pyro_kd.losses.base.DistillationLoss`.

    References:
        Chen, Liang, Zeng, Yao and Shao, A Unified Knowledge Distillation Framework for Deep Directed Graphical Models,
        CVPR 2023. Teacher forcing with a schedule: Bengio, Vinyals, Jaitly and Shazeer, Scheduled Sampling for Sequence Prediction
        with Recurrent Neural Networks, NeurIPS 2015.

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

    teacher_forcing: Weight | None = None
    schedulable: tuple[str, ...] = ("latent_weight", "teacher_forcing")
    given_weight: Weight | None = 1.0

    def __init__(
        self,
        targets: Targets = None,
        *,
        latent_weight: Weight = 0.0,
        teacher_forcing: Weight | None = None,
        given_weight: Weight = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(targets, latent_weight=latent_weight, **options)
        if self.latent_form != "conditional" and isinstance(latent_weight, float | int) and latent_weight == 0:
            raise ValueError(
                f"latent_form={self.latent_form!r:.60} is about the latent terms, whose weight is 0: give latent_weight, such as 0.1"
            )
        self.teacher_forcing = teacher_forcing
        self.given_weight = given_weight

    def given_sites(self, teacher: Mapping[str, Any], targets: Collection[str]) -> Collection[str]:
        """The targets: latents become functions of the shared noise."""
        return targets
