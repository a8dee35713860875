"""Toy chains: their sites, and transitions as stated."""

import pytest
import torch
from pyro import poutine

from models.chains import BinomialChain, BinomialStudent, BitChain, BlockStudent, NormalChain, NormalStudent

MAKERS = {
    "normal teacher": lambda layers: NormalChain(layers),
    "normal student": lambda layers: NormalStudent(layers),
    "normal student with scales": lambda layers: NormalStudent(layers, learn_scale=True, identity=True),
    "binomial teacher": lambda layers: BinomialChain(layers),
    "binomial student": lambda layers: BinomialStudent(layers),
}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_sites_have_the_documented_shapes(make, layers):
    trace = poutine.trace(make(layers).model).get_trace(7)
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "rows"]
    assert sites == [f"z_{i + 1}" for i in range(layers)] + ["y"]
    assert all(trace.nodes[name]["value"].shape == (7,) for name in sites)
    assert torch.equal(trace.nodes["_RETURN"]["value"], trace.nodes["y"]["value"])
    y = torch.ones(7)
    given = poutine.trace(make(layers).model).get_trace(7, y)
    assert given.nodes["y"]["is_observed"]
    assert torch.equal(given.nodes["_RETURN"]["value"], y)


def test_a_chain_of_bits_has_vectors_of_bits():
    trace = poutine.trace(BitChain(3, bits=4, width=2).model).get_trace(7)
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "rows"]
    assert sites == ["z_1", "z_2", "z_3", "y"]
    for name in sites:
        value = trace.nodes[name]["value"]
        assert value.shape == (7, 4)
        assert ((value == 0) | (value == 1)).all()
    torch.manual_seed(0)
    weak, strong = (BitChain(1, width=64, gain=gain).networks[0][0].weight.std() for gain in (1.0, 4.0))
    assert 3.0 < strong / weak < 5.0


def test_a_block_student_has_the_names_of_a_longer_chain_and_its_noise():
    trace = poutine.trace(BlockStudent(2, 3).model).get_trace(7)
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "rows"]
    assert sites == ["z_1", "noise_2", "noise_3", "z_4", "noise_5", "noise_6", "y"]
    assert all(trace.nodes[name]["value"].shape == (7,) for name in sites)
    assert all(trace.nodes[name]["fn"].batch_shape == (7,) for name in sites)
    assert torch.equal(trace.nodes["_RETURN"]["value"], trace.nodes["y"]["value"])
    y = torch.ones(7)
    assert torch.equal(poutine.trace(BlockStudent(2, 3).model).get_trace(7, y).nodes["y"]["value"], y)


def test_the_normal_transition_is_as_stated():
    z = torch.tensor([-2.0, -0.3, 0.0, 0.3, 2.0])
    fn = NormalChain(3).transition(1, z)
    assert fn.loc.tolist() == pytest.approx([-(2**1.1), -(0.3**1.1), 0.0, 0.3**1.1, 2**1.1])
    assert fn.variance.tolist() == pytest.approx([0.01] * 5)
    start = NormalChain(3).start()
    assert (start.low, start.high) == (-1, 1)


def test_the_binomial_transition_is_as_stated():
    z = torch.tensor([0.0, 1.0, 250.0, 999.0, 1000.0])
    fn = BinomialChain(3).transition(1, z)
    assert fn.probs.tolist() == pytest.approx([0.0, 0.001**1.2, 0.25**1.2, 0.999**1.2, 1.0], rel=1e-4, abs=1e-9)
    assert (fn.total_count == 1000).all()
    start = BinomialChain(3).start()
    assert (start.low, start.high) == (0, 1000)


def test_the_chain_of_the_papers_text_goes_to_zero():
    """Why z_1 / 1000 is uniform, and not z_1: from z_1 <= 1, hardly a chain in a hundred is still above 0 at z_4."""
    torch.manual_seed(0)
    chain, z = BinomialChain(3), torch.rand(20_000)
    for layer in range(3):
        z = chain.transition(layer, z).sample()
    assert (z > 0).double().mean() < 0.01


def test_a_student_at_the_identity():
    z = torch.linspace(-2, 2, 9)
    fn = NormalStudent(2, scale=0.3, identity=True).transition(0, z)
    assert torch.equal(fn.loc, z)
    assert fn.scale.tolist() == pytest.approx([0.3] * 9)
    counts = torch.tensor([0.0, 10.0, 1000.0])
    fn = BinomialStudent(2, identity=True).transition(0, counts)
    assert torch.allclose(fn.probs, (counts + 0.5) / 1001)


def test_the_start_follows_the_module():
    """Its ends are moved with the module, as to a device."""
    assert NormalStudent(1).double().start().low.dtype == torch.float64


def test_parameters():
    def count(net):
        return sum(p.numel() for p in net.parameters() if p.requires_grad)

    assert count(NormalChain(5)) == count(BinomialChain(5)) == 0
    assert count(NormalStudent(5, width=4)) == count(BinomialStudent(5, width=4)) == 5 * (4 + 4 + 4 + 1)
    assert count(NormalStudent(5, width=4, learn_scale=True)) == 5 * (4 + 4 + 4 + 1) + 5
