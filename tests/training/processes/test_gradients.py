"""Several processes take the step that one process takes on all of their rows and noise."""

import pyro
import pytest
import torch

from tests.support.processes import in_processes
from tests.support.shared_training import ROWS, fifty_steps, one_step


@pytest.mark.parametrize("total", [None, 1000])
def test_two_processes_of_32_rows_have_the_gradient_of_one_of_64(total):
    """The losses are means over rows, by a weight of 1/rows or by the scale of a subsampled plate."""
    two = in_processes(one_step, ROWS, total)
    (_, mine, _), (_, theirs, _) = two
    assert [law for law, _ in mine] == [law for law, _ in theirs]
    assert all(one != other for (_, one), (_, other) in zip(mine, theirs, strict=True))

    def both(index, value):
        one, other = (torch.tensor(draws[index][1], dtype=value.dtype) for draws in (mine, theirs))
        if mine[index][0] == "PERMUTATION":  # the first rows count
            return torch.cat([one[:ROWS], other[:ROWS], one[2 * ROWS :]])
        return torch.cat([one, other])

    gradients, draws, loss = one_step(2 * ROWS, total, replace=lambda index, value: both(index % len(mine), value))
    assert len(draws) == len(mine)
    for found, _, average in two:
        assert found == two[0][0]
        assert average == pytest.approx(loss, rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compile", [False, {"backend": None}], ids=["eager", "captured"])
def test_students_are_equal_bit_for_bit_after_50_steps(compile):
    first, second = in_processes(fifty_steps, compile)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert all(one != other for one, other in zip(first[2], second[2], strict=True))
    pyro.clear_param_store()
