"""Teachers that are not one program: a posterior predictive, stored draws, several teachers at once, and a device of their own."""

from pyro_kd.teachers.index import UniformIndex
from pyro_kd.teachers.mixture import mixture_of
from pyro_kd.teachers.on_device import on_device
from pyro_kd.teachers.posterior import posterior_predictive
from pyro_kd.teachers.stored import stored_draws

__all__ = ["UniformIndex", "mixture_of", "on_device", "posterior_predictive", "stored_draws"]
