"""The exact law of the targets of discrete programs, and the KL between those of two programs.

The latents are summed out by :mod:`pyro_kd.sites.enumeration`, as in :class:`~pyro_kd.losses.marginal.MarginalKD`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_kd.losses.marginal_run import run_marginals
from pyro_kd.sites.enumeration import Enumerated, enumerated
from pyro_kd.sites.survey import survey
from pyro_kd.utils.advice import Advice, advising
from pyro_kd.utils.estimate import Estimate
from pyro_kd.utils.randomness import keeping_random_state, set_seed

__all__ = ["marginal_kl", "marginal_log_prob"]


MAX_STATES = 2**28
"""The default limit of the elements of one table: 1 GiB in single precision."""


@advising(Advice("marginal_log_prob", frozenset(("max_states",)), instead="pass values of latents in data", is_final=True))
@keeping_random_state()
def marginal_log_prob(
    program: Callable[..., Any], data: Mapping[str, Tensor], *args: Any, max_states: int = MAX_STATES, **kwargs: Any
) -> Tensor:
    r"""Exact log-likelihood :math:`\log p(y | x) = \log \sum_z p(y, z | x)` of a program with discrete latents.

    Args:
        program: a Pyro program. Given ``data``, all its latents must be discrete with a finite support. It must
            broadcast over batch dimensions on the left, as for Pyro's parallel enumeration.
        data: values of the target sites y by name, each of shape ``batch_shape + event_shape``. Sites that the program itself
            observes count as data too.
        args, kwargs: arguments x of the program.
        max_states: the largest number of elements that one table of densities may have, see
            :class:`~pyro_kd.losses.marginal.MarginalKD`.

    Returns:
        The log-likelihood of each row: a tensor with one dimension for each plate that holds all sites, so a scalar
        without such plates.

    Raises:
        UnknownTargetError: a name in ``data`` is not a sample site of the program.
        UnsupportedDivergenceError: a latent cannot be enumerated, there are too many states, the program does not broadcast, or
            the likelihood depends on draws outside of sample sites.
        PlateMismatchError: a site is subsampled or scaled, or a latent masked; the latents cannot be summed out plate by plate; or
            a site has a batch dimension without a plate.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd.metrics import marginal_log_prob
        >>> def coins():
        ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1))
        ...     pyro.sample("y", dist.Bernoulli((z.sum(-1) + 1) / 4))
        >>> marginal_log_prob(coins, {"y": torch.tensor(1.0)}).exp()
        tensor(0.5000)
    """
    wrong = [name for name, value in data.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"data[{wrong[0]!r}] is {type(data[wrong[0]]).__name__}, and must be a tensor: torch.as_tensor(...)")
    conditioned = poutine.condition(program, dict(data))

    def evaluate() -> Enumerated:
        return enumerated(conditioned, args, kwargs, nesting=plain.nesting, max_states=max_states)

    with torch.no_grad(), poutine.block():
        plain = survey(conditioned, args, kwargs, required=data, max_states=max_states)
        plain.check(evaluate)
        run = evaluate()
        return run.log_marginal(run.common_plates)


@advising(
    Advice(
        "marginal_kl",
        frozenset(("site_map", "max_states")),
        instead="use bound_report, which encloses the KL without exact marginals",
        is_final=True,
    )
)
@keeping_random_state()
def marginal_kl(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    targets: Collection[str] | str,
    *args: Any,
    site_map: Mapping[str, str] | None = None,
    max_states: int = MAX_STATES,
    seed: int | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""KL between the target laws, :math:`KL(p_\phi(y|x) \| p_\theta(y|x))`, with exact likelihoods of both programs.

    The expectation is over the rows of one run of the teacher, so more rows make the error smaller. Sites that the programs
    observe and that are not targets are inputs x and have no term.

    Args:
        student, teacher: programs whose latents can be enumerated; see :func:`marginal_log_prob`.
        targets: names of the target sites, in the teacher's naming.
        args, kwargs: arguments of both programs.
        site_map: student's site name -> teacher's, where they differ.
        max_states: as for :func:`marginal_log_prob`.
        seed: of the noise; None takes it from where the random streams stand. These are left as they were, so that two reports
            have the same noise unless they have different seeds.

    Returns:
        The estimate in nats per row, with its standard error over rows.

    Raises:
        ObservedValueError: an observed value depends on parameters or draws, or differs between the programs.
        PyroKDError: as for :class:`~pyro_kd.losses.marginal.MarginalKD`.
    """
    set_seed(seed)
    with torch.no_grad(), poutine.block():
        run = run_marginals(
            student,
            teacher,
            args,
            kwargs,
            targets=[targets] if isinstance(targets, str) else list(targets),
            site_map=site_map,
            max_states=max_states,
        )
        log_p, log_q = run.log_densities(run.targets)
    return Estimate.of((log_p - log_q).flatten().double())
