"""The table of gradients through discrete latents has a line for each gradient that a chain has, and tells biased ones from others."""

import pytest
import torch

from tests.benchmarks.discrete_gradients import CHAINS, near, row
from tests.support.coupled_chains import BITS


@pytest.mark.usefixtures("float64")
def test_a_student_near_its_teacher_has_weights_a_tenth_as_far():
    found = near(BITS)
    far, close = (torch.tensor(chain.student) - torch.tensor(chain.teacher) for chain in (BITS, found))
    assert torch.allclose(close, 0.1 * far)
    assert found.exact(torch.tensor(found.student)) < 0.2 * BITS.exact(torch.tensor(BITS.student))


@pytest.mark.usefixtures("float64")
def test_the_table_tells_a_biased_gradient_from_an_unbiased_one():
    cells = {kind: row("4 bits", BITS, kind, 0.0).split("|") for kind in ("implicit", "boundary")}
    assert float(cells["implicit"][4]) > 5 > float(cells["boundary"][4])
    assert "4 bits" in CHAINS
