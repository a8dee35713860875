"""Measures of how close two programs, or two samples, are. Each docstring states the cost."""

from pyro_kd.metrics.components import PrincipalComponents
from pyro_kd.metrics.counts import count_kl, histogram_kl
from pyro_kd.metrics.density_ratio import Classifier, KLEstimate, density_ratio_kl
from pyro_kd.metrics.frechet import fid, frechet_distance
from pyro_kd.metrics.kernels import gaussian, laplacian, rational_quadratic
from pyro_kd.metrics.marginals import marginal_kl, marginal_log_prob
from pyro_kd.metrics.transport import emd
from pyro_kd.metrics.two_sample import mmd, nearest_neighbour_accuracy
from pyro_kd.utils.estimate import Estimate

__all__ = [
    "Classifier",
    "Estimate",
    "KLEstimate",
    "PrincipalComponents",
    "count_kl",
    "density_ratio_kl",
    "emd",
    "fid",
    "frechet_distance",
    "gaussian",
    "histogram_kl",
    "laplacian",
    "marginal_kl",
    "marginal_log_prob",
    "mmd",
    "nearest_neighbour_accuracy",
    "rational_quadratic",
]
