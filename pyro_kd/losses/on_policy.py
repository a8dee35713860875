r"""Distillation on the student's own history: targets that the student draws, and the teacher scores."""

from typing import Any

from pyro_kd.losses.surrogate import SurrogateKD
from pyro_kd.losses.targets import Targets, Weight

__all__ = ["OnPolicyKD"]


class OnPolicyKD(SurrogateKD):
    r"""Surrogate distillation on targets that the student draws itself. It bounds no KL.

    In a long sequence, a student that was trained on the teacher's history :math:`y_{<j}` meets histories of its own making when it
    generates: exposure bias. Here the student first draws targets y' on the shared noise, without gradients. Then both programs are
    given the history :math:`\tilde y`: for each target and row it is y' with the probability :math:`\mu` (``student_fraction``), and
    the teacher's draw y otherwise:

    .. math::
        L = E_{\epsilon, \tilde y} \sum_j d\big(p_\phi(y_j | \epsilon_{\le j}, \tilde y_{<j}, x),
            p_\theta(y_j | \epsilon_{\le j}, \tilde y_{<j}, x)\big) + \text{latent terms}

    No gradient passes through the history. Its law depends on the student, so for :math:`\mu > 0` the loss is no bound of
    :math:`KL(p_\phi(y|x) \| p_\theta(y|x))`; at 0 it is :class:`~pyro_kd.losses.surrogate.SurrogateKD`. A step runs each program
    twice.

    Args:
        targets: as for :class:`~pyro_kd.losses.surrogate.SurrogateKD`.
        student_fraction: :math:`\mu`: a number, a mapping by target name, or a function of the target's name.
        **options: as for :class:`~pyro_kd.losses.surrogate.SurrogateKD`, teacher forcing of the latents included.

    References:
        Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist and Bachem, On-Policy Distillation of Language Models: Learning from
        Self-Generated Mistakes, ICLR 2024, arXiv:2306.13649, where the coin is tossed once for a sequence.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import OnPolicyKD, SurrogateKD
        >>> def walk(drift):
        ...     y = torch.zeros(1000)
        ...     with pyro.plate("rows", 1000):
        ...         for step in range(3):
        ...             y = pyro.sample(f"y_{step}", dist.Normal(y.abs() + drift, 1.0))
        >>> student, teacher, targets = lambda: walk(0.5), lambda: walk(0.0), ["y_0", "y_1", "y_2"]
        >>> round(OnPolicyKD(targets).loss(student, teacher) / 1000, 3)  # 3 * 0.5^2 / 2, on any history
        0.375
    """

    schedulable = (*SurrogateKD.schedulable, "student_fraction")

    def __init__(self, targets: Targets = None, *, student_fraction: Weight = 1.0, **options: Any) -> None:
        super().__init__(targets, **options)
        self.student_fraction = student_fraction

    def refuses_draws(self, *, stored: bool) -> str:
        """The teacher's distributions depend on the student."""
        return "the teacher runs on histories that the student draws in each step"
