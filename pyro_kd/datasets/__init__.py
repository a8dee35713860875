"""Data that come with the package or with scikit-learn, loaders for the user's files, and how to standardise data.

Nothing is downloaded. If a file is missing, the error says which one to fetch and where to put it.
"""

from pyro_kd.datasets.bif import bif, journey
from pyro_kd.datasets.celeba import celeba
from pyro_kd.datasets.cifar10 import cifar10
from pyro_kd.datasets.digits import Digits, digits, digits_32
from pyro_kd.datasets.hershey import hershey_strokes
from pyro_kd.datasets.iam_ondb import iam_ondb, iam_ondb_forms
from pyro_kd.datasets.idx import idx
from pyro_kd.datasets.images import Images
from pyro_kd.datasets.images_npz import images_npz
from pyro_kd.datasets.named import IMAGES, STROKES, load_images, load_strokes
from pyro_kd.datasets.network import DiscreteNetwork
from pyro_kd.datasets.old_faithful import OldFaithful, old_faithful
from pyro_kd.datasets.standardise import Standardisation
from pyro_kd.datasets.stroke3 import stroke3
from pyro_kd.datasets.strokes import Strokes
from pyro_kd.datasets.svhn import svhn

__all__ = [
    "IMAGES",
    "STROKES",
    "Digits",
    "DiscreteNetwork",
    "Images",
    "OldFaithful",
    "Standardisation",
    "Strokes",
    "bif",
    "celeba",
    "cifar10",
    "digits",
    "digits_32",
    "hershey_strokes",
    "iam_ondb",
    "iam_ondb_forms",
    "idx",
    "images_npz",
    "journey",
    "load_images",
    "load_strokes",
    "old_faithful",
    "stroke3",
    "svhn",
]
