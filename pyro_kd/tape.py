r"""The noise tape: records the raw random draws under a sampler, and supplies them again.

A sampler is a deterministic function of the raw random numbers that it draws, and torch has about two dozen operations
that draw them. So the map :math:`g` of the semi-auxiliary form :math:`z = g(Pa, \epsilon)` (Chen et al. 2023, section
3.1) is the distribution's own ``rsample`` or ``sample``, run under a :class:`~torch.utils._python_dispatch.TorchDispatchMode`
that intercepts those operations. Where the law of an operation depends on parameters (``bernoulli``, ``multinomial``,
``poisson``, ...), the tape draws a noise of fixed law and applies the map from noise to draw itself:
:mod:`pyro_kd.transforms` lists every operation with its map.

Autograd lies above the dispatcher. So a derivative through the recorded sampler is the derivative of :math:`g` at
fixed noise, also for ``torch._standard_gamma``, whose implicit derivative is that of the inverse distribution function
which the tape uses.

The tape knows tensors and no sites: :mod:`pyro_kd.handlers` puts one under each sample site.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_kd.errors import NoiseMismatchError, UnsupportedNoiseError
from pyro_kd.noise import Draw, Kind, convert
from pyro_kd.transforms import TRANSFORMS

__all__ = ["NoiseTape"]

aten = torch.ops.aten


class NoiseTape(TorchDispatchMode):
    """Records the raw draws made inside its context, or supplies recorded ones in their place.

    Args:
        recorded: draws to supply, in their order. ``None`` records new ones.

    Attributes:
        draws: what was drawn or supplied so far.
        trusted: whether to take the sampler's word that it is no rejection sampler. Otherwise one that reads a number or truth
            value from what it drew, and then draws by the same operation again, is taken for one: a heuristic, which a loop
            over remaining indices escapes.
        has_foreign_derivative: whether a Dirichlet or Beta was drawn whose parameters need a gradient: torch's derivative for
            it is that of another map.

    A sampler of another family may ask for another law of noise: continuous laws are converted
    (:func:`~pyro_kd.noise.convert`). It may draw more often than was recorded, and then draws anew, or less often.

    Raises:
        NoiseMismatchError: a draw has another shape than the recorded one, or a law that cannot be converted.
        UnsupportedNoiseError: a random operation has no map from noise, or the sampler decides by the values that it
            drew how often to draw again (a rejection sampler).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with NoiseTape() as tape:
        ...     x = torch.distributions.Poisson(torch.tensor([3.0, 10.0])).sample()
        >>> with NoiseTape(tape.draws):
        ...     y = torch.distributions.Poisson(torch.tensor([3.0, 11.0])).sample()
        >>> x, y
        (tensor([ 7., 12.]), tensor([ 7., 13.]))
    """

    def __init__(self, recorded: Iterable[Draw] | None = None) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self._recorded = None if recorded is None else tuple(recorded)
        self.trusted = False
        self.has_foreign_derivative = False
        self._ops_before_read: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        transform = TRANSFORMS.get(func)
        if transform is not None:
            op = func.overloadpacket.__name__
            if func is aten._sample_dirichlet.default and args[0].requires_grad:
                self.has_foreign_derivative = True
            if op in self._ops_before_read and not self.trusted:
                raise UnsupportedNoiseError(
                    f"the sampler draws ({op}), reads the drawn values, and draws ({op}) again: a rejection sampler "
                    "is no function of a fixed number of draws"
                )
            return transform(partial(self._draw_copy, op), *args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            # A truth value or a number decides what comes next; an integer is an index, and validation draws nothing.
            decides = args[0].dtype == torch.bool or args[0].dtype.is_floating_point
            if decides and self.draws and not _in_argument_validation():
                self._ops_before_read.update(draw.op for draw in self.draws)
        elif torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedNoiseError(f"the random operation {func} has no map from parameter-free noise")
        return func(*args, **(kwargs or {}))

    def draw(
        self,
        kind: Kind,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        op: str,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The next noise: newly drawn and kept, or the recorded one, in the dtype and on the device asked for.

        The caller must not change it in place.

        Args:
            kind: law of the noise.
            shape, dtype, device: of the tensor to return.
            op: who asks, for error messages.
            generator: torch's random generator for a new draw.
        """
        if self._recorded is None or len(self.draws) >= len(self._recorded):
            draw = Draw(kind, kind.sample(shape, dtype, device, generator), op)
        else:
            draw = self._recorded[len(self.draws)]
            if draw.kind is not kind or draw.noise.shape != torch.Size(shape):
                draw = _as_kind(draw, kind, shape, op)
        self.draws.append(draw)
        noise = draw.noise
        return noise if noise.dtype == dtype and noise.device == device else noise.to(dtype=dtype, device=device)

    def _draw_copy(self, op: str, *args: Any) -> Tensor:
        """A draw that the sampler may change in place: the record must not change with it."""
        return self.draw(*args[:4], op=op, generator=args[4] if len(args) > 4 else None).clone()


def _as_kind(draw: Draw, kind: Kind, shape: Sequence[int], op: str) -> Draw:
    """A recorded draw as noise of another law, of the same shape."""
    noise = convert(draw.noise, draw.kind, kind) if draw.noise.shape == torch.Size(shape) else None
    if noise is None:
        raise NoiseMismatchError(
            f"the record holds {draw.describe()}, but {kind.value} noise of shape {tuple(shape)} (for {op}) is asked for"
        )
    return Draw(kind, noise, op)


def _in_argument_validation() -> bool:
    """Whether the caller is a distribution's constructor or ``log_prob``: these read values only to check them."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("__init__", "_validate_sample", "__instancecheck__") and "distributions" in frame.f_code.co_filename:
            return True
        if name == "__torch_dispatch__":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
