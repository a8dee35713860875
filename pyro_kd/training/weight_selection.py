"""A student network that starts from some units of its teacher's, in place of random weights."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from pyro_kd.errors import WeightSelectionError
from pyro_kd.utils.user_code import called

__all__ = ["Units", "check_networks", "select_weights", "units_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUMS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, *_CONVOLUTIONS)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

Units = Callable[[str, int, int, int], Tensor]


def select_weights(
    student: nn.Module,
    teacher: nn.Module,
    *,
    offset: float = 0.0,
    units: Units | None = None,
    rescale: bool = True,
    strict: bool = True,
) -> list[str]:
    r"""Give a smaller network the weights of some evenly spaced units of a larger one, as a start for distillation.

    A parameter of the student takes its values from the teacher's parameter of the same name. Where a dimension has ``n`` entries in
    the student and ``N`` in the teacher, entry ``j`` is the teacher's entry ``floor((j + offset) N / n)``. So all layers choose the
    same units, also where the gates of an LSTM are stacked in one matrix. Running averages of batch norm follow their units; other
    buffers stay as they are. Of a deeper teacher, the layers whose names the student has are taken.

    A unit that sums over fewer inputs has a smaller variance. ``rescale`` multiplies each weight by
    :math:`\sqrt{N / n}` of its inputs, which keeps the variance if the inputs are uncorrelated.

    It is a start and no more: train afterwards, and choose by the loss. Some arrangements of units are not seen, and make a poor
    start: inputs that are joined from parts which shrink by different factors, images that are flattened before a linear layer,
    other numbers of heads of attention, and other numbers of groups of a convolution. ``units`` says what to take there.
    Parameters that a network makes as it runs must exist: run both networks once before.

    Args:
        student: the network to be trained. It is changed in place; on an error, not at all.
        teacher: the network behind the teacher program, with sizes at least as large. It is only read.
        offset: which units: at least 0 and below 1. Where the teacher is four times as wide, 0, 0.25, 0.5 and 0.75 choose disjoint
            sets, between which :func:`~pyro_kd.training.best_start` can decide.
        units: ``f(name, dim, size, wanted)`` returns ``wanted`` indices into a dimension of ``size`` entries of the teacher's
            parameter, in place of evenly spaced ones.
        rescale: whether to multiply weights as said above: those of torch's linear, bilinear, convolutional and recurrent layers and
            of its attention. A weight norm keeps the norm by itself.
        strict: whether each of the student's parameters has to find one that fits; otherwise those without stay as they are.

    Returns:
        The names of the student's parameters that stay as they were; with ``strict``, none.

    Raises:
        WeightSelectionError: a parameter has no counterpart, or one that is smaller, has other dimensions, another kernel, or a value
            that is not finite in the student's type; it is parametrised; or none has a counterpart.
        ValueError: ``offset`` is out of range, or ``units`` returns something else than ``wanted`` different indices.

    Source: Xu, Chen, Vishniakov, Yin, Shen, Darrell, Liu and Liu, Initializing Models with Larger Ones, ICLR 2024: their uniform
    selection, which has no rescaling.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_kd.training import select_weights
        >>> teacher, student = (nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1)) for width in (8, 4))
        >>> select_weights(student, teacher)
        []
        >>> torch.equal(student[0].weight, teacher[0].weight[::2])
        True
        >>> torch.allclose(student[2].weight, 2**0.5 * teacher[2].weight[:, ::2])
        True
    """
    check_networks(student, teacher)
    if not 0 <= offset < 1:
        raise ValueError(f"offset must be at least 0 and below 1, not {offset}")
    choose = _evenly(offset) if units is None else units
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    found, left, reasons = list[tuple[Tensor, Tensor]](), list[str](), list[str]()
    for name, own in student.named_parameters():
        owner = student.get_submodule(name.rpartition(".")[0])
        reason = _of_layer(owner, name, own, theirs.get(name)) or _obstacle(own, theirs.get(name))
        if reason is None:
            values = _chosen(name, own, theirs[name], choose, _inputs(owner, name) if rescale else ())
            reason = None if bool(values.isfinite().all()) else f"the teacher's values are not all finite in {own.dtype}"
        if reason is None:
            found.append((own, values))
        else:
            left.append(name)
            reasons.append(f"{name!r}: {reason}")
    if not found and not left:
        raise WeightSelectionError("the student's network has no parameters: pass the module that holds its weights")
    if not found or (strict and left):
        remedy = "" if not found else ", or leave these as they are by strict=False"
        raise WeightSelectionError(
            f"the teacher's network has no weights to choose from for {len(left)} of {len(left) + len(found)} parameters of the "
            f"student: {'; '.join(reasons[:5])}{'; ...' if len(reasons) > 5 else ''}. Give the networks the same names{remedy}."
        )
    found += _running_averages(student, teacher, choose)
    with torch.no_grad():
        for tensor, values in found:
            tensor.copy_(values)
    return left


def check_networks(student: object, teacher: object) -> None:
    """Raise TypeError where one of the two is no module."""
    for role, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{role} must be the nn.Module that holds the weights, not {type(network).__name__}")


def _obstacle(own: Tensor, theirs: Tensor | None) -> str | None:
    """Why a parameter cannot be chosen from the teacher's; None if it can."""
    if theirs is None:
        return "there is none of this name"
    if own.is_meta or theirs.is_meta:
        return "a tensor on the meta device has no values"
    if theirs.is_complex() and not own.is_complex():
        return "the teacher's is complex"
    if is_lazy(own) or is_lazy(theirs):
        return "it has no shape yet; run both networks once before"
    if own.dim() != theirs.dim() or any(ours > size for ours, size in zip(own.shape, theirs.shape, strict=True)):
        return f"shape {tuple(own.shape)} is not part of {tuple(theirs.shape)}"
    if not bool(theirs.isfinite().all()):
        return "the teacher's values are not all finite"
    return None


def _of_layer(owner: nn.Module, name: str, own: Tensor, theirs: Tensor | None) -> str | None:
    """Why units of a layer's parameter cannot be chosen, as far as it depends on the kind of layer."""
    short = name.rpartition(".")[2]
    buffers = dict(owner.named_buffers(recurse=False))
    is_normed = {"original0", "original1"} <= dict(owner.named_parameters(recurse=False)).keys()  # by weight_norm
    if (isinstance(owner, ParametrizationList) and not is_normed) or f"{short.removesuffix('_orig')}_u" in buffers:
        return (
            "of its parametrisation no units can be chosen; remove it from both networks first, and register it after that"
        )
    is_kernel = isinstance(owner, (*_CONVOLUTIONS, *_TRANSPOSED)) and own.dim() > 2
    if is_kernel and theirs is not None and own.shape[2:] != theirs.shape[2:]:
        return f"the kernels have different sizes, {tuple(own.shape[2:])} and {tuple(theirs.shape[2:])}"
    return None


def _inputs(owner: nn.Module, name: str) -> tuple[int, ...]:
    """The dimensions of a parameter over which a unit sums its inputs; none if it is no weight of such a sum."""
    if name.endswith(("_g", "_v")):  # of torch.nn.utils.weight_norm, which keeps the norm
        return ()
    if isinstance(owner, _TRANSPOSED):
        return (0,)
    return (1, 2) if isinstance(owner, nn.Bilinear) else (1,) if isinstance(owner, _SUMS) else ()


def _chosen(name: str, own: Tensor, theirs: Tensor, choose: Units, inputs: tuple[int, ...]) -> Tensor:
    """The values of a parameter, of its shape and type."""
    values, factor = theirs.detach(), 1.0
    for dim, (wanted, size) in enumerate(zip(own.shape, theirs.shape, strict=True)):
        if wanted != size:
            values = values.index_select(dim, _indices(choose, name, dim, size, wanted).to(values.device))
            if dim in inputs and wanted and own.dim() > 1:
                factor *= math.sqrt(size / wanted)
    return (values * factor if factor != 1 else values).to(own.dtype)


def units_of(offset: float, units: Units | None) -> Callable[[str, int, int], Tensor | None]:
    """``f(name, size, wanted)``: the indices that a selection takes of the first dimension of a parameter; None for all of them."""
    choose = _evenly(offset) if units is None else units
    return lambda name, size, wanted: None if size == wanted else _indices(choose, name, 0, size, wanted)


def _evenly(offset: float) -> Units:
    """Evenly spaced units. The arithmetic is exact, so that all blocks of a stacked matrix choose the same."""
    fraction = min(Fraction(offset).limit_denominator(1_000_000), Fraction(999_999, 1_000_000))

    def choose(name: str, dim: int, size: int, wanted: int) -> Tensor:
        if not wanted:
            return torch.zeros(0, dtype=torch.long)
        places = torch.arange(wanted) * fraction.denominator + fraction.numerator
        return (places * size // (wanted * fraction.denominator)).clamp(max=size - 1)

    return choose


def _indices(choose: Units, name: str, dim: int, size: int, wanted: int) -> Tensor:
    returned = called(choose, "units", "f(name, dim, size, wanted)", name, dim, size, wanted)
    try:
        indices = torch.as_tensor(returned)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"units({name!r}, {dim}, {size}, {wanted}) must return indices, not {returned!r:.60}") from None
    is_valid = indices.shape == (wanted,) and not indices.is_floating_point() and indices.dtype != torch.bool
    if not is_valid or len(indices.unique()) != wanted or bool(((indices < 0) | (indices >= size)).any()):
        raise ValueError(
            f"units({name!r}, {dim}, {size}, {wanted}) must return {wanted} different indices below {size}, not {indices.tolist()}"
        )
    return indices.long()


def _running_averages(student: nn.Module, teacher: nn.Module, choose: Units) -> list[tuple[Tensor, Tensor]]:
    """Running means and variances of the normalisation layers that both have."""
    theirs, found = dict(teacher.named_modules(remove_duplicate=False)), list[tuple[Tensor, Tensor]]()
    for prefix, module in student.named_modules():
        other = theirs.get(prefix)
        if isinstance(module, _NORMS) and isinstance(other, _NORMS):
            known = dict(other.named_buffers(recurse=False))
            for name, own in module.named_buffers(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                if name in known and _obstacle(own, known[name]) is None:
                    found.append((own, _chosen(full, own, known[name], choose, ())))
    return found
