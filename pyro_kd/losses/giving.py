"""The handlers that a student runs in: which of the teacher's values it is given, and from which noise it draws its own.

    CollectingReplayMessenger(noise)  >  GiveMessenger(given, inputs)  >  the student

A value is given where its distribution is compared. Where a mask hides an element of the site, or a scale of 0 removes it, the
student draws the element: the distribution of a given value must have a term, or the loss would no longer be a bound. The student
also draws where a coin says so, see :mod:`pyro_kd.losses.forcing`.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.errors import NoiseMismatchError, SupportMismatchError, UnpairedSiteError, UnsupportedNoiseError
from pyro_kd.losses.discrete_gradients.choice import DiscreteGradients
from pyro_kd.losses.forcing import Given
from pyro_kd.losses.targets import TargetMessenger, require_draw
from pyro_kd.noise.laws import Draw
from pyro_kd.noise.messengers import RecordNoiseMessenger, ReplayNoiseMessenger, SampleMessenger
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.noise.streams import StreamWatch
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.sites.categories import num_categories, recoded, recoded_value
from pyro_kd.sites.compatibility import support_mismatch
from pyro_kd.sites.observed import Observed, observed_by
from pyro_kd.sites.plates import Sizes, sizes_at
from pyro_kd.sites.weighting import compared_elements
from pyro_kd.utils import guards

__all__ = [
    "CANNOT_SHARE",
    "CollectingReplayMessenger",
    "GiveMessenger",
    "OwnDraw",
    "RecordNeededMessenger",
    "ReplayTeacherMessenger",
]

_ALL_COMPARED = "all elements of a given site are compared"

CANNOT_SHARE = (NoiseMismatchError, UnpairedSiteError, UnsupportedNoiseError)


class OwnDraw(NamedTuple):
    """What a student has drawn itself at a site: its distribution, the value, and the noise behind it."""

    fn: Any
    value: Tensor
    noise: tuple[Draw, ...]


class RecordNeededMessenger(RecordNoiseMessenger):
    """Record the noise of a teacher. That of a target is recorded only if a mask may hide elements, which are then not given.

    Args:
        finder: the handler that finds the targets, inside this one.
        watch: see :class:`~pyro_kd.noise.messengers.RecordNoiseMessenger`.
        keeps_targets: whether the noise of all targets is recorded, as far as it can be.
    """

    def __init__(self, finder: TargetMessenger, watch: StreamWatch | None = None, *, keeps_targets: bool = False) -> None:
        def is_left_out(site: Any) -> bool:
            return not keeps_targets and site["name"] in finder.names and compared_elements(site) is True

        super().__init__(is_left_out, watch)
        self._finder = finder

    def _sample(self, msg: Message[..., Any]) -> None:
        try:
            super()._sample(msg)
        except UnsupportedNoiseError:  # the student then draws hidden elements from its own noise: the loss is still a bound
            if msg["name"] not in self._finder.names:
                raise
            if msg["value"] is None:
                self._draw(str(msg["name"]), self._broadcast(msg), msg)


class ReplayTeacherMessenger(ReplayNoiseMessenger):
    """Replay the noise of a teacher. Sites without recorded noise, which are targets, draw as usual."""

    def _tape(self, name: str, fn: Any) -> NoiseTape | None:
        return super()._tape(name, fn) if name in self.noise else None


class CollectingReplayMessenger(ReplayNoiseMessenger):
    """Replay noise. A site without recorded noise draws its own, so that one error can name all such sites.

    Args:
        noise, site_map, fresh, looks_between: see :class:`~pyro_kd.noise.messengers.ReplayNoiseMessenger`.
        gradients: what gradients pass through the discrete draws; none, if it is omitted.

    Attributes:
        unpaired: the error of each site without recorded noise, by name.
        drawn: the student's own draws, by its names of the sites. If there are gradients, those of fresh sites are among them.
    """

    def __init__(
        self,
        noise: Mapping[str, tuple[Draw, ...]],
        site_map: Mapping[str, str],
        fresh: Container[str],
        *,
        looks_between: bool = False,
        gradients: DiscreteGradients | None = None,
    ) -> None:
        super().__init__(noise, site_map, fresh, looks_between=looks_between)
        self.unpaired: dict[str, UnpairedSiteError] = {}
        self.drawn: dict[str, OwnDraw] = {}
        self._gradients = gradients

    def _tape(self, name: str, fn: Any) -> NoiseTape | None:
        try:
            tape = super()._tape(name, fn)
        except UnpairedSiteError as error:
            self.unpaired[name] = error
            return None
        is_fresh = name in self.fresh or "*" in self.fresh
        if tape is None and self._gradients is not None and is_fresh and not draws_nothing(fn):
            return NoiseTape()
        return tape

    def _sampled(self, name: str, fn: Any) -> Any:
        return fn if self._gradients is None else self._gradients.sampled(name, fn)

    def _done(self, name: str, fn: Any, msg: Message[..., Any], tape: NoiseTape) -> None:
        value: Any = msg["value"]
        if self._gradients is not None:
            self.drawn[name] = OwnDraw(fn, value, tuple(tape.draws))


class GiveMessenger(SampleMessenger):
    """Give a student values at named sites, as ``poutine.condition`` does, in the elements that are compared.

    Args:
        sites: sites of the teacher, by the student's names: their values are given. A category is given in the coding of the
            student's distribution.
        given: for each of these sites, which elements are given.
        inputs: values for sites that the student does not observe itself, by its names.
        replay: the handler around this one, which draws the elements that are not given.

    Attributes:
        observed: what the student observes itself.
        last: the name of the last site that it reached.
        sizes: the sizes of the plates there.

    Raises:
        SupportMismatchError: a value and the student's distribution have different event shapes.
        UnknownTargetError: a target is no draw of the student.
        UnsupportedNoiseError: an element is not given, and cannot be drawn.
    """

    targets: Container[str] = ()
    """The names of the targets in the teacher, which cannot be left out."""

    def __init__(
        self,
        sites: Mapping[str, Any],
        given: Mapping[str, Given],
        inputs: Mapping[str, Tensor],
        replay: ReplayNoiseMessenger,
    ) -> None:
        super().__init__()
        self.sites = sites
        self.given = given
        self.inputs = inputs
        self.observed: dict[str, Observed] = {}
        self.last, self.sizes = "", Sizes()
        self._replay = replay

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        name = str(msg["name"])
        self.observed |= observed_by(msg)
        self.last, self.sizes = name, sizes_at(msg)
        if name in self.sites:
            if self.sites[name]["name"] in self.targets:
                require_draw(msg, "student")
            msg["value"] = self._value(name, msg)
            msg["is_observed"] = True
        elif name in self.inputs and not msg["is_observed"]:
            msg["value"] = self.inputs[name]
            msg["is_observed"] = True

    def _value(self, name: str, msg: Any) -> Tensor:
        given = self._given(name, msg["fn"])
        compared = compared_elements(self.sites[name])
        coins = self.given[name]
        is_data = self.sites[name]["is_observed"]  # then it is equal in both programs, also where it is masked
        if (compared is True and coins is True) or (is_data and coins is not False):
            return given
        try:
            own = self._own_draw(name, msg)
        except UnsupportedNoiseError:
            if coins is True and isinstance(compared, Tensor) and guards.holds(compared, _ALL_COMPARED):
                return given
            raise
        if compared is False or coins is False:
            return own
        if isinstance(coins, Tensor):
            if event := len(getattr(self.sites[name]["fn"], "event_shape", ())):
                coins = coins.reshape([*coins.shape, *[1] * event])
            compared = coins if compared is True else coins & compared
        elements = torch.as_tensor(compared, device=given.device)
        # Not 0 where one program has an index and the other a one-hot vector.
        extra = len(msg["fn"].event_shape) - len(self.sites[name]["fn"].event_shape)
        if extra:
            elements = elements.unsqueeze(-1) if extra > 0 else elements.squeeze(-1)
        return torch.where(elements, given, own)

    def _own_draw(self, name: str, msg: Any) -> Tensor:
        """The student's own draw: from the shared noise, if it can be shared at this site; otherwise from its own."""
        replay = self._replay
        msg["is_observed"], msg["value"] = False, None
        if replay.site_map.get(name, name) in replay.noise:
            try:
                replay._pyro_sample(msg)
            except CANNOT_SHARE:
                msg["value"] = None
        if msg["value"] is None:
            replay._draw(name, replay._broadcast(msg), msg)
        value: Tensor = msg["value"]
        return value

    def _given(self, name: str, fn: Any) -> Tensor:
        site = self.sites[name]
        theirs = num_categories(site["fn"])
        mine = None if theirs is None else num_categories(fn)
        if theirs is not None and mine is not None and theirs > mine:
            raise self._mismatch(site, fn, f"{theirs} categories against {mine}")
        value: Tensor = site["value"] if theirs is None else recoded_value(site["value"], site["fn"], fn)
        event_shape = getattr(fn, "event_shape", torch.Size())
        if value.shape[max(value.dim() - len(event_shape), 0) :] != event_shape:
            shapes = tuple(recoded(site["fn"], fn).event_shape), tuple(event_shape)
            reason = f"events of shape {shapes[0]} against {shapes[1]}"
            if shapes[0] == shapes[1]:
                reason += f", and a value of shape {tuple(value.shape)}"
            raise self._mismatch(site, fn, reason)
        return value

    def _mismatch(self, site: Any, fn: Any, reason: str) -> SupportMismatchError:
        return support_mismatch(site["name"], site["fn"], fn, reason, is_target=site["name"] in self.targets)
