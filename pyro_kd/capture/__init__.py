"""A function of programs as a compiled graph of tensors, so that handlers run only once. Start at :mod:`pyro_kd.capture.call`."""

from pyro_kd.capture.call import MAX_GRAPHS, Capture
from pyro_kd.capture.deferred import DeferredReads
from pyro_kd.capture.run import Outputs, Run

__all__ = ["MAX_GRAPHS", "Capture", "DeferredReads", "Outputs", "Run"]
