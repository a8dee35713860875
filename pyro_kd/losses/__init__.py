"""The distillation losses, one a file. A new one subclasses :class:`DistillationLoss` and says which values it gives."""

from pyro_kd.losses.base import DistillationLoss
from pyro_kd.losses.local import LocalKD
from pyro_kd.losses.module import DistillationModule
from pyro_kd.losses.surrogate import SurrogateKD
from pyro_kd.losses.terms import SiteTerm

__all__ = ["DistillationLoss", "DistillationModule", "LocalKD", "SiteTerm", "SurrogateKD"]
