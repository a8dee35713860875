"""Samplers that users register or leave to the tape: one that draws nothing, one that torch does not know, and angles in plates."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_kd import LocalKD, freeze, record_noise, register_sampler, replay_noise
from pyro_kd.errors import SupportMismatchError, UnsupportedNoiseError
from tests.support.losses import SurrogateKD


class Constant(dist.TorchDistribution):
    """Draws nothing."""

    arg_constraints = {}
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, value):
        self.value = value
        super().__init__(value.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.value.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return self.value.expand(*sample_shape, *self.value.shape)

    def log_prob(self, value):
        return torch.zeros_like(value)


class Registered(Constant):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape)


@register_sampler(Registered)
def _sample_registered(fn, sample_shape):
    return fn.value.expand(*sample_shape, *fn.value.shape)


def with_background(family, loc):
    def model():
        with pyro.plate("rows", 3):
            background = pyro.sample("background", family(torch.full((3,), 2.0)))
            pyro.sample("x", dist.Normal(loc + background, 1.0))

    return model


@pytest.mark.parametrize("options", [{}, {"latent_weight": 0.0}, {"fresh": ["background"]}], ids=str)
def test_a_registered_sampler_may_draw_nothing(options):
    student = with_background(Registered, torch.tensor(1.0, requires_grad=True))
    teacher = with_background(Registered, torch.tensor(0.0))
    module = SurrogateKD(["x"], **options)(student, teacher)
    assert module().item() == pytest.approx(3 * 0.5)


def test_a_constant_needs_no_registration():
    """Its sampler returns a view of what the distribution holds, so there was nothing to draw."""
    student = with_background(Constant, torch.tensor(1.0, requires_grad=True))
    teacher = with_background(Constant, torch.tensor(0.0))
    assert SurrogateKD(["x"])(student, teacher)().item() == pytest.approx(3 * 0.5)


class OfNumPy(Constant):
    def rsample(self, sample_shape=()):
        return torch.as_tensor(
            np.random.default_rng().normal(size=(*sample_shape, *self.value.shape)), dtype=self.value.dtype
        )


def test_a_sampler_without_visible_draws_is_refused_with_advice():
    with record_noise(), pytest.raises(UnsupportedNoiseError, match="'background'.*register_sampler.OfNumPy"):
        with_background(OfNumPy, torch.tensor(0.0))()


class Shifted(dist.Distribution):
    """All that Pyro asks for."""

    has_rsample = True

    def __init__(self, loc):
        self.loc = loc

    def sample(self, *args, **kwargs):
        return self.loc + torch.randn(())

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


class Shaped(Shifted):
    batch_shape = event_shape = torch.Size()


class Scored(Shaped):
    has_rsample = False


def chain(family, loc):
    def model():
        z = pyro.sample("z", family(loc))
        pyro.sample("y", dist.Normal(z, 1.0))

    return model


@pytest.mark.parametrize("family", [Shifted, Shaped])
@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_a_distribution_of_pyro_but_not_torch_is_estimated(family, loss):
    loc = torch.tensor(1.0, requires_grad=True)
    student, teacher = chain(family, loc), chain(family, torch.tensor(0.0))
    terms = loss(["z", "y"], num_particles=400).terms(student, teacher)
    assert terms["y"].value.item() == 0
    assert not terms["z"].analytic
    assert abs(terms["z"].value.item() - 0.5) < 5 / 400**0.5
    (gradient,) = torch.autograd.grad(terms["z"].value, loc)
    assert abs(gradient.item() - 1) < 5 / 400**0.5


def test_its_latents_share_noise_and_pass_gradients_if_it_has_rsample():
    for family, passes in ((Shaped, True), (Scored, False)):
        loc = torch.tensor(3.0, requires_grad=True)
        with record_noise() as noise:
            first = pyro.sample("z", family(torch.tensor(0.0)))
        with replay_noise(noise=noise):
            second = pyro.sample("z", family(loc))
        torch.testing.assert_close(second.detach(), first + 3)
        assert second.requires_grad is passes


def test_sine_bivariate_von_mises_shares_noise_in_plates():
    """In two batch dimensions, of which one is expanded: all elements are drawn, replayed, and of the law of one."""
    angle, rate = torch.zeros(2), torch.tensor([2.0, 3.0])
    one = dist.SineBivariateVonMises(angle, angle, rate.expand(2), rate.flip(0), correlation=torch.full((2,), 0.5))

    def model(rows):
        with pyro.plate("outer", rows, dim=-2), pyro.plate("inner", 2, dim=-1):
            return pyro.sample("v", one)

    with record_noise() as noise:
        first = model(3)
    with replay_noise(noise=noise):
        assert torch.equal(first, model(3))
    assert first.shape == (3, 2, 2)
    assert first.flatten().unique().numel() == first.numel()
    with record_noise():
        plated = model(3000)
    with record_noise():
        flat = pyro.sample("v", one, sample_shape=torch.Size([3000]))
    for column in range(2):
        for angle in range(2):
            assert stats.ks_2samp(plated[:, column, angle], flat[:, column, angle]).pvalue > 1e-6


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda shape: None, "returned None"),
        (lambda shape: torch.zeros(*shape, 2), "returned a tensor of shape (3, 2)"),
        (lambda shape: torch.zeros(1), "returned a tensor of shape (1,)"),  # it would broadcast: one draw for all rows
    ],
)
def test_a_registered_sampler_with_a_wrong_shape_is_named(returned, text):
    class Wrong(Constant):
        pass

    register_sampler(Wrong)(lambda fn, sample_shape: returned((*sample_shape, *fn.batch_shape)))
    with pytest.raises(ValueError, match="should return a tensor of shape \\(3,\\)") as caught, record_noise():
        pyro.sample("z", Wrong(torch.zeros(3)))
    assert f"the sampler that @register_sampler has for Wrong {text}" in str(caught.value)


def test_a_sampler_is_registered_for_a_class():
    with pytest.raises(
        TypeError, match="takes the class of a distribution, as in @register_sampler\\(Family\\), not 'Constant'"
    ):
        register_sampler("Constant")


def hidden_markov_model(**options):
    return dist.GaussianHMM(
        dist.Normal(0, 1).expand([1]).to_event(1),
        torch.eye(1),
        dist.Normal(0, 1).expand([1]).to_event(1),
        torch.eye(1),
        dist.Normal(0, 1).expand([1]).to_event(1),
        **options,
    )


@pytest.mark.parametrize("values", ["teacher", "data"])
def test_a_family_that_can_score_and_not_draw_says_what_it_needs(values):
    """Without a duration, a target's value of 12 points can be scored, and cannot be drawn."""
    data = torch.randn(12, 1)

    def program(data):
        pyro.sample("x", hidden_markov_model(), obs=data)

    loss = SurrogateKD(target_values=values)
    with pytest.raises((UnsupportedNoiseError, SupportMismatchError), match=r"'x'.*(duration=|a value of shape \(12, 1\))"):
        loss.loss(program, freeze(program), data)

    def with_duration(data):
        pyro.sample("x", hidden_markov_model(duration=12), obs=data)

    assert loss.loss(with_duration, freeze(with_duration), data) == 0
