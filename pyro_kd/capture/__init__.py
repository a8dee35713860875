"""Running the handlers once: a loss as a compiled graph of tensors (:mod:`pyro_kd.capture.capture`)."""

from pyro_kd.capture.capture import MAX_GRAPHS, Capture, Run
from pyro_kd.capture.graph import Outputs

__all__ = ["MAX_GRAPHS", "Capture", "Outputs", "Run"]
