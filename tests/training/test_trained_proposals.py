"""A distiller trains and saves the proposal of a K-sample bound, which is no part of the student."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pyro_kd import Distiller, MultiSampleKD, freeze
from pyro_kd.metrics import marginal_kl
from tests.support.training_programs import adam

TARGET = (-2.0, 1.0)


class Coin(nn.Module):
    """A bit z, and a bit y given z."""

    def __init__(self, logits):
        super().__init__()
        self.prior, self.logits = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(logits))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior))
            pyro.sample("y", dist.Bernoulli(logits=self.logits[z.long()]))


class Encoder(nn.Module):
    """z given y."""

    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(2, 1)
        self.register_buffer("calls", torch.tensor(0))
        nn.init.zeros_(self.net.weight)

    def forward(self, values, rows):
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Bernoulli(logits=self.net(values["y"].long()).squeeze(-1)))


def coin(rows):
    """The same student without a module."""
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("prior", torch.tensor(0.2))))
        pyro.sample("y", dist.Bernoulli(logits=pyro.param("logits", torch.tensor([0.5, 0.1]))[z.long()]))


def encoder(values, rows):
    """The same proposal without a module."""
    with pyro.plate("rows", rows):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("encoder", torch.zeros(2))[values["y"].long()]))


def closing_over_a_network():
    """The same, with a network that it calls."""
    net = nn.Embedding(2, 1)
    nn.init.zeros_(net.weight)

    def proposal(values, rows):
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Bernoulli(logits=net(values["y"].long()).squeeze(-1)))

    proposal.net = net
    return proposal


PROPOSALS = {
    "a module": (Encoder, lambda made: made.net.weight),
    "a method of a module": (lambda: Encoder().forward, lambda made: made.__self__.net.weight),
    "a function of a network": (closing_over_a_network, lambda made: made.net.weight),
    "a pyro.param": (lambda: encoder, lambda made: pyro.param("encoder")),
}
STUDENTS = {"a module": lambda: Coin((0.5, 0.1)), "a function": lambda: coin}


def distiller(student, teacher, proposal, **options):
    return Distiller(student, teacher, adam, MultiSampleKD(["y"], num_samples=4, proposal=proposal), **options)


@pytest.mark.parametrize("compile", [False, {"backend": None}], ids=["eager", "captured"])
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("kind", PROPOSALS)
def test_it_trains_the_student_and_a_proposal_outside_of_it(kind, student, compile):
    teacher, student = freeze(Coin(TARGET)), STUDENTS[student]()
    make, parameter_of = PROPOSALS[kind]
    proposal = make()
    trainer = distiller(student, teacher, proposal, compile=compile)
    trainer.fit(64, steps=60, progress=False)
    assert parameter_of(proposal).detach().abs().max() > 0.1
    assert marginal_kl(student, teacher, ["y"], 2000).mean < 0.02


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(tmp_path):
    def result(steps, folder, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        student, proposal = Coin((0.5, 0.1)), Encoder()
        history = distiller(student, freeze(Coin(TARGET)), proposal).fit(
            32, steps=steps, checkpoints=folder, progress=False, **options
        )
        return [*map(torch.clone, student.parameters()), *map(torch.clone, proposal.parameters())], history.losses

    whole, losses = result(20, tmp_path / "one")
    result(8, tmp_path / "two")
    resumed, again = result(20, tmp_path / "two", resume=True)
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    assert list(again) == list(losses)


def test_what_is_saved_holds_the_proposal_and_nothing_of_the_teacher(tmp_path):
    trainer = distiller(Coin((0.5, 0.1)), Coin(TARGET), Encoder())  # a teacher that is not frozen
    trainer.fit(32, steps=2, progress=False)
    trainer.save_student(tmp_path / "all.safetensors")
    saved = {"module 0 (Coin).prior", "module 0 (Coin).logits", "module 1 (Encoder).calls", "module 2 (Embedding).weight"}
    assert set(load_file(tmp_path / "all.safetensors")) == saved


def test_the_proposal_is_in_eval_mode_in_an_evaluation():
    modes = []

    class Watched(Encoder):
        def forward(self, values, rows):
            modes.append(self.training)
            super().forward(values, rows)

    proposal = Watched()
    trainer = distiller(Coin((0.5, 0.1)), freeze(Coin(TARGET)), proposal)
    trainer.evaluate(32)
    assert not any(modes)
    assert proposal.training


def test_discovery_of_the_proposal_does_not_move_the_random_stream():
    pyro.set_rng_seed(5)
    trainer = distiller(Coin((0.5, 0.1)), freeze(Coin(TARGET)), Encoder())
    before = torch.get_rng_state()
    trainer._stepper.begin_fit(((32,), {}))
    assert torch.equal(torch.get_rng_state(), before)
