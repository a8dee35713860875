"""KL divergences in mpmath, by the formulas of the literature at a precision in which nothing cancels.

A reference takes the parameters of p and then those of q. ``DENSITIES`` has log densities and supports, so that the formulas themselves can be
held against quadrature at parameters where that is easy.
"""

import mpmath as mp

INF = mp.inf


def log(x):
    return mp.log(x) if x > 0 else -INF


def times_log(x, y):
    """x log y, and 0 at x = 0."""
    return mp.mpf(0) if x == 0 else x * log(y)


def binary(p, q):
    return times_log(p, p) + times_log(1 - p, 1 - p) - times_log(p, q) - times_log(1 - p, 1 - q)


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def categorical(p, q):
    p, q = ([x / mp.fsum(row) for x in row] for row in (p, q))
    return mp.fsum(times_log(a, a) - times_log(a, b) for a, b in zip(p, q, strict=True))


def geometric(p, q):
    return log(p) - log(q) + (mp.mpf(0) if p == 1 else (1 - p) / p * (log(1 - p) - log(1 - q)))


def poisson(p, q):
    return times_log(p, p) - times_log(p, q) + q - p


def normal(m, s, n, t):
    return mp.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - mp.mpf(1) / 2


def gamma(a, r, b, t):
    return b * mp.log(r / t) + mp.loggamma(b) - mp.loggamma(a) + (a - b) * mp.digamma(a) + (t - r) * a / r


def dirichlet(a, b):
    total, other = mp.fsum(a), mp.fsum(b)
    value = mp.loggamma(total) - mp.loggamma(other)
    for x, y in zip(a, b, strict=True):
        value += mp.loggamma(y) - mp.loggamma(x) + (x - y) * (mp.digamma(x) - mp.digamma(total))
    return value


def log_beta(a, b):
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


def logit(p):
    return mp.log(p / (1 - p))


def cb_norm(p):
    """Log of the normaliser of a ContinuousBernoulli: density C p^x (1 - p)^(1 - x)."""
    return mp.log(2) if p == mp.mpf(1) / 2 else mp.log(2 * mp.atanh(1 - 2 * p) / (1 - 2 * p))


def cb_moments(p):
    e = logit(p)
    if e == 0:
        return mp.mpf(1) / 2, mp.mpf(1) / 12
    return 1 / (1 - mp.exp(-e)) - 1 / e, 1 / e**2 - 1 / (4 * mp.sinh(e / 2) ** 2)


# Of one family.


def gumbel(m, s, n, t):
    return mp.log(t / s) + mp.euler * (s / t - 1) + (m - n) / t + mp.exp((n - m) / t) * mp.gamma(1 + s / t) - 1


def weibull(k, a, j, b):
    """Of shapes k, j and scales a, b."""
    value = mp.log(k) - k * mp.log(a) - mp.log(j) + j * mp.log(b) + (k - j) * (mp.log(a) - mp.euler / k)
    return value + (a / b) ** j * mp.gamma(j / k + 1) - 1


def von_mises(m, k, n, j):
    mean = mp.besseli(1, k) / mp.besseli(0, k)
    return mp.log(mp.besseli(0, j) / mp.besseli(0, k)) + mean * (k - j * mp.cos(m - n))


def laplace(m, s, n, t):
    d = abs(m - n)
    return mp.log(t / s) + d / t + s / t * mp.exp(-d / s) - 1


def cauchy(m, s, n, t):
    return mp.log(((s + t) ** 2 + (m - n) ** 2) / (4 * s * t))


def pareto(x, a, y, b):
    return INF if x < y else mp.log(a / b) + b * mp.log(x / y) + b / a - 1


def uniform(a, b, c, d):
    return mp.log((d - c) / (b - a)) if c <= a and b <= d else INF


def continuous_bernoulli(p, q):
    return cb_norm(p) + mp.log(1 - p) - cb_norm(q) - mp.log(1 - q) + cb_moments(p)[0] * (logit(p) - logit(q))


def multivariate_normal(m, s, n, t):
    """Of means and covariances."""
    s, t, moved = mp.matrix(s), mp.matrix(t), mp.matrix(n) - mp.matrix(m)
    inverse = t**-1
    product = inverse * s
    trace = mp.fsum(product[i, i] for i in range(len(m)))
    return (trace + (moved.T * inverse * moved)[0] - len(m) + mp.log(mp.det(t) / mp.det(s))) / 2


# Of different families: what is known of p, and the cost of q.


def known(family, *params):
    """Negentropy, mean, variance, and E log x."""
    if family == "Exponential":
        (r,) = params
        return mp.log(r) - 1, 1 / r, 1 / r**2, -mp.euler - mp.log(r)
    if family == "Gamma":
        a, r = params
        entropy = a - mp.log(r) + mp.loggamma(a) + (1 - a) * mp.digamma(a)
        return -entropy, a / r, a / r**2, mp.digamma(a) - mp.log(r)
    if family == "Beta":
        a, b = params
        n = a + b
        entropy = log_beta(a, b) - (a - 1) * mp.digamma(a) - (b - 1) * mp.digamma(b) + (n - 2) * mp.digamma(n)
        return -entropy, a / n, a * b / n**2 / (n + 1), mp.digamma(a) - mp.digamma(n)
    if family == "ContinuousBernoulli":
        (p,) = params
        mean, variance = cb_moments(p)
        return cb_norm(p) + mp.log(1 - p) + mean * logit(p), mean, variance, None
    if family == "Gumbel":
        m, s = params
        return -mp.log(s) - mp.euler - 1, m + mp.euler * s, (mp.pi * s) ** 2 / 6, None
    if family == "Laplace":
        m, s = params
        return -mp.log(2 * s) - 1, m, 2 * s**2, None
    if family == "Normal":
        m, s = params
        return -mp.log(2 * mp.pi * mp.e * s**2) / 2, m, s**2, None
    if family == "Pareto":
        x, a = params
        mean = a * x / (a - 1) if a > 1 else INF
        return mp.log(a / x) - 1 / a - 1, mean, a * x**2 / ((a - 1) ** 2 * (a - 2)) if a > 2 else INF, mp.log(x) + 1 / a
    a, b = params
    mean_log = (times_log(b, b) - times_log(a, a)) / (b - a) - 1 if a >= 0 else None
    return -mp.log(b - a), (a + b) / 2, (b - a) ** 2 / 12, mean_log


def laplace_transform(family, t, *params):
    """E exp(-t x)."""
    if family == "Exponential":
        return params[0] / (params[0] + t)
    if family == "Gamma":
        return (params[1] / (params[1] + t)) ** params[0]
    if family == "Normal":
        return mp.exp(-t * params[0] + t**2 * params[1] ** 2 / 2)
    a, b = params
    return (mp.exp(-t * a) - mp.exp(-t * b)) / (t * (b - a))


SUPPORTS = {
    "Exponential": lambda r: (0, INF),
    "Gamma": lambda a, r: (0, INF),
    "Beta": lambda a, b: (0, 1),
    "ContinuousBernoulli": lambda p: (0, 1),
    "Gumbel": lambda m, s: (-INF, INF),
    "Laplace": lambda m, s: (-INF, INF),
    "Normal": lambda m, s: (-INF, INF),
    "Pareto": lambda x, a: (x, INF),
    "Uniform": lambda a, b: (a, b),
}


def cross(p, q):
    """The reference of a pair of families by name."""
    count = {"Exponential": 1, "ContinuousBernoulli": 1}.get(p, 2)

    def reference(*params):
        ps, qs = params[:count], params[count:]
        (low, high), (outer_low, outer_high) = SUPPORTS[p](*ps), SUPPORTS[q](*qs)
        if low < outer_low or high > outer_high:
            return INF
        negentropy, mean, variance, mean_log = known(p, *ps)
        return negentropy + cost(p, ps, q, qs, mean, variance, mean_log)

    return reference


def cost(p, ps, q, qs, mean, variance, mean_log):
    """-E_p log q."""
    if q == "Normal":
        m, s = qs
        return mp.log(2 * mp.pi * s**2) / 2 + (variance + (mean - m) ** 2) / (2 * s**2) if variance != INF else INF
    if q == "Exponential":
        return qs[0] * mean - mp.log(qs[0])
    if q == "Gamma":
        a, r = qs
        return mp.loggamma(a) - a * mp.log(r) - (a - 1) * mean_log + r * mean
    if q == "Gumbel":
        m, s = qs
        return mp.log(s) + (mean - m) / s + mp.exp(m / s) * laplace_transform(p, 1 / s, *ps)
    if q == "Laplace":
        m, s = qs
        z = (ps[0] - m) / (ps[1] * mp.sqrt(2))
        distance = ps[1] * mp.sqrt(2) * (mp.exp(-(z**2)) / mp.sqrt(mp.pi) + z * mp.erf(z))
        return mp.log(2 * s) + distance / s
    if q == "Uniform":
        return mp.log(qs[1] - qs[0])
    if q == "ContinuousBernoulli":
        return -cb_norm(qs[0]) - mp.log(1 - qs[0]) - mean * logit(qs[0])
    if q == "Pareto":
        x, a = qs
        return -mp.log(a) - a * mp.log(x) + (a + 1) * mean_log
    a, b = qs  # a Beta, to a Uniform
    log1m = known("Uniform", 1 - ps[1], 1 - ps[0])[3]
    return log_beta(a, b) - (a - 1) * mean_log - (b - 1) * log1m


LOG_DENSITIES = {
    "Exponential": lambda x, r: mp.log(r) - r * x,
    "Gamma": lambda x, a, r: a * mp.log(r) - mp.loggamma(a) + (a - 1) * mp.log(x) - r * x,
    "Beta": lambda x, a, b: (a - 1) * mp.log(x) + (b - 1) * mp.log(1 - x) - log_beta(a, b),
    "ContinuousBernoulli": lambda x, p: cb_norm(p) + x * mp.log(p) + (1 - x) * mp.log(1 - p),
    "Gumbel": lambda x, m, s: -mp.log(s) - (x - m) / s - mp.exp(-(x - m) / s),
    "Laplace": lambda x, m, s: -mp.log(2 * s) - abs(x - m) / s,
    "Normal": lambda x, m, s: -mp.log(2 * mp.pi * s**2) / 2 - ((x - m) / s) ** 2 / 2,
    "Pareto": lambda x, y, a: mp.log(a) + a * mp.log(y) - (a + 1) * mp.log(x),
    "Uniform": lambda x, a, b: -mp.log(b - a),
    "Cauchy": lambda x, m, s: -mp.log(mp.pi * s * (1 + ((x - m) / s) ** 2)),
    "Weibull": lambda x, k, a: mp.log(k / a) + (k - 1) * mp.log(x / a) - (x / a) ** k,
    "VonMises": lambda x, m, k: k * mp.cos(x - m) - mp.log(2 * mp.pi * mp.besseli(0, k)),
}
SUPPORTS |= {
    "Cauchy": lambda m, s: (-INF, INF),
    "Weibull": lambda k, a: (0, INF),
    "VonMises": lambda m, k: (-mp.pi, mp.pi),
}


def by_quadrature(p, ps, q, qs):
    """The definition of the KL, for moderate parameters."""
    low, high = (-8, 80) if p == "Gumbel" else SUPPORTS[p](*ps)  # whose tails are nothing there, and overflow farther out
    points = [
        low,
        *[x for x in (mp.mpf(-3), mp.mpf(0), mp.mpf("0.5"), mp.mpf(1), mp.mpf(2), mp.mpf(5)) if low < x < high],
        high,
    ]

    def integrand(x):
        first = LOG_DENSITIES[p](x, *ps)
        return mp.exp(first) * (first - LOG_DENSITIES[q](x, *qs))

    return mp.quad(integrand, points)
