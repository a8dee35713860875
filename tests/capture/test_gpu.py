"""Captured losses on a GPU: right, without waiting, and in memory of their own. What of it a CPU can show is below."""

import contextlib
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from pyro_kd.capture import call, specialise
from pyro_kd.errors import InvalidParameterError, NonFiniteLossError
from pyro_kd.training import ELBOObjective
from tests.benchmarks.applications import APPLICATIONS
from tests.benchmarks.gpu import synchronisations
from tests.support.losses import SurrogateKD

SMALL = {
    "helmholtz": {"rows": 8},
    "hierarchical_vae": {"rows": 4, "teacher_width": 6, "student_width": 4, "latents": 3},
    "continual": {"rows": 4, "width": 4, "latents": 3},
    "vrnn": {
        "rows": 5,
        "length": 7,
        "teacher_width": 12,
        "teacher_recurrent": 9,
        "student_width": 8,
        "student_recurrent": 6,
    },
    "chain": {"rows": 8, "layers": 4},
}


def build(name, device="cuda"):
    pyro.clear_param_store()
    torch.manual_seed(0)
    return APPLICATIONS[name](**SMALL[name], device=device)


def outcome(application, loss, seed):
    """The loss and its gradients."""
    pyro.clear_param_store()  # or pyro.module would give a student the tensors of another's
    torch.manual_seed(seed)
    value = loss()
    return [value.detach(), *torch.autograd.grad(value, list(application.student.parameters()))]


def is_captured(loss):
    """Call it once: a loss that continues without a graph warns, which is an error here."""
    loss().backward()
    return loss


class Point(nn.Module):
    """A normal distribution that learns its place."""

    def __init__(self, place=0.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor(place))

    def forward(self, shift):
        return pyro.sample("x", dist.Normal(self.place + shift, 1.0))


def point_loss(device, **options):
    student, teacher = Point(1.0).to(device), Point().to(device)
    loss = SurrogateKD(["x"], latent_weight=1.0)(student, freeze(teacher))
    loss.compile(**options)
    return student, loss


@contextlib.contextmanager
def no_waiting():
    """A synchronisation within is an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "cudagraphs"])
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_the_eager_loss(name, backend, float64):
    """In four calls, so that a recorded graph is run again, on other random numbers and other weights."""
    eager, other = build(name), build(name)
    captured = is_captured(other.captured(backend=backend))
    for seed in range(4):
        mine, yours = outcome(other, captured, seed), outcome(eager, eager.library, seed)
        assert_close(mine, yours, rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            for application in (eager, other):
                for param in application.student.parameters():
                    param.mul_(0.9)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"backend": None}, {"backend": "cudagraphs"}, {"mode": "reduce-overhead"}], ids=str)
def test_buffers_are_written_to_once_per_call(options):
    application = build("hierarchical_vae")
    loss = application.captured(**options)
    for _ in range(5):
        loss().backward()
    counts = [buffer for name, buffer in application.student.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 5 for count in counts)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"backend": None}, {"backend": "cudagraphs"}, {}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_a_step_does_not_wait(name, options):
    if name == "vrnn" and options.get("backend", "") == "":
        pytest.skip("inductor takes minutes for an unrolled network")
    application = build(name)
    loss = is_captured(application.captured(**options))
    optim = torch.optim.Adam(application.student.parameters(), fused=True)

    def step():
        loss().backward()
        optim.step()
        optim.zero_grad()

    for _ in range(4):
        step()
    assert synchronisations(step, "cuda") == 0
    with no_waiting():
        step()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "cudagraphs"])
def test_a_loss_that_is_not_finite_is_reported_later_and_teaches_nothing(backend):
    student, loss = point_loss("cuda", backend=backend)
    shift = torch.zeros((), device="cuda")
    loss(shift).backward()
    assert student.place.grad == 1
    student.zero_grad()
    value = loss(torch.full_like(shift, math.inf))
    value.backward()
    assert not value.isfinite()
    assert student.place.grad == 0
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteLossError, match="x"):
        loss(shift)
    loss(shift).backward()  # once
    assert student.place.grad == 1


@pytest.mark.gpu
def test_a_guard_that_does_not_hold_is_found_later_and_teaches_nothing():
    """The masks of student and teacher have to be the same, which is seen from their values."""
    student, teacher = Point(0.5).cuda(), Point().cuda()

    def model(net, index):
        def run(*masks):
            with pyro.plate("rows", 3), pyro.poutine.mask(mask=masks[index]):
                pyro.sample("x", dist.Normal(net.place, 1.0).expand([3]))

        return run

    loss = SurrogateKD(["x"])(model(student, 0), freeze(model(teacher, 1)))
    loss.compile(backend=None)
    mask = torch.tensor([True, True, False], device="cuda")
    loss(mask, mask.clone()).backward()
    assert student.place.grad == 1
    for _ in range(call.MAX_MISSES):
        student.zero_grad()
        loss(mask, ~mask).backward()
        assert student.place.grad == 0
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="continues without a graph: Pyro or torch branch on the values"):
        loss(mask, mask)


@pytest.mark.gpu
def test_an_elbo_that_is_not_finite_is_reported_later_and_teaches_nothing():
    model, guide = Point(1.0).cuda(), lambda shift: None
    objective = ELBOObjective(
        TraceMeanField_ELBO(), pyro.poutine.condition(model, {"x": torch.zeros((), device="cuda")}), guide
    )
    compiled, shift = objective.compiled(backend=None), torch.zeros((), device="cuda")
    compiled.value(0, (shift,), {}).backward()
    assert model.place.grad == 1
    model.zero_grad()
    with no_waiting():
        value = compiled.value(0, (shift + math.inf,), {})
        value.backward()
    assert not value.isfinite()
    assert model.place.grad == 0
    torch.cuda.synchronize()
    with pytest.raises((NonFiniteLossError, InvalidParameterError)):
        compiled.value(0, (shift,), {})
    compiled.value(0, (shift,), {}).backward()
    assert model.place.grad == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}], ids=str)
@pytest.mark.parametrize("is_first_kept", [False, True])
def test_cuda_graphs_give_the_same_gradients(options, is_first_kept):
    """Of two passes that add up, one backward after the other, or both after both losses; nothing is overwritten."""

    def run(**options):
        application = build("hierarchical_vae")
        loss = is_captured(application.captured(**options))
        found = []
        for seed in range(3):  # warm-up, recording and replay
            application.student.zero_grad()
            torch.manual_seed(seed)
            losses = [loss()]
            if not is_first_kept:
                losses[0].backward()
            losses.append(loss())
            for value in losses[not is_first_kept :]:
                value.backward()
            found.append([value.detach() for value in losses])
            found.append([param.grad for param in application.student.parameters()])  # the tensors themselves
        return found

    assert_close(run(**options), run(), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_recorded_parameters_may_move():
    """A parameter that gets other memory is found there."""
    application, eager = build("helmholtz"), build("helmholtz")
    loss = is_captured(application.captured(backend="cudagraphs"))
    for param in application.student.parameters():
        param.data = param.data.clone()
    assert_close(outcome(application, loss, 1), outcome(eager, eager.library, 1), rtol=1e-4, atol=1e-5)


# Without a GPU.


@pytest.mark.parametrize("name", ["hierarchical_vae", "continual"])
def test_full_plates_leave_no_guards(name, monkeypatch):
    """That a plate takes all its rows is known by its statement: a guard costs time, and on a GPU a deferred read."""
    graphs, trace = [], specialise.trace

    def note(*args):
        graphs.append(trace(*args))
        return graphs[-1]

    monkeypatch.setattr(specialise, "trace", note)
    application = build(name, "cpu")
    is_captured(application.captured(backend=None))
    assert graphs
    assert not any(graph._has_conditions for graph in graphs)


def test_without_cuda_the_backend_cudagraphs_runs_the_graph_as_it_is():
    student, loss = point_loss("cpu", backend="cudagraphs")
    loss(torch.zeros(())).backward()
    loss(torch.zeros(())).backward()
    assert student.place.grad == 2
    with pytest.raises(NonFiniteLossError):
        loss(torch.tensor(math.inf))
