r"""A lower confidence limit of the KL between two programs, from samples of their targets. Knows samples, and no programs.

.. math:: KL(p \| q) \ge E_p[f] - E_q[e^f] + 1 \quad \text{for every function } f

A classifier finds f on one half of the samples, and an eighth of them bounds it. The bound is evaluated on the others, for which f is
a fixed and bounded function, so that the mean has a confidence limit whatever the classifier is worth.

Source: Nguyen, Wainwright and Jordan, Estimating Divergence Functionals and the Likelihood Ratio by Convex Risk Minimization, IEEE
Transactions on Information Theory 56, 2010. How far such bounds reach: McAllester and Stratos, AISTATS 2020.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_kd.metrics.density_ratio import Classifier, default_classifier
from pyro_kd.utils.estimate import Estimate

__all__ = ["FEWEST_ROWS", "LowerBound", "nwj_bound"]

FEWEST_ROWS = 200
"""From fewer rows of each program no limit is computed: it would say nothing."""

_ROWS_PER_CELL = 20
_MOST_SPLINED = 10
_FEWEST_VALUES = 32


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on a KL.

    Attributes:
        estimate: the bound on held-out rows, in nats, with its standard error.
        limit: its lower confidence limit, at least 0.
    """

    estimate: Estimate
    limit: float


def nwj_bound(x: Tensor, y: Tensor, *, confidence: float, classifier: Classifier | None = None, seed: int = 0) -> LowerBound:
    r"""The lower bound of Nguyen, Wainwright and Jordan on KL(p || q), and its one-sided confidence limit.

    Args:
        x: sample of p, of shape ``(n, d)``.
        y: sample of q, of the same shape. Row i may depend on row i of x, but on no other row.
        confidence: of the limit, one-sided.
        classifier: an unfitted classifier with ``fit`` and ``predict_proba``. Default: relative frequencies where there are few
            different rows; else logistic regression on splines for up to ten continuous dimensions, and boosted trees.
        seed: of the parts. Torch's random state is not used.

    The function is clipped, at the level that gives the best limit on an eighth of the rows, and at most to
    :math:`|f| \le \log(m) / 2` for m held-out rows: a KL above that is not seen. So each value :math:`f(x_i) - e^{f(y_i)} + 1` lies
    in an interval of known length R, and the limit is the empirical Bernstein bound, which holds for every sample size:

    .. math:: \text{mean} - \sqrt{2 V \log(2 / \delta) / m} - \frac{7 R \log(2 / \delta)}{3 (m - 1)}

    with the sample variance V and :math:`\delta = 1 - \text{confidence}` (Maurer and Pontil, COLT 2009, Theorem 4).

    Raises:
        ModuleNotFoundError: scikit-learn is needed and not installed.
    """
    n = len(x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    train, other, held = order.tensor_split([n // 2, n // 2 + n // 8])
    x, y = (sample.detach().cpu().double() for sample in (x, y))
    scores = _scores(x[train], y[train], torch.cat([x[held], y[held], x[other], y[other]]), classifier)
    on_p, on_q, other_p, other_q = scores.split([len(held), len(held), len(other), len(other)])
    top = math.log(len(held)) / 2
    choices = [_values(other_p, other_q, other_p, other_q, share * top) for share in _CLIPS]
    limits = [_limit(values, spread, len(held), confidence) for values, spread in choices]
    best = _CLIPS[max(range(len(_CLIPS)), key=limits.__getitem__)]
    values, spread = _values(on_p, on_q, other_p, other_q, best * top)
    return LowerBound(Estimate.of(values), max(_limit(values, spread, len(held), confidence), 0.0))


_CLIPS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
"""The levels at which the function may be clipped, as a share of the highest one."""


def _values(on_p: Tensor, on_q: Tensor, other_p: Tensor, other_q: Tensor, most: float) -> tuple[Tensor, float]:
    """The values whose mean is the bound, and the length of the interval that they lie in.

    Args:
        on_p, on_q: scores at pairs of rows.
        other_p, other_q: scores at rows of which no score is among these: f stays within their range.
        most: the level of clipping.
    """
    other = torch.cat([other_p, other_q])
    low, high = max(float(other.min()), -most), min(float(other.max()), most)
    low, high = min(low, high), max(low, high)
    shift = float(other_q.clamp(low, high).exp().mean().log())  # makes E_q[e^f] about 1, where the bound is tightest
    values = on_p.clamp(low, high) - shift - (on_q.clamp(low, high) - shift).exp() + 1
    return values, high - low + math.exp(high - shift) - math.exp(low - shift)


def _limit(values: Tensor, spread: float, size: int, confidence: float) -> float:
    """The empirical Bernstein limit of a mean of ``size`` values like these."""
    log_term = math.log(2 / (1 - confidence))
    error = math.sqrt(2 * float(values.var()) * log_term / size)
    return float(values.mean()) - error - 7 * spread * log_term / (3 * (size - 1))


def _scores(x: Tensor, y: Tensor, at: Tensor, classifier: Classifier | None) -> Tensor:
    """The log ratio of the densities behind two samples, at some rows: of shape ``(rows,)``."""
    if x.shape[1] == 0:  # targets without elements
        return torch.zeros(len(at)).double()
    if classifier is None:
        cells, index = torch.unique(torch.cat([x, y, at]), dim=0, return_inverse=True)
        if len(cells) * _ROWS_PER_CELL <= len(x):
            counts = [torch.bincount(part, minlength=len(cells)) for part in (index[: len(x)], index[len(x) : 2 * len(x)])]
            return ((counts[0] + 0.5) / (counts[1] + 0.5)).log()[index[2 * len(x) :]]
    joint = torch.cat([x, y])
    scale = joint.std(0)
    centre, scale = joint.mean(0), torch.where(scale > 0, scale, 1.0)
    fitted: Any = copy.deepcopy(_default(joint) if classifier is None else classifier)
    fitted.fit(((joint - centre) / scale).numpy(), (np.arange(2 * len(x)) < len(x)).astype(np.int64))
    found = torch.as_tensor(fitted.predict_proba(((at - centre) / scale).numpy())).double().clamp(1e-12, 1.0)
    return found[:, 1].log() - found[:, 0].log()


def _default(joint: Tensor) -> Any:
    """A classifier for samples of shape ``(n, d)``."""
    few = min(len(column.unique()) for column in joint.T)
    if joint.shape[1] <= _MOST_SPLINED and few >= _FEWEST_VALUES:
        return default_classifier(joint.shape[1])
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the lower bound needs scikit-learn: pip install scikit-learn, or pyro-kd[metrics]. Or pass a classifier with fit "
            "and predict_proba"
        ) from error
    return HistGradientBoostingClassifier(max_iter=60, learning_rate=0.1, max_leaf_nodes=15, random_state=0)
