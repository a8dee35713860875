"""The student is given only what is compared, so that losses are bounds also with masks, scales of 0 and weights of 0."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import LocalKD, freeze, site_report
from pyro_kd.divergences import kl
from pyro_kd.errors import UnsupportedNoiseError
from tests.support.losses import SurrogateKD

ROWS = 2000
KEPT = torch.arange(ROWS) % 2 == 0


def binary(heads, hide, target="y"):
    """A latent bit that is hidden in some way, and a bit that depends on it by the same table in both programs."""

    def program():
        with pyro.plate("rows", ROWS):
            z = hide("z", dist.Bernoulli(heads))
            pyro.sample(target, dist.Bernoulli(0.1 + 0.8 * z))

    return program


def exact(heads_p, heads_q):
    """KL of the distributions of y, with z summed out."""
    p, q = (dist.Bernoulli(0.1 + 0.8 * torch.tensor(heads)) for heads in (heads_p, heads_q))
    return float(kl(p, q, torch.tensor(0.0)))


def masked_by_handler(name, fn):
    with poutine.mask(mask=False):
        return pyro.sample(name, fn)


def masked_by_tensor(name, fn):
    with poutine.mask(mask=torch.zeros(ROWS, dtype=torch.bool)):
        return pyro.sample(name, fn)


def scaled(scale):
    def sample(name, fn):
        with pyro.validation_enabled(False), poutine.scale(scale=scale):  # Pyro's validation would ask for a mask instead
            return pyro.sample(name, fn)

    return sample


def masked_event(name, fn):
    pair = fn.expand([ROWS, 2]).mask(torch.tensor([True, False])).to_event(1)
    return pyro.sample(name, pair)[:, 1]


HIDDEN = {
    "fn.mask(False)": lambda name, fn: pyro.sample(name, fn.mask(False)),
    "fn.mask(tensor)": lambda name, fn: pyro.sample(name, fn.mask(torch.tensor(False))),
    "poutine.mask": masked_by_handler,
    "poutine.mask of a tensor": masked_by_tensor,
    "poutine.scale of 0": scaled(torch.zeros(())),
    "poutine.scale of zeros": scaled(torch.zeros(ROWS)),
    "an element of an event": masked_event,
    "some rows": lambda name, fn: pyro.sample(name, fn.mask(KEPT)),
    "two masks": lambda name, fn: pyro.sample(name, fn.mask(KEPT).mask(~KEPT)),
}


def mean_and_error(loss, student, teacher, blocks=10):
    values = torch.tensor([loss.loss(student, teacher) / ROWS for _ in range(blocks)])
    return float(values.mean()), float(values.std() / blocks**0.5)


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("loss", [LocalKD(["y"]), SurrogateKD(["y"])], ids=["local", "surrogate"])
def test_the_loss_bounds_the_exact_kl_whatever_is_hidden(loss, how):
    teacher, student = binary(0.8, HIDDEN[how]), binary(0.3, HIDDEN[how])
    mean, error = mean_and_error(loss, student, teacher)
    truth = exact(0.8, 0.3)
    assert mean >= truth + 5 * error, "given a hidden value, the student has a loss of 0"
    assert error < 0.05 * truth
    assert loss.loss(teacher, teacher) == 0.0


@pytest.mark.parametrize("how", [*HIDDEN, "weight 0"])
def test_a_hidden_target_is_not_given(how):
    """The bit z is a target too. If it is hidden, its distribution does not count."""
    if how == "weight 0":
        how, loss = "fn.mask(False)", SurrogateKD(["z", "y"], latent_weight=0.0)
    else:
        loss = SurrogateKD(["z", "y"])
    mean, error = mean_and_error(loss, binary(0.3, HIDDEN[how]), binary(0.8, HIDDEN[how]))
    assert mean >= exact(0.8, 0.3) + 5 * error


def test_local_latents_of_weight_0_share_noise():
    plain = binary(0.8, pyro.sample), binary(0.3, pyro.sample)
    values = []
    for kind in (LocalKD, SurrogateKD):
        pyro.set_rng_seed(1)
        values.append(kind(["y"], latent_weight={"z": 0.0}).loss(plain[1], plain[0]))
    assert values[0] == values[1] >= ROWS * exact(0.8, 0.3)


def test_each_row_is_given_or_drawn_by_its_own_mask():
    """Compared rows have the terms of the local loss, and all other rows those of the surrogate loss."""

    def program(loc):
        def model():
            with pyro.plate("rows", ROWS):
                z = pyro.sample("z", dist.Normal(loc, 1.0).mask(KEPT))
                pyro.sample("y", dist.Normal(z, 1.0))

        return model

    loc = torch.tensor(2.0, requires_grad=True)
    terms = LocalKD(["y"]).terms(program(loc), program(0.0))
    assert float(terms["z"].value.detach()) == pytest.approx(ROWS / 2 * 2.0)
    assert float(terms["y"].value.detach()) == pytest.approx(ROWS / 2 * 2.0, rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["y"].value, loc)
    assert float(gradient) == pytest.approx(ROWS / 2 * 2.0, rel=1e-4), "the drawn rows pass a gradient on"


def test_hidden_categories_may_differ_in_coding():
    """A masked index in the teacher, and a one-hot vector in the student: each element has the student's coding."""
    logits = torch.tensor([0.0, 1.0, -1.0])

    def program(family, score):
        def model():
            with pyro.plate("rows", ROWS):
                z = pyro.sample("z", family(logits=logits).mask(KEPT))
                pyro.sample("y", dist.Normal(score(z), 1.0))

        return model

    indices = program(dist.Categorical, lambda z: z.float())
    one_hot = program(dist.OneHotCategorical, lambda z: z @ torch.arange(3.0))
    for student, teacher in ((one_hot, indices), (indices, one_hot)):
        assert LocalKD(["y"]).loss(student, teacher) == pytest.approx(0.0, abs=1e-4)


def test_a_mask_that_hides_nothing_changes_nothing():
    def program(loc, mask):
        def model():
            with pyro.plate("rows", 5), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0))

        return model

    for mask in (True, torch.ones(5, dtype=torch.bool)):
        terms = LocalKD(["y"]).terms(program(1.0, mask), program(0.0, mask))
        assert {name: float(term.value) for name, term in terms.items()} == pytest.approx({"z": 2.5, "y": 0.0})


class Coin(dist.Bernoulli):
    """Draws in a way in which no noise can be recorded."""

    def sample(self, sample_shape=()):
        return torch.tensor(np.random.default_rng(0).random(self.batch_shape) < 0.5).float()


def test_hidden_elements_whose_noise_cannot_be_shared_draw_their_own():
    """Padded targets: the student has a different family, and the noise of a target cannot be recorded in the teacher."""
    mask = torch.arange(300) < 200

    def program(fn):
        def model():
            with pyro.plate("rows", 300):
                y = pyro.sample("y", fn.mask(mask))
                pyro.sample("x", dist.Normal(y.float(), 1.0))

        return model

    for teacher, student in ((Coin(0.5), dist.Bernoulli(0.5)), (dist.Poisson(1.0), dist.Geometric(0.5))):
        terms = SurrogateKD(["y", "x"]).terms(program(student), program(teacher))
        assert float(terms["x"].value) > 0.0, "the hidden draws differ"


def test_hidden_elements_that_cannot_be_drawn_are_an_error():
    def program(fn, mask):
        def model():
            with pyro.plate("rows", 2):
                pyro.sample("y", fn.mask(mask))
            pyro.sample("x", dist.Normal(0.0, 1.0))

        return model

    class Unsampled(dist.Normal):
        def rsample(self, sample_shape=()):
            raise NotImplementedError

        sample = rsample

    loss = SurrogateKD(["y", "x"])
    some, none = torch.tensor([True, False]), torch.tensor([True, True])
    with pytest.raises(UnsupportedNoiseError, match="site 'y': Unsampled cannot be sampled"):
        loss.loss(program(Unsampled(1.0, 1.0), some), program(dist.Normal(torch.zeros(2), 1.0), some))
    assert loss.loss(program(Unsampled(1.0, 1.0), none), program(dist.Normal(torch.zeros(2), 1.0), none)) == pytest.approx(
        1.0
    )


def test_a_captured_loss_draws_what_is_hidden():
    def program(loc):
        def model(mask):
            with pyro.plate("rows", len(mask)):
                z = pyro.sample("z", dist.Normal(loc, 1.0).mask(mask))
                pyro.sample("y", dist.Normal(z, 1.0))

        return model

    loc = torch.tensor(2.0, requires_grad=True)
    module = LocalKD(["y"])(program(loc), freeze(program(torch.tensor(0.0))))
    module.compile(backend=None)
    for kept in (3, 0, 5):
        mask = torch.arange(5) < kept
        assert float(module(mask).detach()) == pytest.approx(5 * 2.0), "half a square in each row, at z or at y"


def test_the_report_shows_what_is_given():
    report = site_report(
        LocalKD(["y"]), binary(0.3, HIDDEN["fn.mask(False)"]), binary(0.8, HIDDEN["fn.mask(False)"]), num_samples=2
    )
    assert report["z"].noise != "given"
    assert report["y"].noise == "given"
