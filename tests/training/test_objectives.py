"""The objective of a distillation and of an ELBO: values, schedules, arguments, and errors that name the right class."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_kd import Distiller, errors, freeze
from pyro_kd.training import (
    DistillationObjective,
    ELBOObjective,
    Objective,
    Trainer,
    cosine,
    linear,
)
from tests.support.losses import SurrogateKD
from tests.support.training_programs import decoder, fast_sgd, gaussian, mean, point, quiet_fit


def conjugate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def conjugate_guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def test_elbos_without_a_differentiable_loss_train_like_those_with_one():
    """TraceGraph_ELBO has no differentiable_loss; on a reparametrised guide it is Trace_ELBO."""
    losses = {}
    for kind in (Trace_ELBO, TraceGraph_ELBO):
        pyro.clear_param_store()
        objectives = {
            "elbo": ELBOObjective(kind(), conjugate, conjugate_guide, weight=0.5),
            "distillation": DistillationObjective(
                SurrogateKD(["x"]), lambda x: pyro.sample("x", dist.Normal(pyro.param("loc"), 1.0)), point(1.0)
            ),
        }
        trainer = Trainer(objectives, fast_sgd, accumulate=2)
        losses[kind] = (
            quiet_fit(trainer, torch.tensor(2.0), steps=4, seed=0)["loss"],
            trainer.evaluate(torch.tensor(2.0)).loss.mean,
        )
    assert losses[Trace_ELBO][0] == pytest.approx(losses[TraceGraph_ELBO][0], rel=1e-5)
    assert losses[Trace_ELBO][1] == pytest.approx(losses[TraceGraph_ELBO][1], rel=1e-5)
    quiet_fit(
        Trainer(ELBOObjective(RenyiELBO(alpha=0.5, num_particles=50), conjugate, conjugate_guide), fast_sgd),
        torch.tensor(2.0),
        steps=60,
    )
    assert pyro.param("loc").item() == pytest.approx(1.0, abs=0.2)


def test_latent_weight_follows_its_schedule_and_leaves_the_users_loss_alone():
    def program(z_loc, x_loc):
        def model():
            pyro.sample("z", dist.Normal(z_loc(), 1.0))
            pyro.sample("x", dist.Normal(x_loc(), 1.0))

        return model

    teacher = program(lambda: 2.0, lambda: 0.0)
    student = program(lambda: pyro.param("z_loc", torch.tensor(0.0)), lambda: pyro.param("x_loc", torch.tensor(0.0)))
    loss = SurrogateKD(["x"], latent_weight=7.0)
    distiller = Distiller(
        student, teacher, lambda params: torch.optim.SGD(params, lr=0.0), loss, latent_weight=linear(0, 1, 4)
    )
    history = quiet_fit(distiller, steps=6)
    assert loss.latent_weight == 7.0
    assert history["loss"] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])


def test_an_annealed_elbo_weights_its_kl():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 1.0))

    objective = ELBOObjective(TraceMeanField_ELBO(), model, guide, latent_weight=linear(0.0, 1.0, 2))
    history = quiet_fit(Trainer(objective, lambda params: torch.optim.SGD(params, lr=0.0)), torch.tensor(0.0), steps=3)
    likelihood = 0.5 * math.log(2 * math.pi)
    assert history["loss"] == pytest.approx([likelihood, likelihood + 1.0, likelihood + 2.0])


def test_joint_objectives_are_minimised_as_one_weighted_loss():
    """New data at 1, old knowledge at 3, with weights 1 and 3: the minimum is at 2.5."""

    def data(rows, x=torch.tensor(1.0)):  # noqa: B008
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=x)

    distiller = Distiller(
        mean,
        gaussian(3.0),
        fast_sgd,
        SurrogateKD(["x"]),
        weight=3.0,
        objectives={"new": ELBOObjective(Trace_ELBO(), data, lambda rows: None)},
    )
    history = quiet_fit(distiller, 1, steps=100)
    assert pyro.param("mu").item() == pytest.approx(2.5, abs=1e-4)
    log_normaliser = 0.5 * math.log(2 * math.pi)
    assert history["loss/distillation"][0] == pytest.approx(4.5)
    assert history["loss/new"][0] == pytest.approx(0.5 + log_normaliser)
    assert history["loss"][0] == pytest.approx(3 * 4.5 + 0.5 + log_normaliser)
    assert history["term/distillation/x"][0] == pytest.approx(13.5)


def test_an_objective_makes_its_arguments_from_the_batch():
    seen = []

    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=x)

    objective = ELBOObjective(Trace_ELBO(), model, lambda x: seen.append(len(x)))
    student = mean
    distiller = Distiller(
        student, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), arguments=lambda x: (len(x),), objectives={"new": objective}
    )
    history = quiet_fit(distiller, batches=[torch.zeros(4)], steps=1)
    assert history["loss/distillation"] == [18.0]
    assert set(seen) == {4}
    wrong = ELBOObjective(Trace_ELBO(), model, lambda x: None, arguments=lambda x: x)
    with pytest.raises(TypeError, match="must return a tuple"):
        Trainer(wrong, fast_sgd).step(torch.zeros(3))


def test_schedules_go_from_start_to_end():
    assert [linear(1.0, 3.0, 2)(step) for step in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert [cosine(1.0, 3.0, 2)(step) for step in range(4)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    with pytest.raises(ValueError, match="at least 1 step"):
        linear(0.0, 1.0, 0)


def test_an_elbo_is_validated_in_its_first_call_and_in_every_fiftieth_after_it():
    seen = []

    def model():
        seen.append(pyro.poutine.util.is_validation_enabled())
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    objective = ELBOObjective(Trace_ELBO(), model, guide)
    for step in range(51):
        objective.value(step, (), {})
    assert [index for index, is_validated in enumerate(seen) if is_validated] == [0, 50]
    assert pyro.poutine.util.is_validation_enabled()


def test_a_loss_of_the_wrong_kind_names_the_right_class():
    with pytest.raises(errors.InvalidProgramError, match=r"For an ELBO: ELBOObjective\(elbo, model, guide\)"):
        DistillationObjective(Trace_ELBO(), mean, point(1.0))
    with pytest.raises(errors.InvalidProgramError, match=r"SurrogateKD is a distillation loss: use DistillationObjective\("):
        ELBOObjective(SurrogateKD(["x"]), mean, point(1.0))
    with pytest.raises(errors.InvalidProgramError, match=r"has no differentiable_loss\(model, guide, ...\)"):
        ELBOObjective(nn.Linear(1, 1), mean, point(1.0))
    with pytest.raises(errors.InvalidProgramError, match="the teacher"):
        DistillationObjective(SurrogateKD(["x"]), mean, None)
    with pytest.raises(errors.InvalidProgramError, match="the guide"):
        ELBOObjective(Trace_ELBO(), mean, 3)
    with pytest.raises(TypeError, match=r"base class: use DistillationObjective\(.*ELBOObjective\("):
        Objective(SurrogateKD(["x"]), mean, point(1.0))
    with pytest.raises(TypeError, match=r"objective 'loss' is SurrogateKD.*DistillationObjective\("):
        Trainer(SurrogateKD(["x"]), fast_sgd)
    with pytest.raises(ValueError, match="objectives is empty"):
        Trainer({}, fast_sgd)


def test_terms_add_up_to_the_value_of_a_distillation():
    objective = DistillationObjective(SurrogateKD(["x"], latent_weight=0.5), decoder(1), freeze(decoder(0)))
    torch.manual_seed(3)
    value, terms = objective.evaluate(0, (10,), {})
    torch.manual_seed(3)
    assert torch.allclose(value, objective.value(0, (10,), {}))
    assert value.requires_grad
    assert value.item() == pytest.approx(sum(term.item() for term in terms.values()))
    assert "x" in terms


def test_an_elbo_has_a_value_and_no_terms():
    value, terms = ELBOObjective(TraceMeanField_ELBO(), conjugate, conjugate_guide).evaluate(0, (torch.tensor(2.0),), {})
    assert value.requires_grad
    assert terms == {}


@pytest.mark.parametrize("is_sparse", [False, True])
def test_gradients_that_an_elbo_puts_into_place_are_those_of_a_tensor(is_sparse):
    """The gradient that a parameter has already is kept, and a sparse one stays sparse."""
    table = nn.Embedding(4, 1, sparse=is_sparse)

    def guide(x):
        pyro.sample("z", dist.Normal(table(torch.tensor([1])).squeeze(), 1.0))

    objective = ELBOObjective(TraceGraph_ELBO(), conjugate, guide)
    table.weight.grad = torch.full_like(table.weight, 7.0)
    torch.manual_seed(0)
    value = objective.value(0, (torch.tensor(2.0),), {}, trained=[table.weight])
    assert torch.equal(table.weight.grad, torch.full_like(table.weight, 7.0))
    table.weight.grad = None
    (3.0 * value).backward()
    assert table.weight.grad.is_sparse == is_sparse
    torch.manual_seed(0)
    expected = ELBOObjective(Trace_ELBO(), conjugate, guide).value(0, (torch.tensor(2.0),), {})
    (gradient,) = torch.autograd.grad(3.0 * expected, table.weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(table.weight.grad.to_dense(), gradient.to_dense())


def test_gradients_that_an_elbo_puts_into_place_have_no_gradients_of_their_own():
    conjugate_guide(torch.tensor(2.0))
    loc = pyro.get_param_store()._params["loc"]
    objective = ELBOObjective(TraceGraph_ELBO(), conjugate, conjugate_guide)
    value = objective.value(0, (torch.tensor(2.0),), {}, trained=[loc])
    with pytest.raises(RuntimeError, match="can only be differentiated once"):
        torch.autograd.grad(value, loc, create_graph=True)
