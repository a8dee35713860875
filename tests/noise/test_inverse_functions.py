"""Inverse distribution functions of plain operations, against scipy's, mpmath's and the library's own, and in graphs."""

import warnings

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_kd.export.exact_numbers import with_exact_numbers
from pyro_kd.noise.inverse_functions import binomial_icdf, gamma_icdf, poisson_icdf
from pyro_kd.noise.quantiles import binomial_quantile, gamma_quantile, poisson_quantile

pytestmark = pytest.mark.usefixtures("float64")
TAIL = np.logspace(-16, np.log10(0.5), 300)
U = np.concatenate([TAIL, 1 - TAIL])
U = U[U < 1]

# What the functions consist of, as torch names it. ONNX has each of these in float64.
ARITHMETIC = (
    "abs add arange bitwise_and bitwise_not bitwise_or cat clamp cumsum div eq exp floor ge gt le log lt minimum mul neg"
)
SHAPES = "_to_copy alias detach expand lift_fresh reciprocal remainder rsub scalar_tensor select sqrt stack sub sum unbind unsqueeze"
PLAIN = {*ARITHMETIC.split(), *SHAPES.split(), "where"}
CASES = {
    "gamma": (gamma_icdf, [(0.05, 60.0)]),
    "poisson": (poisson_icdf, [(0.05, 60.0)]),
    "binomial": (binomial_icdf, [(30.0, 30.0), (0.0, 1.0)]),
}
cases = pytest.mark.parametrize(("function", "ranges"), CASES.values(), ids=CASES)


def _arguments(ranges, n, dtype=torch.float64):
    return torch.rand(n), *((low + (high - low) * torch.rand(n)).to(dtype) for low, high in ranges)


@pytest.mark.parametrize("concentration", [1e-3, 0.01, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0, 1.5, 2.0, 5.0, 10.0, 50.0, 1e3, 1e5])
def test_gamma_quantiles_are_those_of_scipy(concentration):
    expected = special.gammaincinv(concentration, U)
    actual = gamma_icdf(torch.tensor(U), torch.tensor(concentration)).numpy()
    normal = expected > 1e-300
    np.testing.assert_allclose(actual[normal], expected[normal], rtol=1e-12)
    assert (actual[~normal] < 1e-299).all()


def _relative_error(concentration, u, x):
    """The distance of x from the quantile, relative to x, from the exact tail at x by mpmath."""
    with mpmath.workdps(40):
        a, x, u = mpmath.mpf(concentration), mpmath.mpf(x), mpmath.mpf(u)
        density = mpmath.exp((a - 1) * mpmath.log(x) - x - mpmath.loggamma(a))
        if a > 1e4:  # by quadrature, since the series of mpmath do not converge
            sign = -1 if u < 0.5 else 1
            ends = [x + sign * mpmath.sqrt(a) * k for k in range(14)]
            tail = density * abs(mpmath.quad(lambda s: mpmath.exp((a - 1) * mpmath.log(s / x) - (s - x)), ends))
        elif u < 0.5 and a >= 1:
            tail = mpmath.gammainc(a, 0, x, regularized=True)
        else:
            tail = mpmath.gammainc(a, x, mpmath.inf, regularized=True)
        exact = u if u < 0.5 and a >= 1 else 1 - u
        return float(abs(tail - exact) / (density * x))


@pytest.mark.parametrize("concentration", [1e-12, 1e-6, 1e-3, 0.3, 1.0, 3.0, 1e4, 1e6, 1e8, 1e10])
def test_gamma_quantiles_are_exact_for_tiny_and_huge_concentrations(concentration):
    u = [1e-16, 1e-8, 0.2, 0.5, 0.7, 1 - 1e-5, 1 - 1e-13]
    if concentration < 1:
        u += [1 - concentration * x for x in (0.7, 0.25, 0.1, 1e-3)]
    for value in u:
        x = float(gamma_icdf(torch.tensor(value), torch.tensor(concentration)))
        if x > 1e-300:
            assert _relative_error(concentration, value, x) < 1e-11, value


@pytest.mark.parametrize("rate", [0.0, 1e-300, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 16.5, 30.0, 100.0, 1e3, 1e4, 1e6])
def test_poisson_quantiles_are_those_of_scipy(rate):
    u = U[U < 1 - 1e-13]  # beyond, the distribution functions differ by rounding
    np.testing.assert_array_equal(poisson_icdf(torch.tensor(u), torch.tensor(rate)).numpy(), stats.poisson.ppf(u, rate))


def test_poisson_quantiles_are_exact_for_the_largest_rate():
    rate = 1e8  # here scipy's distribution function has lost digits in the tails
    for u in (1e-12, 1e-3, 0.3, 0.6, 0.999, 1 - 1e-13):
        k = float(poisson_icdf(torch.tensor(u), torch.tensor(rate)))
        side = 1 if u < 0.5 else -1  # P(X <= k), or P(X > k)
        with mpmath.workdps(40):
            x = mpmath.mpf(rate)
            ends = [x + side * mpmath.sqrt(x) * j for j in range(14)]

            def tail(a, x=x, ends=ends):
                body = abs(mpmath.quad(lambda s: mpmath.exp((a - 1) * mpmath.log(s / x) - (s - x)), ends))
                return body * mpmath.exp((a - 1) * mpmath.log(x) - x - mpmath.loggamma(a))

            before, at = tail(mpmath.mpf(k)), tail(mpmath.mpf(k) + 1)
            assert before < u <= at if side == 1 else before > 1 - mpmath.mpf(u) >= at


@pytest.mark.parametrize("total_count", [0, 1, 2, 10, 17, 33, 100, 1000, 100_000, 10_000_000])
@pytest.mark.parametrize("probs", [0.0, 1e-8, 1e-4, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0])
def test_binomial_quantiles_are_those_of_scipy(total_count, probs):
    u = U[(U < 1 - 1e-11) & (U > 1e-11) & (U != 0.5)]  # at 1/2 a symmetric law has a tie
    actual = binomial_icdf(torch.tensor(u), torch.tensor(total_count), torch.tensor(probs)).numpy()
    np.testing.assert_array_equal(actual, stats.binom.ppf(u, total_count, probs))


def test_the_far_tails_of_counts_are_found():
    u = torch.tensor([0.0, 1e-16, 1 - 2.0**-53, 1.0])
    for rate in torch.logspace(-6, 8, 60):
        assert poisson_icdf(u, rate).isfinite().all(), rate
    for n in torch.logspace(0, 8, 30).floor():
        for p in (1e-7, 1e-3, 0.2, 0.5, 0.97, 1 - 1e-5):
            assert binomial_icdf(u, n, torch.tensor(p)).isfinite().all(), (n, p)


def test_values_are_those_of_the_maps_of_the_tape():
    u = torch.rand(20_000)
    for a in (0.02, 0.7, 1.0, 3.0, 40.0, 2e3):
        a, rtol = torch.tensor(a), 1e-9 if a > 20 else 1e-12  # from 20 on, torch.special.gammainc keeps 10 digits
        assert torch.allclose(gamma_icdf(u, a), gamma_quantile(u, a), rtol=rtol, atol=0), a
    for rate in (0.3, 4.0, 50.0, 3e3):
        assert torch.equal(poisson_icdf(u, torch.tensor(rate)), poisson_quantile(u, torch.tensor(rate)))
    for n, p in ((1, 0.4), (20, 0.1), (1000, 0.8)):
        n, p = torch.tensor(n), torch.tensor(p)
        assert torch.equal(binomial_icdf(u, n, p), binomial_quantile(u, n, p))


@cases
def test_float32_parameters_lose_nothing(function, ranges):
    u, *parameters = _arguments(ranges, 2000, torch.float32)
    assert torch.equal(function(u, *parameters), function(u, *(x.double() for x in parameters)))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (gamma_icdf, [0.0]),
        (gamma_icdf, [-1.0]),
        (gamma_icdf, [2e10]),
        (gamma_icdf, [float("nan")]),
        (poisson_icdf, [-1.0]),
        (poisson_icdf, [2e8]),
        (poisson_icdf, [float("nan")]),
        (binomial_icdf, [-1.0, 0.5]),
        (binomial_icdf, [2.5, 0.5]),
        (binomial_icdf, [2e8, 0.5]),
        (binomial_icdf, [3.0, 1.5]),
        (binomial_icdf, [3.0, float("nan")]),
    ],
)
def test_parameters_outside_of_the_range_give_nan(function, parameters):
    assert function(torch.tensor([0.3, 0.7]), *map(torch.tensor, parameters)).isnan().all()


@cases
def test_probabilities_outside_of_the_range_give_nan(function, ranges):
    _, *parameters = _arguments(ranges, 3)
    assert function(torch.tensor([-0.1, 1.1, float("nan")]), *parameters).isnan().all()


@cases
def test_shapes_broadcast_and_may_be_empty(function, ranges):
    parameters = [torch.tensor(sum(ends) / 2) for ends in ranges]
    assert function(torch.rand(3, 1), *(x.expand(2) for x in parameters)).shape == (3, 2)
    assert function(torch.rand(()), *parameters).shape == ()
    assert function(torch.rand(0), *parameters).shape == (0,)


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def _exported(function, ranges, dtype):
    rows = torch.export.Dim("rows")
    args = _arguments(ranges, 5, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its old interfaces
        return torch.export.export(_Module(function), args, dynamic_shapes=(tuple({0: rows} for _ in args),))


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@cases
def test_there_are_plain_operations_alone(function, ranges):
    args = _arguments(ranges, 5)
    with _Recorder() as recorder:
        function(*args)
    assert recorder.names <= PLAIN, recorder.names - PLAIN


@pytest.mark.slow
@cases
def test_the_graph_gives_the_same_values(function, ranges):
    program = _exported(function, ranges, torch.float64)
    args = _arguments(ranges, 1000)
    assert torch.equal(program.module()(*args), function(*args))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@cases
def test_onnx_runtime_gives_the_same_values(function, ranges, dtype, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the ONNX test needs {package}: pip install pyro-kd[export]")
    import onnxruntime

    file = tmp_path / "function.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(with_exact_numbers(_exported(function, ranges, dtype)), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file)
    args = _arguments(ranges, 5000, dtype)
    (value,) = session.run(None, {item.name: x.numpy() for item, x in zip(session.get_inputs(), args, strict=True)})
    expected = function(*args).numpy()
    np.testing.assert_allclose(value, expected, rtol=1e-12)
