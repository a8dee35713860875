r"""Record the noise of one program, and replay it in another: the two effect handlers that users call.

In the semi-auxiliary form of a directed model, every latent draw is :math:`z_i = g(Pa(z_i), \epsilon_i)`, with noise
:math:`\epsilon_i` of a fixed law (Chen et al. 2023, section 3.1). :func:`record_noise` runs a program and keeps the
:math:`\epsilon_i` of each sample site. :func:`replay_noise` runs a different program, or the same one with different
parameters, on them::

    with record_noise() as noise:
        z = teacher()
    z_student = replay_noise(student, noise=noise)()

Both only set the value of a message. The site's distribution, plates, scale and mask stay as Pyro made them. So the trace of
a replayed program holds at each site the conditional distribution given the shared noise, :math:`p(z_i | \epsilon_{<i}, x)`
(Eq. 6).

The handlers themselves are in :mod:`pyro_kd.noise.messengers`.
"""

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any

from pyro_kd.noise import families  # noqa: F401  (fills the registry of samplers)
from pyro_kd.noise.laws import Draw
from pyro_kd.noise.messengers import RecordNoiseMessenger, ReplayNoiseMessenger

__all__ = ["record_noise", "replay_noise"]


def record_noise(fn: Callable[..., Any] | None = None) -> Any:
    """Record the noise behind every sample site that draws.

    Observed sites, and sites whose value a different handler has set, draw nothing and are left out.

    Args:
        fn: a program with Pyro primitives. Without it, the handler itself is returned, for use as a context manager or
            decorator.

    Returns:
        With ``fn``, a callable like it whose attribute ``noise`` is the :class:`~pyro_kd.noise.record.NoiseRecord` of its last
        call; else a :class:`~pyro_kd.noise.messengers.RecordNoiseMessenger`, which as a context manager gives that record.

    Raises:
        UnsupportedNoiseError: a site's sampler cannot be recorded. The message names the site and the family.
        NoiseMismatchError: a site is sampled twice in one run.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_kd import record_noise, replay_noise
        >>> def model(loc):
        ...     return pyro.sample("z", dist.Normal(loc, 1.0))
        >>> with record_noise() as noise:
        ...     z = model(torch.tensor(0.0))
        >>> shifted = replay_noise(model, noise=noise)(torch.tensor(10.0))
        >>> bool(torch.isclose(shifted, z + 10))
        True
    """
    messenger = RecordNoiseMessenger()
    return messenger if fn is None else messenger(fn)


def replay_noise(
    fn: Callable[..., Any] | None = None,
    noise: Mapping[str, tuple[Draw, ...]] | None = None,
    *,
    site_map: Mapping[str, str] | None = None,
    fresh: Container[str] = (),
) -> Any:
    """Run a program on recorded noise: each latent becomes a function of the noise that was recorded for it.

    Args:
        fn: a program with Pyro primitives. Without it, the handler itself is returned, for use as a context manager or
            decorator.
        noise: the record of :func:`record_noise`.
        site_map: this program's site name -> the recorded site's name, for sites whose names differ.
        fresh: names of sites of this program that draw their own noise; ``"*"`` stands for every site without recorded noise.

    Returns:
        With ``fn``, a callable like it; else a :class:`~pyro_kd.noise.messengers.ReplayNoiseMessenger`.

    Raises:
        UnpairedSiteError: a site that draws has no recorded noise.
        NoiseMismatchError: a site asks for noise of a different law or shape.
        UnsupportedNoiseError: a site's sampler cannot be replayed.
    """
    if noise is None:
        raise TypeError("replay_noise needs the record of record_noise(): replay_noise(model, noise=record)")
    messenger = ReplayNoiseMessenger(noise, site_map, fresh)
    if fn is None:
        return messenger
    return functools.update_wrapper(messenger(fn), fn, updated=())
