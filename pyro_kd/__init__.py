"""Knowledge distillation between probabilistic programs written in Pyro.

A teacher and a student are ordinary Pyro model functions. The teacher's noise is recorded and replayed through the
student, and the conditional distributions of the two are compared site by site::

    svi = SVI(student, freeze(teacher), Adam({"lr": 1e-2}), loss=SurrogateKD(targets=["x"]))
    svi.step(batch_size)

The method is that of Chen, Liang, Zeng, Yao and Shao, "A Unified Knowledge Distillation Framework for Deep Directed
Graphical Models", CVPR 2023. Imports go in one direction: errors and utils, noise, isolation, capture and divergences,
sites, teachers, losses, metrics; then training and diagnosis.
"""

from pyro_kd import datasets, divergences, errors, metrics, plots, teachers, training
from pyro_kd.diagnosis import bound_report, check, site_report, to_inference_data
from pyro_kd.errors import PyroKDError
from pyro_kd.isolation.freezing import freeze
from pyro_kd.losses import DrawsKD, LocalKD, MarginalKD, MultiSampleKD, OnPolicyKD, SiteTerm, SurrogateKD
from pyro_kd.noise.handlers import record_noise, replay_noise
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.noise.samplers import register_sampler
from pyro_kd.teachers import mixture_of, posterior_predictive, stored_draws
from pyro_kd.training import Distiller, TeacherCache, cache_teacher

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "DrawsKD",
    "LocalKD",
    "MarginalKD",
    "MultiSampleKD",
    "NoiseRecord",
    "OnPolicyKD",
    "PyroKDError",
    "SiteTerm",
    "SurrogateKD",
    "TeacherCache",
    "bound_report",
    "cache_teacher",
    "check",
    "datasets",
    "divergences",
    "errors",
    "freeze",
    "metrics",
    "mixture_of",
    "plots",
    "posterior_predictive",
    "record_noise",
    "register_sampler",
    "replay_noise",
    "site_report",
    "stored_draws",
    "teachers",
    "to_inference_data",
    "training",
]
