"""Observed values must be data, the same in both programs. All else is an error, since its distribution would not be compared."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.forecast import ForecastingModel
from torch import nn

from pyro_kd import LocalKD, bound_report, freeze, site_report, to_inference_data
from pyro_kd.divergences import wasserstein2
from pyro_kd.errors import ObservedValueError, PlateMismatchError
from pyro_kd.metrics import marginal_kl
from tests.support.losses import SurrogateKD

X, DATA = torch.linspace(0, 1, 20), torch.zeros(20)
both = pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])


class Residual(nn.Module):
    """Observes the data minus a prediction. A test chooses how the prediction is stored, and how it is observed."""

    def __init__(self, slope, residual=lambda data, prediction: data - prediction):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.residual = residual

    def forward(self, x, data):
        residual = self.residual(data, self.slope * x)
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(0.0, self.scale), obs=residual)


@both
@pytest.mark.parametrize("targets", [None, ["y"]], ids=["observed", "named"])
@pytest.mark.parametrize("slope", [-5.0, 5.0], ids=["different weights", "equal weights"])
def test_a_residual_that_is_observed_is_an_error(kind, targets, slope):
    with pytest.raises(ObservedValueError, match=r"site 'y' in the student depends on its parameters.*obs=data\)"):
        kind(targets)(Residual(slope), freeze(Residual(5.0)))(X, DATA)


def test_the_same_regression_over_the_data_learns():
    class Regression(Residual):
        def forward(self, x, data):
            with pyro.plate("rows", len(data)):
                pyro.sample("y", dist.Normal(self.slope * x, self.scale), obs=data)

    student = Regression(-5.0)
    loss = SurrogateKD()(student, freeze(Regression(5.0)))(X, DATA)
    assert float(loss.detach()) == pytest.approx(float((10 * X).square().sum() / 2))
    loss.backward()
    assert student.slope.grad != 0


@both
def test_a_detached_residual_is_a_different_value(kind):
    def detached(data, prediction):
        return (data - prediction).detach()

    with pytest.raises(ObservedValueError, match="site 'y' differs between teacher and student"):
        kind()(Residual(-5.0, detached), freeze(Residual(5.0, detached)))(X, DATA)


def test_without_gradients_the_values_are_compared():
    with pytest.raises(ObservedValueError, match="differs"):
        SurrogateKD().loss(Residual(-5.0), freeze(Residual(5.0)), X, DATA)
    assert SurrogateKD().loss(Residual(5.0), freeze(Residual(5.0)), X, DATA) == 0.0


def test_a_residual_in_the_teacher_only_is_an_error():
    def data_alone(data, prediction):
        return data

    with pytest.raises(ObservedValueError, match="differs"):
        SurrogateKD()(Residual(5.0, data_alone), freeze(Residual(5.0)))(X, DATA)


def test_data_shifted_by_a_buffer_must_be_equal_in_both_programs():
    class Standardised(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.register_buffer("mean", torch.tensor(mean))
            self.loc = nn.Parameter(torch.tensor(0.0))

        def forward(self, data):
            with pyro.plate("rows", len(data)):
                pyro.sample("y", dist.Normal(self.loc, 1.0), obs=data - self.mean)

    with pytest.raises(ObservedValueError, match="differs"):
        SurrogateKD()(Standardised(1.0), freeze(Standardised(0.0)))(DATA)
    SurrogateKD()(Standardised(1.0), freeze(Standardised(1.0)))(DATA).backward()


@pytest.mark.parametrize("targets", [None, ["x"]], ids=["a target", "an input"])
def test_an_observed_value_that_depends_on_a_draw_is_an_error(targets):
    def program(loc):
        def model(data):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=data - z)
            pyro.sample("x", dist.Normal(z, 1.0))

        return model

    student = program(torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ObservedValueError, match="site 'y'"):
        SurrogateKD(targets)(student, program(0.0))(torch.tensor(0.0))
    with pytest.raises(ObservedValueError, match="site 'y' differs"):
        SurrogateKD(targets).loss(program(1.0), program(0.0), torch.tensor(0.0))


def test_a_value_set_by_condition_is_observed():
    def program(loc):
        def model():
            pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc, 1.0))

        return lambda: poutine.condition(model, {"y": -torch.as_tensor(loc)})()

    with pytest.raises(ObservedValueError, match="site 'y' in the student depends"):
        SurrogateKD(["x"])(program(torch.tensor(1.0, requires_grad=True)), program(1.0))()


def test_a_parameter_that_only_the_student_observes_is_an_error():
    def program(weight, penalised):
        def model():
            if penalised:
                pyro.sample("penalty", dist.Normal(0.0, 1.0), obs=weight)
            pyro.sample("x", dist.Normal(weight, 1.0))

        return model

    with pytest.raises(ObservedValueError, match="site 'penalty' in the student"):
        SurrogateKD(["x"])(program(torch.tensor(1.0, requires_grad=True), True), program(torch.tensor(0.0), False))()


class Trend(ForecastingModel):
    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def model(self, zero_data, covariates):
        self.predict(dist.Normal(0.0, 1.0), self.slope * covariates)


def test_pyro_forecast_models_observe_residuals():
    with pytest.raises(ObservedValueError, match="site 'residual'"):
        SurrogateKD()(Trend(2.0), freeze(Trend(1.0)))(torch.zeros(10, 1), torch.ones(10, 1))


def test_a_captured_loss_raises_too():
    module = SurrogateKD()(Residual(-5.0), freeze(Residual(5.0)))
    module.compile(backend=None)
    with pytest.raises(ObservedValueError):
        module(X, DATA)


@pytest.mark.parametrize(
    "look",
    [
        lambda student, teacher: site_report(SurrogateKD(), student, teacher, X, DATA),
        lambda student, teacher: bound_report(student, teacher, None, X, DATA),
        lambda student, teacher: to_inference_data(SurrogateKD(), student, teacher, X, DATA, num_samples=2),
        lambda student, teacher: SurrogateKD().terms(student, teacher, X, DATA),
        lambda student, teacher: marginal_kl(student, teacher, "y", X, DATA),
    ],
    ids=["site_report", "bound_report", "to_inference_data", "terms", "marginal_kl"],
)
def test_reports_raise_too(look):
    with pytest.raises(ObservedValueError):
        look(Residual(-5.0), freeze(Residual(5.0)))


# Values that are allowed.


class Location(nn.Module):
    """y ~ N(loc, 1), with the observed value that a test chooses."""

    def __init__(self, loc, prepared=lambda data: data, **buffers):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.prepared = prepared

    def forward(self, data):
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(self.loc, 1.0), obs=self.prepared(data))


def test_both_programs_may_prepare_data_in_the_same_way():
    loss = SurrogateKD()(Location(1.0, lambda data: data / 255), freeze(Location(0.0, lambda data: data / 255)))
    assert float(loss(torch.arange(4.0)).detach()) == pytest.approx(2.0)


def test_missing_data_may_be_nan():
    data = torch.tensor([0.0, float("nan"), 1.0])
    assert float(SurrogateKD()(Location(1.0, torch.clone), freeze(Location(0.0)))(data).detach()) == pytest.approx(1.5)


def test_arguments_may_require_gradients():
    """Features of an encoder that is trained elsewhere, given to both programs."""
    features = nn.Linear(1, 1)(torch.ones(4, 1)).squeeze(-1)
    student = Location(1.0, lambda data: 2 * data)
    SurrogateKD()(student, freeze(Location(0.0, lambda data: 2 * data)))(features).backward()
    assert student.loc.grad == 4.0


def test_a_student_may_have_a_different_precision_and_coding():
    def program(fn, observed):
        def model(labels):
            with pyro.plate("rows", len(labels)):
                pyro.sample("y", fn, obs=observed(labels))

        return model

    probs = torch.tensor([0.2, 0.3, 0.5])
    teacher = program(dist.Categorical(probs), lambda labels: labels)
    student = program(
        dist.OneHotCategorical(probs.double()), lambda labels: nn.functional.one_hot(labels, 3).to(torch.float64)
    )
    assert SurrogateKD().loss(student, teacher, torch.tensor([0, 2, 1])) == pytest.approx(0.0, abs=1e-6)
    other = program(dist.OneHotCategorical(probs), lambda labels: nn.functional.one_hot(2 - labels, 3).float())
    with pytest.raises(ObservedValueError):
        SurrogateKD().loss(other, teacher, torch.tensor([0, 2, 1]))


def test_a_value_that_its_distribution_repeats_is_an_error():
    """Parents that do not broadcast with the plate: each row would count as often as there are rows."""

    def program(loc):
        def model(data):
            with pyro.plate("rows", len(data)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0), obs=data)

        return model

    with pytest.raises(
        PlateMismatchError, match=r"'x' has batch shape \(4, 4\), and observes a value of batch shape \(4,\)"
    ):
        SurrogateKD().loss(program(1.0), program(0.0), torch.zeros(4))


# Factors.


def test_one_warning_states_that_a_factor_is_ignored():
    def program(loc):
        def model():
            pyro.factor("likelihood", -(loc - 3.0).square())
            pyro.sample("x", dist.Normal(loc, 1.0))

        return model

    loss = SurrogateKD(["x"], divergence=wasserstein2)
    student, teacher = program(torch.tensor(1.0)), program(torch.tensor(0.0))
    with pytest.warns(UserWarning, match="pyro.factor 'likelihood' has no part in the loss") as caught:
        assert loss.loss(student, teacher) == loss.loss(student, teacher) == 1.0
    assert len(caught) == 1
