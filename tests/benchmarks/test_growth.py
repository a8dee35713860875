"""The benchmarks of growth and of the physical limit run through, and count what they say they count."""

import json

import pyro
import pytest
import torch

from tests.benchmarks import growth, limit


def test_a_size_is_measured_tabulated_and_drawn(tmp_path, capsys):
    arguments = [
        "--only",
        "sites",
        "rows",
        "--largest",
        "64",
        "--seconds",
        "0.01",
        "--threads",
        str(torch.get_num_threads()),
    ]
    growth.main([*arguments, "--json", str(tmp_path / "growth.json"), "--picture", str(tmp_path / "growth.png")])
    lines = {line["name"]: line for line in json.loads((tmp_path / "growth.json").read_text())}
    assert lines["sites"]["sizes"] == [10, 20, 50]
    assert lines["rows"]["sizes"] == [16, 64]
    assert lines["rows"]["bytes"][1] > 2 * lines["rows"]["bytes"][0]
    assert "| sites | 10, 50 |" in capsys.readouterr().out
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_an_exponent_is_that_of_a_power():
    line = growth.Line("x", [1, 2, 4, 8])
    assert line.exponents([3.0, 6.0, 24.0, 96.0]) == pytest.approx((1.7, 2.0))


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointed in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        step = growth.vrnn(3, checkpointed=checkpointed)
        torch.manual_seed(1)
        step()
        found.append([param.grad for _, param in pyro.get_param_store().named_parameters()])
    assert found[0]
    torch.testing.assert_close(*found)


def test_products_and_convolutions_are_known_by_their_names():
    products = [
        "aten::mm",
        "aten::addmm",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
        "mkl::_mkl_linear",
        "aten::bmm",
    ]
    assert all(map(limit.is_product, products))
    assert not any(map(limit.is_product, ["aten::add", "aten::mul", "aten::sum", "aten::normal_", "cpp_fused_add_0"]))


def test_the_operations_of_a_product_are_counted():
    x, y = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert limit.count(lambda: (x @ y).sum().backward()) == 2 * (2 * 3 * 5 * 7)  # forward, and the gradient of y


@pytest.mark.slow
def test_a_limit_is_below_what_is_measured(capsys):
    limit.main(
        ["--applications", "helmholtz", "--rows", "64", "--seconds", "0.1", "--threads", str(torch.get_num_threads())]
    )
    assert "| helmholtz: width 8 -> 2, 64 rows |" in capsys.readouterr().out
