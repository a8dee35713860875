"""Divergences of similar sites in one stack: losses, gradients and errors are the same as without it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_kd import LocalKD, freeze
from pyro_kd.divergences import kl, reverse_kl, wasserstein2
from pyro_kd.errors import NonFiniteLossError, UnsupportedDivergenceError
from tests.support.losses import SurrogateKD

KINDS = {
    "normal": lambda mean: dist.Normal(mean, 0.5 + mean.square()).to_event(1),
    "logits": lambda mean: dist.Bernoulli(logits=mean).to_event(1),
    "probs": lambda mean: dist.Bernoulli(probs=mean.sigmoid()).to_event(1),
    "nested": lambda mean: dist.Normal(mean.unsqueeze(-1), 1.0).to_event(1).to_event(1),
    "batch": lambda mean: dist.Normal(mean.sum(-1), 1.0),
}


class Chain(nn.Module):
    """Similar sites in sequence. Those in ``masked`` count half of the rows, and all are scaled by ``scale``."""

    def __init__(self, kind, length=6, scale=1.0, masked=()):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(length))
        self.kind, self.scale, self.masked = kind, scale, masked

    def forward(self, rows=4):
        x = torch.linspace(-1, 1, 3).expand(rows, 3)
        mask = torch.arange(rows) % 2 == 0
        with pyro.plate("rows", rows), poutine.scale(scale=self.scale):
            for index, net in enumerate(self.nets):
                with poutine.mask(mask=mask if index in self.masked else True):
                    z = pyro.sample(f"z{index}", KINDS[self.kind](net(x)))
                x = x + 0.5 * z.reshape(rows, -1)
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0))


@pytest.fixture
def calls(monkeypatch):
    """The number of sites in each stack."""
    import pyro_kd.losses.stacking as stacking

    found, inner = [], stacking._stacked
    monkeypatch.setattr(stacking, "_stacked", lambda items: (found.append(len(items)), inner(items))[1])
    return found


def loss_and_grads(loss, student, teacher, seed=0):
    torch.manual_seed(seed)
    value = loss(student, teacher)(4)
    return [value.detach(), *torch.autograd.grad(value, list(student.parameters()), allow_unused=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", [kl, reverse_kl, wasserstein2])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("scale", "masked", "stacks"), [(1.0, (), [6]), (2.5, (), [6]), (1.0, (0, 5), [4])])
def test_a_stack_is_the_sum_of_its_sites(kind, divergence, reduction, scale, masked, stacks, calls, monkeypatch):
    if divergence is wasserstein2 and kind in ("logits", "probs"):
        pytest.skip("no distance of Bernoulli")
    torch.manual_seed(0)
    teacher, student = freeze(Chain(kind, scale=scale, masked=masked)), Chain(kind, scale=scale, masked=masked)
    weights = {f"z{index}": 0.1 * index for index in range(1, 6)} | {"z0": 0.7}
    loss = SurrogateKD(
        ["y"], latent_weight=weights, latent_divergence=divergence, latent_reduction=reduction, num_particles=2
    )
    stacked = loss_and_grads(loss, student, teacher)
    if kind == "batch" and divergence is kl:
        stacks = [stacks[0] + 1]  # with the target
    assert calls == 2 * stacks
    torch.manual_seed(0)
    terms = loss.terms(student, teacher, 4)
    monkeypatch.setattr("pyro_kd.losses.stacking._LEAST_SITES", 100)
    for mine, theirs in zip(stacked, loss_and_grads(loss, student, teacher), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.manual_seed(0)
    for name, term in loss.terms(student, teacher, 4).items():
        torch.testing.assert_close(terms[name].value, term.value)
        assert terms[name][:2] + terms[name][3:] == term[:2] + term[3:]


def test_sites_of_different_sizes_types_and_scales_are_not_stacked(calls):
    def program(mean):
        def run():
            for index in range(4):
                pyro.sample(f"a{index}", dist.Normal(mean.expand(2), 1.0).to_event(1))
                pyro.sample(f"b{index}", dist.Normal(mean.expand(3), 1.0).to_event(1))
                pyro.sample(f"c{index}", dist.Normal(mean.double().expand(2), torch.ones(2).double()).to_event(1))
                with poutine.scale(scale=2.0):
                    pyro.sample(f"d{index}", dist.Normal(mean.expand(2), 1.0).to_event(1))
                pyro.sample(f"e{index}", dist.Laplace(mean.expand(2), 1.0).to_event(1))
                pyro.sample(f"y{index}", dist.Normal(mean.expand(2), 1.0).to_event(1))

        return run

    targets = [f"y{index}" for index in range(4)]
    loss = LocalKD(targets, latent_weight=1.0, divergence=reverse_kl)
    value = loss.differentiable_loss(program(torch.tensor(1.0, requires_grad=True)), freeze(program(torch.tensor(0.0))))
    assert sorted(calls) == [4] * 5
    laplace = 1 + torch.tensor(-1.0).exp() - 1  # KL of Laplace distributions with the same scale at a distance of 1
    assert value.item() == pytest.approx(4 * (1 + 1.5 + 1 + 2 + 2 * float(laplace) + 1), rel=1e-5)


def test_a_nan_in_a_stack_names_its_site():
    torch.manual_seed(0)
    student = Chain("normal")
    student.nets[3].bias.data[0] = torch.nan
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLossError, match="'z3'"):
        SurrogateKD(["y"])(student, freeze(Chain("normal")))(4)


def test_a_divergence_that_is_missing_names_its_site():
    program = Chain("logits")
    with pytest.raises(UnsupportedDivergenceError, match="site 'z0': wasserstein2"):
        SurrogateKD(["y"], latent_divergence=wasserstein2)(program, freeze(Chain("logits")))(4)


def test_a_divergence_without_a_hash_works():
    class Scaled:
        __hash__ = None

        def __call__(self, p, q, value):
            return 2 * kl(p, q, value)

    student, teacher = Chain("normal"), freeze(Chain("normal"))
    losses = [SurrogateKD(["y"], latent_weight=weight, latent_divergence=d) for weight, d in ((1.0, Scaled()), (2.0, kl))]
    mine, theirs = (loss_and_grads(loss, student, teacher) for loss in losses)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two)
