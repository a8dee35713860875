"""Guards are plain reads outside of a capture, and ask a watcher inside of one."""

import pytest
import torch

from pyro_kd.utils import guards


class Notes:
    """A watcher that notes names, and gives answers of its own."""

    def __init__(self, answer=None):
        self.names, self.given = [], answer

    def answer(self, name, read, *tensors):
        self.names.append(name)
        return read(*tensors) if self.given is None else self.given


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize(
    ("read", "expected", "is_read"),
    [
        (lambda: guards.holds(torch.tensor([True, True]), "q"), True, True),
        (lambda: guards.holds(torch.tensor([True, False]), "q"), False, True),
        (lambda: guards.holds(True, "q"), True, False),
        (lambda: guards.number(torch.tensor(3), "q"), 3.0, True),
        (lambda: guards.equal(torch.ones(2), torch.ones(2), "q"), True, True),
        (lambda: guards.equal(torch.ones(2), torch.zeros(2), "q"), False, True),
        (lambda: guards.equal(torch.ones(2), torch.ones(3), "q"), False, False),
        (lambda: guards.equal(torch.ones(2), 1.0, "q"), True, True),
        (lambda: guards.equal(torch.ones(2), None, "q"), False, False),
        (lambda: guards.equal(1.0, 1.0, "q"), True, False),
        (lambda: guards.equal(1, 2, "q"), False, False),
        (lambda: guards.equal(None, None, "q"), True, False),
    ],
)
def test_a_guard_gives_the_true_answer_and_names_each_read(read, expected, is_read, is_watched):
    notes = Notes()
    if not is_watched:
        assert read() == expected
        return
    with guards.watched_by(notes):
        assert read() == expected
    assert notes.names == (["q"] if is_read else [])


def test_one_object_equals_itself_without_a_read():
    value, notes = torch.ones(2), Notes()
    with guards.watched_by(notes):
        assert guards.equal(value, value, "q")
    assert notes.names == []


def test_a_watcher_decides_the_answer():
    with guards.watched_by(Notes(answer=False)):
        assert not guards.holds(torch.tensor(True), "q")


def test_the_innermost_watcher_is_asked_and_leaves_after_an_error():
    outer, inner = Notes(), Notes()
    with guards.watched_by(outer):
        with pytest.raises(ZeroDivisionError), guards.watched_by(inner):
            guards.holds(torch.tensor(True), "inner")
            raise ZeroDivisionError
        guards.holds(torch.tensor(True), "outer")
        assert guards.is_active()
    assert (outer.names, inner.names) == (["outer"], ["inner"])
    assert not guards.is_active()
