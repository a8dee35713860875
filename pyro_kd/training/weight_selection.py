"""A student network that starts from some units of its teacher's, in place of random weights."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from pyro_kd.errors import WeightSelectionError

__all__ = ["select_weights"]

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

    It is a start and no more: train afterwards, and choose by the loss. Two arrangements of units are not seen, and make a poor
    start: inputs that are joined from parts which shrink by different factors, and images that are flattened before a linear layer.
    ``units`` mends both.

    Args:
        student: the network to be trained. It is changed in place; on an error, not at all.
        teacher: the network behind the teacher program, with sizes at least as large. It is only read.
        offset: which units: at least 0 and below 1. Where the teacher is four times as wide, 0, 0.25, 0.5 and 0.75 choose disjoint
            sets, between which :func:`~pyro_kd.training.best_start` can decide.
        units: ``f(name, dim, size, wanted)`` returns ``wanted`` indices into a dimension of ``size`` entries of the teacher's
            parameter, in place of evenly spaced ones.
        rescale: whether to multiply weights as said above. Never multiplied are embeddings, parametrised weights (a weight norm keeps
            the norm by itself), ``PyroParam``, and what has one dimension.
        strict: whether each of the student's parameters has to find one that fits; otherwise those without stay as they are.

    Returns:
        The names of the student's parameters that stay as they were; with ``strict``, none.

    Raises:
        WeightSelectionError: a parameter has no counterpart, or one that is smaller, has other dimensions or a value that is not
            finite; or none has a counterpart.
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
    _check_networks(student, teacher)
    if not 0 <= offset < 1:
        raise ValueError(f"offset must be at least 0 and below 1, not {offset}")
    choose = _evenly(offset) if units is None else units
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    found, left, reasons = list[tuple[Tensor, Tensor]](), list[str](), list[str]()
    for name, owner, own in _parameters(student):
        reason = _obstacle(own, theirs.get(name))
        if reason is None:
            found.append((own, _chosen(name, own, theirs[name], choose, _inputs(owner, name, own) if rescale else None)))
        else:
            left.append(name)
            reasons.append(f"{name!r}: {reason}")
    if not found or (strict and left):
        remedy = "" if not found else ", or leave these as they are by strict=False"
        raise WeightSelectionError(
            f"the teacher's network has no weights to choose from for {len(left)} of {len(left) + len(found)} parameters of the "
            f"student: {'; '.join(reasons[:5])}{'; ...' if len(reasons) > 5 else ''}. Give the networks the same names{remedy}."
        )
    found += _running_averages(student, teacher, choose)
    with torch.no_grad():
        for own, values in found:
            own.copy_(values)
    return left


def _check_networks(student: object, teacher: object) -> None:
    for role, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{role} must be the nn.Module that holds the weights, not {type(network).__name__}")


def _parameters(network: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Names, the modules that own them, and parameters, each once."""
    seen = set[int]()
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, module, parameter


def _obstacle(own: Tensor, theirs: Tensor | None) -> str | None:
    """Why a parameter cannot be chosen from the teacher's; None if it can."""
    if theirs is None:
        return "there is none of this name"
    if is_lazy(own) or is_lazy(theirs):
        return "it has no shape yet; run both networks once before"
    if own.dim() != theirs.dim() or any(ours > size for ours, size in zip(own.shape, theirs.shape, strict=True)):
        return f"shape {tuple(own.shape)} is not part of {tuple(theirs.shape)}"
    if not bool(theirs.isfinite().all()):
        return "the teacher's values are not all finite"
    return None


def _inputs(owner: nn.Module, name: str, parameter: Tensor) -> int | None:
    """The dimension over which a unit sums its inputs, as torch.nn.init has it; None if the parameter is no weight of a sum."""
    if parameter.dim() < 2 or isinstance(owner, nn.Embedding | nn.EmbeddingBag | ParametrizationList):
        return None
    if name.endswith("_unconstrained"):  # Pyro's name of a PyroParam
        return None
    return 0 if isinstance(owner, _TRANSPOSED) else 1


def _chosen(name: str, own: Tensor, theirs: Tensor, choose: Units, inputs: int | None) -> Tensor:
    values, factor = theirs.detach(), 1.0
    for dim, (wanted, size) in enumerate(zip(own.shape, theirs.shape, strict=True)):
        if wanted != size:
            values = values.index_select(dim, _indices(choose, name, dim, size, wanted).to(values.device))
            if dim == inputs:
                factor = math.sqrt(size / wanted)
    return values * factor if factor != 1 else values


def _evenly(offset: float) -> Units:
    """Evenly spaced units. The arithmetic is exact, so that all blocks of a stacked matrix choose the same."""
    fraction = Fraction(offset).limit_denominator(1_000_000)

    def choose(name: str, dim: int, size: int, wanted: int) -> Tensor:
        places = torch.arange(wanted) * fraction.denominator + fraction.numerator
        return (places * size // (wanted * fraction.denominator)).clamp(max=size - 1)

    return choose


def _indices(choose: Units, name: str, dim: int, size: int, wanted: int) -> Tensor:
    indices = torch.as_tensor(choose(name, dim, size, wanted))
    is_valid = indices.shape == (wanted,) and not indices.is_floating_point() and indices.dtype != torch.bool
    if not is_valid or len(indices.unique()) != wanted or bool(((indices < 0) | (indices >= size)).any()):
        raise ValueError(
            f"units({name!r}, {dim}, {size}, {wanted}) must return {wanted} different indices below {size}, not {indices.tolist()}"
        )
    return indices.long()


def _running_averages(student: nn.Module, teacher: nn.Module, choose: Units) -> list[tuple[Tensor, Tensor]]:
    """Running means and variances of the normalisation layers that both have."""
    theirs, found = dict(teacher.named_modules()), list[tuple[Tensor, Tensor]]()
    for prefix, module in student.named_modules():
        other = theirs.get(prefix)
        if isinstance(module, _NORMS) and isinstance(other, _NORMS):
            known = dict(other.named_buffers(recurse=False))
            for name, own in module.named_buffers(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                if name in known and _obstacle(own, known[name]) is None:
                    found.append((own, _chosen(full, own, known[name], choose, None)))
    return found
