"""What a user's script changes while several processes train: they stay equal, or the run says that they do not."""

import pytest

from tests.support import changing_processes as changing
from tests.support.processes import Failure, in_processes


@pytest.mark.parametrize("name", changing.CHANGES)
def test_a_change_in_every_process_keeps_the_students_equal(name):
    (first, warned), (second, _) = in_processes(everywhere, name)
    assert first == second
    assert not any("process" in text for text in warned)


def everywhere(name):
    return changing.changed(name, everywhere=True)


def in_the_first(name):
    return changing.changed(name, everywhere=False)


def test_a_change_of_values_in_one_process_is_warned_of():
    (first, warned), (second, _) = in_processes(in_the_first, "scale")
    assert first != second
    assert "is no longer equal in all processes" in warned[0]
    assert "in_every_process = True" in warned[0]


def test_a_parameter_that_one_process_alone_trains_is_an_error():
    for found in in_processes(in_the_first, "unfreeze"):
        assert isinstance(found, Failure)
        assert found.kind == "ProcessMismatchError"


def test_buffers_are_those_of_the_first_process():
    (features, mean, warned), (others, their_mean, _) = in_processes(changing.constants, "buffer")
    assert features == others
    assert mean == their_mean == pytest.approx(0.271)
    assert not any("differs between the processes" in text for text in warned)


def test_constants_that_are_no_buffers_are_warned_of():
    (features, _, warned), (others, _, _) = in_processes(changing.constants, "attribute")
    assert features != others
    assert any("'features', which differs between the processes" in text for text in warned)


def test_all_processes_go_on_with_one_start():
    first, second = in_processes(changing.chosen)
    assert first == second
    assert first[0] == 0  # the mean of 0 and 1, of 1 and 2, of 2 and 0


def test_rows_that_the_user_has_shared_out_are_not_shared_out_again():
    assert in_processes(changing.own_rows) == [8, 8]


def test_lists_of_unequal_length_are_named():
    for found in in_processes(changing.unequal_lists):
        assert found.kind == "ProcessMismatchError"
        assert "batches: 2 in process 0, 1 in process 1" in found.text


def test_a_cache_that_one_process_writes_is_shared_out(tmp_path):
    (first, warned), (second, _) = in_processes(changing.cached, str(tmp_path / "cache"))
    assert first == second
    assert not any("process" in text for text in warned)


def test_a_student_that_is_invalid_in_one_process_at_the_end_ends_both():
    for found in in_processes(changing.invalid_at_the_end):
        assert isinstance(found, Failure)
        assert found.kind == "InvalidParameterError"


def test_a_start_whose_judge_fails_in_one_process_is_left_out_in_both():
    (first, warned), (second, _) = in_processes(changing.failing_judge)
    assert first == second
    assert any("start 2 of 3 has failed and is left out" in text for text in warned)


def test_buffers_whose_sizes_differ_are_left_alone():
    first, second = in_processes(changing.growing)
    assert first == second != 0


def test_a_buffer_of_one_size_is_that_of_the_first_process_beside_others():
    assert in_processes(changing.one_of_another_size) == [([0.0, 0.0], 2), ([0.0, 0.0], 3)]


def test_buffers_of_whole_numbers_that_differ_at_the_end_are_warned_of():
    (warned,), others = in_processes(changing.counted, True)
    assert "buffer 'module 0 (Counting).seen' is not equal in all processes" in warned
    assert others == []
    assert in_processes(changing.counted, False) == [[], []]


def test_a_loader_with_a_sampler_of_the_users_is_not_looked_into():
    assert in_processes(changing.by_name) == [{2}, {2}]
