"""What a step costs beside a loop written by hand, and that both loops compute the same loss."""

import pytest
import torch

from models.helmholtz import HelmholtzMachine
from pyro_kd import SurrogateKD, freeze
from tests.benchmarks.helmholtz_step import loss_by_distributions, loss_by_formulas, measure


@pytest.mark.parametrize("by_hand", [loss_by_distributions, loss_by_formulas])
def test_the_hand_written_losses_are_the_librarys(by_hand):
    """On one noise: value and gradients."""
    torch.manual_seed(0)
    teacher, student = HelmholtzMachine(8), HelmholtzMachine(2)
    loss = SurrogateKD(["y1", "y2"], latent_weight=1.0)
    params = list(student.generative.parameters())
    run = next(loss._runs(student.model, freeze(teacher.model), (50,), {}))
    ours = torch.stack([term.value for term in loss._run_terms(run)]).sum()
    noise = {name: run.noise[name][0].noise for name in ("z4", "z3", "z2", "z1")}
    noise |= {pair.name: (pair.value - pair.p.loc) / pair.p.scale for pair in run.pairs if pair.is_target}
    theirs = by_hand(teacher.generative, student.generative, noise)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for mine, yours in zip(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params), strict=True):
        assert torch.allclose(mine, yours, rtol=1e-4, atol=1e-4)


@pytest.mark.xdist_group("timing")
def test_eager_costs_at_most_one_and_a_half_of_a_hand_written_loop():
    """Medians of alternating blocks; the machine may be busy, so the best of three measurements counts."""
    ratios = []
    for _ in range(3):
        ratios.append(measure(blocks=12, steps=20)["by hand, distributions"][1])
        if min(ratios) <= 1.5:
            break
    assert min(ratios) <= 1.5, ratios
