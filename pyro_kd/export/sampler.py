r"""A program as a deterministic function of noise, :math:`(\epsilon, x) \mapsto (z, y)`, for machines without Pyro.

In the semi-auxiliary form every draw is :math:`z_i = g(Pa(z_i), \epsilon_i)`, with noise of a fixed law (Chen et al. 2023, section
3.1). The tape has made that function; here it becomes a graph whose inputs are the noise and the arguments.
"""

import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.errors import NoTargetsError, PyroKDError, UnknownTargetError, UnsupportedExportError, listing, nearest
from pyro_kd.export.arguments import Arguments, dtype_name
from pyro_kd.export.building import build, rows_in
from pyro_kd.export.description import ROWS, Value
from pyro_kd.export.exported import Exported
from pyro_kd.export.graph import called_modules, known_tensors
from pyro_kd.export.rows import find_rows, plate_sizes
from pyro_kd.export.runs import (
    InputMessenger,
    Run,
    Slot,
    check_repeats,
    in_evaluation,
    keeping_attributes,
    record_run,
    runs_to_verify,
    slots_of,
    value_at,
)
from pyro_kd.export.verification import Case
from pyro_kd.isolation.programs import require_callable
from pyro_kd.losses.targets import TargetMessenger, Targets
from pyro_kd.noise.statements import is_factor
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils.display import first_line, name_of
from pyro_kd.utils.locations import place_of_error

__all__ = ["FURTHER", "export_sampler"]

FURTHER = 3  # rows in the run that shows which sizes grow


def export_sampler(
    student: Callable[..., Any],
    *args: Any,
    targets: Targets = None,
    latents: Collection[str] | str = (),
    rows: str | int | None = None,
    fixed: bool = False,
    path: str | Path | None = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Exported:
    r"""Export a program as a function of its noise: no random operation is left in it, and equal noise gives equal values.

    .. math:: (\epsilon, x) \mapsto (y, z), \qquad z_i = g(Pa(z_i), \epsilon_i)

    The noise behind each draw is an input that is named by its site and law, such as ``z1/normal``. Tensors among the arguments are
    inputs by their names, unless nothing depends on their values, as on those of data that the program observes at a target.
    Parameters and buffers, those of ``pyro.param`` included, are in the state dict of the result; all other tensors are constants.
    Source of the form: Chen et al., CVPR 2023, section 3.1.

    The program runs in evaluation mode. It draws its targets, and keeps the values of other observed sites. The result is compared
    with it on fresh noise, for the example's number of rows and another one.

    Args:
        student: the program.
        *args: an example of what it is called with. The number of rows stays open: every integer among the arguments that is the size
            of the plate of the rows grows with it, and so does every dimension of a tensor that has this size. So choose a number of
            rows of at least 2 that means nothing else.
        targets: names of the sites whose values come out, a predicate on sites, or None for the sites that the program observes.
        latents: names of further sites whose values come out; ``"*"`` for all.
        rows: the plate of the rows, or their number. None for the one plate whose size is among the arguments; where there is none,
            all sizes are fixed.
        fixed: whether to fix all sizes.
        path: where to save the result, ``.pt2`` or ``.onnx``; see :meth:`~pyro_kd.export.exported.Exported.save`.
        tolerance: the largest difference from the program, relative to the largest absolute value of an output if that is above 1.
            None for 1e-5 in float32 and 1e-10 in float64.
        **kwargs: further arguments of the program.

    Returns:
        The exported program. ``print(result)`` shows its inputs and outputs, its size, the largest difference, and its speed.

    Raises:
        UnsupportedExportError: the program takes different paths for different values, a sampler needs a number of draws that
            depends on what it draws, or the number of rows is not clear.
        UnsupportedNoiseError: a draw has no map from noise.
        ExportMismatchError: the exported program gives other values than the program.
        NoTargetsError, UnknownTargetError: there are no targets, or no such site.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_kd.export import export_sampler
        >>> def model(num_rows):
        ...     with pyro.plate("rows", num_rows):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(2 * z, 0.5))
        >>> sampler = export_sampler(model, 8, targets=["y"])
        >>> [item.name for item in sampler.description.noise]
        ['z/normal', 'y/normal']
        >>> inputs = {"z/normal": torch.tensor([0.0, 1.0, 2.0]), "y/normal": torch.zeros(3)}
        >>> sampler(inputs)
        {'y': tensor([0., 2., 4.])}
        >>> sampler.sample(1000, seed=0)["y"].shape
        torch.Size([1000])
    """
    require_callable(student, "the program to export")
    started = time.perf_counter()
    with called_modules() as called, in_evaluation(student):
        first = record_run(student, Arguments(student, args, kwargs, None), 0, targets)
        names = _outputs(first, targets, latents)
        size = None if fixed else find_rows(student, args, kwargs, plate_sizes(first.trace), rows)
        arguments = Arguments(student, args, kwargs, size)
        number = 0 if size is None else size
        grown = record_run(student, arguments, number + FURTHER if number else 0, targets)
        slots = slots_of(first.noise, grown.noise, number or 1, number + FURTHER if number else 1)
        check_repeats(student, arguments, targets)
        runs = runs_to_verify(student, arguments, targets)
        # Where a sampler draws as often as it must, a single row may need less, which the graph is refused for below.
        cases = [_case(run, n, slots, arguments, names) for n, run in runs if n != 1 or _has_all(run, slots)]
    function = _function_of(student, arguments, slots, targets, names)
    known = known_tensors(student, called)
    outputs = _values(cases[0], cases[-1], names)
    example_args, example_kwargs = arguments.call(number, arguments.resized(number))

    def run_in_pyro() -> None:
        get_trace(TargetMessenger(targets)(student), example_args, example_kwargs)

    with in_evaluation(student), keeping_attributes(called):
        exported = build(
            "sampler",
            name_of(student),
            function,
            [slot.input for slot in slots],
            arguments.values(),
            outputs,
            known,
            cases,
            run_in_pyro,
            tolerance,
            started,
        )
    if path is not None:
        exported.save(path)
    return exported


def _outputs(run: Run, targets: Targets, latents: Collection[str] | str) -> list[str]:
    """The sites whose values come out, targets first."""
    drawn = [
        name
        for name, site in run.trace.nodes.items()
        if site["type"] == "sample"
        and isinstance(site["value"], Tensor)
        and not (site_is_subsample(site) or is_factor(site))
    ]
    wanted = [] if targets is None or callable(targets) else list(targets)
    further = drawn if latents == "*" else list(latents)
    for name in (*wanted, *further):
        if name not in drawn:
            raise UnknownTargetError(
                f"{name!r} is not a sample site of the program, which has {listing(drawn)}.{nearest(name, drawn)}"
            )
    if not run.targets:
        raise NoTargetsError(
            f"the program observes no site in this call, so it is not clear what should come out. Its sites are "
            f"{listing(drawn)}. Name them: export_sampler(..., targets=[...])."
        )
    return list(dict.fromkeys([*run.targets, *further]))


def _has_all(run: Run, slots: Sequence[Slot]) -> bool:
    """Whether a run has drawn all that the inputs of noise stand for."""
    records = [(run.noise.between if slot.is_between else run.noise, slot) for slot in slots]
    return all(slot.input.site in record and slot.place < len(record[slot.input.site]) for record, slot in records)


def _case(run: Run, rows: int, slots: Sequence[Slot], arguments: Arguments, names: Sequence[str]) -> Case:
    """The noise and arguments of a run, and what came out."""
    noise = {}
    for slot in slots:
        draws = (run.noise.between if slot.is_between else run.noise)[slot.input.site]
        if slot.place >= len(draws):
            raise UnsupportedExportError(
                f"site {slot.input.site!r} draws {slot.place + 1} times or more in one run of the program, and {len(draws)} times in "
                f"another one, of {rows} rows: its sampler draws again until all values are accepted, which no graph can do. Use a "
                "different family there."
            )
        noise[slot.input.name] = slot.as_input(draws[slot.place].noise.detach().clone(), rows)
    inputs = {name: tensor.detach().clone() for name, tensor in arguments.resized(rows).items()}
    expected = {name: value_at(run.trace, name).detach().clone() for name in names}
    return Case(rows, {**noise, **inputs}, expected)


def _values(case: Case, other: Case, names: Sequence[str]) -> list[Value]:
    """The outputs, whose sizes in two runs show which of them grow."""
    values = []
    for name in names:
        one, two = case.expected[name], other.expected[name]
        shape = tuple(ROWS if small != large else small for small, large in zip(one.shape, two.shape, strict=True))
        values.append(Value(name, shape, dtype_name(one)))
    return values


def _function_of(
    student: Callable[..., Any], arguments: Arguments, slots: Sequence[Slot], targets: Targets, names: Sequence[str]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The program as a function of tensors, which also tells where it fails."""
    shapes = {slot.input.name: slot.input.shape for slot in slots} | {
        value.name: value.shape for value in arguments.values()
    }

    def function(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = rows_in(inputs, shapes)
        call_args, call_kwargs = arguments.call(rows, inputs)
        messenger = InputMessenger(slots, inputs)
        try:
            with messenger:
                trace = get_trace(TargetMessenger(targets)(student), call_args, call_kwargs)
            messenger.check()
        except PyroKDError:
            raise
        except Exception as error:
            raise _refusal(error, messenger) from error
        return {name: value_at(trace, name) for name in names}

    return function


_VALUES = "what it does depends on the values of tensors"


def _refusal(error: Exception, messenger: InputMessenger) -> UnsupportedExportError:
    """What stands in the way, with the site and the line."""
    place = place_of_error(error)
    at = f" at {place}" if place else ""
    reason = _reason(error)
    family = _checking_family(error) if reason.startswith(_VALUES) else ""
    where = f"the program, {f'after site {messenger.site!r}' if messenger.site else 'before its first site'}{at},"
    if family:
        remedy = f"{family} looks at the values of its parameters when it is made, which a graph cannot: choose a different family."
    elif messenger.is_sampling:
        where = f"the sampler of site {messenger.site!r} ({messenger.family})"
        remedy = (
            "Register a sampler with a fixed number of operations, @pyro_kd.register_sampler, or choose a different family."
        )
    else:
        remedy = "Compute with tensors (torch.where, masks) in place of branches, loops and indices that values decide."
    return UnsupportedExportError(f"{where} cannot be a graph: {reason}. {remedy}")


def _checking_family(error: Exception) -> str:
    """The family of Pyro or torch in whose constructor an error is; an empty text if it is in none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "__init__" and module.startswith(("pyro.distributions.", "torch.distributions.")):
            return type(frame.f_locals.get("self")).__name__
    return ""


def _reason(error: Exception) -> str:
    kind, text = type(error).__name__, first_line(error)
    if "DataDependent" in kind or "data-dependent" in text or "_local_scalar_dense" in text or "data dependent" in text:
        return f"{_VALUES} ({kind}: {text:.200})"
    return f"{kind}: {text:.300}"
