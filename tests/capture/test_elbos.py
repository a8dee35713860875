"""ELBOs of Pyro, and whole trainings, with and without capture."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from models.vae import VAE
from pyro_kd import Distiller, freeze
from pyro_kd.errors import NonFiniteLossError
from pyro_kd.training import CompiledELBO, DistillationObjective, ELBOObjective, Trainer, linear
from tests.support.captured import MARKS, Net, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda elbo: type(elbo).__name__)
def test_a_captured_elbo_equals_the_eager_one(elbo, num_graphs):
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


def test_a_captured_elbo_of_an_autoguide_equals_the_eager_one():
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
    return ELBOObjective(Trace_ELBO(), model.model, model.guide)


def annealed_elbo_of_a_vae():
    model = VAE(6, 2, [4])
    return ELBOObjective(TraceMeanField_ELBO(), model.model, model.guide, latent_weight=linear(0.0, 1.0, 5))


def distillation_with_a_schedule():
    model, teacher = VAE(6, 2, [4]), VAE(6, 2, [4])
    arguments = lambda rows, x: (rows,)  # noqa: E731
    loss = SurrogateKD(["x"])
    weight = linear(0.0, 1.0, 5)
    return DistillationObjective(loss, model.model, freeze(teacher.model), arguments=arguments, latent_weight=weight)


@pytest.mark.parametrize("make", [elbo_of_a_vae, annealed_elbo_of_a_vae, distillation_with_a_schedule])
def test_a_trainer_trains_alike_with_and_without_capture(make, num_graphs):
    captured = fit(make, compile={"backend": None})
    assert 1 <= num_graphs() <= 2
    assert captured == pytest.approx(fit(make), rel=1e-5)


def test_a_distiller_trains_alike_with_and_without_capture():
    sgd, losses = (lambda params: torch.optim.SGD(params, lr=0.01)), []
    for compile in ({"backend": None}, False):
        pyro.clear_param_store()
        distiller = Distiller(Net(1), freeze(Net(0)), sgd, SurrogateKD(["x"]), compile=compile)
        losses.append(distiller.fit(rows(), steps=6, seed=1, progress=False)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_trainer_that_compiles_reports_nan():
    objective = elbo_of_a_vae()
    trainer = Trainer(objective, lambda params: torch.optim.SGD(params, lr=0.1), compile={"backend": None})
    x = torch.ones(5, 6)
    trainer.step(5, x)
    objective.model.__self__.decoder[0].weight.data.fill_(torch.nan)
    with pytest.raises((NonFiniteLossError, ValueError), match="nan|NaN"):
        trainer.step(5, x)
