"""A program as a function of noise for machines without Pyro: programs of torch.export, ONNX files, and their descriptions.

From the inside out: the description of inputs and outputs, runs on given noise, the graph, its verification, and files.
This room knows programs, noise and graphs. It does not know pairs of programs, or training.
"""

from pyro_kd.export.density import export_density
from pyro_kd.export.description import Description, NoiseInput, Value
from pyro_kd.export.exported import Exported
from pyro_kd.export.loading import load
from pyro_kd.export.numpy_noise import draw_noise
from pyro_kd.export.onnx_loading import OnnxProgram, load_onnx
from pyro_kd.export.report import ExportReport
from pyro_kd.export.sampler import export_sampler

__all__ = [
    "Description",
    "ExportReport",
    "Exported",
    "NoiseInput",
    "OnnxProgram",
    "Value",
    "draw_noise",
    "export_density",
    "export_sampler",
    "load",
    "load_onnx",
]
