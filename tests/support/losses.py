"""The surrogate loss with the paper's defaults, for tests of what all losses share: handlers, pairing, capture, reports.

The defaults of the package depend on the kind of the latents, and on the step of a fit. ``tests/losses/test_default_objective.py``
is about these.
"""

from typing import Any

import pyro_kd

__all__ = ["SurrogateKD"]


class SurrogateKD(pyro_kd.SurrogateKD):
    """Latents are functions of the noise, and their terms have a weight."""

    def __init__(self, targets: Any = None, *, latent_weight: Any = 0.1, teacher_forcing: Any = 0.0, **options: Any) -> None:
        super().__init__(targets, latent_weight=latent_weight, teacher_forcing=teacher_forcing, **options)
