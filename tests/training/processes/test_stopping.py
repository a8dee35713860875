"""A callback in one of several processes ends the fit of all of them."""

import pytest

from tests.support.processes import Failure, in_processes
from tests.support.shared_training import stopped


@pytest.mark.parametrize("asks", [0, 1])
def test_all_processes_end_together_and_resume(tmp_path, asks):
    """They learn of it in the next step. A callback that asks again at the start of a resumed fit ends that before a step."""
    for _ in range(2):
        found = in_processes(stopped, tmp_path, asks, 5, True)
        assert not any(isinstance(each, Failure) for each in found), found
        assert found[0] == found[1]
        assert found[0][:3] == (6, False, ["step-00000006"])
    first, second = in_processes(stopped, tmp_path, 2, 5, True)
    assert first == second
    assert first[0] == 20
