"""Programs with inverse distribution functions: traced with one operation for each, exported with plain operations."""

import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import record_noise
from pyro_kd.export import draw_noise, export_sampler, load_onnx
from pyro_kd.export.graph import complete, trace_graph
from pyro_kd.export.inlining import _graph_of, with_plain_operations
from pyro_kd.noise.inverse_functions import binomial_icdf, gamma_icdf, poisson_icdf
from pyro_kd.noise.single_operations import function_of, single_operation

DRAWS = torch.tensor([0.1, 0.5, 0.7, 0.99], dtype=torch.float64)


def single_operations(program):
    return [node.target for node in program.graph.nodes if function_of(node.target)]


def counts(num_rows):
    """Several sites of each family, of several shapes."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor([0.5, 2.0, 9.0]), 1.0).to_event(1))
    with pyro.plate("rows", num_rows):
        weight = pyro.sample("weight", dist.Beta(2.0, 3.0))
        some = pyro.sample("some", dist.Poisson(5 * rate).to_event(1))
        pyro.sample("more", dist.Poisson(some.sum(-1) + 1.0))
        pyro.sample("few", dist.Binomial(20, weight))
        pyro.sample("many", dist.Binomial(torch.tensor([3.0, 200.0]), weight.unsqueeze(-1).expand(-1, 2)).to_event(1))


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_many_sites_of_several_shapes_are_those_of_the_program(float64, counted, rows):
    with torch.no_grad(), record_noise() as noise:
        trace = poutine.trace(counts).get_trace(rows)
    left = {site: [draw.noise for draw in draws] for site, draws in noise.items()}
    found = counted({item.name: left[item.site].pop(0) for item in counted.description.noise})
    for name, value in found.items():
        torch.testing.assert_close(value, trace.nodes[name]["value"], rtol=1e-10, atol=0)


@pytest.fixture(scope="module")
def counted():
    torch.set_default_dtype(torch.float64)
    try:
        return export_sampler(counts, 4, targets=["more", "few", "many"], latents="*")
    finally:
        torch.set_default_dtype(torch.float32)


def test_plain_operations_are_left_alone_and_constants_are_shared(counted):
    assert not single_operations(counted.program)
    functions = {"gamma_icdf": (gamma_icdf, 2), "poisson_icdf": (poisson_icdf, 2), "binomial_icdf": (binomial_icdf, 3)}
    for name, (function, arguments) in functions.items():
        graph = _graph_of(function, arguments, torch.device("cpu")).graph
        constants = {node.target for node in graph.nodes if node.op == "get_attr"}
        assert sum(target.startswith(f"{name}_tensor_constant") for target in counted.program.constants) == len(constants)


@pytest.mark.parametrize(("function", "arguments"), [(gamma_icdf, 2), (poisson_icdf, 2), (binomial_icdf, 3)])
def test_the_graph_of_a_function_serves_all_shapes(float64, function, arguments):
    module = _graph_of(function, arguments, torch.device("cpu"))
    for shape in ((), (1,), (7,), (2, 0), (2, 3, 4)):
        args = [torch.rand(shape), *(torch.full(shape, 5.0), torch.rand(shape))[: arguments - 1]]
        assert torch.equal(module(*args), function(*args))
        assert torch.equal(single_operation(function, *args), function(*args))


def test_a_trace_has_one_operation_for_each_site():
    program = trace_graph(
        lambda inputs: {
            "x": single_operation(poisson_icdf, inputs["u"], 2 * single_operation(gamma_icdf, inputs["u"], inputs["u"] + 1))
        },
        {"u": torch.rand(5)},
        {"u": ("rows",)},
    )
    assert [str(target) for target in single_operations(program)] == [
        "pyro_kd.gamma_icdf.default",
        "pyro_kd.poisson_icdf.default",
    ]


def test_gradients_that_stay_off_leave_nothing_in_the_graph():
    """Each draw of Pyro switches them off, and torch makes a graph inside the graph of what it finds between."""

    def model(num_rows):
        with pyro.plate("rows", num_rows):
            for i in range(3):
                pyro.sample(f"x_{i}", dist.Bernoulli(0.5))

    program = export_sampler(model, 4, targets=["x_0"], latents="*").program
    assert not [node for node in program.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]


@pytest.mark.slow
def test_twenty_sites_of_gamma_noise_are_exported_in_seconds():
    """On one core: three passes over the some 500 operations of each site took a minute and a half."""

    def model(num_rows):
        with pyro.plate("rows", num_rows):
            z = 1.0
            for i in range(20):
                z = 0.5 + pyro.sample(f"z_{i}", dist.Gamma(z, 1.0))

    started = time.process_time()
    export_sampler(model, 4, targets=["z_19"])
    assert time.process_time() - started < 20


def test_what_is_inlined_leaves_the_traced_program_alone():
    program = complete(
        trace_graph(
            lambda inputs: {"x": single_operation(gamma_icdf, inputs["u"], inputs["u"] + 1)}, {"u": DRAWS}, {"u": ("rows",)}
        ),
        {},
    )
    for _ in range(2):
        assert torch.equal(with_plain_operations(program).module()({"u": DRAWS})["x"], gamma_icdf(DRAWS, DRAWS + 1))
        assert len(single_operations(program)) == 1


@pytest.mark.slow
def test_calls_in_onnx_are_the_operations_of_the_functions(float64, counted, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    counted.save(tmp_path / "counts.onnx")
    model = onnx.load(tmp_path / "counts.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [item.domain for item in model.opset_import] == [""]
    assert not model.functions
    sampler = load_onnx(tmp_path / "counts.onnx")
    for rows in (1, 3, 40):
        noise = draw_noise(sampler.description, rows, np.random.default_rng(rows))
        expected = counted({name: torch.from_numpy(value) for name, value in noise.items()})
        for name, value in sampler(noise).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-12)
