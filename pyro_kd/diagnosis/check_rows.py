"""The rows of the table of sites that a check before training shows. Knows pairs and sites, and runs nothing."""

from typing import Any

import torch

from pyro_kd.diagnosis.check_report import SiteCheck
from pyro_kd.losses.terms import SiteTerm
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.sites.pairing import SitePair

__all__ = ["fresh_row", "row_of"]


def row_of(pair: SitePair, twin: str, kind: str, noise: str, term: SiteTerm | None) -> SiteCheck:
    """The row of a term of a pair, whose site in the student is ``twin``, with its kind and how it shares noise."""
    counts = []
    scales = torch.as_tensor(pair.teacher_scale).flatten().tolist()
    if any(scale != 1 for scale in scales):
        counts.append(f"{scales[0]:.4g} times" if len(set(scales)) == 1 else "scaled")
    if pair.teacher_mask is not None:
        counts.append("masked")
    return SiteCheck(
        name=pair.name if term is None else term.name,
        student=twin,
        kind=kind,
        families=(_family(pair.p), _family(pair.q)),
        batch_shape=tuple(getattr(pair.p, "batch_shape", ())),
        event_shape=tuple(getattr(pair.p, "event_shape", ())),
        plates=tuple(frame.name for frame in pair.plates),
        counts=", ".join(counts) or "all",
        noise=noise,
        divergence=term.divergence if term is not None else "",
        analytic=term.analytic if term is not None else None,
        term=float(term.value.detach()) if term is not None else None,
        weight=float(term.weight) if term is not None else None,
    )


def fresh_row(name: str, site: Any, whose: str) -> SiteCheck:
    """The row of a site without a counterpart; ``whose`` is empty for the student's."""
    family, fn = _family(site["fn"]), site["fn"]
    shapes = tuple(getattr(fn, "batch_shape", ())), tuple(getattr(fn, "event_shape", ()))
    plates = tuple(frame.name for frame in site["cond_indep_stack"])
    return SiteCheck(name, name, f"fresh {whose}".strip(), (family, family), *shapes, plates, "-", "its own")


def _family(fn: Any) -> str:
    return type(unwrapped(fn)).__name__
