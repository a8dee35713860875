r"""A lower confidence limit of the KL between two programs, from samples of their targets. Knows samples, and no programs.

.. math:: KL(p \| q) \ge E_p[f] - E_q[e^f] + 1 \quad \text{for every function } f

A classifier finds f on one half of the samples. The bound is evaluated on the other half, where f is a fixed and bounded function,
so that the mean has a confidence interval whatever the classifier is worth.

Source: Nguyen, Wainwright and Jordan, Estimating Divergence Functionals and the Likelihood Ratio by Convex Risk Minimization, IEEE
Transactions on Information Theory 56, 2010. How far such bounds reach: McAllester and Stratos, AISTATS 2020.
"""

import copy
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_kd.metrics.density_ratio import Classifier, default_classifier
from pyro_kd.utils.estimate import Estimate

__all__ = ["FEWEST_ROWS", "LowerBound", "nwj_bound"]

FEWEST_ROWS = 200
"""From fewer rows of each program no limit is computed: the normal interval would not hold."""

_ROWS_PER_CELL = 20
_MOST_CROSSED = 10
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
        seed: of the halves. Torch's random state is not used.

    The function is clipped to :math:`|f| \le \log(m) / 2` for m held-out rows, so that no single row decides. A KL above that is
    not seen.

    Raises:
        ModuleNotFoundError: scikit-learn is needed and not installed.
    """
    n = len(x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    train, held = order[: n // 2], order[n // 2 :]
    x, y = (sample.detach().cpu().double() for sample in (x, y))
    scores = _scores(x[train], y[train], torch.cat([x[held], y[held], y[train]]), classifier)
    most = math.log(len(held)) / 2
    scores = scores.clamp(-most, most)
    on_p, on_q, trained_on_q = scores.split([len(held), len(held), len(train)])
    shift = trained_on_q.exp().mean().log()  # makes E_q[e^f] about 1, where the bound is tightest
    values = (on_p - shift) - (on_q - shift).exp() + 1
    estimate = Estimate.of(values)
    limit = estimate.mean - NormalDist().inv_cdf(confidence) * estimate.standard_error
    return LowerBound(estimate, max(limit, 0.0))


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
    if joint.shape[1] <= _MOST_CROSSED and few >= _FEWEST_VALUES:
        return default_classifier(joint.shape[1])
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the lower bound needs scikit-learn: pip install scikit-learn, or pyro-kd[metrics]. Or pass a classifier with fit "
            "and predict_proba"
        ) from error
    return HistGradientBoostingClassifier(max_iter=60, learning_rate=0.1, max_leaf_nodes=15, random_state=0)
