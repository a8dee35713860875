"""One optimisation step: schedulers, clipping, accumulation, foreign optimisers, and losses that are not finite."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_kd import Distiller, errors, freeze
from pyro_kd.training import (
    Checkpoints,
    ELBOObjective,
    Trainer,
)
from tests.support.losses import SurrogateKD
from tests.support.training_programs import decoder, fast_sgd, gaussian, mean, names, point, quiet_fit


def test_schedulers_step_with_the_optimiser():
    def scheduler(optim):
        return torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)

    history = quiet_fit(Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), scheduler=scheduler), steps=3)
    assert history["lr"] == pytest.approx([0.1, 0.05, 0.025])
    assert pyro.param("mu").item() == pytest.approx(3 - 3 * 0.9 * 0.95 * 0.975)


def test_gradients_are_clipped():
    quiet_fit(Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), clip_norm=0.5), steps=2)
    assert pyro.param("mu").item() == pytest.approx(2 * 0.1 * 0.5, rel=1e-4)


def test_accumulated_batches_make_one_step_of_their_mean():
    def conditional(network):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(network() * x, 1.0))

        return model

    student, teacher = conditional(lambda: pyro.param("w", torch.tensor(0.0))), conditional(lambda: 1.0)
    data = [torch.full((4,), value) for value in (1.0, 2.0, 3.0, 4.0)]
    history = quiet_fit(Distiller(student, teacher, fast_sgd, SurrogateKD(["y"]), accumulate=2), batches=data, steps=2)
    assert history["loss"][0] == pytest.approx((4 * 0.5 + 4 * 2.0) / 2)
    first = 0.1 * (4 * 1 + 4 * 4) / 2
    assert history["loss"][1] == pytest.approx((1 - first) ** 2 * (4 * 4.5 + 4 * 8) / 2)


def test_an_optimiser_of_foreign_parameters_is_an_error():
    other = torch.nn.Linear(3, 2)
    distiller = Distiller(mean, gaussian(3.0), torch.optim.Adam(other.parameters()), SurrogateKD(["x"]))
    with pytest.raises(
        errors.OptimiserMismatchError, match=r"2 of the optimiser's 2 parameters are not the student's.*\(2, 3\)"
    ):
        distiller.step()
    own = decoder(0)
    distiller = Distiller(own, freeze(decoder(1)), torch.optim.Adam(own.net.parameters()), SurrogateKD(["x"]))
    pyro.clear_param_store()
    assert distiller.step(5) > 0
    with pytest.raises(TypeError, match=r"lambda params: Adam\(params"):
        Distiller(mean, gaussian(3.0), torch.optim.Adam, SurrogateKD(["x"]))
    with pytest.raises(errors.NoParametersError, match="Register its module"):
        net = nn.Linear(1, 1)
        unregistered = lambda: pyro.sample("x", dist.Normal(net(torch.ones(1)).squeeze(), 1.0))  # noqa: E731
        Distiller(unregistered, point(3.0), pyro.optim.Adam({"lr": 0.1}), SurrogateKD(["x"])).step()


def explosive(limit):
    def student(rows=1):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(mu * torch.inf if mu > limit else mu, 1.0, validate_args=False))

    return student


def test_a_loss_that_becomes_infinite_names_step_site_and_checkpoint(tmp_path):
    distiller = Distiller(explosive(1.0), gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    with pytest.raises(
        errors.NonFiniteLossError, match=r"step 5: .*target site 'x'.*parameters are those of step 4.*step-00000003"
    ):
        quiet_fit(distiller, steps=9, checkpoints=Checkpoints(tmp_path, every=3))
    assert pyro.param("mu").item() == pytest.approx(3 - 3 * 0.9**4)
    assert distiller.history.num_rows == 4
    assert names(tmp_path) == ["step-00000003"]


def test_an_elbo_that_becomes_infinite_names_the_site():
    def model():
        pyro.sample(
            "x",
            dist.Normal(pyro.param("mu", torch.tensor(1.0)) * torch.inf, 1.0, validate_args=False),
            obs=torch.tensor(0.0),
        )

    trainer = Trainer(ELBOObjective(Trace_ELBO(), model, lambda: None), fast_sgd)
    with pytest.raises(errors.NonFiniteLossError, match="step 1: the ELBO is nan: site 'x' of the model"):
        trainer.step()
    assert pyro.param("mu").item() == 1.0


def test_a_gradient_that_is_not_finite_names_the_parameter():
    def student():
        mu = pyro.param("mu", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(mu.abs().sqrt(), 1.0))

    distiller = Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"]))
    with pytest.raises(
        errors.NonFiniteLossError, match="step 1: .*gradient for parameter 'mu' is not.*no checkpoint was written"
    ):
        distiller.step()
    assert pyro.param("mu").item() == 0.0
