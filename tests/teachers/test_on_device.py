"""A teacher on a device of its own: whatever compares it with a student finds all that it needs on the student's device."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_kd import (
    DrawsKD,
    LocalKD,
    MarginalKD,
    MultiSampleKD,
    OnPolicyKD,
    SurrogateKD,
    check,
    freeze,
    mixture_of,
    posterior_predictive,
    site_report,
)
from pyro_kd.errors import InvalidProgramError, MissingDeviceError
from pyro_kd.teachers import on_device
from tests.support.second_device import SECOND, MeetingError, two_devices


@pytest.fixture
def devices():
    with two_devices() as found:
        yield found


class Program(torch.nn.Module):
    """Latents of both kinds, a mask, a scale, an input, and a tensor without a named device."""

    def __init__(self, seed, shift=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.net = torch.nn.Linear(2, 2)
        for param in self.net.parameters():
            torch.nn.init.normal_(param, generator=generator)
        self.register_buffer("shift", torch.tensor([shift]))

    def forward(self, x, kept=True):
        with pyro.plate("rows", len(x)), poutine.scale(scale=0.5):
            first, second = self.net(x).unbind(-1)
            z = pyro.sample("z", dist.Normal(first + self.shift, 1.0))
            bit = pyro.sample("bit", dist.Bernoulli(logits=second + z))
            with poutine.mask(mask=kept):
                pyro.sample("y", dist.Normal(z + bit + torch.zeros(len(x)), torch.ones(len(x))))
            pyro.sample("label", dist.Categorical(logits=torch.stack(torch.broadcast_tensors(z, bit, second), -1)))


class Bits(torch.nn.Module):
    """What can be enumerated."""

    def __init__(self, logit):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor([logit]))

    def forward(self, x, kept=True):
        with pyro.plate("rows", len(x)):
            bit = pyro.sample("bit", dist.Bernoulli(logits=self.logit + x[:, 0]))
            pyro.sample("y", dist.Normal(bit - x[:, 1], 1.0))


TARGETS = ["y", "label"]
LOSSES = {
    "default": lambda: SurrogateKD(TARGETS),
    "surrogate": lambda: SurrogateKD(TARGETS, teacher_forcing=0.0),
    "teacher forcing": lambda: SurrogateKD(TARGETS, teacher_forcing=0.5),
    "boundary": lambda: SurrogateKD(TARGETS, teacher_forcing=0.0, discrete_gradient="boundary"),
    "score": lambda: SurrogateKD(TARGETS, teacher_forcing=0.0, discrete_gradient="score", num_particles=2),
    "local": lambda: LocalKD(TARGETS),
    "particles": lambda: SurrogateKD(TARGETS, num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    "draws": lambda: DrawsKD(["y"], fresh=["label"]),
    "on policy": lambda: OnPolicyKD(TARGETS, student_fraction=0.5),
    "reuse": lambda: SurrogateKD(TARGETS, reuse=2),
    "samples in a plate": lambda: MultiSampleKD(TARGETS, num_samples=3, reuse_batch=False),
    "samples in a loop": lambda: MultiSampleKD(TARGETS, num_samples=3, reuse_batch=False, vectorize=False),
    "samples of the batch": lambda: MultiSampleKD(["y"], num_samples=3),
    "marginal": lambda: MarginalKD(["y"]),
}


def inputs(name, rows=6):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows, generator=generator) < 0.7
    return torch.randn(rows, 2, generator=generator), True if name.startswith("samples") else kept


def outcomes(name, place):
    """Values and gradients of some calls of a loss."""
    student = Bits(0.0) if name in ("marginal", "samples of the batch") else Program(1)
    teacher = place(Bits(1.0) if name in ("marginal", "samples of the batch") else Program(0, shift=0.5))
    loss = LOSSES[name]()(student, teacher)
    torch.manual_seed(0)
    found = []
    for _ in range(3):
        value = loss(*inputs(name))
        value.backward()
        found += [value.detach(), *(param.grad.clone() for param in student.parameters())]
    return [*found, torch.rand(1)]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_on_one_device(name, devices):
    """Bit for bit, with the same seed, and the random stream is left at the same place."""
    expected = outcomes(name, freeze)
    assert devices.num_operations == 0
    found = outcomes(name, lambda teacher: on_device(teacher, SECOND))
    assert devices.num_operations > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_teacher_that_is_only_moved_meets_the_students_tensors(devices):
    """So the second device notices what stays behind."""
    with pytest.raises(MeetingError):
        SurrogateKD(TARGETS).loss(Program(1), freeze(Program(0)).to(SECOND), *inputs(""))


def test_what_a_loss_sees_is_on_the_students_device_and_the_teacher_is_not(devices):
    teacher = freeze(Program(0))
    (particle,) = LocalKD(TARGETS).particles(Program(1), on_device(teacher, SECOND), *inputs(""))
    seen = [tensor for pair in particle.run.pairs for tensor in (pair.value, *vars(pair.p).values())]
    seen += [draw.noise for draws in particle.run.noise.values() for draw in draws]
    assert {str(tensor.device) for tensor in seen if isinstance(tensor, torch.Tensor)} == {"cpu"}
    assert {tensor.device for tensor in teacher.tensors()} == {SECOND}


def test_the_tensors_that_a_teacher_makes_are_on_its_device(devices):
    made = []

    def teacher(rows):
        made.append(torch.zeros(rows))
        with pyro.plate("rows", rows):
            made.append(pyro.sample("y", dist.Normal(made[0], 1.0)))

    placed = on_device(teacher, SECOND)
    value = poutine.trace(placed).get_trace(4).nodes["y"]["value"]
    made = placed.func.args[1].program.__closure__[0].cell_contents  # of the frozen copy
    assert [tensor.device for tensor in made] == [SECOND, SECOND]
    assert value.device.type == "cpu"
    assert torch.zeros(1).device.type == "cpu"


class Shifted(dist.Normal):
    """Its sampler makes a tensor without naming a device."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) + torch.zeros(self.batch_shape)


def test_a_sampler_runs_where_the_student_is(devices):
    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", Shifted(x[:, 0], 1.0))

    trace = poutine.trace(on_device(teacher, SECOND)).get_trace(inputs("")[0])
    assert trace.nodes["y"]["value"].device.type == "cpu"


def test_a_result_comes_back(devices):
    assert on_device(lambda x: x + 1, SECOND)(torch.zeros(2)).device.type == "cpu"
    assert on_device(lambda rows: torch.zeros(rows), SECOND, to="cpu")(2).device.type == "cpu"


def test_the_students_device_may_be_the_second(devices):
    """That of the arguments, unless ``to`` says otherwise."""
    sites = poutine.trace(on_device(Program(0), "cpu")).get_trace(inputs("")[0].to(SECOND)).nodes
    assert {sites[name]["value"].device for name in ("z", "bit", "y", "label")} == {SECOND}
    sites = poutine.trace(on_device(Bits(0.0), SECOND, to=SECOND)).get_trace(inputs("")[0].to(SECOND)).nodes
    assert sites["bit"]["fn"].logits.device == SECOND


def rows_of(data):
    with pyro.plate("rows", len(data), subsample_size=3, device=data.device) as index:
        pyro.sample("y", dist.Normal(data[index], 1.0))


def test_subsampled_rows_are_the_same(devices):
    found = []
    for place in (freeze, lambda teacher: on_device(teacher, SECOND)):
        torch.manual_seed(0)
        sites = poutine.trace(place(rows_of)).get_trace(torch.arange(8.0)).nodes
        found.append([sites["rows"]["value"], sites["y"]["value"]])
        assert {str(tensor.device) for tensor in found[-1]} == {"cpu"}
    assert all(map(torch.equal, *found))


def test_draws_between_sites_are_shared_and_do_not_depend_on_the_device(devices):
    def teacher(x):
        noisy = x + torch.randn_like(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(noisy[:, 0], 1.0))

    x, found = inputs("")[0], []
    for place in (freeze, lambda program: on_device(program, SECOND)):
        torch.manual_seed(0)
        (particle,) = SurrogateKD(["y"]).particles(lambda x: teacher(2 * x), place(teacher), x)
        assert len(particle.run.noise.between[""]) == 1
        found.append([particle.run.noise.between[""][0].noise, particle.run.pairs[0].value, particle.run.pairs[0].q.loc])
    assert all(map(torch.equal, *found))


def model(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5))


OTHERS = {
    "posterior": lambda: posterior_predictive(model, {"slope": torch.linspace(0, 1, 7)}, rows=len),
    "mixture": lambda: mixture_of([Bits(1.0), Bits(-1.0)], sites=["y"], rows=lambda x: len(x)),
    "function": lambda: partial(Bits(1.0), kept=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_teachers_have_their_losses_too(name, devices):
    found = []
    for place in (freeze, lambda teacher: on_device(teacher, SECOND)):
        teacher = place(OTHERS[name]())
        torch.manual_seed(0)
        found.append([SurrogateKD(["y"], fresh="*").loss(Bits(0.0), teacher, inputs("")[0]) for _ in range(2)])
    assert found[0] == found[1]


def test_teachers_of_a_mixture_keep_their_devices_when_it_moves(devices):
    found, x = [], inputs("")[0]
    for place in (freeze, lambda teacher: on_device(teacher, SECOND)):
        mixture = mixture_of([place(Bits(1.0)), place(Bits(-1.0))], sites=["y"], rows=len).to("cpu")
        torch.manual_seed(0)
        found.append(SurrogateKD(["y"], fresh="*").loss(Bits(0.0), mixture, x))
    assert found[0] == found[1]
    assert SECOND in {tensor.device for tensor in mixture.tensors()}


def test_svi_check_and_reports_take_it(devices):
    teacher, student, x = on_device(Bits(1.0), SECOND), Bits(0.0), inputs("", rows=64)[0]
    loss = SurrogateKD(["y"], latent_weight=1.0, teacher_forcing=0.0)
    svi = SVI(lambda x: pyro.module("student", student)(x), teacher, pyro.optim.Adam({"lr": 0.1}), loss)
    losses = [svi.step(x) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert check(loss, student, teacher, x, try_capture=False).is_ok
    assert site_report(loss, student, teacher, x) is not None


def test_a_distribution_with_a_module_is_an_error_that_names_the_site(devices):
    flow = dist.transforms.affine_autoregressive(2, hidden_dims=[4])

    def with_flow(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [flow]))

    with pytest.raises(InvalidProgramError, match=r"site 'y': its distribution holds a AffineAutoregressive .* lazy:0"):
        poutine.trace(on_device(with_flow, SECOND)).get_trace(inputs("")[0])


def test_errors():
    with pytest.raises(MissingDeviceError, match=r"device='cuda:99' is not there .*There is 'cpu'"):
        on_device(Bits(0.0), "cuda:99")
    with pytest.raises(MissingDeviceError, match="to='nowhere' is not there"):
        on_device(Bits(0.0), "cpu", to="nowhere")
    with pytest.raises(InvalidProgramError, match="on a device of its own already, cpu: pass the teacher itself"):
        on_device(on_device(Bits(0.0), "cpu"), "cpu")


def test_an_error_in_the_teacher_leaves_pyro_as_it_was(devices):
    def broken(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], 1.0))
            raise ZeroDivisionError

    def refused(x):
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(x[:, 0], 1.0))

    for program, error in ((broken, ZeroDivisionError), (refused, ValueError)):
        with pytest.raises(error):
            poutine.trace(on_device(program, SECOND)).get_trace(inputs("")[0])
    assert poutine.trace(Bits(0.0)).get_trace(inputs("")[0]).nodes["bit"]["value"].shape == (6,)
