r"""The log density of a program as a function of values, :math:`(y, z, x) \mapsto \log p(y, z \mid x)`, for machines without Pyro."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.errors import PyroKDError, UnsupportedExportError, listing
from pyro_kd.export.arguments import Arguments, dtype_name
from pyro_kd.export.building import build, rows_in
from pyro_kd.export.description import ROWS, Value
from pyro_kd.export.exported import Exported
from pyro_kd.export.graph import called_modules, known_tensors
from pyro_kd.export.rows import find_rows, plate_sizes
from pyro_kd.export.runs import check_repeats, in_evaluation, keeping_attributes, record_run, runs_to_verify, value_at
from pyro_kd.export.sampler import FURTHER
from pyro_kd.export.supports import common_support
from pyro_kd.export.verification import Case
from pyro_kd.isolation.programs import require_callable
from pyro_kd.noise.messengers import SampleMessenger
from pyro_kd.noise.statements import is_statement
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils.display import first_line, name_of
from pyro_kd.utils.locations import place_of_error
from pyro_kd.utils.pyro_internals import is_deterministic

__all__ = ["export_density"]


def export_density(
    program: Callable[..., Any],
    *args: Any,
    values: Collection[str] | None = None,
    rows: str | int | None = None,
    fixed: bool = False,
    path: str | Path | None = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Exported:
    r"""Export the log density of a program, given the values of all that it draws.

    .. math:: (y, z, x) \mapsto \log p(y, z \mid x) = \sum_i \log p(y_i, z_i \mid Pa, x)

    The values of the sites are inputs by the names of the sites, and tensors among the arguments by theirs, unless nothing depends on
    them. A value outside of the support of its site is refused before the graph runs, as far as the support is the same in every run,
    no mask can hide the value, and the distribution has no ``validate_args=False``. The program runs in evaluation mode. For a guide,
    the result is :math:`\log q(z \mid x)`; its draws are ``export_sampler(guide, ...)``.

    Args:
        program: the program.
        *args: an example of what it is called with; see :func:`~pyro_kd.export.export_sampler`.
        values: names of the sites whose values are inputs. None for all that the program draws or observes. Sites that are left out
            must be observed by the program, and keep their values.
        rows, fixed, path, tolerance: as there.
        **kwargs: further arguments of the program.

    Returns:
        The exported program. Its outputs are ``log_prob``, of shape (rows,), the sum over the sites in the plate of the rows, and,
        if there are sites outside of it, ``log_prob_shared``, a scalar. With fixed sizes, ``log_prob`` is a scalar, the sum over all
        sites. Scales, masks and ``pyro.factor`` count as in Pyro.

    Raises:
        UnsupportedExportError: the program takes different paths for different values, draws a site that ``values`` leaves out, or
            draws between its sites.
        ExportMismatchError: the exported program gives other values than the program.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_kd.export import export_density
        >>> def model(num_rows):
        ...     with pyro.plate("rows", num_rows):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(2 * z, 0.5))
        >>> density = export_density(model, 8)
        >>> density({"z": torch.zeros(2), "y": torch.tensor([0.0, 1.0])})
        {'log_prob': tensor([-1.1447, -3.1447])}
    """
    require_callable(program, "the program to export")
    started = time.perf_counter()

    def is_given(site: Mapping[str, Any]) -> bool:
        return site["type"] == "sample" and not is_statement(site) and (values is None or site["name"] in values)

    with called_modules() as called, in_evaluation(program):
        first = record_run(program, Arguments(program, args, kwargs, None), 0, is_given)
        if any(first.noise.between.values()):
            raise UnsupportedExportError(
                f"the program draws outside of its sample sites ({listing(first.noise.between)}), so that its density given the "
                "values of its sites is not a function of them. Make the draw a site: pyro.sample('name', ...)."
            )
        names = [name for name, site in first.trace.nodes.items() if is_given(site)]
        sites = [name for name, site in first.trace.nodes.items() if site["type"] == "sample" and not is_statement(site)]
        subsampled = [name for name, site in first.trace.nodes.items() if site_is_subsample(site) and name in first.noise]
        if subsampled and any(first.noise[name] for name in subsampled):
            raise UnsupportedExportError(
                f"plate {subsampled[0]!r} takes a subsample, which it draws anew in each run, so that the density is no function of "
                "the values alone. Leave out subsample_size, or give the indices: pyro.plate(..., subsample=indices)."
            )
        missing = set(values or ()) - set(names)
        drawn = [name for name, draws in first.noise.items() if draws and name not in names]
        if missing or drawn:
            raise UnsupportedExportError(
                f"the program has no sites {listing(sorted(missing))}, which values names; it has {listing(sites)}."
                if missing
                else f"the program draws {listing(drawn)}, and a density needs their values too: values=None takes all sites."
            )
        sizes = plate_sizes(first.trace)
        size = None if fixed else find_rows(program, args, kwargs, sizes, rows)
        plates = frozenset(name for name, found in sizes.items() if found == size)
        arguments = Arguments(program, args, kwargs, size)
        number = 0 if size is None else size
        check_repeats(program, arguments, is_given)
        runs = runs_to_verify(program, arguments, is_given)
        grown = record_run(program, arguments, number + FURTHER if number else 0, is_given)
        others = next((run for _, run in ((0, grown), *runs) if not set(names) <= set(run.trace.nodes)), None)
        if others is not None:
            absent = [name for name in names if name not in others.trace.nodes]
            raise UnsupportedExportError(
                f"the sites of the program depend on the number of rows, or on what it draws: not every run has {listing(absent)}. "
                "Use pyro.plate as a context, not as a loop; or fix all sizes: fixed=True."
            )
    inputs = []
    taken = {value.name for value in arguments.values()}
    inner = {name: f"{name}_value" if name in taken else name for name in names}
    for name in names:
        one, two = value_at(first.trace, name), value_at(grown.trace, name)
        shape = tuple(ROWS if small != large else small for small, large in zip(one.shape, two.shape, strict=True))
        seen = [run.trace.nodes[name] for run in (first, grown, *(run for _, run in runs))]
        support = common_support(seen, arguments.tensors.values())
        inputs.append(Value(inner[name], shape, dtype_name(one), support=support))
    shapes = {value.name: value.shape for value in (*inputs, *arguments.values())}

    def evaluate(given: Mapping[str, Tensor], count: Any) -> dict[str, Tensor]:
        call_args, call_kwargs = arguments.call(count, given)
        messenger = _GiveValues({name: given[inner[name]] for name in names})
        with messenger:
            trace = get_trace(program, call_args, call_kwargs)
        return _log_prob(trace, plates, count)

    def function(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return evaluate(given, rows_in(given, shapes))
        except PyroKDError:
            raise
        except Exception as error:
            place = place_of_error(error)
            raise UnsupportedExportError(
                f"the density{f' at {place}' if place else ''} cannot be a graph: {type(error).__name__}: {first_line(error):.300}. "
                "Compute with tensors in place of branches, loops and indices that values decide."
            ) from error

    with in_evaluation(program), keeping_attributes(called):
        cases = []
        for n, run in runs:
            feed = {inner[name]: value_at(run.trace, name).detach().clone() for name in names}
            feed |= {name: tensor.detach().clone() for name, tensor in arguments.resized(n).items()}
            cases.append(Case(n, feed, evaluate(feed, n)))
        outputs = [
            Value(name, (ROWS,) if value.dim() else (), dtype_name(value)) for name, value in cases[0].expected.items()
        ]
        exported = build(
            "density",
            name_of(program),
            function,
            (),
            (*inputs, *arguments.values()),
            outputs,
            known_tensors(program, called),
            cases,
            lambda: evaluate(cases[0].inputs, number),
            tolerance,
            started,
        )
    if path is not None:
        exported.save(path)
    return exported


class _GiveValues(SampleMessenger):
    """Gives sites their values, from the outside of the program."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values:
            msg["value"], msg["is_observed"] = self._values[msg["name"]], True


def _log_prob(trace: Any, plates: frozenset[str], rows: Any) -> dict[str, Tensor]:
    """The log densities of all sites, summed over everything but the rows."""
    trace.compute_log_prob(lambda name, site: _counts(site))
    by_row: list[Tensor] = []
    shared: list[Tensor] = []
    for site in trace.nodes.values():
        if not _counts(site):
            continue
        log_prob = torch.as_tensor(site["log_prob"])
        dims = [frame.dim for frame in site["cond_indep_stack"] if frame.name in plates and frame.vectorized]
        if not dims:
            shared.append(log_prob.sum())
            continue
        log_prob = log_prob.movedim(dims[0], 0) if log_prob.dim() > 1 else log_prob
        by_row.append(log_prob.flatten(1).sum(1) if log_prob.dim() > 1 else log_prob)
    if not by_row:
        return {"log_prob": torch.stack([value.double() for value in shared]).sum().to(shared[0].dtype)}
    total = sum(by_row[1:], by_row[0]).expand(rows)
    return {"log_prob": total, **({"log_prob_shared": sum(shared[1:], shared[0])} if shared else {})}


def _counts(site: Any) -> bool:
    """Whether a site has a density: every sample site and every ``pyro.factor``."""
    return site["type"] == "sample" and not is_deterministic(site) and not site_is_subsample(site)
