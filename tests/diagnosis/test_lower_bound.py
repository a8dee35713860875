"""The lower limit of a KL from samples: below the exact KL as often as it says, for every kind of value and classifier."""

import math

import pytest
import torch

from pyro_kd.diagnosis.lower_bound import nwj_bound

CASES = {
    "equal": ([0.5, 0.5], [0.5, 0.5]),
    "near": ([0.5, 0.5], [0.38, 0.62]),
    "far": ([0.7, 0.2, 0.1], [0.1, 0.2, 0.7]),
    "rare": ([0.5, 0.3, 0.19, 0.01], [0.55, 0.3, 0.1495, 0.0005]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_limit_is_below_the_kl(case):
    """With a normal interval, the limit of the rare case is too high in 7 % of the samples: its value is often not seen in q."""
    p, q = map(torch.tensor, CASES[case])
    exact = float((p * (p / q).log()).sum())
    limits = []
    for seed in range(60):
        x, y = (torch.multinomial(law, 2000, replacement=True).unsqueeze(1) for law in (p, q))
        limits.append(nwj_bound(x, y, confidence=0.975, seed=seed).limit)
    assert sum(limit > exact + 1e-9 for limit in limits) <= 4  # of 60 at 2.5 %: more in 1 case of 60
    if case == "far":
        assert sum(limits) / 60 > exact / 2


def test_the_estimate_of_continuous_values_is_near_the_kl():
    torch.manual_seed(0)
    found = nwj_bound(torch.randn(10_000, 2) + 0.5, torch.randn(10_000, 2), confidence=0.975)
    assert 0.25 / 2 < found.limit <= 0.25
    assert abs(found.estimate.mean - 0.25) < 5 * found.estimate.standard_error


def test_many_columns_and_columns_with_few_values_go_to_trees():
    torch.manual_seed(0)
    x, y = torch.randn(3000, 12), torch.randn(3000, 12)
    x[:, 0] += 1
    assert 0.1 < nwj_bound(x, y, confidence=0.975).limit <= 0.5
    x, y = (torch.cat([torch.randn(3000, 1) + shift, (torch.rand(3000, 1) < 0.5).float()], 1) for shift in (1.0, 0.0))
    assert 0.1 < nwj_bound(x, y, confidence=0.975).limit <= 0.5


def test_a_useless_classifier_gives_a_limit_of_zero():
    class Useless:
        def fit(self, X, y):
            return self

        def predict_proba(self, X):
            return torch.rand(len(X), 2).numpy()

    torch.manual_seed(0)
    assert nwj_bound(torch.randn(500, 1) + 3, torch.randn(500, 1), confidence=0.975, classifier=Useless()).limit == 0.0


def test_a_kl_beyond_what_the_rows_can_show_is_cut_off():
    x, y = torch.zeros(1000, 1), torch.ones(1000, 1)
    assert 0.5 < nwj_bound(x, y, confidence=0.975).limit <= math.log(500) / 2 + 1


def test_targets_without_elements_have_no_kl():
    assert nwj_bound(torch.zeros(300, 0), torch.zeros(300, 0), confidence=0.975).limit == 0.0
