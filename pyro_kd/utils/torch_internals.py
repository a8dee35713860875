"""Every private name of torch's that the package uses, each behind a function that says what it is for."""

from torch import Tensor, nn

__all__ = ["parts_of_module", "persistent_tensors"]


def parts_of_module(module: nn.Module) -> dict[str, Tensor | nn.Module | None]:
    """Parameters, buffers and submodules that a module has itself, by name, also where they are None."""
    return {**module._parameters, **module._buffers, **module._modules}


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that a module has itself, by name."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor for name, tensor in own if name not in module._non_persistent_buffers_set}
