r"""Discrete draws as steps of their noise: the interval of uniform noise on which a draw has its value.

A draw by an inverse distribution function is constant on intervals of its noise u. The ends of these intervals depend on the
parameters, and have a derivative, though the draw has none. Two programs that share u draw the values z and z' together with the
probability of the overlap of their intervals. For categories, which are drawn by a race (Gumbel-max), this probability has a closed
form too.

Distributions and values only. All probabilities are float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.utils import guards
from pyro_kd.utils.autograd import with_slope

__all__ = ["Ends", "ends_of", "log_coupling", "neighbour_beyond", "ties_of"]


_LEAST = 1e-100  # instead of 0, far enough from the ends of float64 for products


class Ends(NamedTuple):
    """The ends of intervals of uniform noise, float64 tensors of the shape of the draws, differentiable in the parameters."""

    low: Tensor
    high: Tensor

    @property
    def width(self) -> Tensor:
        """The probability of the value."""
        return self.high - self.low


def ends_of(fn: Any, value: Tensor) -> Ends:
    """The interval of uniform noise on which a draw has a value.

    Args:
        fn: a Bernoulli, Binomial, Poisson or Geometric, also inside of ``to_event``, ``expand`` or ``mask``.
        value: a draw, of shape ``batch_shape + event_shape``.

    Raises:
        UnsupportedGradientError: the family is not drawn from one uniform number.

    Example:
        >>> import pyro.distributions as dist
        >>> ends = ends_of(dist.Bernoulli(torch.tensor(0.25)), torch.tensor([1.0, 0.0]))
        >>> ends.low.tolist(), ends.high.tolist()
        ([0.0, 0.25], [0.25, 1.0])
    """
    fn = unwrapped(fn)
    for family, (ends, _) in _FAMILIES.items():
        if isinstance(fn, family):
            return ends(fn, value.detach().double())
    raise UnsupportedGradientError(
        f"a {type(fn).__name__} is not drawn from one uniform number, as {', '.join(f.__name__ for f in _FAMILIES)} are"
    )


def neighbour_beyond(fn: Any, value: Tensor, *, high: Tensor) -> Tensor:
    """The value on the other side of an end of a draw's interval.

    Args:
        fn: the distribution, as for :func:`ends_of`.
        value: the draw.
        high: where to cross the upper end; the lower one elsewhere. A boolean tensor of the shape of the draw.
    """
    fn = unwrapped(fn)
    direction = next(step for family, (_, step) in _FAMILIES.items() if isinstance(fn, family))
    return value + torch.where(high, direction, -direction)


def _bernoulli(fn: Any, value: Tensor) -> Ends:
    p = fn.probs.double().expand_as(value)
    is_one = value > 0.5  # u < p
    return Ends(torch.where(is_one, 0.0, p), torch.where(is_one, p, 1.0))


def _geometric(fn: Any, value: Tensor) -> Ends:
    log = torch.log1p(-fn.probs.double())
    return Ends(((value + 1) * log).exp(), (value * log).exp())


def _poisson(fn: Any, value: Tensor) -> Ends:
    rate = fn.rate.double().expand_as(value)
    mass = (value.xlogy(rate.detach()) - rate.detach() - torch.lgamma(value + 1)).exp()
    high = with_slope(torch.special.gammaincc(value + 1, rate.detach()), -mass, rate)
    below = torch.special.gammaincc(value.clamp(min=1), rate.detach())
    below_mass = mass * value / rate.detach().clamp(min=1e-300)
    low = torch.where(value > 0, with_slope(below, -below_mass, rate), 0.0)
    return Ends(low, high)


def _binomial(fn: Any, value: Tensor) -> Ends:
    n = fn.total_count.double().expand_as(value)
    logits = fn.logits.double().expand_as(value)
    p = logits.detach().sigmoid()
    count = int(guards.number(n.max(), "the largest number of trials of a binomial")) if n.numel() else 0
    k = torch.arange(count + 1, dtype=torch.float64, device=value.device)
    # Masses of all k <= n, by the logarithm; the distribution function is their running sum.
    above = n.unsqueeze(-1) - k
    log_mass = torch.lgamma(n + 1).unsqueeze(-1) - torch.lgamma(k + 1) - torch.lgamma(above.clamp(min=0) + 1)
    log_mass = (
        log_mass
        + k * logits.detach().unsqueeze(-1)
        - n.unsqueeze(-1) * torch.nn.functional.softplus(logits.detach()).unsqueeze(-1)
    )
    mass = torch.where(above >= 0, log_mass.exp(), 0.0)
    total = mass.cumsum(-1)
    index = value.long().unsqueeze(-1)

    def end(at: Tensor) -> Tensor:
        # dF(k) / dlogit = -p (n - k) f(k)
        inside = at.clamp(0, count)
        slope = -p * (n - at.squeeze(-1)) * mass.gather(-1, inside).squeeze(-1)
        return with_slope(total.gather(-1, inside).squeeze(-1), slope, logits)

    low = torch.where(value > 0, end(index - 1), 0.0)
    high = torch.where(value < n, end(index), 1.0)
    return Ends(low, high)


_FAMILIES: dict[type, tuple[Callable[[Any, Tensor], Ends], float]] = {
    torch.distributions.Bernoulli: (_bernoulli, -1.0),
    torch.distributions.Binomial: (_binomial, 1.0),
    torch.distributions.Poisson: (_poisson, 1.0),
    torch.distributions.Geometric: (_geometric, -1.0),
}
"""Family -> its intervals, and by how much a value changes where its noise crosses the upper end."""


def log_coupling(student: Any, value: Tensor, teacher: Any, teacher_value: Tensor) -> Tensor:
    r"""The log probability that two programs draw these values from the same noise.

    For draws by inverse distribution functions, it is the logarithm of the overlap of their intervals of the noise,

    .. math:: P(z, z') = \min(F(z), F'(z')) - \max(F(z - 1), F'(z' - 1)).

    Categories are drawn by a race of exponential times, :math:`z = \arg\max_i p_i / E_i`. The teacher draws m from p and the
    student k from q together with the probability

    .. math::
        P(m, m) = \frac{1}{\sum_i \max(p_i / p_m, q_i / q_m)}, \qquad
        P(m, k) = \int_{p_k / p_m}^{q_k / q_m} \frac{dr}{\left(\sum_i \max(p_i / p_m, r\, q_i / q_k)\right)^2}

    where :math:`r = E_k / E_m`, and 0 if the interval is empty. The integrand is constant but for a linear function of r between
    the points at which the maxima change, so the integral is a finite sum.

    Args:
        student, teacher: the two distributions: both of counts or bits, or both of categories.
        value, teacher_value: their draws from the same noise, of shape ``batch_shape + event_shape``.

    Returns:
        float64 tensor, one number per draw of the family, differentiable in the student's parameters.

    Raises:
        UnsupportedGradientError: the joint probability of the families is not known.
    """
    mine, theirs = unwrapped(student), unwrapped(teacher)
    if _is_category(mine) and _is_category(theirs):
        q, p = _probabilities(mine), _probabilities(theirs).detach()
        if p.shape[-1] != q.shape[-1]:
            raise UnsupportedGradientError(f"the teacher has {p.shape[-1]} categories, and the student {q.shape[-1]}")
        drawn, teachers = _index(mine, value), _index(theirs, teacher_value)
        _check_same_shape(drawn, teachers)
        return _race(q, drawn, p, teachers).log()
    _check_same_shape(value, teacher_value)
    try:
        own, other = ends_of(student, value), ends_of(teacher, teacher_value)
    except UnsupportedGradientError as error:
        raise UnsupportedGradientError(
            f"the law of the student's draw given the teacher's, from {type(theirs).__name__}, is not known: {error}"
        ) from error
    overlap = torch.minimum(own.high, other.high.detach()) - torch.maximum(own.low, other.low.detach())
    return overlap.clamp(min=_LEAST).log()


def _check_same_shape(mine: Tensor, teachers: Tensor) -> None:
    if mine.shape != teachers.shape:
        raise UnsupportedGradientError(f"draws of shape {tuple(mine.shape)} and {tuple(teachers.shape)} have no common law")


def _is_category(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.Categorical | torch.distributions.OneHotCategorical)


def _probabilities(fn: Any) -> Tensor:
    probs: Tensor = fn.probs.double()
    return probs


def _index(fn: Any, value: Tensor) -> Tensor:
    is_one_hot = isinstance(fn, torch.distributions.OneHotCategorical)
    return (value.argmax(-1) if is_one_hot else value.long()).detach()


def ties_of(fn: Any, times: Tensor) -> Tensor:
    """The time of each category in a race at which it would tie with the first of the others; below it, the category is drawn.

    Args:
        fn: a Categorical or OneHotCategorical, also inside of ``to_event``, ``expand`` or ``mask``.
        times: the exponential times E of the race, with the categories last.

    Returns:
        float64 tensor of the shape of the times, differentiable in the probabilities.
    """
    probs = _probabilities(unwrapped(fn)).expand_as(times).clamp(min=_LEAST)
    if times.shape[-1] == 1:
        return probs * times
    arrivals = times / probs
    first, second = arrivals.topk(2, largest=False).values.split(1, -1)
    return probs * torch.where(arrivals.detach() == first.detach(), second, first)


def _race(q: Tensor, k: Tensor, p: Tensor, m: Tensor) -> Tensor:
    """The probability that the teacher draws m from p and the student k from q; q and p have the categories last."""
    q, p = (x.expand(*k.shape, x.shape[-1]) for x in (q, p))
    p_m, q_k = (x.gather(-1, i.unsqueeze(-1)).clamp(min=_LEAST) for x, i in ((p, m), (q, k)))
    a, b = p / p_m, q / q_k
    same = 1 / torch.maximum(a, b).sum(-1)
    low, high = a.gather(-1, k.unsqueeze(-1)), 1 / b.gather(-1, m.unsqueeze(-1)).clamp(min=_LEAST)
    # Between two of the points a_i / b_i, the sum of maxima is A + B r: B adds up the categories whose point lies below.
    points, order = (a / b.clamp(min=_LEAST)).sort(-1)
    a, b = a.gather(-1, order), b.gather(-1, order)
    constant = torch.nn.functional.pad(a.flip(-1).cumsum(-1).flip(-1), (0, 1))
    slope = torch.nn.functional.pad(b.cumsum(-1), (1, 0))
    points = torch.maximum(torch.minimum(points, high), low)
    left, right = torch.cat([low, points], -1), torch.cat([points, torch.maximum(high, low)], -1)
    pieces = (right - left) / ((constant + slope * left) * (constant + slope * right))
    return torch.where(k == m, same, pieces.sum(-1)).clamp(min=_LEAST)
