"""What the experiments on images share: a feature network, distances between sets of images, the ELBO of a VAE.

The feature network is a small classifier. It is trained here on the labels of the data, with one seed for all runs, and its last
hidden layer gives the features. If you have Inception's weights, pass its features to ``pyro_kd.metrics.fid`` instead: distances on
different features cannot be compared.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples._experiment import Place, fingerprint
from pyro_kd import record_noise, replay_noise
from pyro_kd.datasets import Images, load_images
from pyro_kd.metrics import emd, fid, mmd, nearest_neighbour_accuracy
from pyro_kd.training import ELBOObjective, Objective, linear

MEASURES = {"fid": "FID", "emd": "EMD", "mmd": "1000 MMD²", "nn": "1-NN accuracy"}


def load(settings: Any, train: bool) -> Images:
    """The images to train or to test on: faces at ``settings.image_size``, IDX files padded to 32, others as they are."""
    sizes = {"celeba": settings.image_size, "idx": 32}
    options = {"size": sizes[settings.data]} if settings.data in sizes else {}
    return load_images(settings.data, settings.data_root or None, train, **options)


class FeatureNetwork(nn.Module):
    """A classifier of images in four strided convolutions; :meth:`features` are its last hidden layer.

    Args:
        channels: channels of the images.
        classes: number of classes or attributes.
        width: channels of the first layer; the next layers have 2, 4 and 4 times as many.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width, 4 * width)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in itertools.pairwise(sizes)
            )
        )
        self.head = nn.Linear(sizes[-1], classes)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of shape (n, 4 * width) of images of shape (n, channels, size, size) with values from 0 to 1.

        They are the last layer, averaged over its pixels.
        """
        self.eval()
        device = self.head.weight.device
        return torch.cat([self.body(batch.to(device)).mean((2, 3)).cpu() for batch in images.split(500)])

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """The most probable class of each image, shape (n,), of images as for :meth:`features`."""
        self.eval()
        device = self.head.weight.device
        return torch.cat([self(batch.to(device)).argmax(-1).cpu() for batch in images.split(500)])

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (n, classes) of images of shape (n, channels, size, size)."""
        return self.head(self.body(images).mean((2, 3)))


def feature_network(data: Images, place: Place, epochs: int, device: str) -> FeatureNetwork:
    """The network of a data set, trained on its labels with Adam, or taken from the cache."""
    if len(data.classes) < 2:
        raise SystemExit("the images have no labels, but the feature network learns from labels")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FeatureNetwork(data.images.shape[1], len(data.classes)).to(device)

        def train() -> None:
            loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=128, shuffle=True)
            optim = torch.optim.Adam(network.parameters(), lr=2e-3)
            for _ in range(epochs):
                for images, labels in loader:
                    logits, labels = network(floats(images, device)), labels.to(device)
                    is_class = labels.ndim == 1
                    loss = (
                        cross_entropy(logits, labels)
                        if is_class
                        else binary_cross_entropy_with_logits(logits, labels.float())
                    )
                    optim.zero_grad()
                    loss.backward()
                    optim.step()

        place.trained(network, {"data": fingerprint(data.images, data.labels), "epochs": epochs}, train)
    return network.eval()


def floats(images: Tensor, device: str) -> Tensor:
    """Bytes of any shape as numbers from 0 to 1."""
    return images.to(device).float() / 255


def distances(x: Tensor, y: Tensor) -> dict[str, float]:
    """The four measures of Table 1 between features of shape (n, k); 1-NN is best at one half, the others at 0.

    FID uses as many rows of each sample as the smaller one has. The cost of the others is at least quadratic: they use 2,000 rows at
    most.
    """
    size = min(len(x), len(y))
    frechet = fid(x[:size], y[:size])
    x, y = x[: min(size, 2000)], y[: min(size, 2000)]
    return {"fid": frechet, "emd": emd(x, y), "mmd": 1000 * mmd(x, y), "nn": nearest_neighbour_accuracy(x, y)}


@torch.no_grad()
def generate(program: Callable[..., Tensor], num: int, *args: Any, rows: int = 250) -> Tensor:
    """Means of ``num`` images that a program makes, shape (num, channels, size, size), on the CPU."""
    return torch.cat([program(min(rows, num - start), *args).cpu() for start in range(0, num, rows)])


@torch.no_grad()
def generate_both(
    student: Callable[..., Tensor], teacher: Callable[..., Tensor], num: int, rows: int = 250
) -> tuple[Tensor, Tensor]:
    """What student and teacher make from the same noise, each of shape (num, channels, size, size), on the CPU."""
    made = []
    for start in range(0, num, rows):
        count = min(rows, num - start)
        with record_noise() as noise:
            original = teacher(count)
        made.append((replay_noise(student, noise=noise)(count).cpu(), original.cpu()))
    students, teachers = zip(*made, strict=True)
    return torch.cat(students), torch.cat(teachers)


def elbo(vae: Any, weight: float, warm_up: int, arguments: Callable[..., tuple[Any, ...]]) -> Objective:
    """The ELBO of a VAE with the KL of each layer in closed form, which is turned on over the first ``warm_up`` steps."""
    schedule = linear(0.0, 1.0, warm_up) if warm_up else None
    return ELBOObjective(
        TraceMeanField_ELBO(), vae.model, vae.guide, weight=weight, arguments=arguments, latent_weight=schedule
    )


def bits_per_dimension(nats: float, vae: Any) -> float:
    """Nats per image as bits per pixel and channel."""
    return nats / math.log(2) / (vae.channels * vae.size**2)
