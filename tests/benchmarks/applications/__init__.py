"""The applications of the paper at its sizes, each with its loss written in two ways: with the library, and by hand.

``APPLICATIONS`` maps a name to a function ``build(rows=..., ...) -> Application`` that makes new networks. A loss by hand is plain PyTorch
for its one model: the model's own networks, the teacher without gradients, divergences as bare formulas. It draws random numbers in
the library's order, so that both losses, and their gradients, are equal after the same ``torch.manual_seed``:
``tests/benchmarks/test_benchmarks.py`` holds them to it. ``tests/benchmarks/step_time.py`` measures them.
"""

from collections.abc import Callable

from tests.benchmarks.applications import chain, continual, helmholtz, hierarchical_vae, vrnn
from tests.benchmarks.applications.application import Application

__all__ = ["APPLICATIONS", "Application"]

APPLICATIONS: dict[str, Callable[..., Application]] = {
    "helmholtz": helmholtz.build,
    "hierarchical_vae": hierarchical_vae.build,
    "continual": continual.build,
    "vrnn": vrnn.build,
    "chain": chain.build,
}
