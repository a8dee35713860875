"""pyroved: variational autoencoders of images, with invariances, convolutions and classes."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from tests.third_party.cases import Case, Programs

if find_spec("pyroved") and not find_spec("torchvision"):  # pyroved needs it for a picture alone
    sys.modules["torchvision"], sys.modules["torchvision.utils"] = ModuleType("torchvision"), ModuleType("torchvision.utils")
    sys.modules["torchvision.utils"].make_grid = None  # type: ignore[attr-defined]

models = pytest.importorskip("pyroved.models")
iVAE, jiVAE, VED = models.iVAE, models.jiVAE, models.VED

IMAGES = torch.rand(20, 8, 8, generator=torch.Generator().manual_seed(0))
CHANNEL = IMAGES.unsqueeze(1)


def rotations() -> Programs:
    options = {"invariances": ["r", "t"], "sampler_d": "gaussian", "decoder_sig": 0.3}
    teacher, student = (
        iVAE((8, 8), hidden_dim_d=[32, 32], seed=1, **options),
        iVAE((8, 8), hidden_dim_d=[8], seed=2, **options),
    )
    return Programs(teacher.model, student.model, (IMAGES,), ["obs"])


def encoder() -> Programs:
    teacher, student = iVAE((8, 8), hidden_dim_e=[32, 32], seed=1), iVAE((8, 8), hidden_dim_e=[8], seed=2)
    return Programs(teacher.guide, student.guide, (IMAGES,), ["latent"])


def classes() -> Programs:
    teacher, student = jiVAE((8, 8), 2, 3, hidden_dim_d=[32], seed=1), jiVAE((8, 8), 2, 3, hidden_dim_d=[8], seed=2)
    return Programs(teacher.model, student.model, (IMAGES,), ["obs"])


def convolutions() -> Programs:
    options = {"sampler_d": "gaussian", "decoder_sig": 0.3, "batchnorm": True, "hidden_dim_e": [(4,)]}
    teacher = VED((8, 8), (8, 8), hidden_dim_d=[(8, 8), (4,)], seed=1, **options)
    student = VED((8, 8), (8, 8), hidden_dim_d=[(4,)], seed=2, **options)
    return Programs(teacher.model, student.model, (CHANNEL, CHANNEL), ["obs"])


CASES = [
    Case("pyroved", "iVAE, the decoder of rotated and shifted images", rotations),
    Case("pyroved", "iVAE, the encoder", encoder),
    Case("pyroved", "jiVAE, with a discrete latent", classes),
    Case("pyroved", "VED, convolutions with batch norm", convolutions),
]
