"""Noise that programs draw between their sample sites: recorded, replayed and shared like that of the sites."""

import copy
import functools
import itertools
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoIAFNormal
from torch import nn

from pyro_kd import LocalKD, SurrogateKD, bound_report, freeze, record_noise, replay_noise, site_report, to_inference_data
from pyro_kd.errors import UnsupportedDivergenceError, UnsupportedNoiseError
from pyro_kd.metrics import marginal_kl, marginal_log_prob
from pyro_kd.noise.between import ProgramTape
from pyro_kd.noise.streams import StreamWatch

ROWS = 64
QUERY = torch.linspace(-1, 1, 32).reshape(1, 1, 4, 8)
GRID = torch.linspace(-2, 2, 12).reshape(3, 4)

SEEDS = itertools.count()
OWN_GENERATOR = np.random.default_rng(0)
OWN_RANDOM = random.Random(0)

OPERATIONS = {
    "randn": lambda: torch.randn(3),
    "randn_like": lambda: torch.randn_like(GRID),
    "rand out=": lambda: torch.rand(3, out=torch.empty(0)),
    "rand of half precision": lambda: torch.rand(3, dtype=torch.float16),
    "randn of complex numbers": lambda: torch.randn(3, dtype=torch.complex64),
    "a generator of its own": lambda: torch.randn(3, generator=torch.Generator().manual_seed(next(SEEDS))),
    "randint": lambda: torch.randint(3, 9, (5,)),
    "randint_like": lambda: torch.randint_like(GRID, 3),
    "randint_like, low": lambda: torch.randint_like(GRID, 3, 8),
    "random_": lambda: torch.empty(3).random_(),
    "random_ to": lambda: torch.empty(3).random_(9),
    "random_ from": lambda: torch.empty(3, dtype=torch.int64).random_(3, 9),
    "random_ of bool": lambda: torch.empty(9, dtype=torch.bool).random_(),
    "randperm": lambda: torch.randperm(5),
    "normal of numbers": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal out=": lambda: torch.normal(torch.ones(3), 1.0, out=torch.empty(3)),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "bernoulli_": lambda: torch.empty(9).bernoulli_(torch.rand(9)),
    "multinomial": lambda: torch.multinomial(torch.ones(5), 2),
    "poisson": lambda: torch.poisson(torch.full((3,), 5.0)),
    "binomial": lambda: torch.binomial(torch.full((3,), 5.0), torch.full((3,), 0.5)),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "a distribution": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).sample(),
    "dropout": lambda: F.dropout(GRID, 0.5, True),
    "dropout, fused": lambda: torch.native_dropout(GRID, 0.5, True)[0],
    "dropout2d": lambda: F.dropout2d(torch.ones(1, 9, 3, 3), 0.5, True),
    "alpha_dropout": lambda: F.alpha_dropout(GRID, 0.5, True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(torch.ones(2, 9, 3), 0.5, True),
    "rrelu": lambda: F.rrelu(GRID, training=True),
    "rrelu_": lambda: F.rrelu_(GRID.clone(), training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(GRID),
    "attention with dropout": lambda: F.scaled_dot_product_attention(QUERY, QUERY, QUERY, dropout_p=0.3),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(torch.arange(400.0).reshape(1, 1, 20, 20), 2, output_size=9),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_replayed_bit_for_bit(name):
    pyro.set_rng_seed(0)
    draw = OPERATIONS[name]
    with ProgramTape() as recorded:
        first = draw()
    with ProgramTape() as other:
        second = draw()
    with ProgramTape(recorded.recorded()) as replayed:
        again = draw()
    assert recorded.found
    assert torch.equal(again, first)
    assert not torch.equal(second, first)
    assert [found.sharing for found in replayed.found] == ["shared"] * len(recorded.found)
    assert not replayed.left_over()
    assert all(__file__ in found.where for found in other.found)


@pytest.mark.parametrize(
    "name",
    ["dropout, fused", "rrelu", "randint_like, low", "random_ from", "rand out="],
)
def test_an_operation_keeps_its_law(name):
    """Mean of many draws on the tape against that of torch's own, within five standard errors."""
    pyro.set_rng_seed(1)
    draw = OPERATIONS[name]
    own = torch.stack([draw().double().mean() for _ in range(400)])
    with ProgramTape():
        taped = torch.stack([draw().double().mean() for _ in range(400)])
    error = ((own.var() + taped.var()) / 400).sqrt()
    assert (own.mean() - taped.mean()).abs() < 5 * error


def test_operations_that_draw_nothing_are_not_recorded():
    with ProgramTape() as tape:
        F.dropout(GRID, 0.5, False)
        F.rrelu(GRID, training=False)
        F.scaled_dot_product_attention(QUERY, QUERY, QUERY)
        torch.native_dropout(GRID, 0.5, False)
    assert not tape.found


class Program(nn.Module):
    """A program with one parameter, which is a log standard deviation, a logit or a log rate."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))


class ByHand(Program):
    def forward(self):
        hidden = 1.0 + self.weight.exp() * torch.randn(ROWS)
        with pyro.plate("rows", ROWS):
            pyro.sample("y", dist.Normal(hidden, 0.5))


class Called(Program):
    def forward(self):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(self.weight, 1.0))
            scale = dist.LogNormal(z, 0.1)()
            weight = dist.Gamma(scale, 1.0).rsample()
            pyro.sample("y", dist.Normal(z, 0.1 + weight))


class DropsOut(Program):
    def forward(self):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), self.weight.exp()).to_event(1))
            pyro.sample("y", dist.Normal(F.dropout(z, 0.3).sum(-1), 1.0))
            z = F.dropout(z, 0.3)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


class Relaxed(Program):
    def forward(self):
        with pyro.plate("rows", ROWS):
            logits = torch.stack([self.weight, -self.weight, torch.zeros(())]).expand(ROWS, 3)
            pyro.sample("y", dist.Normal(F.gumbel_softmax(logits, 0.5) @ torch.arange(3.0, dtype=logits.dtype), 0.3))


class Noisy(Program):
    """Draws before the first site, in a loop, between sites, hidden from handlers, and after the last one."""

    def forward(self):
        shift = torch.rand(())
        z = pyro.sample("z", dist.Normal(self.weight + shift, 1.0))
        for index in range(3):
            z = z + 0.1 * torch.randn(())
            z = pyro.sample(f"z{index}", dist.Normal(z, self.weight.exp()))
        with poutine.block():
            z = z + pyro.sample("hidden", dist.Laplace(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("y", dist.Normal(z + torch.poisson(torch.tensor(3.0)), 1.0))
        return torch.randn(2)


class Process(Program):
    """Pyro's Bernoulli likelihood draws the function's value by calling a distribution."""

    def __init__(self, start=0.0):
        super().__init__(start)
        self.likelihood = gp.likelihoods.Binary()

    def forward(self):
        f_loc = self.weight + torch.linspace(-1, 1, ROWS)
        with pyro.plate("rows", ROWS):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            self.likelihood(f_loc, torch.ones(ROWS), y=None)


PROGRAMS = {program.__name__: program for program in (ByHand, Called, DropsOut, Relaxed, Noisy, Process)}


def targets_of(program):
    return ["y", "x"] if program is DropsOut else ["y"]


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
    assert "between.py" in repr(noise)


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


class Net(nn.Module):
    """A decoder with dropout in its network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self):
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.net(z).squeeze(-1), 0.5))


def test_dropout_of_the_student_alone_warns_once_and_trains_on():
    student = Net()
    teacher = freeze(Net())
    loss = SurrogateKD(["y"])
    with pytest.warns(UserWarning, match=r"the student draws these .*bernoulli_ at .*test_between.py:\d+"):
        loss.differentiable_loss(student, teacher).backward()
    for _ in range(3):  # warnings are errors here
        loss.differentiable_loss(student, teacher).backward()
    assert student.net[0].weight.grad.abs().sum() > 0


def test_dropout_that_begins_later_warns_then():
    student, teacher = Net().eval(), freeze(Net())
    loss = SurrogateKD(["y"])
    for _ in range(3):
        loss.loss(student, teacher)
    student.train()
    with pytest.warns(UserWarning, match="bernoulli_"):
        _ = [loss.loss(student, teacher) for _ in range(3)]


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


def model_of(between):
    def model():
        weight = pyro.param("weight", lambda: torch.randn(()))  # an initial value is no noise of the program
        z = pyro.sample("z", dist.Normal(weight, 1.0))
        pyro.sample("y", dist.Normal(z + between(), 1.0))

    return model


@pytest.mark.parametrize(
    ("teacher", "student", "text"),
    [
        (lambda: torch.randn(()), lambda: 0.0, r"the teacher draws these .*randn at .*test_between.py:\d+"),
        (lambda: 0.0, lambda: torch.randn(()), r"the student draws these .*randn at .*test_between.py:\d+"),
        (
            lambda: torch.rand(()),
            lambda: torch.randperm(3)[0],
            "the student draws these .*randperm.*the teacher draws these .*rand",
        ),
        (lambda: np.random.randn(), lambda: np.random.randn(), "numpy.random"),
        (lambda: OWN_GENERATOR.normal(), lambda: OWN_GENERATOR.normal(), "Generator 'OWN_GENERATOR'"),
        (lambda: 0.0, lambda: OWN_RANDOM.random(), "Random 'OWN_RANDOM'"),
        (lambda: random.random(), lambda: random.random(), "Python's random"),
    ],
)
def test_the_warning_of_unmatched_draws_names_file_and_line(teacher, student, text):
    pyro.set_rng_seed(0)
    frozen = freeze(model_of(teacher))
    loss = SurrogateKD(["y"])
    with pytest.warns(UserWarning, match=text) as caught:
        _ = [loss.loss(model_of(student), frozen) for _ in range(2)]
    assert len(caught) == 1


def test_the_initial_value_of_a_parameter_is_not_noise():
    frozen = freeze(model_of(lambda: 0.0))
    SurrogateKD(["y"]).loss(model_of(lambda: 0.0), frozen)  # the student's parameter is made in this call


def test_the_set_up_of_a_flow_guide_is_not_noise():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    teacher, student = AutoIAFNormal(model), AutoIAFNormal(model)
    teacher()
    SurrogateKD(["z"]).loss(student, freeze(teacher))  # the student's networks are made in this call


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
