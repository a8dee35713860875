"""What a user may pass as targets, and as weights and probabilities of latents, and what it means at a site."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pyro.poutine.runtime import Message

from pyro_kd.errors import NoTargetsError, ObservedValueError, UnknownTargetError, listing, nearest
from pyro_kd.noise.messengers import SampleMessenger
from pyro_kd.noise.statements import is_bookkeeping, is_left_by_reparam, is_statement
from pyro_kd.sites.observed import Observed, observed_by
from pyro_kd.utils.advice import advice
from pyro_kd.utils.user_code import called

__all__ = [
    "TargetMessenger",
    "Targets",
    "Weight",
    "probability_of",
    "require_data",
    "require_draw",
    "require_targets",
    "weight_of",
]

Targets = Collection[str] | str | Callable[[Mapping[str, Any]], bool] | None
Weight = float | Mapping[str, float] | Callable[[str], float]


class TargetMessenger(SampleMessenger):
    """Find the targets of a program, and let the program draw them where it observes data.

    Observed sites that are not targets keep their values: they are inputs.

    Args:
        targets: names, a predicate, or None for the sites that the program observes.
        keeps_data: whether targets keep the data that the program observes, too.

    Attributes:
        names: the targets found so far, in execution order.
        observed: what the program observes, targets and inputs.
    """

    def __init__(self, targets: Targets, keeps_data: bool = False) -> None:
        super().__init__()
        self.keeps_data = keeps_data
        self.targets = targets if targets is None or callable(targets) else frozenset(targets)
        self.names: dict[str, None] = {}  # a set in order of insertion
        self.observed: dict[str, Observed] = {}

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        self.observed |= observed_by(msg)
        if self.is_target(msg):
            require_draw(msg, "teacher")
            self.names[str(msg["name"])] = None
            if msg["is_observed"] and not self.keeps_data:
                msg["is_observed"] = False
                msg["value"] = None

    def is_target(self, msg: Any) -> bool:
        """Whether a message, or a site of a trace, is that of a target."""
        if self.targets is not None and not callable(self.targets):
            return msg["name"] in self.targets and not is_statement(msg)
        if is_bookkeeping(msg):
            return False
        if self.targets is None:
            return bool(msg["is_observed"])
        return bool(called(self.targets, f"site {msg['name']!r}: targets", "f(site)", msg))


def require_targets(
    names: Collection[str], sites: Collection[str], targets: Targets, observed: Collection[str] = ()
) -> None:
    """Check the targets that were found.

    Args:
        names: the targets found.
        sites: the sites that the teacher draws.
        targets: the ``targets`` option of the loss.
        observed: the sites that the teacher observes, which may be targets too.

    Raises:
        NoTargetsError: no targets were found.
        UnknownTargetError: a name is not that of a site.
    """
    if targets is not None and not callable(targets):
        for name in targets:
            if name not in names:
                inputs = [site for site in observed if site not in sites]
                hint = nearest(name, [*sites, *inputs])
                has = f"which has {listing(sites)}" + (f", and observes {listing(inputs)}" if inputs else "")
                if f"{name}_unobserved" in sites:
                    hint = f" With obs_mask, Pyro draws it at the sites {name}_observed and {name}_unobserved."
                raise UnknownTargetError(
                    f"target {name!r} is not a sample site of the teacher, {has}.{hint} "
                    f"Use the teacher's name of the site: {advice().name}(targets=[...])."
                )
    if not names:
        has = listing(dict.fromkeys([*sites, *observed]))
        reason = "targets is empty" if targets is not None else "the teacher observes no site"
        if callable(targets):
            reason = "the teacher has no site for which targets(site) holds"
        raise NoTargetsError(
            f"no targets found: {reason}. The teacher's sample sites are {has}. Name the ones that the student should "
            f"reproduce: {advice().name}(targets=[...])."
        )


def require_draw(msg: Any, whose: str) -> None:
    """Raise UnknownTargetError where ``poutine.reparam`` has left a point mass in place of a target, which has no term then.

    Args:
        msg: the message of a target.
        whose: the program, ``"teacher"`` or ``"student"``.
    """
    if is_left_by_reparam(msg):
        name = msg["name"]
        raise UnknownTargetError(
            f"target {name!r} is no draw in the {whose}: poutine.reparam has made it a point mass (Delta), a function of an "
            f"auxiliary draw. Leave it out of the config: a dict without {name!r}, or, with strategy = AutoReparam(), "
            f"poutine.reparam(program, config=lambda site: None if site['name'] == {name!r} else strategy(site)). Or observe it "
            f"inside of the reparam: AutoReparam leaves {name!r} as it is in poutine.condition(program, data={{{name!r}: ...}})."
        )


def require_data(finder: TargetMessenger) -> None:
    """Raise ObservedValueError where targets are to keep the data that a program observes, and it observes none."""
    drawn = [name for name in finder.names if name not in finder.observed]
    if not drawn and (finder.names or finder.targets is not None):  # a target that was not found is a different error
        return
    where = f"draws {listing(drawn)}" if drawn else "observes no site"
    raise ObservedValueError(
        f"target_values='data' needs data at every target, but the teacher {where} in this call. Pass the data, so that the program "
        f"has pyro.sample({(drawn or ['y'])[0]!r}, ..., obs=data); with target_values='teacher' the teacher draws the targets."
    )


def weight_of(name: str, weight: Weight, *, option: str = "latent_weight") -> float:
    """The weight of a latent site.

    Args:
        name: the site.
        weight: a number, a mapping by site name, or a function of the site name.
        option: the name of the option, for errors.

    Raises:
        UnknownTargetError: a mapping has no entry for the site.
        TypeError: its weight is not a number.
        ValueError: its weight is below 0, so that training would drive the site's distributions apart.
    """
    if type(weight) is float and weight >= 0:
        return weight
    number = _number_of(name, weight, option, "weight", "0 leaves the site out")
    if number < 0:
        raise ValueError(f"{option} of site {name!r} is {number}, but must be at least 0; 0 leaves the site out")
    return number


def probability_of(name: str, probability: Weight, *, option: str = "teacher_forcing") -> float:
    """The probability with which something happens at a site; see :func:`weight_of`.

    Raises:
        UnknownTargetError, TypeError: as there.
        ValueError: it is outside [0, 1].
    """
    number = _number_of(name, probability, option, "probability", "0 leaves the site to the shared noise")
    if not 0 <= number <= 1:
        raise ValueError(
            f"{option} of site {name!r} is {number}, but must be a probability, in [0, 1]: 0 gives the student the noise alone, 1 "
            "the teacher's value"
        )
    return number


def _number_of(name: str, option: Weight, option_name: str, noun: str, about_zero: str) -> float:
    value: Any = option
    if callable(option):
        value = called(option, f"site {name!r}: {option_name}", "f(site_name)", name)
    elif isinstance(option, Mapping):
        if name not in option:
            raise UnknownTargetError(
                f"{option_name} has no entry for the latent site {name!r}; it has {listing(option)}.{nearest(name, option)} "
                f"Give every latent site a {noun}; {about_zero}."
            )
        value = option[name]
    try:
        number = value if type(value) is float else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, str):
        raise TypeError(f"{option_name} of site {name!r} is {value!r:.60}, but must be a number, such as 0.1; {about_zero}")
    return number
