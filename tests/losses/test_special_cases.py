"""Known methods of distillation are special cases (section 3.5 of the paper): docs/recipes.md has the code, here are their own formulas."""

import itertools
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close

from pyro_kd import freeze
from pyro_kd.divergences import kl
from pyro_kd.metrics import Estimate
from tests.support import readme
from tests.support.estimates import assert_within
from tests.support.losses import SurrogateKD

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """The names that the code of the page binds."""
    return readme.run(PAGE, name="recipes.md")


def assert_same(loss, expected, module):
    """Equal values and equal gradients with respect to a module's parameters."""
    params = list(module.parameters())
    assert_close(loss, expected)
    for found, wanted in zip(*(torch.autograd.grad(each, params) for each in (loss, expected)), strict=True):
        assert_close(found, wanted)


def values_at(run, prefix):
    """The teacher's values at the sites with a prefix, stacked in the last dimension."""
    return torch.stack([pair.value for pair in run.pairs if pair.name.startswith(prefix)], -1)


def test_vanilla_distillation_of_a_classifier():
    """No latents: the KL between class probabilities."""
    x, p, q = torch.randn(20, 4), torch.randn(4, 3), torch.randn(4, 3)

    def classifier(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("label", dist.Categorical(logits=x @ weight))

        return model

    expected = kl_div((x @ q).log_softmax(-1), (x @ p).log_softmax(-1), reduction="sum", log_target=True)
    assert SurrogateKD(["label"]).loss(classifier(q), classifier(p), x) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_vanilla_distillation_with_a_temperature(page, temperature):
    """Hinton et al.: T^2 KL(softmax(teacher / T) || softmax(student / T))."""
    big, small, x = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), torch.randn(20, 8)
    loss = SurrogateKD(["label"], divergence=page["softened_kl"](temperature))
    found = loss(page["classifier"](small), freeze(page["classifier"](big)))(x)
    with torch.no_grad():
        soft = (big(x) / temperature).softmax(-1)
    expected = temperature**2 * kl_div((small(x) / temperature).log_softmax(-1), soft, reduction="sum")
    assert_same(found, expected, small)


def test_sequence_level_distillation():
    """Fully visible and autoregressive (Eq. 3): the student follows the teacher's sequence."""

    def language_model(stay):
        def model():
            word = torch.tensor(0)
            for t in range(4):
                word = pyro.sample(f"word_{t}", dist.Bernoulli(torch.where(word > 0, stay, 1 - stay)))

        return model

    teacher, student = language_model(torch.tensor(0.9)), language_model(torch.tensor(0.6))
    each = kl(dist.Bernoulli(torch.tensor(0.9)), dist.Bernoulli(torch.tensor(0.6)), torch.tensor(1.0))
    loss = SurrogateKD(lambda site: site["name"].startswith("word"))
    assert loss.loss(student, teacher) == pytest.approx(4 * float(each))


def logits_on(model, words):
    """The logits of each word given the words before it, shape (rows, length, vocabulary), without Pyro."""
    before = torch.cat([torch.full((len(words), 1), model.words), words[:, :-1]], 1)
    state, logits = torch.zeros(len(words), model.cell.hidden_size), []
    for t in range(model.length):
        state = model.cell(model.embedding(before[:, t]), state)
        logits.append(model.out(state))
    return torch.stack(logits, 1)


def kl_on(student, teacher, words):
    """The KL of each word's distribution given the words before it, summed over words and rows."""
    with torch.no_grad():
        target = logits_on(teacher, words).log_softmax(-1)
    return kl_div(logits_on(student, words).log_softmax(-1), target, reduction="sum", log_target=True)


@pytest.fixture
def language_models(page):
    pyro.set_rng_seed(1)
    return page["LanguageModel"](3, words=3, length=3), page["LanguageModel"](8, words=3, length=3)


def test_sequence_level_distillation_of_a_network_is_torchs_kl_on_the_teachers_words(page, language_models):
    small, big = language_models
    (particle,) = SurrogateKD(page["is_word"]).particles(small, freeze(big), 20)
    found = sum(term.value for term in particle.terms)
    assert_same(found, kl_on(small, big, values_at(particle.run, "word")), small)


def test_sequence_level_distillation_is_on_average_the_kl_of_the_sequences(page, language_models):
    """By enumeration of all 27 sequences; likewise on generated text, where the entropy of the teacher is added."""
    small, big = language_models
    words = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        log_p, log_q = (
            logits_on(model, words).log_softmax(-1).gather(-1, words.unsqueeze(-1)).squeeze(-1).sum(-1)
            for model in (big, small)
        )
    exact, entropy = float((log_p.exp() * (log_p - log_q)).sum()), float(-(log_p.exp() * log_p).sum())
    teacher = freeze(big)
    for divergence, truth in ((kl, exact), (page["cross_entropy"], exact + entropy)):
        loss = SurrogateKD(page["is_word"], divergence=divergence)
        values = [loss.loss(small, teacher, 1000) / 1000 for _ in range(20)]
        assert_within(Estimate.of(torch.tensor(values)), truth)


def test_distillation_on_generated_text_is_the_likelihood_of_the_teachers_words(page, language_models):
    small, big = language_models
    (particle,) = SurrogateKD(page["is_word"], divergence=page["cross_entropy"]).particles(small, freeze(big), 20)
    words = values_at(particle.run, "word")
    expected = cross_entropy(logits_on(small, words).flatten(0, 1), words.flatten(), reduction="sum")
    assert_same(sum(term.value for term in particle.terms), expected, small)


def test_word_level_distillation_is_torchs_kl_on_the_words_of_the_data(page, language_models):
    """Eq. 2."""
    small, big = language_models
    text = torch.randint(3, (20, 3))
    found = SurrogateKD(target_values="data")(small, freeze(big))(len(text), text)
    assert_same(found, kl_on(small, big, text), small)


@pytest.mark.parametrize("order", [1, 2])
def test_feature_distillation_with_a_learned_projection(page, order):
    """FitNets (Eq. 8): KD of the labels plus the p-norm, to the power p, between the teacher's feature and the projected one."""
    pyro.set_rng_seed(1)
    big, small, images = page["Network"](16, 16), page["Network"](4, 16), torch.randn(20, 8)
    loss = SurrogateKD(["label"], latent_weight=0.5, latent_divergence=page["distance_of_points"](order))
    found = loss(small, freeze(big))(images)
    with torch.no_grad():
        feature = big.body(images).relu()
        soft = big.head(feature).softmax(-1)
    hidden = small.body(images).relu()
    distance = (small.project(hidden) - feature).abs().pow(order).sum()
    expected = kl_div(small.head(hidden).log_softmax(-1), soft, reduction="sum") + 0.5 * distance
    assert_same(found, expected, small)
    if order == 2:  # the default distance of point masses
        assert_close(SurrogateKD(["label"], latent_weight=0.5)(small, freeze(big))(images), found)


@pytest.mark.parametrize("is_perceptual", [False, True])
def test_gan_distillation(page, is_perceptual):
    """Eq. 9: the distance between the images of both generators, on the same noise."""
    pyro.set_rng_seed(1)
    big, small = page["Generator"](32), page["Generator"](4)
    options = {"divergence": page["perceptual"]} if is_perceptual else {}
    seen = page["features"] if is_perceptual else lambda image: image
    loss = SurrogateKD(["image"], **options)
    (particle,) = loss.particles(small, freeze(big), 20)
    z = particle.run.pairs[0].student_value
    assert particle.run.pairs[0].name == "z"
    with torch.no_grad():
        theirs = seen(big.net(z))
    assert_same(particle.terms[1].value, (seen(small.net(z)) - theirs).square().sum(), small)
    assert float(particle.terms[0].value) == 0


def test_latents_as_points_have_on_average_their_squared_wasserstein_distance(page):
    """Eq. 5 against Eq. 6 with that distance, for normal latents."""
    small, teacher = page["small"], page["teacher"]
    by_value = SurrogateKD(["x"], latent_form="value", latent_weight=1.0)
    exact = page["on_average_the_same"].loss.terms(small, teacher, 1000)["z"].value.detach() / 1000
    values = [by_value.terms(small, teacher, 1000)["z"].value.detach() / 1000 for _ in range(30)]
    assert_within(Estimate.of(torch.stack(values)), float(exact))


def test_the_links_of_the_page_lead_to_its_sections():
    sections = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-") for line in PAGE.splitlines() if line[:3] == "## "
    }
    assert sections == set(re.findall(r"\]\(#([^)]+)\)", PAGE))


def test_the_mean_over_the_events_of_an_hmm():
    def program(shift):
        steps = dist.Normal(torch.zeros(3, 1), 1.0).to_event(1)
        start, noise = dist.Normal(torch.full((1,), shift), 1.0).to_event(1), dist.Normal(torch.zeros(3, 1), 0.5).to_event(1)
        z = pyro.sample("z", dist.GaussianHMM(start, torch.eye(1), steps, torch.eye(1), noise))
        pyro.sample("y", dist.Normal(z.sum(), 1.0))

    values = []
    for reduction in ("sum", "mean"):
        pyro.set_rng_seed(0)
        loss = SurrogateKD(["y"], latent_reduction=reduction, teacher_forcing=0.0)
        values.append(loss.terms(lambda: program(0.5), lambda: program(0.0))["z"].value.item())
    assert values[0] == pytest.approx(3 * values[1])
