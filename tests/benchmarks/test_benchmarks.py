"""The applications of tests/benchmarks: the loss written by hand is the library's, in value and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.benchmarks.applications import APPLICATIONS, Application

SMALL: dict[str, Callable[[], Application]] = {
    "helmholtz": APPLICATIONS["helmholtz"],
    "hierarchical_vae": lambda: APPLICATIONS["hierarchical_vae"](4, teacher_width=6, student_width=4, latents=3),
    "continual": lambda: APPLICATIONS["continual"](4, width=4, latents=3),
    "vrnn": lambda: APPLICATIONS["vrnn"](5, 7, teacher_width=12, teacher_recurrent=9, student_width=8, student_recurrent=6),
    "chain": lambda: APPLICATIONS["chain"](6, layers=4),
}


def test_every_application_is_here():
    assert SMALL.keys() == APPLICATIONS.keys()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SMALL)
def test_the_loss_by_hand_is_the_librarys(name):
    """Twice: the first call of a loss also checks its programs."""
    torch.manual_seed(0)
    application = SMALL[name]()
    params = dict(application.student.named_parameters())
    for seed in (1, 2):

        def run(loss: Callable[[], Tensor], seed: int = seed) -> tuple[Tensor, dict[str, Tensor]]:
            torch.manual_seed(seed)
            value = loss()
            return value, dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))

        ours, our_grads = run(application.library)
        assert ours > 0
        for param in params:
            assert our_grads[param].any() or name == "helmholtz", param  # a perceptron of width 2 may be dead
        for loss in filter(None, (application.by_hand, application.by_formulas)):
            theirs, their_grads = run(loss)
            torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=0)
            for param in params:
                torch.testing.assert_close(their_grads[param], our_grads[param], rtol=1e-8, atol=1e-11)
