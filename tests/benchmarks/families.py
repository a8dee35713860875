"""The table of docs/distributions.md: what pyro_kd does with each family of pyro.distributions, and how well noise couples it.

    python -m tests.benchmarks.families > docs/distributions.md

Two settings of a family, whose parameters differ by up to five per cent, are drawn on the same noise. For discrete families the
table gives the share of equal draws, and the largest share that any coupling can reach, 1 - TV = E_p min(1, q / p). For counts
it also gives the mean distance of the two draws, and the smallest possible one, that of sorted draws. For continuous families it gives
the rank correlation, averaged over coordinates; 1 is the best that any coupling can reach.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_kd import record_noise, replay_noise
from pyro_kd.divergences import kl
from pyro_kd.errors import PyroKDError
from pyro_kd.export import export_sampler
from pyro_kd.noise.samplers import DIRECT, replayable
from tests.support.families import FAMILIES, WITHOUT_SAMPLER, Family

GRADIENTS = {
    "exact": "of the value",
    "none": "none",
    "straight-through": "straight-through, by design",
}
HEAD = """# Every distribution

Written by `python -m tests.benchmarks.families > docs/distributions.md`, and tested by `tests/noise/test_coupling.py`. The parameters
are those of `tests/support/families.py`.

- **noise**: *tape*: the raw draws of the family's own sampler are recorded and replayed. *direct*: the same, without the cost of a
  tape. *explicit*: pyro_kd has its own map (`pyro_kd/noise/families.py`), since the family's sampler has a different derivative, couples
  badly, or is wrong. *explicit inside*: the family is built from an explicit one.
- **gradient**: what autograd gives at fixed noise: the derivative of the value, or none.
- **coupling**: draws of two settings on the same noise, whose parameters differ by up to 5 %. For discrete families, the share of equal
  draws, and in brackets the largest share that any coupling can reach. For counts, also the mean distance of the two draws, and in
  brackets the smallest possible one; no coupling has the best of both. For continuous families, the rank correlation, averaged over
  coordinates; 1 is the best. Angles are cut at pi, which lowers only the rank correlation. 4000 draws (spanning trees: 1000),
  seed 0: standard errors up to 0.01.
- **KL**: whether the KL between two members of the family has a closed form, or is estimated at the teacher's draw.
- **exports**: whether a program with the family can be exported as a function of noise ([export.md](export.md)), equal to Pyro on the same
  noise to 1e-10 in float64. *fixed*: for a fixed number of rows only. *no*: refused with an error, in most cases because the path of its
  sampler, or of Pyro's check of its parameters, depends on values.

| family | noise | gradient | coupling | KL | exports |
|---|---|---|---|---|---|
"""
TAIL = """
`Delta` and `Unit` need no noise. `ExpandedDistribution` is what `expand` makes, and `LKJCorrCholesky` is the old name of
`LKJCholesky`. The following have no sampler in Pyro. They raise an `UnsupportedNoiseError`, which says how to register one:
"""


class Row(NamedTuple):
    """One line of the table."""

    family: str
    noise: str
    gradient: str
    coupling: float
    best: float | None
    distance: tuple[float, float] | None
    divergence: str
    exports: str

    def __str__(self) -> str:
        cell = f"{self.coupling:.2f}" + ("" if self.best is None else f" ({self.best:.2f})")
        if self.distance is not None:
            cell += f", distance {self.distance[0]:.2f} ({self.distance[1]:.2f})"
        return f"| {self.family} | {self.noise} | {self.gradient} | {cell} | {self.divergence} | {self.exports} |"


def neighbour(family: Family) -> list[Tensor]:
    """The parameters, each moved by up to five per cent, in different directions."""
    return [
        value * (1 + 0.05 * torch.cos(1.7 * torch.arange(value.numel()) + 0.4).view_as(value)) for value in family.tensors()
    ]


def on_the_same_noise(family: Family, size: int) -> tuple[Tensor, Tensor]:
    """``size`` draws of both settings, flattened to rows."""
    p, q = family(), family.make(*neighbour(family))
    with torch.no_grad(), record_noise() as noise:
        x = pyro.sample("x", p, sample_shape=torch.Size([size]))
    with torch.no_grad(), replay_noise(noise=noise):
        y = pyro.sample("x", q, sample_shape=torch.Size([size]))
    return x, y


def coupling(family: Family) -> tuple[float, float | None]:
    """The measure of the coupling, and the best that can be reached."""
    pyro.set_rng_seed(0)
    x, y = on_the_same_noise(family, min(4000, family.size // 2))
    if not family.discrete:
        return rank_correlation(x.reshape(len(x), -1), y.reshape(len(x), -1)), 1.0
    fn, other = family(), family.make(*neighbour(family))
    events = len(fn.event_shape)
    equal = ((x == y).flatten(x.dim() - events).all(-1) if events else x == y).double().mean().item()
    if family.gradient == "straight-through" and "Relaxed" in family.name:
        return equal, None  # the density that these have is that of the relaxed value
    ratios = [(other.log_prob(value) - fn.log_prob(value)).exp().clamp(max=1) for value in ([x] if family.batched else x)]
    return equal, torch.stack(ratios).mean().item()


def distance(family: Family) -> tuple[float, float]:
    """Mean distance of two counts on the same noise, and that of the best coupling, of sorted draws."""
    pyro.set_rng_seed(0)
    x, y = on_the_same_noise(family, 4000)
    return (x - y).abs().mean().item(), (x.sort(0).values - y.sort(0).values).abs().mean().item()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, averaged over the columns that vary."""
    values = []
    for a, b in zip(x.unbind(1), y.unbind(1), strict=True):
        if a.std() > 1e-9:
            ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
            values.append(torch.corrcoef(ranks)[0, 1])
    return torch.stack(values).mean().item()


def mechanism(family: Family) -> str:
    """How the family is drawn as a function of noise."""
    fn = family()
    if type(fn) in DIRECT:
        return "direct"
    new = replayable(fn)
    if new is fn:
        return "tape"
    return "explicit" if type(new) is not type(fn) else "explicit inside"


def divergence(family: Family) -> str:
    """How the KL between two of the family is computed."""
    p, q = family(), family.make(*neighbour(family))
    if kl.is_exact(p, q):
        return "closed form"
    try:
        p.log_prob(p.sample())
    except NotImplementedError:
        return "no density in Pyro"
    return "Monte Carlo"


def exports(family: Family) -> str:
    """Whether a program with a site of this family is exported, for any number of rows or for a fixed one."""
    pyro.set_rng_seed(0)
    fn = family()

    def model(num_rows: int) -> None:
        with pyro.plate("rows", num_rows, dim=-1 - len(fn.batch_shape)):
            pyro.sample("x", family())

    def single() -> None:
        pyro.sample("x", family())

    try:
        export_sampler(model, 7, targets=["x"])
        return "yes"
    except (
        PyroKDError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # also of Pyro, for a batch of the family
        pass
    try:
        export_sampler(single, targets=["x"])
        return "fixed"
    except PyroKDError:
        return "no"


def rows(exported: Mapping[str, str] | None) -> Iterator[Row]:
    """The table, family by family.

    Args:
        exported: the last column by family; None to export every family, which takes minutes.
    """
    for family in sorted(FAMILIES.values(), key=lambda family: family.name.lower()):
        measured, best = coupling(family)
        yield Row(
            family.name,
            mechanism(family),
            GRADIENTS[family.gradient],
            measured,
            best if family.discrete else None,
            distance(family) if family.ordered else None,
            divergence(family),
            exports(family) if exported is None else exported.get(family.name, "not tried"),
        )


def page(exported: Mapping[str, str] | None = None) -> str:
    """The whole page; see :func:`rows`. It needs float64 as the default type, which torch's GeneralizedPareto takes for granted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = "\n".join(str(row) for row in rows(exported))
    return HEAD + table + "\n" + TAIL + ", ".join(f"`{name}`" for name in sorted(WITHOUT_SAMPLER)) + "."


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print(page())
