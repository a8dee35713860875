"""Every private name of torch that the package uses is still there, and no module uses one behind the back of this list."""

import pytest
import torch

from tests.support import private_names
from tests.support.private_attributes import OF_PYRO, OF_TORCH

NAMES = {
    "torch._decomp.get_decompositions": "batch norm whose writes a trace can see",
    "torch._dynamo.mark_static_address": "parameters that a CUDA graph need not copy",
    "torch._foreach_copy_": "the arguments of a CUDA graph in one launch",
    "torch._foreach_mul": "the gradients of a graph in one launch",
    "torch._C._aoti.AOTIModelPackageLoader": "to load a compiled graph without importing the compiler",
    "torch._inductor.aoti_compile_and_package": "graphs that a process of its own compiles",
    "torch._inductor.runtime.cache_dir_utils.default_cache_dir": "where compiled graphs stay",
    "torch._inductor.list_mode_options": "whether a mode of torch.compile uses CUDA graphs",
    "torch.fx._lazy_graph_module._make_graph_module": "graphs whose code is written once, after all passes",
    "torch.fx._lazy_graph_module._use_lazy_graph_module": "graphs whose code is written once, after all passes",
    "torch._subclasses.fake_tensor.FakeTensorMode": "the shapes in a graph",
    "torch.ops.aten._ctc_loss": "reads of lengths that a trace would take for constants",
    "torch.ops.aten._pack_padded_sequence": "reads of lengths that a trace would take for constants",
    "torch.ops.aten._to_copy.default": "uniform noise compared with probabilities of a different dtype",
    "torch.ops.aten._to_sparse": "results whose size depends on values",
    "torch.utils._pytree.tree_flatten": "the tensors in nested arguments",
    "torch.utils._pytree.tree_unflatten": "the tensors in nested arguments",
    "torch._C.DisableTorchFunction": "to hide a comparison of buffers from function modes",
    "torch._C._are_functorch_transforms_active": "to say that torch.func cannot transform a captured loss",
    "torch._C._get_mkldnn_enabled": "LSTMs that a graph can have",
    "torch._C._set_mkldnn_enabled": "LSTMs that a graph can have",
    "torch._C._jit_resolve_packet": "to find the overload of a random operation under torch.export",
    "torch._C._set_grad_enabled": "to keep switches that change nothing out of exported graphs",
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
    "torch.utils._python_dispatch.autograd_would_have_decomposed": "which operations a trace takes apart in inference mode",
    "torch.utils._python_dispatch._disable_current_modes": "to hide a comparison of buffers from dispatch modes",
    "torch.utils._pytree": "the tensors in nested results",
    "torch.utils._pytree.tree_map_only": "the tensors in nested results",
}
OF_MKL = {
    "torch.ops.mkl._mkl_linear.default": "matrix products of long sequences",
    "torch.ops.mkl._mkl_reorder_linear_weight": "matrix products of long sequences",
}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
@pytest.mark.parametrize("path", OF_MKL)
def test_the_private_name_of_mkl_exists(path):
    assert private_names.exists(path), f"{path} is gone: pyro_kd uses it for {OF_MKL[path]}."


@pytest.mark.parametrize("path", NAMES)
def test_the_private_name_exists(path):
    assert private_names.exists(path), f"{path} is gone: pyro_kd uses it for {NAMES[path]}."


@pytest.mark.parametrize("name", OF_TORCH)
def test_the_private_attribute_exists(name):
    make, purpose = OF_TORCH[name]
    owner = make()
    assert hasattr(owner, name), f"{type(owner).__name__}.{name} is gone: pyro_kd uses it for {purpose}."


def test_private_names_are_imported_in_one_module():
    assert private_names.paths_in(private_names.PACKAGE / "utils" / "torch_internals.py") <= NAMES.keys() | OF_MKL.keys()
    for file in private_names.files():
        if file.name != "torch_internals.py":
            found = {path for path in private_names.paths_in(file) if path.startswith("torch.")}
            assert not found, f"{file}: import {found} through pyro_kd.utils.torch_internals"


def test_every_private_attribute_is_listed():
    """Also those of Pyro's objects: the source does not say whose an attribute is."""
    parts = {part for path in NAMES for part in path.split(".")}
    listed = {*OF_PYRO, *OF_TORCH, *parts, "_bfind", "_process_message"}  # the last two are names of Pyro's classes
    for file in private_names.files():
        missing = private_names.attributes_in(file) - listed
        assert not missing, f"{file} reads {missing}: list what has it in tests/support/private_attributes.py"
