"""How tests run the losses: both of them, with one particle, with several in a loop, and with several at once."""

import pytest

from pyro_kd import LocalKD
from tests.support.losses import SurrogateKD

both = pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
particles = pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}],
    ids=["one", "loop", "vectorized"],
)
