"""Small data files as their publishers write them, for tests of the loaders."""

import gzip
import struct

import numpy

__all__ = ["drawings", "idx_bytes", "line", "pixels", "write_end_to_end", "write_idx"]


_LINE = """<?xml version="1.0" encoding="ISO-8859-1"?>
<WhiteboardCaptureSession>
  <WhiteboardDescription>
    <SensorLocation corner="top_left"/>
    <DiagonallyOppositeCoords x="6512" y="1376"/>
    <VerticallyOppositeCoords x="966" y="1376"/>
    <HorizontallyOppositeCoords x="6512" y="787"/>
  </WhiteboardDescription>
  <StrokeSet>
    {strokes}
  </StrokeSet>
</WhiteboardCaptureSession>
"""


def line(*strokes):
    inside = []
    for stroke in strokes:
        points = "\n".join(f'      <Point x="{x}" y="{y}" time="769.05"/>' for x, y in stroke)
        inside.append(f'<Stroke colour="black" start_time="769.05" end_time="769.64">\n{points}\n    </Stroke>')
    return _LINE.format(strokes="\n    ".join(inside))


def drawings(n=5, seed=0, dtype=numpy.int16):
    generator = numpy.random.default_rng(seed)
    found = []
    for length in generator.integers(1, 9, n):
        drawing = generator.integers(-50, 50, (length, 3)).astype(dtype)
        drawing[:, 2] = generator.integers(0, 2, length)
        found.append(drawing)
    return found


def write_end_to_end(path, split, arrays, compressed=False):
    save = numpy.savez_compressed if compressed else numpy.savez
    save(path, **{f"{split}_strokes": numpy.concatenate(arrays), f"{split}_lengths": [len(array) for array in arrays]})


def pixels(*shape):
    return numpy.random.default_rng(0).integers(0, 256, shape, dtype=numpy.uint8)


def idx_bytes(array):
    """Two zeros, the type, the number of dimensions, their sizes, the bytes."""
    array = numpy.asarray(array)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype("u1").tobytes()


def write_idx(folder, images, labels, part="train", prefix="", mark="-", packed=False):
    for kind, array, rank in (("images", images, 3), ("labels", labels, 1)):
        name = f"{prefix}{part}-{kind}{mark}idx{rank}-ubyte{'.gz' * packed}"
        (folder / name).write_bytes(gzip.compress(idx_bytes(array), mtime=0) if packed else idx_bytes(array))
