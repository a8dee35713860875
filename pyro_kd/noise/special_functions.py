r"""Special functions as graphs of plain tensor operations: sums, products, quotients, exp, log, sqrt and where.

An exported program runs where torch does not, and ONNX has no ``lgamma`` and no ``ndtri``, and loses digits in ``log1p`` and
``expm1``. These functions have a fixed number of steps, and no branch depends on a value. They work element by element.
:mod:`pyro_kd.noise.inverse_functions` builds inverse distribution functions on them. Knows tensors only.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "constant",
    "excess_of_exp",
    "expm1",
    "lgamma",
    "lgamma1p",
    "log1p",
    "log_ratio",
    "normal_icdf",
    "open_unit",
    "polynomial",
    "power_series",
    "rough_normal_icdf",
    "stirling_error",
]

HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)

# The Taylor series of lgamma at 2: its slope 1 - Euler's constant, and then (-1)^k (zeta(k) - 1) / k.
_LGAMMA_AT_2 = (
    *(0.42278433509846714, 0.3224670334241132, -0.0673523010531981, 0.020580808427784546, -0.007385551028673986),
    *(0.0028905103307415234, -0.001192753911703261, 0.0005096695247430425, -0.00022315475845357936, 9.945751278180853e-05),
    *(-4.492623673813314e-05, 2.0507212775670694e-05, -9.439488275268395e-06, 4.374866789907487e-06, -2.039215753801366e-06),
    *(9.55141213040742e-07, -4.492469198764566e-07, 2.1207184805554667e-07, -1.00432248239681e-07, 4.769810169363981e-08),
    *(
        -2.2711094608943164e-08,
        1.0838659214896955e-08,
        -5.183475041970047e-09,
        2.4836745438024785e-09,
        -1.1921401405860912e-09,
    ),
)
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
_SHIFT = 8  # the series of Stirling is used from here on
_EXP = tuple(1 / math.factorial(n) for n in range(2, 10))

# Wichura (1988), algorithm AS 241, PPND16: numerators and denominators in the centre, in the tails and far out.
_CENTRE = (
    (
        *(3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4),
        *(4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    ),
    (
        *(1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3),
        *(2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
    ),
)
_TAIL = (
    (
        *(1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0),
        *(1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    ),
    (
        *(1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1),
        *(1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
    ),
)
_FAR = (
    (
        *(6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1),
        *(2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    ),
    (
        *(1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2),
        *(7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
    ),
)


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, the constant first, at ``x`` of any shape; at least two coefficients."""
    total = coefficients[-1] * x + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        total = total * x + coefficient
    return total


def constant(value: float, like: Tensor) -> Tensor:
    """A number as a tensor without dimensions, with the type and device of another of any shape.

    ``torch.onnx`` rounds the plain numbers of a graph to float32, whatever the type of the tensors. Tensors keep their digits.
    """
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def power_series(coefficients: Sequence[float], x: Tensor, *, first: int = 1, step: int = 1) -> Tensor:
    """The sum of coefficients times powers of x: the ``first`` one, and then each ``step`` higher, of float64 x of any shape.

    All terms are made at once, by exponentials, which keeps the graph short.
    """
    powers = torch.arange(first, first + step * len(coefficients), step, dtype=x.dtype, device=x.device)
    of_positive = torch.tensor(coefficients, dtype=x.dtype, device=x.device)
    of_negative = of_positive * (1 - 2 * (powers % 2))
    x = x.unsqueeze(-1)
    return ((powers * x.abs().log()).exp() * torch.where(x < 0, of_negative, of_positive)).sum(-1)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) to full accuracy near 0, for x >= -1 of any shape and floating-point type (Kahan's quotient)."""
    one = 1 + x
    return torch.where(one == 1, x, one.log() * (x / (one - 1)))


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 to full accuracy near 0, for x of any shape and floating-point type (Kahan's quotient)."""
    exp = x.exp()
    return torch.where(exp == 1, x, torch.where(x.abs() > 1, exp - 1, (exp - 1) * (x / exp.log())))


def excess_of_exp(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for float64 x of any shape, with an error below 1e-14 relative to x."""
    return torch.where(x.abs() < 0.05, power_series(_EXP, x, first=2), x.exp() - 1 - x)


def log_ratio(x: Tensor, y: Tensor, difference: Tensor) -> Tensor:
    """log(x / y) to full accuracy where the positive x and y are close, given their difference x - y; all of one shape."""
    relative = difference / y
    return torch.where(relative.abs() < 0.5, log1p(relative), x.log() - y.log())


def lgamma(x: Tensor) -> Tensor:
    """The logarithm of the gamma function.

    By its Taylor series at 2 for arguments up to 2.5, which keeps the relative accuracy at its zeros 1 and 2, and by Stirling's
    series beyond.

    Args:
        x: positive, of any shape.

    Returns:
        float64 tensor of the same shape.
    """
    x = x.double()
    is_least = x < 0.5
    near = lgamma1p(torch.where(is_least, x, x - 1)) - torch.where(is_least, x.log(), 0.0)
    far = x.clamp(min=2.5)
    return torch.where(x < 2.5, near, (far - 0.5) * far.log() - far + constant(HALF_LOG_2_PI, x) + stirling_error(far))


def lgamma1p(x: Tensor) -> Tensor:
    """The logarithm of gamma(1 + x) to full accuracy near its zeros 0 and 1, for float64 x from -0.5 to 1.5, of any shape."""
    is_near_0 = x < 0.5
    z = torch.where(is_near_0, x, x - 1).clamp(-0.5, 0.5)  # gamma(2 + z) is (1 + z) gamma(1 + z)
    return power_series(_LGAMMA_AT_2, z) - torch.where(is_near_0, log1p(z), 0.0)


def stirling_error(x: Tensor) -> Tensor:
    r"""What Stirling's formula leaves out: :math:`\ln\Gamma(x) - (x - \frac12) \ln x + x - \frac12 \ln 2\pi`.

    Args:
        x: float64, at least 1, of any shape.
    """
    # Below the shift n: error(x) = error(x + n) + (x + n - 1/2) log(1 + n/x) - n - log(prod_{i=1}^{n-1} (1 + i/x)).
    is_small = x < _SHIFT
    start = torch.where(is_small, x, 1.0)
    product = start + 1
    for i in range(2, _SHIFT):
        product = product * (start + i)
    # The product of x, ..., x + 7 over powers of x, in which the logarithms of x cancel.
    moved = (start + _SHIFT - 0.5) * (start + _SHIFT).log() - (start - 0.5) * start.log() - _SHIFT - (product * start).log()
    inverse = 1 / torch.where(is_small, x + _SHIFT, x)
    series = power_series(_STIRLING, inverse, step=2)
    return series + torch.where(is_small, moved, 0.0)


def normal_icdf(u: Tensor) -> Tensor:
    """Quantile function of the standard normal law, by the rational functions of Wichura (1988), algorithm AS 241.

    Args:
        u: probabilities in [0, 1], any shape. Those at the ends are moved inside: to 2^-54 and to 1 - 2^-53.

    Returns:
        float64 tensor of the same shape.
    """
    u = open_unit(u)
    q = u - 0.5
    centre = q * _quotient(_CENTRE, constant(0.180625, q) - q * q)
    r = (-torch.where(q < 0, u, 1 - u).log()).sqrt()
    tail = torch.where(r <= 5, _quotient(_TAIL, r - constant(1.6, r)), _quotient(_FAR, r - 5))
    return torch.where(q.abs() <= 0.425, centre, torch.where(q < 0, -tail, tail))


def rough_normal_icdf(u: Tensor) -> Tensor:
    """:func:`normal_icdf` with an error below 5e-4, by formula 26.2.23 of Abramowitz and Stegun (1964), for u in (0, 1)."""
    t = (-2 * torch.minimum(u, 1 - u).log()).sqrt()
    z = t - polynomial((2.515517, 0.802853, 0.010328), t) / polynomial((1.0, 1.432788, 0.189269, 0.001308), t)
    return torch.where(u < 0.5, -z, z)


def open_unit(u: Tensor) -> Tensor:
    """Move uniforms into the open interval (0, 1), in float64; the shape stays."""
    u = u.double().clamp(min=2.0**-54)
    return torch.minimum(u, constant(1 - 2.0**-53, u))


def _quotient(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    return polynomial(coefficients[0], x) / polynomial(coefficients[1], x)
