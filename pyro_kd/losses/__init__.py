"""The distillation losses, one per file.

A new loss subclasses :class:`DistillationLoss`. It overrides which values the student is given, or how the particles are combined
into one number.
"""

from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.draws import DrawsKD
from pyro_kd.losses.evaluation import Particle
from pyro_kd.losses.local import LocalKD
from pyro_kd.losses.marginal import MarginalKD
from pyro_kd.losses.module import DistillationModule
from pyro_kd.losses.multi_sample import MultiSampleKD
from pyro_kd.losses.on_policy import OnPolicyKD
from pyro_kd.losses.paired_run import PairedRun, run_pair
from pyro_kd.losses.surrogate import SurrogateKD
from pyro_kd.losses.terms import SiteTerm, SiteTerms, terms_of

__all__ = [
    "DistillationLoss",
    "DistillationModule",
    "DrawsKD",
    "LocalKD",
    "MarginalKD",
    "MultiSampleKD",
    "OnPolicyKD",
    "PairedRun",
    "Particle",
    "SiteTerm",
    "SiteTerms",
    "SurrogateKD",
    "run_pair",
    "terms_of",
]
