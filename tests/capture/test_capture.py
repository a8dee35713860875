"""A captured loss is the eager one: the same numbers on the same noise, whatever changes from call to call.

``backend=None`` runs the graph as it was traced, bit for bit; what torch's compiler makes of it is for the last tests.
"""

import logging
import math
import random
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from models.bottleneck import Bottleneck
from models.chains import BinomialChain, BinomialStudent, NormalChain, NormalStudent
from models.conditional_vae import ConditionalVAE
from models.helmholtz import HelmholtzMachine
from models.hierarchical_vae import HierarchicalVAE
from models.vae import VAE
from models.vrnn import VRNN
from pyro_kd import Distiller, LocalKD, SurrogateKD, freeze
from pyro_kd.capture.passes.sequences import shorten
from pyro_kd.errors import NonFiniteLossError, PlateMismatchError
from pyro_kd.training import CompiledELBO, Objective, Trainer, linear
from tests.integration.test_programs import MODULES, NAMES, parameters_of_student

READ_VALUES = ("attend_infer_repeat", "discrete_hmm", "neural_topics", "spline_flow")
"""Programs whose path, or whose shapes, depend on drawn or given values."""

SLOW = {  # to trace, since they have many sites or operations; what LocalKD adds to SurrogateKD there can wait
    *(
        "capture_recapture",
        "coins",
        "deep_exponential_family",
        "deep_markov",
        "dirichlet_process",
        "epidemic",
        "gaussian_hmm",
    ),
    *("lda", "mixed_hmm", "state_space", "switching_dynamics"),
}


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:these are drawn outside of sample sites by a generator"),
    # of Pyro's sparse Gaussian processes
    pytest.mark.filterwarnings("ignore:pyro.factor 'trace_term' has no part in the loss"),
]


@pytest.fixture
def num_graphs(caplog):
    """How many graphs were made so far, as the log has it."""
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    return lambda: sum(bool(re.search(r": graph \d+, of \d+ operations", message)) for message in caplog.messages)


class Net(nn.Module):
    """inputs -> z -> x, with what modules have: batch norm, dropout, buffers. Counts its runs."""

    def __init__(self, seed, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 2, bias=False)  # a bias before batch norm has rounding for a gradient
        self.norm, self.dropout = nn.BatchNorm1d(2), nn.Dropout(dropout)
        self.last = nn.Linear(2, 1)
        self.runs = 0
        self.double()

    def forward(self, inputs):
        self.runs += 1
        with pyro.plate("rows", len(inputs)):
            z = pyro.sample("z", dist.Normal(self.dropout(self.norm(self.first(inputs))), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.last(z).squeeze(-1), 0.5))


class Registered(Net):
    """The same, in Pyro's parameter store."""

    def forward(self, inputs):
        pyro.module("net", self)
        return super().forward(inputs)


class Pair:
    """A student and a teacher, with their loss twice: eager and captured."""

    def __init__(self, student=None, teacher=None, loss=None, **options):
        self.student = Net(1) if student is None else student
        self.teacher = freeze(Net(0)) if teacher is None else teacher
        loss = SurrogateKD(["x"]) if loss is None else loss
        self.eager, self.captured = loss(self.student, self.teacher), loss(self.student, self.teacher)
        self.captured.compile(backend=None, **options)

    def agree(self, *args):
        """Assert equal losses and gradients. Returns them."""
        captured = outcome(self.captured, *args)
        assert_close(captured, outcome(self.eager, *args))
        return captured


def outcome(module, *args, seed=3):
    """The loss, and the gradient of each of the student's parameters."""
    torch.manual_seed(seed)
    module.zero_grad()
    loss = module(*args)
    loss.backward()
    return [loss.detach(), *(None if p.grad is None else p.grad.clone() for p in module.parameters())]


def rows(seed=0, number=5):
    return torch.randn(number, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def differ(mine, yours):
    return not torch.allclose(mine[0], yours[0], rtol=1e-4)


# Every program and every model.


def measured(loss, program, params):
    """The loss, the gradients, and the next number of the random stream."""
    pyro.set_rng_seed(3)
    for param in params.values():
        param.grad = None
    value = loss.loss_and_grads(program.student, program.teacher, *program.args)
    grads = {name: None if param.grad is None else param.grad.clone() for name, param in params.items()}
    return torch.tensor(value), grads, torch.rand(())


def cases(names_of_slow=()):
    return [
        pytest.param(module.program, id=name, marks=[pytest.mark.slow] if name in names_of_slow else [])
        for module, name in zip(MODULES, NAMES, strict=True)
        if name not in READ_VALUES
    ]


def check_program(make, kind, num_graphs):
    program = make()
    params = parameters_of_student(program)
    eager, captured = kind(**program.options), kind(**program.options).compile(backend=None)
    for _ in range(2):
        assert_close(measured(captured, program, params), measured(eager, program, params))
    assert num_graphs() == 1


def test_answers_belong_to_the_reads_of_one_run(num_graphs):
    """The permutations of two flows are read at one place in the code: by the teacher once more in the first run."""
    from tests.programs import flow_prior

    torch.manual_seed(0)  # the two differ
    check_program(flow_prior.program, SurrogateKD, num_graphs)


@pytest.mark.parametrize("make", cases())
def test_every_program_with_surrogate_kd(make, num_graphs):
    check_program(make, SurrogateKD, num_graphs)


@pytest.mark.parametrize("make", cases(SLOW))
def test_every_program_with_local_kd(make, num_graphs):
    check_program(make, LocalKD, num_graphs)


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
@pytest.mark.parametrize("name", READ_VALUES)
def test_a_program_that_reads_values_stays_eager(name, kind, num_graphs):
    program = MODULES[NAMES.index(name)].program()
    params = parameters_of_student(program)
    eager, captured = kind(**program.options), kind(**program.options).compile(backend=None)
    with pytest.warns(
        UserWarning, match=rf"without a graph: (the program reads|shapes) .* at {name}\.py:\d+ \(.+\)"
    ) as caught:
        found = [measured(captured, program, params) for _ in range(2)]
    assert sum("without a graph" in str(warning.message) for warning in caught) == 1
    assert num_graphs() == 0
    for one in found:
        assert_close(one, measured(eager, program, params), rtol=0, atol=0)


def helmholtz():
    return HelmholtzMachine(3, 3).model, ["y1", "y2"], (6,)


def helmholtz_guide():
    return HelmholtzMachine(3, 3).guide, None, (6, torch.arange(6.0), torch.arange(6.0) / 2)


def hierarchical_vae():
    return HierarchicalVAE(32, 3, latents=2).model, ["x"], (3,)


def conditional_vae():
    return ConditionalVAE(32, 3, latents=2).model, ["x"], (3, 1)


def vrnn():
    is_point = lambda site: site["name"].startswith(("pen", "move"))  # noqa: E731
    return VRNN(3, 4, latents=2).model, is_point, (5, 3)


def bottleneck():
    return Bottleneck(3, latents=2, classes=4, hidden=[5]).classify, ["label"], (rows(),)


def vae():
    return VAE(6, 2, [4]).model, ["x"], (5,)


def normal_chain():
    return NormalStudent(3).model, ["y"], (5,)


def binomial_chain():
    return BinomialStudent(3, count=20).model, ["y"], (5,)


TEACHERS = {normal_chain: lambda: NormalChain(3), binomial_chain: lambda: BinomialChain(3, count=20)}


@pytest.mark.parametrize(
    "make",
    [
        helmholtz,
        helmholtz_guide,
        hierarchical_vae,
        conditional_vae,
        vrnn,
        bottleneck,
        vae,
        normal_chain,
        binomial_chain,
    ],
)
def test_every_model_trains_alike(make, num_graphs, float64):
    """Losses of four steps, then parameters and running averages."""

    def train(is_captured):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        teacher = freeze(TEACHERS[make]().model if make in TEACHERS else make()[0])
        student, targets, args = make()
        loss = (SurrogateKD(targets) if targets else LocalKD(["z1", "z3"]))(student, teacher)
        if is_captured:
            loss.compile(backend=None)
        optim = torch.optim.SGD(loss.parameters(), lr=1e-6)
        losses = []
        for _ in range(4):
            optim.zero_grad()
            value = loss(*args)
            value.backward()
            optim.step()
            losses.append(value.detach())
        return losses, loss.state_dict(), torch.rand(())

    assert_close(train(True), train(False), rtol=1e-9, atol=1e-9)
    assert num_graphs() == 1


def test_buffers_are_written_to_as_often_as_the_loss_is_called():
    pair = Pair()
    for calls in range(1, 4):
        pair.captured(rows())
        assert pair.student.norm.num_batches_tracked == calls


# Noise.


def test_noise_is_drawn_in_every_call():
    pair, x = Pair(), rows()
    assert len({pair.captured(x).item() for _ in range(6)}) == 6
    assert pair.student.runs == 3  # to set up, to look, and to trace


def test_a_seed_gives_one_sequence():
    pair, x = Pair(), rows()
    sequences = []
    for module in (pair.captured, pair.captured, pair.eager):
        torch.manual_seed(8)
        sequences.append([module(x).item() for _ in range(4)] + [torch.rand(()).item()])
    assert sequences[0] == sequences[1] == pytest.approx(sequences[2], rel=1e-6)


def test_the_first_call_is_one_as_any_other():
    pair, x = Pair(), rows()
    state = {name: value.clone() for name, value in pair.student.state_dict().items()}
    found = []
    for _ in range(2):
        pair.student.load_state_dict(state)
        torch.manual_seed(4)
        found.append((pair.captured(x).detach(), torch.rand(()), [b.clone() for b in pair.student.buffers()]))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_capturing_leaves_the_random_numbers_of_python_and_numpy_alone():
    def draw(*_):
        random.random()
        np.random.rand()

    pair, x = Pair(), rows()
    pair.student.register_forward_pre_hook(draw)
    pyro.set_rng_seed(0)
    expected = random.random(), np.random.rand()
    pyro.set_rng_seed(0)
    pair.captured(x)
    assert (random.random(), np.random.rand()) == expected


# Whatever changes between calls is seen.


def test_a_loaded_state(num_graphs):
    pair, x = Pair(), rows()
    before = pair.agree(x)
    pair.student.load_state_dict(Net(7).state_dict())
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_a_loaded_state_with_new_tensors(num_graphs):
    pair, x = Pair(), rows()
    before = pair.agree(x)
    pair.student.load_state_dict(Net(7).state_dict(), assign=True)
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_a_parameter_replaced_by_another():
    pair, x = Pair(), rows()
    before = pair.agree(x)
    pair.student.last.bias = nn.Parameter(torch.tensor([9.0], dtype=torch.float64))
    assert differ(pair.agree(x), before)


def test_steps_of_an_optimiser(num_graphs):
    pair, x = Pair(), rows()
    optim = torch.optim.Adam(pair.student.parameters(), lr=0.5)
    before = pair.agree(x)
    for _ in range(3):
        optim.step()
        after = pair.agree(x)
        assert differ(after, before)
        before = after
    assert num_graphs() == 1


def test_data_changed_in_place(num_graphs):
    pair, x = Pair(), rows()
    before = pair.agree(x)
    x[0] += 5.0
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_other_data_of_one_shape(num_graphs):
    pair = Pair()
    before = pair.agree(rows(0))
    assert differ(pair.agree(rows(1)), before)
    assert num_graphs() == 1


def test_data_in_other_strides():
    pair, x = Pair(), rows()
    before = pair.agree(x)
    assert_close(pair.agree(x.t().contiguous().t()), before)
    assert_close(pair.agree(torch.cat([x, x], 1)[:, :3]), before)


def test_other_batch_sizes(num_graphs):
    pair = Pair()
    for number in (5, 4, 5, 4):
        pair.agree(rows(0, number))
    assert num_graphs() == 2


def test_numbers_among_the_arguments_are_told_apart(num_graphs):
    def program(loc):
        def run(number, factor):
            with pyro.plate("rows", number):
                pyro.sample("x", dist.Normal(loc * (2.0 if factor is True else factor), 1.0))

        return run

    loc = torch.zeros((), requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc), program(3.0))
    captured.compile(backend=None)
    for number, factor in [(2, 1), (2, True), (2, 1.0), (2, 3.0), (4, 1)]:
        expected = number * (3.0 * (2.0 if factor is True else factor)) ** 2 / 2
        assert captured(number, factor).item() == pytest.approx(expected)
    assert num_graphs() == 5


def test_keyword_and_nested_arguments():
    def program(loc):
        def run(batch, *, scale):
            with pyro.plate("rows", 3):
                pyro.sample("x", dist.Normal(loc + batch["shift"][0], scale))

        return run

    loc = torch.zeros((), requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc), program(1.0))
    captured.compile(backend=None)
    for scale in (1.0, 0.5, 2.0):
        batch = {"shift": [torch.randn(3)], "name": "a"}
        assert captured(batch, scale=torch.tensor(scale)).item() == pytest.approx(1.5 / scale**2)


def test_another_dtype(num_graphs):
    pair = Pair()
    pair.agree(rows())
    pair.captured.float()
    assert pair.agree(rows().float())[0].dtype == torch.float32
    assert num_graphs() == 2


def test_parameters_that_are_frozen_and_thawed(num_graphs):
    pair, x = Pair(), rows()
    pair.agree(x)
    pair.student.first.requires_grad_(False)
    grads = dict(zip(dict(pair.captured.named_parameters()), pair.agree(x)[1:], strict=True))
    assert [name for name, grad in grads.items() if grad is None] == ["student.first.weight"]
    assert num_graphs() == 2
    pair.student.first.requires_grad_(True)
    assert None not in pair.agree(x)
    assert num_graphs() == 2


def test_a_buffer(num_graphs):
    pair, x = Pair(), rows()
    pair.student.eval()
    before = pair.agree(x)
    pair.student.norm.running_mean.add_(1.0)
    assert differ(pair.agree(x), before)
    pair.student.norm.running_mean = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


class Dropping(nn.Module):
    """Without latents, so that dropout is the only noise."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 8).double(), nn.Dropout(0.5)

    def forward(self, inputs):
        with pyro.plate("rows", len(inputs)):
            pyro.sample("x", dist.Normal(self.dropout(self.layer(inputs)).sum(-1), 1.0))


def test_dropout_in_train_and_eval_mode(num_graphs):
    pair, x = Pair(Dropping(), freeze(Dropping())), rows()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(6)}) == 6
    pair.student.eval()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(6)}) == 1
    pair.student.train()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(6)}) == 6
    assert num_graphs() == 2


def test_the_mode_of_a_part(num_graphs):
    pair, x = Pair(Dropping(), freeze(Dropping())), rows()
    pair.captured(x)
    pair.student.dropout.eval()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(3)}) == 1
    assert num_graphs() == 2


def test_the_weights_of_a_frozen_teacher():
    pair, x = Pair(), rows()
    before = pair.agree(x)
    for tensor in pair.teacher.tensors():
        if tensor.is_floating_point():
            tensor.add_(0.5)
    assert differ(pair.agree(x), before)


def test_another_dtype_of_a_frozen_teacher():
    def teacher(inputs, shift=torch.tensor(0.1)):  # noqa: B008
        with pyro.plate("rows", len(inputs)):
            pyro.sample("x", dist.Normal(shift, 1.0))

    pair, x = Pair(Dropping().float(), freeze(teacher)), rows().float()
    assert pair.agree(x)[0].dtype == torch.float32
    pair.teacher.to(torch.float64)
    assert pair.agree(x)[0].dtype == torch.float64


def test_the_weights_of_a_teacher_that_is_not_frozen(num_graphs):
    teacher = Net(0)
    pair, x = Pair(teacher=teacher), rows()
    before = pair.agree(x)
    teacher.load_state_dict(Net(7).state_dict())
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1
    assert all(param.grad is None for param in teacher.parameters())


def test_the_gradient_mode(num_graphs):
    pair, x = Pair(), rows()
    with torch.no_grad():
        torch.manual_seed(3)
        value = pair.captured(x)
        assert not value.requires_grad
        torch.manual_seed(3)
        assert_close(value, pair.eager(x))
    assert_close(pair.agree(x)[0], value)
    assert num_graphs() == 2


def test_the_default_dtype(float64):
    torch.set_default_dtype(torch.float32)
    student = lambda: pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(1.0)), torch.ones(())))  # noqa: E731
    loss = SurrogateKD(["x"]).compile(backend=None)
    teacher = freeze(lambda: pyro.sample("x", dist.Normal(torch.zeros(()), 1.0)))
    assert loss.differentiable_loss(student, teacher).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    assert loss.differentiable_loss(student, teacher).dtype == torch.float64


def test_there_are_no_more_graphs_than_allowed(num_graphs):
    pair = Pair(max_graphs=2)
    pair.agree(rows(0, 5))
    pair.agree(rows(0, 4))
    with pytest.warns(UserWarning, match=r"there are 2 graphs already.*max_graphs"):
        pair.agree(rows(0, 3))
    pair.agree(rows(0, 3))  # warned once
    runs = pair.student.runs
    outcome(pair.captured, rows(1, 4))
    assert pair.student.runs == runs
    assert num_graphs() == 2


def test_several_pairs_of_one_loss():
    loss, x = SurrogateKD(["x"]).compile(backend=None), rows()
    teacher = freeze(Net(0))
    students = [Net(seed) for seed in range(1, 7)]
    for _ in range(2):
        for student in students:
            assert_close(outcome(loss(student, teacher), x), outcome(SurrogateKD(["x"])(student, teacher), x))


def test_arguments_that_cannot_be_told_apart_stay_eager():
    def program(loc):
        return lambda holder: pyro.sample("x", dist.Normal(loc, holder.scale))

    class Holder:
        scale = 1.0
        __hash__ = None

    loc = torch.tensor(2.0, requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc), program(0.0))
    captured.compile(backend=None)
    with pytest.warns(UserWarning, match="neither a tensor nor hashable"):
        assert captured(Holder()).item() == pytest.approx(2.0)


# Weights and particles.


def test_a_latent_weight_that_changes(num_graphs):
    pair, x = Pair(loss=SurrogateKD(["x"], latent_weight=0.5)), rows()
    values = []
    for weight in (0.5, 0.25, 2.0, {"z": 0.75}, {"z": 3.0}):
        pair.eager.loss.latent_weight = pair.captured.loss.latent_weight = weight
        values.append(pair.agree(x)[0].item())
    assert len(set(values)) == 5
    assert num_graphs() == 2  # numbers, and mappings


def test_a_latent_weight_that_is_zero_at_times(num_graphs):
    pair, x = Pair(loss=SurrogateKD(["x"], latent_weight=0.0)), rows()
    for weight in (0.0, 1.0, 0.0, 0.5):
        pair.eager.loss.latent_weight = pair.captured.loss.latent_weight = weight
        pair.agree(x)
    assert num_graphs() == 2


def test_a_latent_weight_that_is_a_function():
    pair = Pair(loss=SurrogateKD(["x"], latent_weight=lambda name: 0.3))
    pair.agree(rows())
    pair.eager.loss.latent_weight = pair.captured.loss.latent_weight = lambda name: 0.6
    pair.agree(rows())


def test_a_divergence_that_changes():
    pair = Pair(loss=SurrogateKD(["x"]))
    before = pair.agree(rows())
    halved = lambda p, q, value: 0.5 * torch.distributions.kl_divergence(p, q)  # noqa: E731
    pair.eager.loss.divergence = pair.captured.loss.divergence = halved
    assert differ(pair.agree(rows()), before)


def test_several_particles(num_graphs):
    pair, x = Pair(loss=SurrogateKD(["x"], num_particles=3)), rows()
    pair.agree(x)
    pair.agree(x)
    assert num_graphs() == 1


def test_vectorised_particles(num_graphs):
    loss = SurrogateKD(["x"], num_particles=3, max_plate_nesting=1, vectorize_particles=True)
    student, teacher = vae()[0], freeze(vae()[0])
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None)
    for _ in range(2):
        assert_close(outcome(captured, 5), outcome(eager, 5))
    assert num_graphs() == 1


def test_particles_add_up_in_loss_and_grads():
    x, results = rows(), []
    for is_captured in (True, False):
        pyro.clear_param_store()
        loss, student, teacher = SurrogateKD(["x"], num_particles=3), Registered(1), freeze(Net(0))
        if is_captured:
            loss.compile(backend=None)
        for _ in range(2):
            pyro.set_rng_seed(5)
            student.zero_grad()
            value = loss.loss_and_grads(student, teacher, x)
        results.append([torch.tensor(value), *(param.grad for param in student.parameters())])
    assert_close(*results)


# Values that are not finite.


def raised(loss, pair, *args):
    with pytest.raises(NonFiniteLossError) as caught:
        loss.loss_and_grads(pair.student, pair.teacher, *args)
    assert all(param.grad is None for param in pair.student.parameters())
    return str(caught.value)


@pytest.mark.parametrize("where", ["data", "parameter"])
def test_nan(where):
    pair, x = Pair(Registered(1)), rows()
    eager, captured = SurrogateKD(["x"]), SurrogateKD(["x"]).compile(backend=None)
    captured.loss_and_grads(pair.student, pair.teacher, x)
    pair.student.zero_grad()
    if where == "data":
        x[0, 0] = torch.nan
    else:
        pair.student.last.bias.data.fill_(torch.nan)
    runs = pair.student.runs
    message = raised(captured, pair, x)
    assert pair.student.runs == runs
    with pyro.validation_enabled(False):  # which would find it earlier
        assert message == raised(eager, pair, x)
    assert ("'z'" if where == "data" else "'x'") in message


def test_a_gradient_that_is_not_finite():
    def student(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x + (loc - 1.0).abs().sqrt(), 1.0))

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x, 1.0))

    messages = []
    for loss in (SurrogateKD(["x"]).compile(backend=None), SurrogateKD(["x"])):
        with pytest.raises(NonFiniteLossError, match="gradient for parameter 'loc'") as caught:
            loss.loss_and_grads(student, teacher, torch.zeros(2))
        messages.append(str(caught.value))
        assert pyro.get_param_store()._params["loc"].grad is None
    assert messages[0] == messages[1]


# SVI.


def with_param():
    def student(inputs):
        weight = pyro.param("weight", torch.zeros(3))
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(inputs)):
            z = pyro.sample("z", dist.Normal((inputs * weight).sum(-1, keepdim=True).expand(-1, 2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0))

    return student


def stored():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("make", [with_param, lambda: Registered(1)], ids=["pyro.param", "pyro.module"])
def test_svi(make, num_graphs):
    teacher, results = freeze(Net(0)), []
    for loss in (SurrogateKD(["x"]).compile(backend=None), SurrogateKD(["x"])):
        pyro.clear_param_store()
        svi = SVI(make(), teacher, pyro.optim.Adam({"lr": 0.05}), loss)
        pyro.set_rng_seed(2)
        losses = [svi.step(rows(step)) for step in range(5)]
        results.append((losses, stored()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1].keys() == results[1][1].keys() != set()
    assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert num_graphs() == 1


@pytest.mark.parametrize("make", [with_param, lambda: Registered(1)], ids=["pyro.param", "pyro.module"])
def test_svi_after_the_store_was_cleared(make):
    teacher, student, results = freeze(Net(0)), make(), []
    start = student.state_dict() if isinstance(student, nn.Module) else {}
    start = {name: value.clone() for name, value in start.items()}
    for loss in (SurrogateKD(["x"]).compile(backend=None), SurrogateKD(["x"])):
        svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.05}), loss)
        for _ in range(2):
            pyro.clear_param_store()
            if start:
                student.load_state_dict(start)
            pyro.set_rng_seed(2)
            svi.step(rows())
            first = stored()
            losses = [svi.step(rows(step)) for step in range(3)]
            assert all(not torch.equal(value, first[name]) for name, value in stored().items())
            results.append((torch.tensor(losses), stored()))
    for found in results[1:]:
        assert found[1].keys() == results[0][1].keys()
    assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    assert_close(results[1], results[3], rtol=1e-4, atol=1e-5)


def test_a_store_that_was_cleared_and_filled_again():
    student = lambda: pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))  # noqa: E731
    captured = SurrogateKD(["x"])(student, freeze(lambda: pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))))
    captured.compile(backend=None)
    assert captured().item() == pytest.approx(0.5)
    pyro.clear_param_store()
    pyro.param("loc", torch.tensor(10.0))
    assert captured().item() == pytest.approx(50.0)
    state = pyro.get_param_store().get_state()
    pyro.get_param_store()["loc"] = torch.tensor(2.0)
    assert captured().item() == pytest.approx(2.0)
    pyro.get_param_store().set_state(state)
    assert captured().item() == pytest.approx(50.0)


def test_svi_evaluates_without_gradients():
    pair, x = Pair(Registered(1)), rows()
    svi = SVI(pair.student, pair.teacher, pyro.optim.Adam({"lr": 0.05}), SurrogateKD(["x"]).compile(backend=None))
    svi.step(x)
    pyro.set_rng_seed(4)
    found = svi.evaluate_loss(x)
    pyro.set_rng_seed(4)
    assert found == pytest.approx(SurrogateKD(["x"]).loss(pair.student, pair.teacher, x), rel=1e-6)


# Autograd.


def test_a_second_backward_is_refused():
    pair, x = Pair(), rows()
    loss = pair.captured(x)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="captured loss can be differentiated once"):
        loss.backward()


def test_a_weighted_sum_of_losses():
    pair, other = Pair(), Pair(teacher=freeze(Net(5)))
    other.student, x = pair.student, rows()
    grads = []
    for kind in ("captured", "eager"):
        torch.manual_seed(1)
        pair.student.zero_grad()
        one, two = getattr(pair, kind), SurrogateKD(["x"])(pair.student, other.teacher)
        if kind == "captured":
            two.compile(backend=None)
        (0.3 * one(x) + 2.0 * two(x).square()).backward()
        grads.append([param.grad.clone() for param in pair.student.parameters()])
    assert_close(*grads)


def test_gradients_add_up():
    pair, x = Pair(), rows()
    once = outcome(pair.captured, x)[1:]
    torch.manual_seed(3)
    pair.captured(x).backward()
    assert_close([param.grad for param in pair.student.parameters()], [2 * grad for grad in once])


@pytest.mark.parametrize("is_leaf", [True, False])
def test_the_gradient_of_an_argument(is_leaf, num_graphs):
    pair, grads = Pair(), []
    for module in (pair.captured, pair.captured, pair.eager):
        x = rows().requires_grad_()
        torch.manual_seed(3)
        module(x if is_leaf else 2 * x).backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[2])
    assert_close(grads[1], grads[2])
    assert grads[2].abs().sum() > 0
    assert num_graphs() == 1


def test_the_graph_of_an_argument_without_gradient_is_another():
    pair = Pair()
    pair.agree(rows())
    pair.agree(rows().requires_grad_())
    pair.agree(rows())


# What is around the call.


@pytest.mark.parametrize("handler", [poutine.scale(scale=2.0), poutine.mask(mask=torch.tensor([True, False] * 2 + [True]))])
def test_under_a_handler_of_pyro(handler):
    pair, x = Pair(), rows()
    plain = pair.agree(x)
    with handler:
        assert differ(pair.agree(x), plain)
    assert_close(pair.agree(x), plain)


def test_under_a_handler_of_pyro_from_the_first_call_on(num_graphs):
    pair, x = Pair(), rows()
    with poutine.scale(scale=2.0):
        pair.agree(x)
    assert num_graphs() == 0
    pair.agree(x)
    assert num_graphs() == 1


def test_autocast(num_graphs):
    pair, x = Pair(Dropping(), freeze(Dropping())), rows(0, 16).float()
    pair.captured.float()
    full = pair.agree(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outcome(pair.captured, x), outcome(pair.eager, x), rtol=2e-2, atol=2e-2)
        low = outcome(pair.captured, x)
        assert not torch.equal(low[0], full[0])
    assert_close(pair.agree(x), full)
    assert num_graphs() == 2


# ELBOs and the trainer.


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda elbo: type(elbo).__name__)
def test_an_elbo(elbo, num_graphs):
    model, x = VAE(6, 2, [4]), torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).round()
    captured = CompiledELBO(elbo, model.model, model.guide, backend=None)
    for step in range(3):
        found = []
        for loss in (captured, lambda *args: elbo.differentiable_loss(model.model, model.guide, *args)):
            pyro.set_rng_seed(step)
            model.zero_grad()
            value = loss(5, x)
            value.backward()
            found.append([value.detach(), *(param.grad.clone() for param in model.parameters()), torch.rand(())])
        assert_close(*found)
        for param in model.parameters():
            param.data.sub_(0.1 * param.grad)
    assert num_graphs() == 1


def test_an_elbo_of_a_score_function_and_an_autoguide():
    def model(data):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Bernoulli(p), obs=data)

    guide, elbo, found = AutoNormal(model), Trace_ELBO(num_particles=2), []
    captured = CompiledELBO(elbo, model, guide, backend=None)
    data = torch.tensor([1.0, 1.0, 0.0])
    for loss in (captured, captured, lambda data: elbo.differentiable_loss(model, guide, data)):
        pyro.set_rng_seed(1)
        guide.zero_grad()
        value = loss(data)
        value.backward()
        found.append([value.detach(), *(param.grad.clone() for param in guide.parameters())])
    assert_close(found[0], found[2])
    assert_close(found[1], found[2])


def fit(make, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trainer = Trainer(make(), lambda params: torch.optim.Adam(params, lr=0.01), **options)
    x = torch.rand(5, 6).round()
    return trainer.fit(5, x, steps=8, seed=1, progress=False)["loss"]


def elbo_of_a_vae():
    model = VAE(6, 2, [4])
    return Objective(Trace_ELBO(), model.model, model.guide)


def annealed_elbo_of_a_vae():
    model = VAE(6, 2, [4])
    return Objective(TraceMeanField_ELBO(), model.model, model.guide, latent_weight=linear(0.0, 1.0, 5))


def distillation_with_a_schedule():
    model, teacher = VAE(6, 2, [4]), VAE(6, 2, [4])
    arguments = lambda rows, x: (rows,)  # noqa: E731
    loss = SurrogateKD(["x"])
    weight = linear(0.0, 1.0, 5)
    return Objective(loss, model.model, freeze(teacher.model), arguments=arguments, latent_weight=weight)


@pytest.mark.parametrize("make", [elbo_of_a_vae, annealed_elbo_of_a_vae, distillation_with_a_schedule])
def test_a_trainer(make, num_graphs):
    captured = fit(make, compile={"backend": None})
    assert 1 <= num_graphs() <= 2
    assert captured == pytest.approx(fit(make), rel=1e-5)


def test_a_distiller():
    sgd, losses = (lambda params: torch.optim.SGD(params, lr=0.01)), []
    for compile in ({"backend": None}, False):
        pyro.clear_param_store()
        distiller = Distiller(Net(1), freeze(Net(0)), sgd, SurrogateKD(["x"]), compile=compile)
        losses.append(distiller.fit(rows(), steps=6, seed=1, progress=False)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_trainer_reports_nan():
    objective = elbo_of_a_vae()
    trainer = Trainer(objective, lambda params: torch.optim.SGD(params, lr=0.1), compile={"backend": None})
    x = torch.ones(5, 6)
    trainer.step(5, x)
    objective.model.__self__.decoder[0].weight.data.fill_(torch.nan)
    with pytest.raises((NonFiniteLossError, ValueError), match="nan|NaN"):
        trainer.step(5, x)


# Decisions on values, of the libraries.


def masked(loc, which):
    def program(*masks):
        with pyro.plate("rows", 3), poutine.mask(mask=masks[which]):
            pyro.sample("x", dist.Normal(loc, 1.0))

    return program


def test_an_error_that_one_call_deserves():
    loc, mask = torch.zeros((), requires_grad=True), torch.tensor([True, True, False])
    captured = SurrogateKD(["x"])(masked(loc, 0), masked(2.0, 1))
    captured.compile(backend=None)
    assert captured(mask, mask.clone()).item() == pytest.approx(4.0)
    with pytest.raises(PlateMismatchError, match="mask of site 'x' differs"):
        captured(mask, ~mask)
    assert captured(~mask, ~mask).item() == pytest.approx(2.0)


def test_a_value_that_one_call_deserves():
    def program(loc):
        def run(shift):
            with pyro.plate("rows", 3):
                pyro.sample("x", dist.Bernoulli(logits=loc + shift))

        return run

    loc = torch.tensor(0.3, requires_grad=True)
    loss, student, teacher = SurrogateKD(["x"]), program(loc), program(-0.5)
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None)
    usual, certain = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, torch.inf, 2.0])
    for shift in (usual, certain, usual):
        values = [module(shift) for module in (captured, eager)]
        assert values[0].isfinite()
        assert_close(*values)
        assert_close(*[torch.autograd.grad(value, loc) for value in values])


def test_decisions_that_keep_changing_end_the_graph():
    loc, mask = torch.zeros((), requires_grad=True), torch.tensor([True, True, False])
    captured = SurrogateKD(["x"])(masked(loc, 0), masked(2.0, 1))
    captured.compile(backend=None)
    captured(mask, mask.clone())

    for _ in range(2):
        with pytest.raises(PlateMismatchError):
            captured(mask, ~mask)
    with pytest.warns(UserWarning, match="decide by the values of tensors"), pytest.raises(PlateMismatchError):
        captured(mask, ~mask)
    with pytest.raises(PlateMismatchError):
        captured(mask, ~mask)
    assert captured(mask, mask).item() == pytest.approx(4.0)


def test_one_tensor_for_two_arguments_is_not_two_tensors():
    def program(loc, which):
        return lambda *shifts: pyro.sample("x", dist.Normal(loc + shifts[which], 1.0))

    loc = torch.zeros((), requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc, 0), program(0.0, 1))
    captured.compile(backend=None)
    one, two = torch.tensor(1.0), torch.tensor(3.0)
    for shifts, expected in [((one, one), 0.0), ((one, two), 2.0), ((two, two), 0.0), ((two, one), 2.0)]:
        assert captured(*shifts).item() == expected


class Certain(nn.Module):
    """A student whose logits are infinite where ``shift`` is."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, inputs, shift):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(self.norm(inputs).squeeze(-1), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z + shift))


def test_a_call_without_the_graph_is_as_an_eager_one():
    """The graph has run already when it is known that it does not hold: what it did is taken back."""
    usual, certain = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, torch.inf, 2.0])
    inputs, results = torch.tensor([[0.0], [1.0], [3.0]]), []
    teacher = freeze(Certain())
    for is_captured in (True, False):
        student = Certain()
        module = SurrogateKD(["x"])(student, teacher)
        if is_captured:
            module.compile(backend=None)
        torch.manual_seed(3)
        losses = [module(inputs, shift).detach() for shift in (usual, certain, usual)]
        results.append((losses, list(student.buffers())))
    assert_close(*results)


# With torch's compiler.


def test_inductor_with_the_noise_of_torch():
    student, targets, args = helmholtz()
    loss = SurrogateKD(targets)
    eager, captured = loss(student, freeze(helmholtz()[0])), None
    captured = loss(student, eager.teacher)
    captured.compile(options={"fallback_random": True})
    for seed in range(3):
        assert_close(outcome(captured, *args, seed=seed), outcome(eager, *args, seed=seed), rtol=1e-4, atol=1e-5)


def test_inductor_with_noise_of_its_own():
    def program(loc):
        def run():
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(loc * z.square(), 1.0))

        return run

    loss, student, teacher = SurrogateKD(["x"]), program(torch.tensor(1.0, requires_grad=True)), freeze(program(0.5))
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile()
    draws = [torch.tensor([module().item() for _ in range(200)]) for module in (captured, eager)]
    assert len(set(draws[0].tolist())) == 200
    error = math.sqrt(sum(values.var().item() / len(values) for values in draws))
    assert abs(draws[0].mean() - draws[1].mean()) < 4 * error


def test_inductor_sees_the_weights_of_a_frozen_teacher():
    pair, x = Pair(Dropping(), freeze(Dropping())), rows()
    pair.student.eval()
    x, captured = x.float(), SurrogateKD(["x"])(pair.student, pair.teacher)
    captured.float().compile()
    before = outcome(captured, x)
    assert_close(before, outcome(pair.eager, x), rtol=1e-4, atol=1e-5)
    for tensor in pair.teacher.tensors():
        tensor.add_(0.5)
    after = outcome(captured, x)
    assert differ(after, before)
    assert_close(after, outcome(pair.eager, x), rtol=1e-4, atol=1e-5)


# Long runs.


@pytest.mark.parametrize("rows", [1, 5])
def test_a_long_run_is_shortened(rows, monkeypatch):
    """Weight gradients as long products, weights in order: the same gradients, of a recurrent student with a frozen recurrent teacher."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 100)
    monkeypatch.setattr("pyro_kd.capture.passes.sequences._LEAST_PACKED", 100)
    monkeypatch.setattr("pyro_kd.capture.passes.sequences._ROWS", 4 * rows)  # four steps of twelve: three products
    torch.manual_seed(0)
    teacher, student = freeze(VRNN(6, 8, latents=3).model), VRNN(5, 7, latents=3)
    targets = [f"{kind}{t}" for t in range(1, 13) for kind in ("pen", "move")]
    eager = SurrogateKD(targets)(student.model, teacher)
    captured = SurrogateKD(targets)(student.model, teacher)
    captured.compile()
    params = list(student.generative.parameters())

    def grads(module):
        torch.manual_seed(1)
        return torch.autograd.grad(module(rows, 12), params)

    for _ in range(2):
        for mine, theirs in zip(grads(captured), grads(eager), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for param in params:
                param.mul_(1.1)
    graph = next(iter(captured.loss._captured[0][1]._capture._kinds.values())).entries[0].graph
    assert graph.is_long
    packed = [name for name in graph._compiled.args[0]._buffers if name.endswith("packed")]
    assert bool(packed) == (rows > 1 and torch.backends.mkl.is_available())


def test_weights_of_a_long_run_that_are_products_themselves():
    """The gradient of one is a part of the gradient of its factors."""

    def run(lefts, right, x):
        for _ in range(8):
            x = sum(nn.functional.linear(x, left @ right).tanh() for left in lefts)
        return torch.autograd.grad(x.sum(), [right, *lefts])

    torch.manual_seed(0)
    inputs = (
        [torch.randn(5, 2, requires_grad=True) for _ in range(8)],
        torch.randn(2, 5, requires_grad=True),
        torch.randn(3, 5),
    )
    graph = make_fx(run)(*inputs)
    expected = graph(*inputs)
    shorten(graph)
    for mine, theirs in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# What a review found.


class Means(nn.Module):
    """Two sites whose means are parameters, or functions of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 2))
        self.register_buffer("calls", torch.zeros(()))

    def mean(self):
        return (self.a + self.b.view(2, 1)).squeeze(-1)

    def forward(self):
        pyro.sample("x", dist.Normal(self.mean(), 1.0).to_event(1))


def standard():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def both(student, **options):
    """A loss without and with capture."""
    loss = SurrogateKD(["x"])
    captured = loss(student, standard)
    captured.compile(backend=None, **options)
    return loss(student, standard), captured


def test_gradients_share_no_memory():
    student = Means()
    for module in both(student):
        student.zero_grad()
        module().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        torch.testing.assert_close(student.a.grad.norm(), torch.tensor(0.5**0.5))


def test_hooks_of_parameters_act_once():
    student = Means()
    student.a.register_hook(lambda grad: 0.1 * grad)
    grads = []
    for module in both(student):
        student.zero_grad()
        module().backward()
        grads.append(student.a.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("change", ["untied", "another module"])
def test_another_parameter_is_seen(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
            self.two.weight = self.one.weight

        def forward(self):
            x = torch.ones(1)
            pyro.sample("x", dist.Normal(self.one(x) + self.two(x), 1.0).to_event(1))

    student = Net()
    eager, captured = both(student)
    torch.testing.assert_close(captured(), eager())
    if change == "untied":
        student.two.weight = nn.Parameter(torch.full((2, 1), 3.0))
    else:
        student.two = nn.Linear(1, 2)
    torch.testing.assert_close(captured(), eager())


def test_a_buffer_that_is_replaced_is_refused():
    class Counting(Means):
        def forward(self):
            self.calls = self.calls + 1
            super().forward()

    student = Counting()
    eager, captured = both(student)
    with pytest.warns(UserWarning, match="in place of buffer 'calls'"):
        torch.testing.assert_close(captured(), eager())
    assert student.calls == 2


def test_options_of_the_loss_are_seen():
    def program():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def teacher():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    eager, captured = SurrogateKD(["x"]), SurrogateKD(["x"]).compile(backend=None)
    for targets in (["x"], ["x", "z"], ["z"]):
        eager.targets = captured.targets = targets
        values = []
        for loss in (eager, captured):
            torch.manual_seed(0)
            values.append(loss.loss(program, teacher))
        assert values[0] == pytest.approx(values[1])
    captured.targets, captured.latent_weight = ["x"], math.nan
    with pytest.raises(NonFiniteLossError, match="latent_weight"):
        captured.loss(program, teacher)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.addmm(torch.ones(2), x, w, beta=2, alpha=3),
        lambda x, w: torch.addmm(x[:, :1].expand(-1, 2), x, w),
        lambda x, w: torch.addmm(torch.ones(1), x, w),
        lambda x, w: torch.addmm(torch.ones(2), x, w),
    ],
    ids=["scaled", "matrix", "number", "bias"],
)
def test_products_of_a_long_run(product, monkeypatch):
    """Each form of a product gets its matrix in order, or is left alone."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 1)
    monkeypatch.setattr("pyro_kd.capture.passes.sequences._LEAST_PACKED", 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(0.1 * torch.arange(6.0).view(3, 2))

        def forward(self):
            x = torch.arange(12.0).view(4, 3) / 12
            means = [product(x + i, self.w) for i in range(12)]
            pyro.sample("x", dist.Normal(torch.stack(means), 1.0).to_event(3))

    student, teacher, loss = Net(), freeze(Net()), SurrogateKD(["x"])
    captured = loss(student, teacher)
    captured.compile()
    with torch.no_grad():
        student.w.mul_(2)
    for _ in range(2):
        (mine,) = torch.autograd.grad(captured(), [student.w])
        (theirs,) = torch.autograd.grad(loss(student, teacher)(), [student.w])
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().min() > 0.1


def test_a_scale_that_becomes_negative_is_found():
    """Validation goes on in every 50th call."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self):
            pyro.sample("x", dist.Normal(torch.zeros(2), self.scale).to_event(1))

    student = Net()
    loss = SurrogateKD(["x"])(student, standard)
    loss()
    student.scale.data.neg_()

    def train():
        for _ in range(50):
            loss()

    with pytest.raises((ValueError, NonFiniteLossError), match="scale"):  # the KL of two Normals is NaN there at once
        train()
