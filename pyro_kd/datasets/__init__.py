"""Data that ships with the package, and how to standardise it."""

from pyro_kd.datasets.old_faithful import OldFaithful, old_faithful
from pyro_kd.datasets.standardise import Standardisation

__all__ = ["OldFaithful", "Standardisation", "old_faithful"]
