"""Data that ships with the package or with scikit-learn, loaders for files of the user's, and how to standardise them.

Nothing is downloaded: where a file is missing, the error says which to fetch and where to put it.
"""

from pyro_kd.datasets.cifar10 import cifar10
from pyro_kd.datasets.digits import Digits, digits
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.old_faithful import OldFaithful, old_faithful
from pyro_kd.datasets.standardise import Standardisation
from pyro_kd.datasets.strokes import Strokes

__all__ = ["Digits", "Images", "OldFaithful", "Standardisation", "Strokes", "cifar10", "digits", "old_faithful"]
