"""Random damage to the bytes of a file."""

import random

__all__ = ["mutated"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A different content: a bit flipped, bytes changed, lost, repeated or added, or the end cut off."""
    while True:
        data, place = bytearray(content), rng.randrange(len(content))
        length = rng.randrange(1, 9)
        kind = rng.randrange(6)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + length] = rng.randbytes(len(data[place : place + length]))
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = rng.randbytes(length)
        elif kind == 4:
            data[place:place] = data[rng.randrange(len(data)) :][: 1 << length]
        else:
            del data[place:]
        if data != content:
            return bytes(data)
