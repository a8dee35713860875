"""What runs a traced graph: its uncompiled code, ``torch.compile``, or one CUDA graph."""

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from pyro_kd.capture.background import BackgroundGraph
from pyro_kd.capture.cuda_graph import CUDAGraphFunction
from pyro_kd.capture.passes.batch_norm import expand, split_sums
from pyro_kd.capture.passes.bernoulli import draw_uniformly
from pyro_kd.capture.passes.sequences import shorten
from pyro_kd.capture.passes.writes import indices_of_written
from pyro_kd.utils.torch_internals import mark_static_address, options_of_mode

__all__ = ["Compiled", "check_options", "compiled", "device_of"]

logger = logging.getLogger("pyro_kd.capture")

_LONGEST = 4000  # operations; a step of the hierarchical VAE has 1,800 and takes a minute
_LONGEST_IN_BACKGROUND = 10_000  # a VRNN of 24 points has 6,800, and takes five minutes

# Each call checks the conditions of its graph, so torch.compile need not. Freezing prepares the weights of a frozen teacher once, and
# computes only once what a guide and its model both compute. The wrapper in C++ saves time between small kernels. Reordering for
# locality would move operations of the teacher in between those of the student, so that both would hold their memory at once.
_ELSEWHERE = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
_ON_CPU = _ELSEWHERE | {"freezing": True, "cpp_wrapper": True, "reorder_for_locality": False}


class Compiled(NamedTuple):
    """What runs a graph.

    Attributes:
        run: ``f(*inputs)`` returns the graph's outputs.
        overwrites: whether the next call overwrites what a call has returned.
    """

    run: Callable[..., Sequence[Tensor]]
    overwrites: bool


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of ``compile()`` that exclude each other."""
    others = sorted(options.keys() - {"background", "max_graphs"})
    if options.get("background") and others:
        raise ValueError(
            "compile(background=True) compiles by inductor with its own options, and takes no "
            f"{', '.join(others)}: leave out one or the other"
        )


def compiled(
    module: fx.GraphModule, inputs: Sequence[Tensor], kept: Sequence[Tensor], options: Mapping[str, Any]
) -> Compiled:
    """Compile a graph for inputs of these shapes, types and devices.

    A long graph, for which ``torch.compile`` would take too long, runs as it is, shortened.

    Args:
        module: the graph, which the passes change.
        inputs: all inputs, of any shapes.
        kept: the first inputs, which stay where they are in memory: parameters and buffers.
        options: options of ``torch.compile``. With ``backend=None`` the graph is not compiled. A mode or options replace those chosen
            here. The backend ``"cudagraphs"`` records the uncompiled graph; without CUDA, it is the same as None. With
            ``background=True`` the graph runs as it is until a process of its own has compiled it.
    """
    options = dict(options)
    in_background = options.pop("background", False)
    length = len(module.graph.nodes)
    backend = options.get("backend", None if length > _LONGEST else "inductor")
    devices = {device_of(module).type, *(tensor.device.type for tensor in inputs)}
    is_cuda = "cuda" in devices
    overwrites = is_cuda and (backend == "cudagraphs" or (backend == "inductor" and _uses_cuda_graphs(options)))
    is_on_cpu = devices == {"cpu"}
    if in_background and is_on_cpu and length <= _LONGEST_IN_BACKGROUND:
        meanwhile = module
        if length > _LONGEST:
            meanwhile = fx.GraphModule(module, copy.deepcopy(module.graph))
            shorten(meanwhile)
        plain, written = _code_of(meanwhile), indices_of_written(module.graph)
        expand(module)  # whose operations do not say what they write to
        split_sums(module)
        return Compiled(BackgroundGraph(module, plain, inputs, written), False)
    if backend is None or backend == "cudagraphs":
        if length > _LONGEST:
            shorten(module)
        if backend is None and "backend" not in options:
            remedy = "; background=True compiles them" if length <= _LONGEST_IN_BACKGROUND and not in_background else ""
            logger.info("%s operations are too many for torch.compile, and run as they are%s", f"{length:,}", remedy)
        plain = _code_of(module)
        return Compiled(CUDAGraphFunction(plain, len(kept)) if overwrites else plain, overwrites)
    if overwrites:
        for tensor in kept:  # so that they are not copied before each run, also if the graph writes to them
            mark_static_address(tensor)
    if in_background:
        warnings.warn("compile(background=True) compiles programs at once that are not on a CPU", stacklevel=2)
    if backend == "inductor":
        expand(module)
        split_sums(module)
        if not (options.get("options") or {}).get("fallback_random"):
            draw_uniformly(module)
        if not options.keys() & {"mode", "options"}:
            options["options"] = _ON_CPU if is_on_cpu else _ELSEWHERE
    return Compiled(torch.compile(module, dynamic=False, **options), overwrites)


def device_of(module: fx.GraphModule) -> torch.device:
    """The device of a graph's first output."""
    output: Any = module.graph.output_node()
    first: Tensor = output.args[0][0].meta["val"]
    return first.device


def _uses_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether options of torch.compile ask for CUDA graphs, whose next run overwrites what a run has returned."""
    if (options.get("options") or {}).get("triton.cudagraphs"):
        return True
    mode = options.get("mode")
    return mode is not None and bool(options_of_mode(mode).get("triton.cudagraphs"))


def _code_of(module: fx.GraphModule) -> Callable[..., Any]:
    """The code of the module, without the nodes of its graph, of which a long run has hundreds of thousands."""
    holder = nn.Module()
    for name, tensor in module._buffers.items():
        holder.register_buffer(name, tensor)
    assert module.code  # which writes the code of a module that is recompiled lazily
    return functools.partial(type(module).forward, holder)
