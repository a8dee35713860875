"""What a user may pass as targets and as latent weight, and what it means for a site."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.errors import NoTargetsError, UnknownTargetError, listing, nearest
from pyro_kd.handlers import SampleMessenger
from pyro_kd.pairing import is_bookkeeping, support_mismatch
from pyro_kd.recoding import recoded, recoded_value

__all__ = ["GiveMessenger", "TargetMessenger", "Targets", "Weight", "require_targets", "weight_of"]

Targets = Collection[str] | str | Callable[[Mapping[str, Any]], bool] | None
Weight = float | Mapping[str, float] | Callable[[str], float]


class TargetMessenger(SampleMessenger):
    """Find the targets of a program, and let the program draw them where it observes data.

    Sites that are observed and are no targets keep their values: they are inputs.

    Attributes:
        names: the targets met so far, in execution order.
    """

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.targets = targets
        self.names: list[str] = []

    def _pyro_sample(self, msg: Message) -> None:
        if not is_bookkeeping(msg) and self._is_target(msg):
            self.names.append(str(msg["name"]))
            if msg["is_observed"]:
                msg["is_observed"] = False
                msg["value"] = None

    def _is_target(self, msg: Message) -> bool:
        if self.targets is None:
            return msg["is_observed"]
        return bool(self.targets(msg)) if callable(self.targets) else msg["name"] in self.targets


class GiveMessenger(SampleMessenger):
    """Give a program values at named sites, as ``poutine.condition`` does.

    Args:
        values: by the program's site name.
        laws: the distributions that the values were drawn from, by the same names: a category is given in the coding of the
            program's own distribution.

    Raises:
        SupportMismatchError: a value has another event shape than the program's distribution.
    """

    def __init__(self, values: Mapping[str, Tensor], laws: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values
        self.laws = laws

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        value = self.values.get(name)
        if value is None:
            return
        law, fn = self.laws.get(name), msg["fn"]
        if law is not None:
            value = recoded_value(value, law, fn)
            event_shape = getattr(fn, "event_shape", torch.Size())
            if value.shape[max(value.dim() - len(event_shape), 0) :] != event_shape:
                reason = f"events of shape {tuple(recoded(law, fn).event_shape)} against {tuple(event_shape)}"
                raise support_mismatch(name, law, fn, reason, needs_value=True)
        msg["value"] = value
        msg["is_observed"] = True


def require_targets(names: Collection[str], sites: Collection[str], targets: Targets) -> None:
    """Check the targets that were found.

    Args:
        names: the targets found.
        sites: the teacher's sample sites.
        targets: what the user asked for.

    Raises:
        NoTargetsError: there are none.
        UnknownTargetError: a name is no site.
    """
    remedy = "SurrogateKD(targets=[...])"
    if targets is not None and not callable(targets):
        for name in targets:
            if name not in names:
                hint = nearest(name, sites)
                if f"{name}_unobserved" in sites:
                    hint = f" With obs_mask, Pyro draws it at the sites {name}_observed and {name}_unobserved."
                raise UnknownTargetError(
                    f"target {name!r} is no sample site of the teacher; it has {listing(sites)}.{hint} "
                    f"Use the teacher's name of the site: {remedy}."
                )
    if not names:
        reason = "targets is empty" if targets is not None else "the teacher observes no site"
        if callable(targets):
            reason = "the teacher has no site for which targets(site) holds"
        raise NoTargetsError(
            f"no targets found: {reason}. The teacher's sample sites are {listing(sites)}. Name the ones that the student "
            f"should reproduce: {remedy}."
        )


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
