"""What SurrogateKD(["x"]) does when the user says nothing else, which docs/objectives.md advises."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_kd import Distiller, LocalKD, SurrogateKD, freeze
from pyro_kd.divergences import reverse_kl
from pyro_kd.errors import UnsupportedGradientError
from pyro_kd.training import Callback, Checkpoints, DistillationObjective, Validation, best_start, switch


class Mixed(nn.Module):
    """A count, a real number around it, and a target."""

    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            n = pyro.sample("n", dist.Poisson(self.loc.exp()))
            z = pyro.sample("z", dist.Normal(n + self.loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5))


def kinds(loss, student=None, teacher=None):
    terms = loss.terms(student or Mixed(0.5), freeze(teacher or Mixed(0.0)), 50)
    return {term.name: (term.kind, float(term.weight)) for term in terms.values() if term.weight != 0}


def adam(params):
    return torch.optim.Adam(params, lr=0.02)


def test_a_latent_without_a_derivative_is_given_and_any_other_is_a_function_of_the_noise():
    assert kinds(SurrogateKD(["y"])) == {"n": ("given", 1.0), "y": ("target", 1.0)}
    (particle,) = SurrogateKD(["y"]).particles(Mixed(0.5), freeze(Mixed(0.0)), 50)
    assert particle.run.given == {"n": True, "y": True}


def test_a_latent_with_a_gradient_of_its_own_is_a_function_of_the_noise():
    loss = SurrogateKD(["y"], discrete_gradient={"n": "implicit"}, latent_weight=0.5)
    assert kinds(loss) == {"n": ("latent", 0.5), "z": ("latent", 0.5), "y": ("target", 1.0)}


class Blocked(nn.Module):
    """A real number through whose draws no gradient passes, and a target: in the student, or in the teacher."""

    def __init__(self, loc, has_derivative=False):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.has_derivative = has_derivative

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).has_rsample_(self.has_derivative))
            pyro.sample("y", dist.Normal(z, 0.5))


@pytest.mark.parametrize("in_student", [True, False], ids=["in the student", "in the teacher"])
def test_a_latent_without_a_derivative_in_one_program_is_given(in_student):
    student, teacher = Blocked(0.5, not in_student), freeze(Blocked(0.0, in_student))
    loss = SurrogateKD(["y"])
    assert {term.name: term.kind for term in loss.terms(student, teacher, 50).values()} == {"z": "given", "y": "target"}
    assert loss.loss_and_grads(student, teacher, 50) == pytest.approx(50 * 0.5**2 / 2)
    assert student.loc.grad.item() == pytest.approx(50 * 0.5)


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
@pytest.mark.parametrize("schedule", [{}, {"teacher_forcing": switch(1.0, 0.0, 2)}], ids=["left open", "a schedule"])
def test_a_latent_without_a_derivative_in_the_student_is_given_in_all_steps(schedule, options):
    distiller = Distiller(
        Blocked(0.5), freeze(Blocked(0.0, True)), adam, SurrogateKD(["y"]), log_every=1, **schedule, **options
    )
    history = distiller.fit(200, steps=6, progress=False)
    given = next(history[name] for name in ("term/z", "term/z (given)") if name in history)
    assert (torch.tensor(given) > 0).all()


def test_a_gradient_that_the_student_asks_for_at_such_a_latent_is_taken():
    """What is given does not ask whether there is such a gradient; a step does."""
    loss = SurrogateKD(["y"], discrete_gradient="score", latent_weight=0.5, num_particles=2)
    with torch.no_grad():
        assert kinds(loss, Blocked(0.5), Blocked(0.0, True)) == {"z": ("latent", 0.5), "y": ("target", 1.0)}
    for call in ("terms", "differentiable_loss"):
        with pytest.raises(UnsupportedGradientError, match="site 'z': Normal has no gradient 'score'"):
            getattr(loss, call)(Blocked(0.5), Blocked(0.0, True), 200)


def test_the_loss_of_the_paper_can_be_named():
    loss = SurrogateKD(["y"], latent_weight=0.1, teacher_forcing=0.0)
    assert kinds(loss) == {"n": ("latent", pytest.approx(0.1)), "z": ("latent", pytest.approx(0.1)), "y": ("target", 1.0)}


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_a_fit_gives_every_latent_in_its_first_quarter(options):
    student, teacher, loss = Mixed(0.5), freeze(Mixed(0.0)), SurrogateKD(["y"])
    distiller = Distiller(student, teacher, adam, loss, log_every=1, **options)
    history = distiller.fit(200, steps=8, progress=False)
    given, target = torch.tensor(history["term/z"]), torch.tensor(history["term/y"])
    assert given.isnan().tolist() == [False] * 2 + [True] * 6
    assert not target[:2].any(), "given z, the target's distributions are equal"
    assert (target[2:] > 0).all()
    assert not torch.tensor(history["term/n"]).isnan().any(), "what has no derivative is given in all steps"
    distiller.fit(200, steps=8, progress=False)
    assert torch.tensor(distiller.history["term/z"]).isnan().sum() == 14, "the second fit goes on"
    assert loss.local_first == 0.0, "the loss that was passed stays as it is"


def test_the_first_quarter_is_that_of_all_steps_when_a_fit_is_resumed(tmp_path):
    class StopError(Exception):
        pass

    class Stop(Callback):
        def on_step(self, trainer, row):
            if trainer.num_steps == 3:
                raise StopError

    pyro.set_rng_seed(0)
    first = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), log_every=1)
    with pytest.raises(StopError):
        first.fit(200, steps=16, progress=False, checkpoints=Checkpoints(tmp_path / "run", every=2), callbacks=[Stop()])
    second = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), log_every=1)
    history = second.fit(200, steps=16, progress=False, checkpoints=Checkpoints(tmp_path / "run", every=2), resume=True)
    whole = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), log_every=1)
    pyro.set_rng_seed(0)
    expected = whole.fit(200, steps=16, progress=False)
    assert torch.tensor(history["term/z"]).isnan().tolist() == [False] * 4 + [True] * 12
    assert history["loss"] == expected["loss"]


def test_a_schedule_of_the_users_takes_its_place():
    loss = SurrogateKD(["y"], latent_weight=0.5)
    distiller = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, loss, teacher_forcing=switch(0.0, 1.0, 4), log_every=1)
    history = distiller.fit(200, steps=8, progress=False)
    given = torch.tensor(history["term/n (given)"])
    assert not given[:4].any()
    assert (given[4:] > 0).all()


def test_single_steps_and_svi_have_no_first_quarter():
    student, teacher = Mixed(0.5), freeze(Mixed(0.0))
    distiller = Distiller(student, teacher, adam, SurrogateKD(["y"]), log_every=1)
    for _ in range(4):
        distiller.step(200)
    assert "term/z" not in distiller.history

    def registered(rows):
        pyro.module("student", student)
        student(rows)

    loss = SurrogateKD(["y"])
    SVI(registered, teacher, pyro.optim.Adam({"lr": 0.01}), loss=loss).step(200)
    assert loss.local_first == 0.0


def test_an_evaluation_is_of_the_objective_at_the_end():
    student, teacher = Mixed(0.5), freeze(Mixed(0.0))
    distiller = Distiller(student, teacher, adam, SurrogateKD(["y"]))
    distiller.fit(200, steps=8, progress=False, validation=[200])
    assert set(distiller.evaluate(200).terms) == {"n", "y"}


def test_the_objective_knows_nothing_of_losses_without_teacher_forcing():
    objective = DistillationObjective(LocalKD(["y"]), Mixed(0.5), freeze(Mixed(0.0)))
    objective.begin_fit(100)
    assert objective.loss.teacher_forcing == 0.0


def test_a_latent_that_cannot_be_compared_is_never_given():
    """Of another width, for instance: it is a function of the noise in the first quarter, too."""

    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(width))

        def forward(self, rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(self.weights)), 1.0).to_event(1))
                w = pyro.sample("w", dist.Normal((z * self.weights).sum(-1), 1.0))
                pyro.sample("y", dist.Normal(w, 0.5))

    distiller = Distiller(Wide(1), freeze(Wide(2)), adam, SurrogateKD(["y"]), log_every=1)
    history = distiller.fit(100, steps=8, progress=False)
    assert "term/z" not in history
    assert torch.tensor(history["term/w"]).isnan().tolist() == [False] * 2 + [True] * 6


def test_finding_out_what_can_be_given_leaves_no_trace():
    """The first step has the random numbers that it would have had."""
    student, teacher = Mixed(0.5), freeze(Mixed(0.0))
    distiller = Distiller(student, teacher, adam, SurrogateKD(["y"]), log_every=1)
    history = distiller.fit(200, steps=8, seed=3, progress=False)
    again = Distiller(Mixed(0.5), teacher, adam, SurrogateKD(["y"], teacher_forcing=1.0), log_every=1)
    assert again.fit(200, steps=8, seed=3, progress=False)["loss"][0] == history["loss"][0]


def test_under_a_schedule_too_what_has_neither_gradient_nor_term_stays_given():
    distiller = Distiller(
        Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), teacher_forcing=switch(1.0, 0.0, 4), log_every=1
    )
    history = distiller.fit(200, steps=8, progress=False)
    assert not torch.tensor(history["term/n"]).isnan().any()
    assert not torch.tensor(history["term/z (given)"])[4:].any()


def test_the_number_of_local_steps_can_be_given():
    distiller = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), local_steps=3, log_every=1)
    for _ in range(4):
        distiller.fit(200, steps=2, progress=False)
    assert torch.tensor(distiller.history["term/z"]).isnan().tolist() == [False] * 3 + [True] * 5


def test_a_short_first_fit_has_no_local_steps_and_later_fits_add_none():
    distiller = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), log_every=1)
    distiller.fit(200, steps=3, progress=False)
    distiller.fit(200, steps=40, progress=False)
    assert "term/z" not in distiller.history


def test_a_start_can_know_of_the_steps_that_follow():
    def make():
        return Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), log_every=1)

    distiller = best_start(make, 200, starts=2, steps=8, total_steps=80)
    distiller.fit(200, total_steps=80, progress=False)
    assert (~torch.tensor(distiller.history["term/z"]).isnan()).sum() == 20


def test_early_stopping_begins_after_the_local_steps():
    distiller = Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), log_every=1)
    worse = iter(range(1, 1000))
    validation = Validation(lambda: float(next(worse)), every=1, patience=3)
    distiller.fit(200, steps=40, progress=False, validation=validation)
    assert distiller.num_steps == 10 + 3


def test_the_form_of_latents_without_a_weight_is_an_error():
    with pytest.raises(
        ValueError, match="latent_form='value' is about the latent terms, whose weight is 0: give latent_weight"
    ):
        SurrogateKD(["y"], latent_form="value")


def test_values_are_compared_after_the_local_steps():
    class Real(nn.Module):
        def __init__(self, loc):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(loc))

        def forward(self, rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5))

    loss = SurrogateKD(["y"], latent_form="value", latent_weight=0.5)
    distiller = Distiller(Real(0.5), freeze(Real(0.0)), adam, loss, log_every=1)
    assert not torch.tensor(distiller.fit(200, steps=8, progress=False)["term/z"]).isnan().any()


def test_a_number_in_place_of_a_schedule_is_an_error():
    with pytest.raises(
        TypeError, match="teacher_forcing must be a schedule, a function of the step, not 0.5: give the number to the"
    ):
        Distiller(Mixed(0.5), freeze(Mixed(0.0)), adam, SurrogateKD(["y"]), teacher_forcing=0.5)


class OfComponents(nn.Module):
    """A latent from a mixture of two normals, of which the student learns the weights and the offset of what comes out."""

    def __init__(self, family, logit, offset):
        super().__init__()
        self.family, self.logit, self.offset = family, nn.Parameter(torch.tensor(logit)), nn.Parameter(torch.tensor(offset))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            locs = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]).expand(rows, 2, 2)
            logits = torch.stack([self.logit, torch.zeros(())]).expand(rows, 2)
            scale = torch.full((rows, 2), 0.5)
            if self.family is dist.MixtureOfDiagNormals:
                scale = scale.unsqueeze(-2).expand(rows, 2, 2)
            z = pyro.sample("z", self.family(locs, scale, logits))
            pyro.sample("y", dist.Normal(z[..., 0] + self.offset, 0.5))


@pytest.mark.parametrize("family", [dist.MixtureOfDiagNormals, dist.MixtureOfDiagNormalsSharedCovariance])
def test_a_latent_whose_component_is_drawn_is_given_and_its_weights_are_trained(family):
    """Pyro's own gradient for the weights does not hold where the loss depends on the noise as well."""
    student, teacher = OfComponents(family, 0.0, 0.0), freeze(OfComponents(family, 2.0, 0.5))
    loss = SurrogateKD(["y"])
    assert kinds(loss, student, teacher) == {"z": ("given", 1.0), "y": ("target", 1.0)}
    distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.05), loss)
    distiller.fit(100, steps=150, progress=False)
    assert student.logit.item() == pytest.approx(2.0, abs=0.5)
    assert student.offset.item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("wrap", [lambda fn: fn, lambda fn: fn.to_event(1), lambda fn: fn.mask(True)])
def test_the_reverse_kl_of_a_mixture_is_not_taken_at_a_draw_without_a_derivative(wrap):
    """Against a central difference: with respect to the weights, on many draws of the teacher."""

    def mixture(logit, rows=100_000):
        locs, scale = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).expand(rows, 2, 2), torch.ones(rows, 2)
        logits = torch.stack([logit, torch.zeros(())]).expand(rows, 2)
        return wrap(dist.MixtureOfDiagNormalsSharedCovariance(locs, scale, logits))

    torch.manual_seed(0)
    p, logit = mixture(torch.tensor(0.5)), torch.tensor(0.0, requires_grad=True)
    x = p.sample()
    (gradient,) = torch.autograd.grad(reverse_kl(p, mixture(logit), x).mean(), logit)
    with torch.no_grad():
        upper, lower = (reverse_kl(p, mixture(torch.tensor(value)), x).mean() for value in (0.1, -0.1))
    assert gradient.item() == pytest.approx(((upper - lower) / 0.2).item(), rel=0.05)
