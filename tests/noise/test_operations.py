"""Operations that draw noise are replayed bit for bit, and keep their law."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_kd.noise.between import ProgramTape
from pyro_kd.noise.tape import NoiseTape, drawing_on

QUERY = torch.linspace(-1, 1, 32).reshape(1, 1, 4, 8)
GRID = torch.linspace(-2, 2, 12).reshape(3, 4)
SEEDS = itertools.count()
OPERATIONS = {
    "randn": lambda: torch.randn(3),
    "randn_like": lambda: torch.randn_like(GRID),
    "rand out=": lambda: torch.rand(3, out=torch.empty(0)),
    "rand of half precision": lambda: torch.rand(3, dtype=torch.float16),
    "randn of complex numbers": lambda: torch.randn(3, dtype=torch.complex64),
    "a generator of its own": lambda: torch.randn(3, generator=torch.Generator().manual_seed(next(SEEDS))),
    "randint": lambda: torch.randint(3, 9, (5,)),
    "randint_like": lambda: torch.randint_like(GRID, 3),
    "randint_like, low": lambda: torch.randint_like(GRID, 3, 8),
    "random_": lambda: torch.empty(3).random_(),
    "random_ to": lambda: torch.empty(3).random_(9),
    "random_ from": lambda: torch.empty(3, dtype=torch.int64).random_(3, 9),
    "random_ of bool": lambda: torch.empty(9, dtype=torch.bool).random_(),
    "randperm": lambda: torch.randperm(5),
    "normal of numbers": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal out=": lambda: torch.normal(torch.ones(3), 1.0, out=torch.empty(3)),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "bernoulli_": lambda: torch.empty(9).bernoulli_(torch.rand(9)),
    "multinomial": lambda: torch.multinomial(torch.ones(5), 2),
    "poisson": lambda: torch.poisson(torch.full((3,), 5.0)),
    "binomial": lambda: torch.binomial(torch.full((3,), 5.0), torch.full((3,), 0.5)),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "a distribution": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).sample(),
    "dropout": lambda: F.dropout(GRID, 0.5, True),
    "dropout, fused": lambda: torch.native_dropout(GRID, 0.5, True)[0],
    "dropout2d": lambda: F.dropout2d(torch.ones(1, 9, 3, 3), 0.5, True),
    "alpha_dropout": lambda: F.alpha_dropout(GRID, 0.5, True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(torch.ones(2, 9, 3), 0.5, True),
    "rrelu": lambda: F.rrelu(GRID, training=True),
    "rrelu_": lambda: F.rrelu_(GRID.clone(), training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(GRID),
    "attention with dropout": lambda: F.scaled_dot_product_attention(QUERY, QUERY, QUERY, dropout_p=0.3),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(torch.arange(400.0).reshape(1, 1, 20, 20), 2, output_size=9),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_replayed_bit_for_bit(name):
    pyro.set_rng_seed(0)
    draw = OPERATIONS[name]
    with ProgramTape() as recorded:
        first = draw()
    with ProgramTape() as other:
        second = draw()
    with ProgramTape(recorded.recorded()) as replayed:
        again = draw()
    assert recorded.found
    assert torch.equal(again, first)
    assert not torch.equal(second, first)
    assert [found.sharing for found in replayed.found] == ["shared"] * len(recorded.found)
    assert not replayed.left_over()
    assert all(__file__ in found.where for found in other.found)


@pytest.mark.parametrize(
    "name",
    ["dropout, fused", "rrelu", "randint_like, low", "random_ from", "rand out="],
)
def test_an_operation_keeps_its_law(name):
    """Mean of many draws on the tape against that of torch's own, within five standard errors."""
    pyro.set_rng_seed(1)
    draw = OPERATIONS[name]
    own = torch.stack([draw().double().mean() for _ in range(400)])
    with ProgramTape():
        taped = torch.stack([draw().double().mean() for _ in range(400)])
    error = ((own.var() + taped.var()) / 400).sqrt()
    assert (own.mean() - taped.mean()).abs() < 5 * error


def test_noise_is_drawn_on_a_named_device_and_moved_to_where_it_is_needed():
    with NoiseTape() as here:
        torch.randn(3), torch.rand(3)
    torch.manual_seed(0)  # where the test has begun
    with drawing_on(torch.device("cpu")), NoiseTape() as tape:
        needed = torch.randn(3, device="meta"), torch.rand(3, device="meta")
    assert {tensor.device.type for tensor in needed} == {"meta"}
    assert [draw.noise.tolist() for draw in tape.draws] == [draw.noise.tolist() for draw in here.draws]


def test_operations_that_draw_nothing_are_not_recorded():
    with ProgramTape() as tape:
        F.dropout(GRID, 0.5, False)
        F.rrelu(GRID, training=False)
        F.scaled_dot_product_attention(QUERY, QUERY, QUERY)
        torch.native_dropout(GRID, 0.5, False)
    assert not tape.found
