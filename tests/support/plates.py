"""How tests of plates run the two losses."""

import pytest

from pyro_kd import LocalKD, SurrogateKD

both = pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])


particles = pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}],
    ids=["one", "loop", "vectorized"],
)
