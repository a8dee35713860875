"""What is kept of a run of a teacher: records of plain values, tensors and distributions, and the way back to a run.

Taught --keep--> KeptRun --> Taught
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_kd.errors import UnknownTargetError, listing
from pyro_kd.losses.packing import PLAIN, Held
from pyro_kd.losses.recording import Taught
from pyro_kd.losses.targets import TargetMessenger, Targets
from pyro_kd.noise.laws import Draw, NoiseLaw
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.sites.observed import Observed
from pyro_kd.sites.tracing import params_of

__all__ = ["KeptNoise", "KeptRun", "KeptSite", "keep", "taught"]


class KeptRun(NamedTuple):
    """What is kept of a run. Sites are tuples of what :class:`KeptSite` names.

    Attributes:
        nodes: the sample sites.
        params: leaves of the teacher's ``pyro.param`` statements, by name.
        noise: the noise of its draws.
        targets: names of the targets.
        keeps_data: whether the targets have kept the data that they observe.
        observed: what the teacher observes, by name: value, distribution and plates.
        compared: names of the sites that are compared.
    """

    nodes: list["KeptSite"]
    params: dict[str, Any]
    noise: "KeptNoise"
    targets: list[str]
    keeps_data: bool
    observed: dict[str, tuple[Any, Any, Any]]
    compared: list[str]


class KeptSite(NamedTuple):
    """A sample site, without what only Pyro's handlers need."""

    name: str
    fn: Any
    value: Any
    is_observed: bool
    mask: Any
    scale: Any
    plates: tuple[tuple[Any, ...], ...]
    infer: dict[str, Any]


class KeptNoise(NamedTuple):
    """A :class:`~pyro_kd.noise.record.NoiseRecord`: draws are tuples of law, noise, operation and place."""

    sites: dict[str, list[tuple[Any, ...]]]
    between: dict[str, list[tuple[Any, ...]]]
    lost: list[Any]
    is_seeded: bool


def keep(run: Taught) -> KeptRun:
    """What a run has left."""
    nodes = [_site(name, node) for name, node in run.trace.nodes.items() if node["type"] == "sample"]
    noise, finder = run.noise, run.finder
    return KeptRun(
        nodes,
        {name: Held(leaf) for name, leaf in params_of(run.trace).items()},
        KeptNoise(
            {name: list(map(_parts, draws)) for name, draws in noise.items()},
            {name: list(map(_parts, draws)) for name, draws in noise.between.items()},
            list(noise.lost_between),
            noise.is_seeded,
        ),
        list(finder.names),
        finder.keeps_data,
        {name: (value, fn, tuple(map(tuple, plates))) for name, (value, fn, plates) in finder.observed.items()},
        list(run.sites),
    )


def _site(name: str, node: Any) -> KeptSite:
    plates = tuple(tuple(frame) for frame in node["cond_indep_stack"])
    infer = {key: value for key, value in (node["infer"] or {}).items() if isinstance(value, PLAIN)}
    return KeptSite(name, node["fn"], node["value"], node["is_observed"], node["mask"], node["scale"], plates, infer)


def _parts(draw: Draw) -> tuple[Any, ...]:
    return draw.law.value, draw.noise, draw.op, draw.where


def taught(kept: KeptRun, targets: Targets, keeps_data: bool) -> Taught:
    """The run, for a loss with these targets.

    Raises:
        UnknownTargetError: it was made for different targets.
    """
    trace = Trace()
    for site in kept.nodes:
        plates = _frames(site.plates)
        trace.add_node(
            site.name,
            name=site.name,
            type="sample",
            fn=site.fn,
            value=site.value,
            is_observed=site.is_observed,
            mask=site.mask,
            scale=site.scale,
            cond_indep_stack=plates,
            infer=dict(site.infer),
            args=(),
            kwargs={},
        )
    for name, leaf in kept.params.items():
        trace.add_node(name, name=name, type="param", value=leaf)
    noise = NoiseRecord()
    for name, draws in kept.noise.sites.items():
        noise.add(name, map(_draw, draws))
    noise.between = {name: tuple(map(_draw, draws)) for name, draws in kept.noise.between.items()}
    noise.lost_between, noise.is_seeded = list(kept.noise.lost), kept.noise.is_seeded
    finder = TargetMessenger(targets, keeps_data)
    finder.observed = {name: Observed(value, fn, _frames(plates)) for name, (value, fn, plates) in kept.observed.items()}
    _check_targets(kept, trace, finder)
    finder.names = dict.fromkeys(kept.targets)
    nodes: Mapping[str, Any] = trace.nodes
    return Taught(trace, noise, finder, {name: nodes[name] for name in kept.compared})


def _check_targets(kept: KeptRun, trace: Trace, finder: TargetMessenger) -> None:
    """Raise where a loss has other targets than the run."""
    nodes: Mapping[str, Any] = trace.nodes
    names = [
        name
        for name, node in nodes.items()
        if node["type"] == "sample"
        and finder.is_target({**node, "is_observed": node["is_observed"] or name in kept.observed})
    ]
    if set(names) != set(kept.targets) or finder.keeps_data != kept.keeps_data:
        kind = {True: "data", False: "teacher"}
        raise UnknownTargetError(
            f"the teacher was drawn from with targets {listing(kept.targets)} and target_values={kind[kept.keeps_data]!r}, and the "
            f"loss has targets {listing(names)} and target_values={kind[finder.keeps_data]!r}. Draw with those of the "
            "loss: cache_teacher(..., targets=[...])."
        )


def _frames(plates: Iterable[Sequence[Any]]) -> tuple[CondIndepStackFrame, ...]:
    return tuple(CondIndepStackFrame(*plate) for plate in plates)


def _draw(parts: Sequence[Any]) -> Draw:
    law, noise, op, where = parts
    return Draw(NoiseLaw(law), noise, op, where)
