"""Known methods of distillation are special cases (section 3.5 of the paper), each written in one line by the user."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import SurrogateKD
from pyro_kd.divergences import kl


def test_vanilla_distillation_of_a_classifier():
    """No latents: the KL between class probabilities."""
    x, p, q = torch.randn(20, 4), torch.randn(4, 3), torch.randn(4, 3)

    def classifier(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("label", dist.Categorical(logits=x @ weight))

        return model

    expected = torch.nn.functional.kl_div((x @ q).log_softmax(-1), (x @ p).log_softmax(-1), reduction="sum", log_target=True)
    assert SurrogateKD(["label"]).loss(classifier(q), classifier(p), x) == pytest.approx(float(expected), rel=1e-5)


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
