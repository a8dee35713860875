"""Values taken apart into a structure and tensors, and put together again."""

import pyro.distributions as dist
import pytest
import torch

from pyro_kd.losses.packing import Held, owned, pack, unpack
from pyro_kd.noise.samplers import sample_on
from pyro_kd.noise.tape import NoiseTape
from tests.support.families import FAMILIES


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_same_draws_and_densities_on_copied_tensors(name):
    fn = FAMILIES[name]()
    with torch.no_grad():
        tape = NoiseTape()
        value = sample_on(tape, fn)
        structure, tensors = pack((fn, value))
        again, same = unpack(structure, [tensor.clone() for tensor in tensors])
        assert torch.equal(sample_on(NoiseTape(tape.draws), again), value)
        assert torch.equal(same, value)
        if name != "LinearHMM":  # which has no density
            assert torch.equal(again.log_prob(same), fn.log_prob(value))


def test_equal_structures_of_equal_calls():
    def run():
        return dist.TransformedDistribution(dist.Normal(torch.randn(3), 1.0), [dist.transforms.ExpTransform().inv])

    assert pack(run())[0] == pack(run())[0]
    assert hash(pack(run())[0]) == hash(pack(run())[0])


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, 1.0), ([1], (1,)), ({"a": 1}, {"b": 1}), (torch.Size([1]), (1,)), (Held([]), Held([]))]
)
def test_different_structures(one, other):
    assert pack(one)[0] != pack(other)[0]


def test_a_tensor_in_two_places_is_one_tensor():
    x = torch.randn(3)
    structure, tensors = pack({"a": x, "b": [x, x[:2]]})
    assert len(tensors) == 2
    found = unpack(structure, tensors)
    assert found["a"] is found["b"][0] is x


def test_a_tensor_with_a_gradient_is_copied_without_it():
    x = torch.randn(3, requires_grad=True)
    (found,) = pack(x)[1]
    assert not found.requires_grad
    with torch.no_grad():
        x.zero_()
    assert found.abs().sum() > 0


def test_an_owned_value_does_not_change_with_the_original():
    x = torch.ones(2)
    mine = owned(((x, 3, "a"), {"k": {"x": x}}))
    x.zero_()
    assert mine[0][0].tolist() == [1, 1]
    assert mine[1]["k"]["x"] is mine[0][0]
    assert mine[0][1:] == (3, "a")


def test_what_is_not_known_is_held():
    module = torch.nn.Linear(1, 1)
    assert unpack(*pack([module, print])) == [module, print]
