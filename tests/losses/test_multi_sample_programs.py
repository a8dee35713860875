"""Which programs may use the batch as its own samples, and the errors of the K-sample bound."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_kd import MultiSampleKD, bound_report, freeze
from pyro_kd.errors import PlateMismatchError, SupportMismatchError, UnsupportedDivergenceError
from pyro_kd.losses.sample_runs import SampledRun
from tests.support.sampled_coins import Coin

ROWS = 8


def gaussian(shift=0.0, slope=None, *, inputs=None, plate="rows"):
    """z, y1 and y2, whose mean depends on z, on an input and, by ``slope``, on y1."""

    def model(x=None):
        with pyro.plate(plate, ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            y1 = pyro.sample("y1", dist.Normal(z, 1.0))
            terms = [z, x, inputs, None if slope is None else slope * y1]
            mean = sum(
                (term for term in terms if term is not None), torch.tensor(shift) if isinstance(shift, float) else shift
            )
            pyro.sample("y2", dist.Normal(mean, 1.0))

    return model


def reuses_batch(student, teacher, *args, targets=("y1", "y2")):
    """Whether the loss takes the rows of the batch as samples."""
    (particle,) = MultiSampleKD(list(targets), num_samples=4).particles(student, freeze(teacher), *args)
    assert isinstance(particle.run, SampledRun)
    return particle.run.sample_dim is None


def parameter(value):
    return torch.tensor(value, requires_grad=True)


def test_rows_that_depend_on_their_latents_alone_serve_each_other():
    assert reuses_batch(gaussian(parameter(0.5)), gaussian())
    assert reuses_batch(gaussian(parameter(0.5)), gaussian(), torch.tensor(2.0)), "an input that all rows share"
    assert reuses_batch(Coin(0.1, (0.2, 0.3)), Coin(0.0, (0.0, 0.0)), ROWS, targets=["y"])


@pytest.mark.parametrize(
    ("student", "teacher", "args"),
    [
        (gaussian(0.5, 0.3), gaussian(), ()),
        (gaussian(0.5), gaussian(0.0, 0.3), ()),
        (gaussian(0.5), gaussian(), (torch.arange(ROWS) / 8,)),
        (gaussian(0.5, inputs=torch.arange(ROWS) / 8), gaussian(), ()),
        (gaussian(0.5), gaussian(inputs=torch.arange(ROWS) / 8), ()),
    ],
    ids=["target in the student", "target in the teacher", "input", "data in the student", "data in the teacher"],
)
def test_rows_with_targets_or_inputs_of_their_own_do_not(student, teacher, args):
    assert not reuses_batch(student, teacher, *args)


def test_a_dependence_on_targets_that_is_switched_off_so_far_counts():
    assert not reuses_batch(gaussian(0.5, parameter(0.0)), gaussian())


def test_parameters_of_rows_that_are_equal_so_far_count():
    assert not reuses_batch(gaussian(torch.zeros(ROWS, requires_grad=True)), gaussian())


def test_what_was_found_holds_for_arguments_of_one_kind():
    student, teacher = gaussian(parameter(0.5)), freeze(gaussian())
    loss = MultiSampleKD(["y1", "y2"], num_samples=4)
    for args, dim in (((), None), ((torch.arange(ROWS) / 8,), -2), ((), None)):
        (particle,) = loss.particles(student, teacher, *args)
        assert particle.run.sample_dim == dim


def test_masked_targets_and_programs_without_one_plate_for_all_take_runs():
    mask = torch.arange(ROWS) > 3
    assert not reuses_batch(*[poutine.mask(gaussian(shift), mask=mask) for shift in (0.5, 0.0)])

    def without_plate(shift):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        pyro.sample("y", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1))

    assert not reuses_batch(lambda: without_plate(0.5), lambda: without_plate(0.0), targets=["y"])

    def global_latent(shift):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        with pyro.plate("rows", ROWS):
            pyro.sample("y", dist.Normal(z, 1.0))

    assert not reuses_batch(lambda: global_latent(0.5), lambda: global_latent(0.0), targets=["y"])


def test_a_batch_that_is_too_small_takes_runs():
    student, teacher = Coin(0.1, (0.2, 0.3)), freeze(Coin(0.0, (0.0, 0.0)))
    loss = MultiSampleKD(["y"], num_samples=4)
    assert [loss.particles(student, teacher, rows)[0].run.sample_dim for rows in (4, 3)] == [None, -2]


def test_finding_out_has_no_effect():
    student, teacher = Coin(0.1, (0.2, 0.3)), freeze(Coin(0.0, (0.0, 0.0)))
    loss = MultiSampleKD(["y"], num_samples=4)
    values = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        values.append(loss.loss(student, teacher, 20))
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, not 0"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be a whole number, such as 16, not 2.5"),
        (
            {"num_samples": 2, "gradient": "leave_one_out"},
            ValueError,
            "num_samples must be at least 3 for gradient='leave_one_out'",
        ),
        ({"gradient": "reinforce"}, ValueError, "gradient must be 'score', 'leave_one_out' or 'cut', not 'reinforce'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, not 0"),
        ({"divergence": None}, TypeError, "MultiSampleKD has no divergence to choose"),
        ({"target_values": "data"}, TypeError, "MultiSampleKD takes no target_values"),
        ({"discrete_gradient": "implicit"}, TypeError, "MultiSampleKD takes no discrete_gradient: gradient='score'"),
    ],
)
def test_wrong_options_are_errors(options, error, text):
    with pytest.raises(error, match=text):
        MultiSampleKD(["y"], **options)


def test_more_samples_than_rows_are_an_error_if_the_batch_must_serve():
    loss = MultiSampleKD(["y"], num_samples=4, reuse_batch=True)
    with pytest.raises(
        ValueError, match="num_samples=4 with reuse_batch=True needs a batch of at least 4 rows, not 3. Take"
    ):
        loss.loss(Coin(0.1, (0.2, 0.3)), freeze(Coin(0.0, (0.0, 0.0))), 3)


def test_a_batch_without_a_plate_cannot_serve():
    def program(shift):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0))

    with pytest.raises(
        PlateMismatchError, match="needs one plate that holds every latent and target.*there are 0. Put both"
    ):
        MultiSampleKD(["y"], reuse_batch=True).loss(lambda: program(0.5), freeze(lambda: program(0.0)))


def test_dimensions_without_a_plate_belong_to_one_row():
    def program(shift):
        z = pyro.sample("z", dist.Normal(torch.full((3,), shift), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0))

    def in_one_event(shift):
        z = pyro.sample("z", dist.Normal(torch.full((3,), shift), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1))

    values = []
    for each in (program, in_one_event):
        pyro.set_rng_seed(1)
        values.append(
            MultiSampleKD(["y"], num_samples=3).loss(lambda each=each: each(0.5), freeze(lambda each=each: each(0.0)))
        )
    assert values[0] == pytest.approx(values[1])


class ByCell(nn.Module):
    """A latent of a recurrent cell, whose input has two dimensions at most: the rows can serve each other, and an outer plate cannot."""

    def __init__(self):
        super().__init__()
        self.cell, self.read_out = nn.RNNCell(2, 3), nn.Linear(3, 1)

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.read_out(self.cell(z)), 1.0).to_event(1))


def test_a_batch_with_fewer_rows_than_samples_is_an_error_that_names_the_loop():
    student, teacher = ByCell(), freeze(ByCell())
    loss = MultiSampleKD(["y"], num_samples=8)
    assert loss.loss(student, teacher, 20) > 0, "the rows serve each other"
    with pytest.raises(
        PlateMismatchError, match=r"does not broadcast over 8 samples.*MultiSampleKD\(..., vectorize=False\)"
    ):
        loss.loss(student, teacher, 5)
    report = str(bound_report(student, teacher, ["y"], 100, num_samples=20, sample_numbers=(4, 128)))
    assert "does not broadcast over 128 samples" in report
    assert "over 4 samples" not in report


def test_a_program_that_does_not_broadcast_is_an_error_that_names_the_loop():
    def program(net):
        def model():
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(net(z).view(5), 1.0))

        return model

    student, teacher = program(nn.Linear(3, 1)), freeze(program(nn.Linear(3, 1)))
    with pytest.raises(
        PlateMismatchError, match=r"does not broadcast over 3 samples.*MultiSampleKD\(..., vectorize=False\)"
    ):
        MultiSampleKD(["y"], num_samples=3, reuse_batch=False).loss(student, teacher)
    loss = MultiSampleKD(["y"], num_samples=3, reuse_batch=False, vectorize=False)
    assert loss.loss_and_grads(student, teacher) > 0


def test_point_masses_have_no_density_to_average():
    def program(shift):
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("y", dist.Delta(z))

    with pytest.raises(
        UnsupportedDivergenceError, match=r"target 'y' is a point mass \(Delta\), which has no density to average"
    ):
        MultiSampleKD(["y"], num_samples=3).loss(lambda: program(0.5), freeze(lambda: program(0.0)))


def test_a_subsample_within_a_row_is_an_error():
    def program(shift):
        with pyro.plate("rows", 5, dim=-2):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            with pyro.plate("pixels", 6, subsample_size=2, dim=-1):
                pyro.sample("y", dist.Normal(z, 1.0))

    with pytest.raises(PlateMismatchError, match="target 'y' lies in the plate 'pixels', which is subsampled inside a row"):
        MultiSampleKD(["y"], num_samples=3).loss(lambda: program(0.5), freeze(lambda: program(0.0)))


def test_targets_of_different_scales_are_an_error():
    def program(shift):
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))
            with poutine.scale(scale=2.0):
                pyro.sample("y", dist.Normal(z, 1.0))

    with pytest.raises(PlateMismatchError, match="the scale of target 'y' is not the same for all targets and rows"):
        MultiSampleKD(["x", "y"], num_samples=3).loss(lambda: program(0.5), freeze(lambda: program(0.0)))


def test_a_mask_that_depends_on_latents_is_an_error():
    def program(shift):
        with pyro.plate("rows", 50):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
            with poutine.mask(mask=w > 0):
                pyro.sample("y", dist.Normal(z, 1.0))

    for vectorize in (True, False):
        with pytest.raises(PlateMismatchError, match="which elements of target 'y' a mask hides depends on latents"):
            MultiSampleKD(["y"], num_samples=3, vectorize=vectorize).loss(lambda: program(0.5), freeze(lambda: program(0.0)))


def test_a_value_outside_of_a_support_under_other_latents_is_an_error():
    def program(high):
        with pyro.plate("rows", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Uniform(torch.zeros_like(z), z.exp() * high))

    with pytest.raises(
        SupportMismatchError, match="target 'y': a draw of the teacher's Uniform is outside the support of Uniform"
    ):
        MultiSampleKD(["y"], num_samples=3).loss(lambda: program(2.0), freeze(lambda: program(1.0)))


def test_inputs_of_rows_take_runs_even_if_they_are_equal_in_the_first_call():
    def program(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.5 + 0.4 * weight * x))
                pyro.sample("y", dist.Normal(z, 0.5))

        return model

    student, teacher = program(torch.tensor(-1.0, requires_grad=True)), freeze(program(1.0))
    loss, x = MultiSampleKD(["y"], num_samples=32), torch.tensor([1.0, -1.0]).repeat(200)
    loss.loss(student, teacher, torch.zeros(400))
    values = torch.tensor([loss.loss(student, teacher, x) / 400 for _ in range(10)])
    fresh = torch.tensor([MultiSampleKD(["y"], num_samples=32).loss(student, teacher, x) / 400 for _ in range(10)])
    error = (values.var() / 10 + fresh.var() / 10) ** 0.5
    assert abs(values.mean() - fresh.mean()) < 5 * error
    assert values.mean() > 0.3, "the two programs differ most where inputs do"
