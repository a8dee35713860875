"""What was exported, in a few lines. Knows numbers and descriptions."""

from dataclasses import dataclass

from pyro_kd.export.description import Description, Shape
from pyro_kd.utils.tables import format_table

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how it compares with the Pyro program.

    Attributes:
        description: of inputs and outputs.
        parameters: number of numbers in the state dict.
        size: of the state dict in bytes.
        operations: number of operations in the graph.
        largest_difference: of an output from that of the Pyro program, on fresh noise and with another number of rows.
        rows_per_second: of the exported program, as PyTorch runs it.
        pyro_rows_per_second: of the Pyro program, eager.
        seconds: that the export took.
    """

    description: Description
    parameters: int
    size: int
    operations: int
    largest_difference: float
    rows_per_second: float
    pyro_rows_per_second: float
    seconds: float

    def __str__(self) -> str:
        found = self.description
        rows = [["noise", item.name, _shape(item.shape), item.dtype] for item in found.noise]
        rows += [["input", item.name, _shape(item.shape), item.dtype] for item in found.inputs]
        rows += [["output", item.name, _shape(item.shape), item.dtype] for item in found.outputs]
        table = format_table(["", "name", "shape", "type"], rows)
        speed, pyro = self.rows_per_second, self.pyro_rows_per_second
        unit = "rows" if found.has_rows else "runs"
        return (
            f"{found.kind} of {found.program}, the number of rows {'open' if found.has_rows else 'fixed'}\n{table}\n"
            f"{self.parameters:,} parameters and buffers, {self.size:,} bytes, {self.operations:,} operations\n"
            f"largest difference from Pyro on the same noise: {self.largest_difference:.2g}\n"
            f"{unit} a second: {speed:,.0f}, in Pyro {pyro:,.0f} ({speed / pyro:.1f} times); exported in {self.seconds:.1f} s"
        )


def _shape(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
