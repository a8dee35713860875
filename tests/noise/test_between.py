"""Noise that programs draw between their sample sites: recorded, replayed and shared like that of the sites."""

import copy
import functools
import warnings
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_kd import LocalKD, bound_report, freeze, record_noise, replay_noise, site_report, to_inference_data
from pyro_kd.errors import UnsupportedDivergenceError, UnsupportedNoiseError
from pyro_kd.metrics import marginal_kl, marginal_log_prob
from pyro_kd.noise.between import ProgramTape
from pyro_kd.noise.streams import StreamWatch
from tests.support.losses import SurrogateKD
from tests.support.noisy_programs import PROGRAMS, ROWS, ByHand, Called, Net, Program, targets_of


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_programs_have_a_loss_of_exactly_0(loss, name):
    pyro.set_rng_seed(0)
    program = PROGRAMS[name]
    objective = loss(targets_of(program))
    teacher, student = freeze(program(0.3)), program(0.3)
    for _ in range(3):
        assert objective.differentiable_loss(student, teacher).item() == 0
    assert objective.loss(student, teacher) == 0
    assert loss(targets_of(program), num_particles=3).loss(student, teacher) == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_handlers_replay_a_program_bit_for_bit(name):
    pyro.set_rng_seed(0)
    program = PROGRAMS[name](0.3)
    with record_noise() as noise:
        first = poutine.trace(program).get_trace()
    again = poutine.trace(replay_noise(program, noise=noise)).get_trace()
    for site, node in first.nodes.items():
        if node["type"] == "sample":
            assert torch.equal(node["value"], again.nodes[site]["value"]), site
    if name == "Noisy":
        assert torch.equal(first.nodes["_RETURN"]["value"], again.nodes["_RETURN"]["value"])
    assert sum(map(len, noise.between.values())) > 0
    assert "noisy_programs.py" in repr(noise)


@pytest.mark.parametrize("name", ["ByHand", "Called", "Relaxed"])
def test_the_gradient_is_taken_at_fixed_noise(name):
    """Autograd against a central difference, with the teacher's noise held by the seed."""
    program = PROGRAMS[name]
    teacher = freeze(program(0.0).double())
    student = program(0.2).double()
    loss = SurrogateKD(["y"])

    def value(weight):
        pyro.set_rng_seed(5)
        student.weight.data.fill_(weight)
        return loss.differentiable_loss(student, teacher)

    value(0.2).backward()
    difference = (value(0.2 + 1e-4) - value(0.2 - 1e-4)).item() / 2e-4
    assert student.weight.grad.item() == pytest.approx(difference, rel=2e-3)


def test_training_finds_the_scale_of_hidden_noise():
    pyro.set_rng_seed(0)
    teacher, student = freeze(ByHand(0.0)), ByHand(0.7)
    loss = SurrogateKD(["y"])(student, teacher)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert student.weight.exp().item() == pytest.approx(1.0, abs=0.02)


def test_noise_that_the_teacher_begins_to_draw_later_is_shared_from_its_first_draw():
    class Late(Program):
        noisy = False

        def forward(self):
            hidden = torch.randn(ROWS) if self.noisy else torch.zeros(ROWS)
            with pyro.plate("rows", ROWS):
                pyro.sample("y", dist.Normal(self.weight + hidden, 0.5))

    student, teacher = Late(), Late()
    loss = SurrogateKD(["y"])
    assert [loss.loss(student, teacher) for _ in range(3)] == [0, 0, 0]
    student.noisy = teacher.noisy = True
    assert [loss.loss(student, teacher) for _ in range(3)] == [0, 0, 0]


def test_draws_of_different_laws_or_widths_share_what_they_can():
    def program(draw):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + draw().sum(), 1.0))

        return model

    pyro.set_rng_seed(0)
    with record_noise() as noise:
        program(lambda: torch.randn(4))()
    recorded = noise.between["z"][0].noise
    for draw in (lambda: torch.randn(3), lambda: torch.randn(6), lambda: torch.empty(4).normal_()):
        kept = []
        replay_noise(program(lambda: kept.append(draw()) or kept[0]), noise=noise)()
        width = min(len(kept[0]), 4)
        assert torch.equal(kept[0][:width], recorded[:width])


def test_sites_that_only_one_program_has_do_not_shift_the_places_of_draws():
    def teacher():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        noise = torch.randn(())
        pyro.sample("y", dist.Normal(z + noise, 1.0))

    def student(offset=0.0):
        z = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("own", dist.Normal(0.0, 1.0))
        noise = torch.randn(())
        pyro.sample("y", dist.Normal(z + noise, 1.0))

    loss = SurrogateKD(["y"], site_map={"w": "z"}, fresh=["extra", "own"])
    assert [loss.loss(student, teacher) for _ in range(3)] == [0, 0, 0]


def test_a_derivative_that_belongs_to_a_different_map_is_refused():
    class Mixed(Program):
        def forward(self):
            share = dist.Dirichlet(self.weight.exp().expand(3)).rsample()
            pyro.sample("y", dist.Normal(share.sum(), 1.0))

    with pytest.raises(UnsupportedNoiseError, match=r"test_between.py:\d+ draws from a Dirichlet"):
        SurrogateKD(["y"])(Mixed(), freeze(Mixed()))()


def test_programs_without_such_draws_run_without_a_tape(monkeypatch):
    entered, enter = [], ProgramTape.__enter__
    monkeypatch.setattr(ProgramTape, "__enter__", lambda self: entered.append(self) or enter(self))
    student, teacher = Net().eval(), freeze(Net())
    loss = SurrogateKD(["y"])
    for _ in range(5):
        loss.loss(student, teacher)
    assert len(entered) == 2  # teacher and student, in the first call


def test_the_watch_changes_no_draw_and_leaves_the_stream_where_the_tape_does():
    """One seed: the call with tapes and the one without give the same loss, and the same number afterwards."""

    def program(loc):
        def model():
            with pyro.plate("all", 20, subsample_size=8):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                b = pyro.sample("b", dist.Bernoulli(0.4))
                pyro.sample("y", dist.Gamma(1.0 + b, z.exp()))

        return model

    loss = SurrogateKD(["y"])
    programs = program(1.0), program(0.0)
    results = []
    for _ in range(3):
        pyro.set_rng_seed(3)
        results.append((loss.loss(*programs), torch.rand(()).item()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("how", ["poutine.seed", "torch.manual_seed", "fork_rng"])
def test_a_program_that_seeds_itself_draws_the_same_in_each_call(how):
    def plain(loc):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

    def seeded():
        with torch.random.fork_rng() if how == "fork_rng" else nullcontext():
            torch.manual_seed(3)
            plain(0.0)

    teacher = poutine.seed(lambda: plain(0.0), rng_seed=3) if how == "poutine.seed" else seeded
    loss = SurrogateKD(["y"], divergence=lambda p, q, value: value)
    student = functools.partial(plain, 1.0)
    assert len({loss.loss(student, teacher) for _ in range(4)}) == 1


def test_the_watch_resets_the_streams_if_something_was_drawn():
    pyro.set_rng_seed(0)
    before = torch.get_rng_state()
    with StreamWatch() as watch:
        torch.randn(3, generator=watch.generator(torch.device("cpu")))
        torch.rand(1)
    assert watch.moved
    assert torch.equal(torch.get_rng_state(), before)


def test_a_captured_loss_shares_draws_between_sites():
    pyro.set_rng_seed(0)
    for name, program in PROGRAMS.items():
        module = SurrogateKD(targets_of(program))(program(0.3), freeze(program(0.3)))
        module.compile(backend=None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [module().item() for _ in range(3)] == [0, 0, 0], name


def test_captured_draws_are_new_in_each_call():
    pyro.set_rng_seed(0)
    module = SurrogateKD(["y"])(ByHand(0.5), freeze(ByHand(0.0)))
    module.compile(backend=None)
    assert len({module().item() for _ in range(5)}) == 5


def test_svi_trains_on_shared_draws():
    pyro.set_rng_seed(0)

    def program(start):
        def model():
            hidden = pyro.param("scale", torch.tensor(start)) * torch.randn(ROWS)
            with pyro.plate("rows", ROWS):
                pyro.sample("y", dist.Normal(hidden, 0.5))

        return model

    teacher = freeze(program(1.0))
    pyro.clear_param_store()
    svi = SVI(program(2.0), teacher, pyro.optim.Adam({"lr": 0.05}), loss=SurrogateKD(["y"]))
    losses = [svi.step() for _ in range(80)]
    assert losses[-1] < 0.01 * losses[0]


def test_the_report_lists_draws_between_sites():
    report = site_report(SurrogateKD(["y"]), Called(0.0), freeze(Called(0.0)), num_samples=2)
    assert [draw.after for draw in report.between] == ["z", "z"]
    assert all(draw.sharing == "shared" for draw in report.between)
    assert "drawn between sites: " in str(report)
    assert "_standard_gamma" in str(report)
    assert report.to_dict()["between"]


def test_inference_data_draws_both_programs_on_the_same_noise():
    pyro.set_rng_seed(0)
    pair = to_inference_data(SurrogateKD(["y"]), ByHand(0.3), freeze(ByHand(0.3)), num_samples=4)
    teacher, student = (np.asarray(data["prior_predictive"]["y"]) for data in (pair.teacher, pair.student))
    assert np.array_equal(teacher, student)


def test_a_copied_loss_looks_for_draws_again():
    loss = SurrogateKD(["y"])
    teacher, student = freeze(ByHand(0.0)), ByHand(0.0)
    loss.loss(student, teacher)
    assert copy.deepcopy(loss).loss(student, teacher) == 0


def test_an_exact_likelihood_that_hidden_draws_decide_is_refused():
    """One of a program whose draws between sites have no effect, as values that Pyro's store replaces, is not."""

    def coin(bias):
        def model():
            pyro.param("unused", torch.rand(3))
            with pyro.plate("rows", ROWS):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * z + bias()))

        return model

    teacher = freeze(coin(lambda: 0.0))
    pyro.clear_param_store()
    assert marginal_kl(coin(lambda: 0.1), teacher, ["y"]).mean != 0
    noisy = coin(lambda: 0.1 * torch.rand(()))
    with pytest.raises(UnsupportedDivergenceError, match=r"rand at .*test_between.py:\d+"):
        marginal_log_prob(noisy, {"y": torch.ones(ROWS)})
    teacher = freeze(noisy)
    pyro.clear_param_store()
    report = bound_report(noisy, teacher, ["y"], num_samples=2)
    assert report.exact is None
    assert "outside of its sample sites" in report.reasons["exact"]
