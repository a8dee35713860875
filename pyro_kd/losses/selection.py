"""What a user may pass as targets and as latent weight, and what it means for a site."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pyro_kd.errors import NoTargetsError, UnknownTargetError, listing, nearest

__all__ = ["Targets", "Weight", "is_target", "target_names", "weight_of"]

Targets = Collection[str] | str | Callable[[Mapping[str, Any]], bool] | None
Weight = float | Mapping[str, float] | Callable[[str], float]


def is_target(site: Mapping[str, Any], targets: Targets) -> bool:
    """Whether a site of the teacher, run under ``poutine.uncondition``, is a target. May be asked before it has a value."""
    if targets is None:
        infer = site["infer"]
        return bool(infer.get("was_observed")) and not infer.get("_deterministic")
    if callable(targets):
        return bool(targets(site))
    return site["name"] in targets


def target_names(sites: Mapping[str, Any], targets: Targets) -> list[str]:
    """The names of the target sites among the teacher's, in execution order.

    Raises:
        NoTargetsError: there are none.
        UnknownTargetError: a name is no site.
    """
    remedy = "SurrogateKD(targets=[...])"
    if targets is not None and not callable(targets):
        for name in targets:
            if name not in sites:
                raise UnknownTargetError(
                    f"target {name!r} is no sample site of the teacher; it has {listing(sites)}.{nearest(name, sites)} "
                    f"Use the teacher's name of the site: {remedy}."
                )
    names = [name for name, site in sites.items() if is_target(site, targets)]
    if not names:
        reason = "targets is empty" if targets is not None else "the teacher observes no site"
        if callable(targets):
            reason = "the teacher has no site for which targets(site) holds"
        raise NoTargetsError(
            f"no targets found: {reason}. The teacher's sample sites are {listing(sites)}. Name the ones that the student "
            f"should reproduce: {remedy}."
        )
    return names


def weight_of(name: str, weight: Weight) -> float:
    """The weight of a latent site.

    Raises:
        UnknownTargetError: a mapping has no entry for it.
    """
    if callable(weight):
        return float(weight(name))
    if isinstance(weight, Mapping):
        if name not in weight:
            raise UnknownTargetError(
                f"latent_weight has no entry for the latent site {name!r}; it has {listing(weight)}.{nearest(name, weight)} "
                "Give every latent site a weight (0 leaves it out)."
            )
        return float(weight[name])
    return weight
