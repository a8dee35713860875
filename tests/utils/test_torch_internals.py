"""Every private name of torch that the package uses is still there, and no module uses one behind the back of this list."""

import pytest

from tests.support import private_names
from tests.support.private_attributes import OF_PYRO, OF_TORCH

NAMES = {
    "torch._C.DisableTorchFunction": "to hide a comparison of buffers from function modes",
    "torch._C._jit_resolve_packet": "to find the overload of a random operation under torch.export",
    "torch._C._nn._parse_to": "the arguments of FrozenProgram.to",
    "torch._dynamo.config": "to run compiled networks uncompiled while a run is recorded",
    "torch._standard_gamma": "draws of gamma laws with a derivative",
    "torch.distributions.Distribution._validate_args": "to put validation back as it was",
    "torch.distributions.Distribution._validate_sample": "the validation of a zero-inflated distribution",
    "torch.distributions.Distribution._extended_shape": "the shape of a draw",
    "torch.distributions.Wishart._bartlett_sampling": "draws of a Wishart without a loop",
    "torch.distributions.kl._KL_MEMOIZE": "to tell whether a user has registered a KL",
    "torch.distributions.kl._KL_REGISTRY": "to tell whether a user has registered a KL",
    "torch.distributions.kl._dispatch_kl": "to tell whether a user has registered a KL",
    "torch.nn.modules.lazy.LazyModuleMixin._infer_parameters": "to leave a lazy module's first values out of the shared noise",
    "torch.nn.modules.lazy.LazyModuleMixin.initialize_parameters": "to leave a lazy module's first values out of the shared noise",
    "torch.ops.aten._sample_dirichlet.default": "draws of Dirichlet laws from shared noise",
    "torch.ops.aten._standard_gamma.default": "draws of gamma laws from shared noise",
    "torch.utils._python_dispatch.TorchDispatchMode": "the noise tape",
    "torch.utils._python_dispatch._disable_current_modes": "to hide a comparison of buffers from dispatch modes",
    "torch.utils._pytree": "the tensors in nested results",
    "torch.utils._pytree.tree_map_only": "the tensors in nested results",
}


@pytest.mark.parametrize("path", NAMES)
def test_the_private_name_exists(path):
    assert private_names.exists(path), f"{path} is gone: pyro_kd uses it for {NAMES[path]}."


@pytest.mark.parametrize("name", OF_TORCH)
def test_the_private_attribute_exists(name):
    make, purpose = OF_TORCH[name]
    owner = make()
    assert hasattr(owner, name), f"{type(owner).__name__}.{name} is gone: pyro_kd uses it for {purpose}."


def test_private_names_are_imported_in_one_module():
    assert private_names.paths_in(private_names.PACKAGE / "utils" / "torch_internals.py") <= NAMES.keys()
    for file in private_names.files():
        if file.name != "torch_internals.py" and file.parent.name not in private_names.NOT_YET:
            found = {path for path in private_names.paths_in(file) if path.startswith("torch.")}
            assert not found, f"{file}: import {found} through pyro_kd.utils.torch_internals"


def test_every_private_attribute_is_listed():
    """Also those of Pyro's objects: the source does not say whose an attribute is."""
    parts = {part for path in NAMES for part in path.split(".")}
    listed = {*OF_PYRO, *OF_TORCH, *parts, "_bfind", "_process_message"}  # the last two are names of Pyro's classes
    for file in private_names.files():
        if file.parent.name not in private_names.NOT_YET:
            missing = private_names.attributes_in(file) - listed
            assert not missing, f"{file} reads {missing}: list what has it in tests/support/private_attributes.py"
