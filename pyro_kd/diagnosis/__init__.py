"""Reports on a distillation: a check before training, terms by site, bounds on the KL, and draws of both programs for ArviZ."""

from pyro_kd.diagnosis.bounds import BoundReport, bound_report
from pyro_kd.diagnosis.check import check
from pyro_kd.diagnosis.check_report import CheckReport
from pyro_kd.diagnosis.inference_data import InferencePair, to_inference_data
from pyro_kd.diagnosis.reports import SiteReport, site_report

__all__ = [
    "BoundReport",
    "CheckReport",
    "InferencePair",
    "SiteReport",
    "bound_report",
    "check",
    "site_report",
    "to_inference_data",
]
