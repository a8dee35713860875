"""The training loop against loops by hand, and what it costs."""

import statistics
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

from pyro_kd import Distiller, LocalKD, errors, freeze
from pyro_kd.training import Callback, ELBOObjective, Trainer
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, decoder, fast_sgd, gaussian, mean, quiet_fit


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_fit_gives_the_losses_and_parameters_of_a_loop_by_hand(kind):
    teacher = freeze(decoder(0))
    pyro.clear_param_store()
    student = decoder(1)
    module, optim = kind(["x"])(student, teacher), adam(student.net.parameters())
    pyro.set_rng_seed(5)
    losses = []
    for _ in range(12):
        optim.zero_grad()
        loss = module(10)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    by_hand = [parameter.detach().clone() for parameter in student.net.parameters()]

    pyro.clear_param_store()
    student = decoder(1)
    history = quiet_fit(Distiller(student, teacher, adam, kind(["x"]), log_every=5), 10, steps=12, seed=5)
    assert history["loss"] == pytest.approx(losses, rel=1e-6)
    assert all(
        torch.allclose(mine, theirs, atol=1e-6) for mine, theirs in zip(student.net.parameters(), by_hand, strict=True)
    )


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_a_compiled_fit_finds_out_the_nesting_of_plates_on_the_noise_of_an_eager_one(kind):
    losses = []
    for compile in (False, {"backend": None}):
        pyro.clear_param_store()
        loss = kind(["x"], num_particles=2, vectorize_particles=True)
        distiller = Distiller(decoder(1), freeze(decoder(0)), adam, loss, compile=compile)
        losses.append(quiet_fit(distiller, 10, steps=4, seed=5)["loss"])
    assert losses[0] == losses[1]


def test_an_option_that_a_callback_changes_counts_in_steps_and_evaluations_compiled_or_not():
    class Changing(Callback):
        def on_step(self, trainer, row):
            if row["step"] == 2:
                trainer.objectives["distillation"].loss.latent_weight = 100.0

    def program(loc, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def student(rows):
        program(pyro.param("loc", torch.tensor(0.0)), rows)

    found, teacher = [], freeze(lambda rows: program(1.0, rows))
    for compile, callbacks in ((False, [Changing()]), ({"backend": None}, [Changing()]), (False, [])):
        pyro.clear_param_store()
        distiller = Distiller(student, teacher, adam, SurrogateKD(["x"], latent_weight=0.1), compile=compile)
        history = distiller.fit(10, steps=5, seed=5, progress=False, callbacks=callbacks)
        found.append((history["loss"], distiller.evaluate(10).loss.mean))
    assert found[0] == found[1] != found[2]


def test_pyro_optimisers_train_as_svi_does():
    teacher = freeze(decoder(0))
    results = []
    for by_hand in (True, False):
        pyro.clear_param_store()
        student, optim = decoder(1), pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9})
        if by_hand:
            pyro.set_rng_seed(5)
            svi = SVI(student, teacher, optim, SurrogateKD(["x"]))
            losses = [svi.step(10) for _ in range(12)]
        else:
            losses = quiet_fit(Distiller(student, teacher, optim, SurrogateKD(["x"])), 10, steps=12, seed=5)["loss"]
        results.append((losses, [parameter.detach().clone() for parameter in student.net.parameters()]))
    (one, first), (two, second) = results
    assert one == pytest.approx(two, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


def test_step_returns_the_loss_before_the_update():
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    assert [distiller.step(2), distiller.step(2)] == pytest.approx([9.0, 5.76])
    assert pyro.param("mu").item() == pytest.approx(3 - 3 * 0.8**2)
    assert distiller.num_steps == 2
    assert distiller.history["loss"] == pytest.approx([9.0, 5.76])


def test_an_elbo_trains_a_guide_to_the_exact_posterior():
    """Conjugate: z ~ N(0, 1), x ~ N(z, 1) observed once at 2; the posterior is N(1, 1/2)."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc, scale = (
            pyro.param("loc", torch.tensor(0.0)),
            pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive),
        )
        pyro.sample("z", dist.Normal(loc, scale))

    loss = TraceMeanField_ELBO(num_particles=200, vectorize_particles=True)
    trainer = Trainer(
        ELBOObjective(loss, model, guide),
        adam,
        scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 300),
    )
    quiet_fit(trainer, torch.tensor(2.0), steps=300)
    assert pyro.param("loc").item() == pytest.approx(1.0, abs=0.02)
    assert pyro.param("scale").item() == pytest.approx(0.5**0.5, abs=0.02)
    assert set(trainer.parameters) == {"loc", "scale"}


def test_a_distiller_with_swapped_arguments_names_the_right_order():
    with pytest.raises(errors.InvalidProgramError, match=r"Distiller\(student, teacher, optim, loss\)"):
        Distiller(mean, gaussian(0.0), SurrogateKD(["x"]), adam)


@pytest.mark.slow
@pytest.mark.xdist_group("timing")
def test_the_loop_costs_less_than_three_per_cent():
    """Of a step of five milliseconds and more, medians of alternating blocks, the best of three."""

    def wide():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64))

        def model(rows):
            pyro.module("wide", net)
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(64), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1))

        model.net = net
        return model

    threads = torch.get_num_threads()
    teacher = freeze(wide())
    pyro.clear_param_store()
    student = wide()
    module, optim = SurrogateKD(["x"])(student, teacher), adam(student.net.parameters())
    distiller = Distiller(student, teacher, adam, SurrogateKD(["x"]))

    def by_hand():
        optim.zero_grad()
        module(1000).backward()
        optim.step()

    def timed(step, count=20):
        begin = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - begin) / count

    def ours():
        return timed(lambda: distiller.step(1000))

    torch.set_num_threads(1)
    ours(), timed(by_hand)
    ratios, seconds = [], []
    for _ in range(3):
        blocks = [(timed(by_hand), ours()) for _ in range(5)]
        seconds.append(statistics.median(hand for hand, _ in blocks))
        ratios.append(statistics.median(loop for _, loop in blocks) / statistics.median(hand for hand, _ in blocks))
    torch.set_num_threads(threads)
    assert min(seconds) > 5e-3, seconds
    assert min(ratios) < 1.03, ratios
