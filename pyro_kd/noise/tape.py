r"""The noise tape: records the raw random draws under a sampler, and supplies them again.

A sampler is a deterministic function of the raw random numbers that it draws, and torch has about two dozen operations
that draw them. So the map :math:`g` of the semi-auxiliary form :math:`z = g(Pa, \epsilon)` (Chen et al. 2023, section
3.1) is the distribution's own ``rsample`` or ``sample``, run under a :class:`~torch.utils._python_dispatch.TorchDispatchMode`
that intercepts those operations. If the law of an operation depends on parameters (``bernoulli``, ``multinomial``,
``poisson``, ...), the tape draws noise of a fixed law and applies the map from noise to draw itself.
:mod:`pyro_kd.noise.torch_ops` lists every operation with its map.

Autograd lies above the dispatcher. So the derivative through a recorded sampler is the derivative of :math:`g` at
fixed noise. This includes ``torch._standard_gamma``: its implicit derivative is that of the inverse distribution function,
which the tape uses.

The tape knows tensors and no sites. :mod:`pyro_kd.noise.messengers` puts one under each sample site.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import NoiseMismatchError, UnsupportedNoiseError
from pyro_kd.noise.draw_mode import DrawMode
from pyro_kd.noise.laws import Draw, NoiseLaw, convert
from pyro_kd.noise.torch_ops import TRANSFORMS

__all__ = ["NoiseTape", "drawing_on"]

aten = torch.ops.aten

_ORIGIN: ContextVar[torch.device | None] = ContextVar("origin", default=None)


@contextmanager
def drawing_on(device: torch.device) -> Iterator[None]:
    """Draw noise on this device inside the context, wherever it is needed, so that it does not depend on that."""
    token = _ORIGIN.set(device)
    try:
        yield
    finally:
        _ORIGIN.reset(token)


class NoiseTape(DrawMode):
    """Records the raw draws made inside its context, or supplies recorded ones instead.

    Args:
        recorded: draws to supply, in order. ``None`` records new ones.
        batch_shape: of the distribution that is sampled. The further dimensions of a draw belong to the event.
        generator: device -> the generator of new draws; None for torch's global one.

    Attributes:
        draws: what was drawn or supplied so far.
        has_foreign_derivative: whether a Dirichlet or Beta was drawn with parameters that need a gradient. Torch's derivative
            of such a draw belongs to a different map.

    The sampler of a different family may ask for a different law of noise. Continuous laws are converted
    (:func:`~pyro_kd.noise.laws.convert`). A wider event than the recorded one shares the leading entries and draws the others anew; a
    narrower one takes the leading entries.

    How often a sampler draws, and how much, may depend on its parameters and on earlier draws, as in a rejection loop. Then the noise
    is an endless sequence, and the record holds its beginning. Draws beyond the record are new, and so are draws of a different
    shape, except for the first, which must fit. The law stays right, since what a sampler asks for next never depends on noise
    that it has not seen.

    Raises:
        NoiseMismatchError: the first draw differs from the recorded one in its number of dimensions or its batch dimensions, or
            its law cannot be converted.
        UnsupportedNoiseError: a random operation has no map from noise.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with NoiseTape() as tape:
        ...     x = torch.distributions.Poisson(torch.tensor([3.0, 10.0])).sample()
        >>> with NoiseTape(tape.draws):
        ...     y = torch.distributions.Poisson(torch.tensor([3.0, 11.0])).sample()
        >>> x, y
        (tensor([ 7., 12.]), tensor([ 7., 13.]))
    """

    def __init__(
        self,
        recorded: Iterable[Draw] | None = None,
        batch_shape: Sequence[int] = (),
        generator: Callable[[torch.device], torch.Generator | None] | None = None,
    ) -> None:
        super().__init__()
        self._generator = generator
        self.draws: list[Draw] = []
        self._batch_shape = torch.Size(batch_shape)
        self._recorded = None if recorded is None else tuple(recorded)
        self.has_foreign_derivative = False

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the draw of a random operation from noise."""
        transform = TRANSFORMS.get(func)
        if transform is None:
            raise UnsupportedNoiseError(f"the random operation {func} has no map from parameter-free noise")
        if func is aten._sample_dirichlet.default and args[0].requires_grad:
            self.has_foreign_derivative = True
        return transform(partial(self._draw_copy, func.overloadpacket.__name__), *args, **kwargs)

    def draw(
        self,
        law: NoiseLaw,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        op: str,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the next noise: newly drawn and recorded, or taken from the record.

        The caller must not change it in place.

        Args:
            law: the law of the noise.
            shape, dtype, device: of the tensor to return.
            op: the operation that asks, for error messages.
            generator: torch's random generator for a new draw.
        """
        recorded = None if self._recorded is None else self._next_recorded(law, torch.Size(shape), op)
        if recorded is not None and recorded.noise.shape == torch.Size(shape):
            draw = recorded
        else:
            origin = device if generator is not None else _ORIGIN.get() or device
            if generator is None and self._generator is not None:
                generator = self._generator(origin)
            draw = Draw(law, law.sample(shape, dtype, origin, generator), op)
            if recorded is not None:
                common = tuple(slice(0, min(sizes)) for sizes in zip(shape, recorded.noise.shape, strict=True))
                draw.noise[common] = recorded.noise[common].to(draw.noise)
        self.draws.append(draw)
        noise = draw.noise
        if noise.dtype == dtype and noise.device == device:
            return noise
        is_rounded = noise.dtype != dtype
        noise = noise.to(dtype=dtype, device=device)
        if (
            law is NoiseLaw.UNIFORM and dtype.is_floating_point and is_rounded
        ):  # rounding may have reached an end of the interval
            noise = noise.clamp(torch.finfo(dtype).eps / 4, 1 - torch.finfo(dtype).eps / 2)
        return noise

    def _next_recorded(self, law: NoiseLaw, shape: torch.Size, op: str) -> Draw | None:
        """The recorded draw for the next one, as noise of this law; None if nothing fits."""
        if self._recorded is None or len(self.draws) >= len(self._recorded):
            return None
        draw = self._recorded[len(self.draws)]
        if draw.noise.shape == shape or self._same_but_event(law, shape, draw.noise.shape):
            if draw.law is law:
                return draw
            noise = convert(draw.noise, draw.law, law)
            if noise is not None:
                return Draw(law, noise, op)
        if self.draws:
            return None
        raise NoiseMismatchError(
            f"the record holds {draw.describe()}, but {law.value} noise of shape {tuple(shape)} (for {op}) is needed"
        )

    def _same_but_event(self, law: NoiseLaw, shape: torch.Size, recorded: torch.Size) -> bool:
        """Whether two shapes of noise differ only in the sizes of event dimensions."""
        batch = self._batch_shape
        start = len(batch) if shape[: len(batch)] == batch else 1  # torch's multinomial flattens them
        if law is NoiseLaw.PERMUTATION or len(shape) != len(recorded) or shape[:start].numel() != batch.numel():
            return False
        return shape[:start] == recorded[:start]

    def _draw_copy(self, op: str, *args: Any) -> Tensor:
        """A copy of the next noise, which the sampler may change in place without changing the record."""
        return self.draw(*args[:4], op=op, generator=args[4] if len(args) > 4 else None).clone()
