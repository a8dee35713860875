"""The bounds hold for teacher and student of different structure, on models that can be enumerated."""

import pytest
import torch

from pyro_kd import LocalKD
from pyro_kd.metrics import marginal_log_prob
from tests.support.category_programs import ROWS, chain, one_hot
from tests.support.losses import SurrogateKD

COMPARABLE = {
    "renamed": (chain("a", "b", seed=0), chain("c", "d", seed=1), {"site_map": {"c": "a", "d": "b"}}),
    "crosswise": (chain("a", "b", seed=0), chain("b", "a", seed=1), {"site_map": {"b": "a", "a": "b"}}),
    "fewer layers": (chain("a", "b", "c", seed=2), chain("a", seed=3), {"fresh": ["b", "c"]}),
    "last layer only": (chain("a", "b", "c", seed=2), chain("c", seed=3), {"fresh": ["a", "b"]}),
    "more layers": (chain("a", seed=4), chain("a", "b", "c", seed=5), {"fresh": ["b", "c"]}),
    "nothing in common": (chain("a", "b", seed=6), chain("c", seed=7), {"fresh": ["a", "b", "c"]}),
    "one-hot student": (chain("a", "b", seed=8), chain("a", "b", seed=9, family=one_hot), {}),
    "one-hot teacher": (chain("a", "b", seed=10, family=one_hot), chain("a", "b", seed=11), {}),
    "different plate name": (chain("a", seed=12), chain("a", seed=13, plate="data"), {}),
}
OF_DIFFERENT_WIDTH = {
    "fewer categories": (chain("a", "b", seed=14, sizes=[4, 3]), chain("a", "b", seed=15, sizes=[2, 3]), {}),
    "more categories": (chain("a", "b", seed=16, sizes=[2, 3]), chain("a", "b", seed=17, sizes=[4, 3]), {}),
}


def exact_kl(*, student, teacher):
    log_q, log_p = (marginal_log_prob(program, {"y": torch.arange(3)}, 3) for program in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum().item()


def assert_bounds_the_exact_kl(loss, *, student, teacher):
    values = torch.tensor([loss.loss(student, teacher) / ROWS for _ in range(20)])
    mean, error = values.mean().item(), values.std().item() / len(values) ** 0.5
    assert error < 0.05 * mean  # the check has the power to fail
    assert mean + 5 * error >= exact_kl(student=student, teacher=teacher) > 0.01


@pytest.mark.parametrize("case", [*COMPARABLE, *OF_DIFFERENT_WIDTH])
def test_the_surrogate_bounds_the_exact_kl(case):
    teacher, student, options = (COMPARABLE | OF_DIFFERENT_WIDTH)[case]
    assert_bounds_the_exact_kl(SurrogateKD(["y"], latent_weight=0.0, **options), student=student, teacher=teacher)


@pytest.mark.parametrize("case", COMPARABLE)
def test_local_distillation_bounds_the_exact_kl(case):
    teacher, student, options = COMPARABLE[case]
    assert_bounds_the_exact_kl(LocalKD(["y"], **options), student=student, teacher=teacher)


@pytest.mark.parametrize("case", OF_DIFFERENT_WIDTH)
def test_local_distillation_bounds_the_exact_kl_if_the_wide_latent_is_fresh(case):
    teacher, student, _ = OF_DIFFERENT_WIDTH[case]
    assert_bounds_the_exact_kl(LocalKD(["y"], fresh=["a"]), student=student, teacher=teacher)
