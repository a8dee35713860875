"""The checks that every comparison of two samples makes first. Knows tensors only."""

from torch import Tensor

__all__ = ["rows", "two_rows"]


def rows(x: Tensor, name: str, minimum: int = 1) -> Tensor:
    """Return a sample of shape ``(n, ...)`` as a float64 matrix of shape ``(n, d)`` without gradient, on the same device.

    Raises:
        TypeError: ``x`` is not a tensor, or is complex.
        ValueError: ``x`` is a scalar, holds no numbers or fewer than ``minimum`` values, or is not finite.
    """
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"{name} must be a real tensor of shape (n, ...), not {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0:
        raise ValueError(f"{name} is a scalar; a sample has shape (n, ...), and its first dimension counts the values")
    if len(x) < minimum:
        needed = {1: "one value", 2: "two values"}.get(minimum, f"{minimum} values")
        raise ValueError(f"each sample needs at least {needed}, but {name} has {len(x)}")
    if x.numel() == 0:
        raise ValueError(f"{name} holds no numbers: its shape is {tuple(x.shape)}")
    flat = x.detach().double().reshape(len(x), -1)
    finite = flat.isfinite().all(1)
    if not bool(finite.all()):
        keep = f"{name}.isfinite()" if x.dim() == 1 else f"{name}.flatten(1).isfinite().all(1)"
        raise ValueError(
            f"{name} has {int((~finite).sum())} values of {len(x)} that are NaN or infinite, the first at index "
            f"{int((~finite).nonzero()[0])}. Look for the cause; to drop them: {name}[{keep}]"
        )
    return flat


def two_rows(x: Tensor, y: Tensor, minimum: int = 2) -> tuple[Tensor, Tensor]:
    """Return both samples as :func:`rows` does, of shapes ``(n, d)`` and ``(m, d)`` and on one device.

    Raises:
        TypeError, ValueError: as for :func:`rows`; also if the shapes of values or the devices differ.
    """
    first, second = rows(x, "x", minimum), rows(y, "y", minimum)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"the samples hold values of shape {tuple(x.shape[1:])} and {tuple(y.shape[1:])}; they must agree: x and y have "
            "shapes (n, ...) and (m, ...)"
        )
    if first.device != second.device:
        raise ValueError(f"x is on {first.device} and y on {second.device}; move one of them: y.to(x.device)")
    return first, second
