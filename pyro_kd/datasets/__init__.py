"""Data that ships with the package or with scikit-learn, and how to standardise it."""

from pyro_kd.datasets.digits import Digits, digits
from pyro_kd.datasets.old_faithful import OldFaithful, old_faithful
from pyro_kd.datasets.standardise import Standardisation

__all__ = ["Digits", "OldFaithful", "Standardisation", "digits", "old_faithful"]
