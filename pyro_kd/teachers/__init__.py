"""Teachers that are not one program: a posterior predictive, stored draws, and several teachers at once."""

from pyro_kd.teachers.index import UniformIndex
from pyro_kd.teachers.mixture import mixture_of
from pyro_kd.teachers.posterior import posterior_predictive
from pyro_kd.teachers.stored import stored_draws

__all__ = ["UniformIndex", "mixture_of", "posterior_predictive", "stored_draws"]
