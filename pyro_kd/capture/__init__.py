"""Running the handlers once: a loss as a compiled graph of tensors (:mod:`pyro_kd.capture.capture`)."""

from pyro_kd.capture.capture import MAX_GRAPHS, Capture, Run
from pyro_kd.capture.graph import Outputs
from pyro_kd.capture.late import Late

__all__ = ["MAX_GRAPHS", "Capture", "Late", "Outputs", "Run"]
