"""Every private name of torch that the package uses, and what it is used for.

The other modules import them from here, so that a release of torch that renames one breaks a single file.
``tests/utils/test_torch_internals.py`` has a test for each name. Attributes of modules and of single families of distributions
are used where they are needed, and are listed in the same test.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch import _standard_gamma as standard_gamma
from torch._C import DisableTorchFunction
from torch._C import _jit_resolve_packet as overload_for
from torch._C import _set_grad_enabled as set_grad_enabled
from torch._C._nn import _parse_to as parse_to
from torch._decomp import get_decompositions
from torch._inductor.runtime import cache_dir_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.distributions.kl import _KL_MEMOIZE as KL_MEMOIZE
from torch.distributions.kl import _KL_REGISTRY as KL_REGISTRY
from torch.distributions.kl import _dispatch_kl as dispatch_kl
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import autograd_would_have_decomposed as is_decomposed_by_autograd
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "KL_MEMOIZE",
    "KL_REGISTRY",
    "DisableTorchFunction",
    "FakeTensorMode",
    "TorchDispatchMode",
    "WeakTensorKeyDictionary",
    "are_transforms_active",
    "can_decompose",
    "compile_package",
    "copy_all_",
    "disable_current_modes",
    "dispatch_kl",
    "dynamo_config",
    "get_decompositions",
    "hooks_on_all_modules",
    "inductor_cache",
    "is_decomposed_by_autograd",
    "is_same_storage",
    "is_validating",
    "lazy_graph_module",
    "load_package",
    "mark_static_address",
    "mkl_linear",
    "options_of_mode",
    "overload_for",
    "overload_name",
    "pack_for_mkl",
    "parse_to",
    "parts_of_module",
    "persistent_tensors",
    "pytree",
    "qualified_name",
    "scaled",
    "schema_arguments",
    "set_grad_enabled",
    "standard_gamma",
    "storage_id",
    "version_of",
    "without_mkldnn",
]

# standard_gamma: draws from Gamma(concentration, 1), with the derivative of the inverse distribution function.
# overload_for: the name of the overload of an operation that a call resolves to.
# parse_to: reads the arguments of ``nn.Module.to``.
# KL_REGISTRY, KL_MEMOIZE, dispatch_kl: which function ``torch.distributions.kl_divergence`` would call for two families.
# is_decomposed_by_autograd: whether autograd, were it on, would take an operation apart that can be.
# disable_current_modes, DisableTorchFunction: hide operations from dispatch modes and from function modes.


def lazy_graph_module(attributes: dict[str, Tensor], graph: fx.Graph) -> fx.GraphModule:
    """A graph module that writes its Python code when it is asked for, and not after each pass."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(attributes, graph)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 for an inference tensor, which has no count."""
    return -1 if tensor.is_inference() else tensor._version


def storage_id(tensor: Tensor) -> int:
    """The number of a tensor's storage, equal for tensors that share it."""
    return int(tensor.untyped_storage()._cdata)


def is_same_storage(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of the same storage. Works without an address, which tensors do not have in a trace."""
    return storage_id(first) == storage_id(second)


def is_validating() -> bool:
    """Whether torch's distributions check their arguments by default."""
    return bool(Distribution._validate_args)


def are_transforms_active() -> bool:
    """Whether the code runs inside of a transform of ``torch.func``, such as ``grad`` or ``vmap``."""
    return bool(torch._C._are_functorch_transforms_active())


def can_decompose(op: Any) -> bool:
    """Whether an overload of an operation consists of other operations, from which it has its gradient."""
    return bool(op._can_decompose())


def schema_arguments(op: Any) -> Any:
    """The arguments that an overload of an operation takes, with names and defaults."""
    return op._schema.arguments


def overload_name(op: Any) -> str:
    """The name of an overload within its operation, such as ``default``."""
    return str(op._overloadname)


def qualified_name(packet: Any) -> str:
    """The name of an operation with its namespace, such as ``aten::rand``."""
    return str(packet._qualified_op_name)


def dynamo_config() -> Any:
    """The options of ``torch.compile``. The first call imports the compiler, which takes several seconds."""
    return torch._dynamo.config


def inductor_cache() -> str:
    """The folder in which inductor keeps what it has compiled."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_dir_utils.default_cache_dir())


def compile_package(program: torch.export.ExportedProgram, path: Path, options: Mapping[str, Any]) -> None:
    """Compile an exported program by AOTInductor, into a package: a file that ends in ``.pt2``."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(options))


def load_package(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The function in a package, without importing the compiler, which takes several seconds."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    run: Callable[[list[Tensor]], list[Tensor]] = loader.run
    return run


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Inside the context torch chooses none of oneDNN's operations. ``torch.backends.mkldnn.flags`` warns where no Intel GPU is."""
    was_on = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_on)


def parts_of_module(module: nn.Module) -> dict[str, Tensor | nn.Module | None]:
    """Parameters, buffers and submodules that a module has itself, by name, including those that are None."""
    return {**module._parameters, **module._buffers, **module._modules}


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that a module has itself, by name."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor for name, tensor in own if name not in module._non_persistent_buffers_set}


def hooks_on_all_modules() -> list[dict[Any, Any]]:
    """The dictionaries that hold torch's hooks on all modules."""
    names = vars(torch.nn.modules.module)
    return [held for name, held in names.items() if name.startswith("_global_") and isinstance(held, dict)]


def scaled(tensors: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Copies of tensors of any shapes, multiplied by a number or a scalar tensor, in one launch."""
    return list(torch._foreach_mul(tensors, factor)) if tensors else []


def copy_all_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy ``sources`` into ``targets``, tensors of the same shapes, in one launch."""
    torch._foreach_copy_(targets, sources)


def options_of_mode(mode: str) -> Mapping[str, Any]:
    """The options that a mode of ``torch.compile`` sets."""
    options: Mapping[str, Any] = torch._inductor.list_mode_options(mode)
    return options


def mark_static_address(tensor: Tensor) -> None:
    """Tell ``torch.compile`` that a tensor, of any shape, stays where it is in memory."""
    torch._dynamo.mark_static_address(tensor)


def pack_for_mkl(weight: Tensor, rows: int) -> Tensor:
    """A matrix of shape (out, in) in the memory order in which MKL multiplies it with ``rows`` rows. Needs torch with MKL."""
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return packed


def mkl_linear() -> Any:
    """The operation ``(input, packed weight, weight, bias, rows)`` that multiplies with a matrix of :func:`pack_for_mkl`."""
    return torch.ops.mkl._mkl_linear.default
