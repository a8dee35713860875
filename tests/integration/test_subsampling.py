"""Subsampled plates: teacher and student take the same rows, and the loss of mini-batches is that of the whole on average."""

from collections import defaultdict

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import LocalKD
from pyro_kd.errors import PlateMismatchError, UnpairedSiteError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run, runs_of


def rows_of(options, label, seen):
    data = torch.arange(100.0)

    def model():
        with pyro.plate("rows", 100, **options) as index:
            seen[label].append(index)
            z = pyro.sample("z", dist.Normal(data[index], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


@both
@particles
def test_both_programs_see_the_rows_of_an_explicit_subsample(loss, options):
    """In the user's order; and no noise is recorded for them, so that none can be supplied."""
    mine, seen = torch.tensor([40, 7, 93]), defaultdict(list)
    programs = [rows_of({"subsample": mine}, label, seen) for label in ("student", "teacher")]
    objective = loss(["x"], **options)
    for run in runs_of(objective, *programs):
        assert "rows" not in run.noise
        (z, x) = run.pairs
        assert torch.equal(z.p.mean.reshape(-1, 3)[0], mine.float())
        assert torch.equal(z.q.mean.reshape(-1, 3)[-1], mine.float())
        assert x.scale == pytest.approx(100 / 3)
    assert all(torch.equal(index, mine) for label in seen for index in seen[label])


@both
@particles
def test_both_programs_see_the_same_random_rows(loss, options):
    seen = defaultdict(list)
    programs = [rows_of({"subsample_size": 5}, label, seen) for label in ("student", "teacher")]
    for _ in range(3):
        for run in runs_of(loss(["x"], max_plate_nesting=1, **options), *programs):
            index = run.teacher.nodes["rows"]["value"]
            assert torch.equal(run.student.nodes["rows"]["value"], index)
            assert torch.equal(run.pairs[0].q.mean.reshape(-1, 5)[0], index.float())
    assert len({tuple(index.tolist()) for index in seen["student"]}) > 1
    assert {tuple(index.tolist()) for index in seen["student"]} == {tuple(index.tolist()) for index in seen["teacher"]}


@pytest.mark.parametrize("teachers", [{"subsample": torch.tensor([1, 2])}, {"subsample_size": 2}], ids=["other", "random"])
def test_rows_that_differ_are_an_error(teachers):
    seen = defaultdict(list)
    student = rows_of({"subsample": torch.tensor([98, 99])}, "student", seen)
    with pytest.raises(PlateMismatchError, match="rows"):
        SurrogateKD(["x"]).loss(student, rows_of(teachers, "teacher", seen))


def test_a_random_subsample_of_the_student_alone_is_an_error():
    seen = defaultdict(list)
    programs = [rows_of(k, "any", seen) for k in ({"subsample_size": 2}, {"subsample": torch.tensor([1, 2])})]
    with pytest.raises(UnpairedSiteError, match="'rows'"):
        SurrogateKD(["x"]).loss(*programs)


@both
def test_pyro_subsample_takes_the_same_rows_of_the_data(loss):
    data = torch.randn(50, 2)

    def program(weight):
        def model(data):
            with pyro.plate("rows", len(data), subsample_size=8) as index:
                batch = pyro.subsample(data, event_dim=1)
                assert torch.equal(batch, data[index])
                pyro.sample("x", dist.Normal(batch @ weight, 1.0))

        return model

    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    pyro.set_rng_seed(3)
    value = loss(["x"]).differentiable_loss(program(weight), program(torch.zeros(2)), data)
    pyro.set_rng_seed(3)
    run = only_run(loss(["x"]), program(weight), program(torch.zeros(2)), data)
    batch = data[run.student.nodes["rows"]["value"]]
    assert float(value.detach()) == pytest.approx(50 / 8 * float((batch @ weight.detach()).square().sum() / 2), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, weight)
    assert torch.allclose(gradient, 50 / 8 * batch.T @ (batch @ weight.detach()), rtol=1e-4)


@both
def test_a_parameter_subsampled_by_a_plate_learns_at_the_drawn_rows(loss):
    def student():
        with pyro.plate("rows", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.arange(20.0), event_dim=0), 1.0))

    def teacher():
        with pyro.plate("rows", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(2)
    run = only_run(loss(["x"]), student, teacher)
    drawn = run.teacher.nodes["rows"]["value"]
    pyro.set_rng_seed(2)
    assert loss(["x"]).loss_and_grads(student, teacher) == pytest.approx(4 * float(drawn.float().square().sum()) / 2)
    expected = torch.zeros(20).index_put((drawn,), 4 * drawn.float())
    assert torch.equal(pyro.param("loc").unconstrained().grad, expected)


@both
def test_minibatches_of_a_data_loader_average_to_the_whole(loss):
    """With the rows of a batch as explicit subsample the scale is that of the plate, and the mean over an epoch is exact."""
    data = torch.randn(12, 2)
    loader = DataLoader(TensorDataset(torch.arange(12), data), batch_size=4, shuffle=True)

    def program(weight):
        def model(index, batch):
            with pyro.plate("rows", 12, subsample=index):
                z = pyro.sample("z", dist.Normal(batch @ weight, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0))

        return model

    student, teacher = program(torch.tensor([1.0, 0.5])), program(torch.tensor([-1.0, 0.0]))
    objective = loss(["x"], latent_weight=0.2)
    whole = objective.loss(student, teacher, torch.arange(12), data)
    batches = [objective.loss(student, teacher, index, batch) for index, batch in loader]
    assert len(batches) == 3
    assert sum(batches) / 3 == pytest.approx(whole, rel=1e-5)
    difference = data @ torch.tensor([2.0, 0.5])
    each = {SurrogateKD: 0.2 + 1, LocalKD: 0.2}[loss]
    assert whole == pytest.approx(each * float(difference.square().sum() / 2), rel=1e-5)
