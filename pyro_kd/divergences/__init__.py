r"""Divergences between the teacher's and the student's distribution at one site.

A :class:`Divergence` is called as ``d(p, q, value)``, with the teacher's distribution ``p``, the student's ``q`` and a draw
``value`` of the teacher's. It returns a tensor of shape ``p.batch_shape``. Only ``q`` carries gradients. A plain function
``d(p, q, value)`` can take its place in every loss. This room knows two distributions and no traces.
"""

from pyro_kd.divergences.divergence import Divergence, DivergenceFunction
from pyro_kd.divergences.kullback_leibler import cross_entropy, jensen_shannon, kl, reverse_kl
from pyro_kd.divergences.wasserstein import wasserstein2

__all__ = ["Divergence", "DivergenceFunction", "cross_entropy", "jensen_shannon", "kl", "reverse_kl", "wasserstein2"]
