"""The student alone, as a file for use without pyro_kd."""

from pathlib import Path

import torch

from pyro_kd.errors import CheckpointError
from pyro_kd.training.files import replace_file
from pyro_kd.training.parameters import ProgramState

__all__ = ["save_tensors"]


def save_tensors(state: ProgramState, path: str | Path) -> None:
    """Write parameters and buffers, in the form that the ending of the file's name implies: see ``Trainer.save_student``.

    Raises:
        CheckpointError: the form does not hold all of them, or the file cannot be written.
    """
    if Path(path).suffix in (".onnx", ".pt2"):
        raise CheckpointError(
            f"{path} would be a program, and save_student writes tensors: name it .pt or .safetensors. "
            "pyro_kd.export.export_sampler(student, ..., path=...) writes the program."
        )
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = state.values()
        replace_file(path, lambda aside: save_file(tensors, aside), "the student")
    else:
        portable = state.portable()

        def write(aside: Path) -> None:
            with aside.open("wb") as file:  # torch.save does not accept every file name
                torch.save(portable, file)

        replace_file(path, write, "the student")
