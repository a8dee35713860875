"""Seeds of the processes of a run: made from one text, which all of them know."""

import hashlib

from pyro_kd.utils.randomness import stream_states

__all__ = ["digest_of_streams", "seed_of"]


def seed_of(text: str) -> int:
    """A seed made from a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def digest_of_streams() -> str:
    """Where torch's random streams stand in this process, on the CPU and on every GPU in use, as a text."""
    return hashlib.blake2b(b"".join(state.numpy().tobytes() for state in stream_states())).hexdigest()
