"""The models of models/ with small sizes, and the programs of tests/programs, as arguments of ``export_sampler``."""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch

from models import chains
from models.bayesian_classifier import BayesianClassifier, Classifier
from models.bayesian_network import BayesianNetwork, NeuralBayesianNetwork
from models.bottleneck import Bottleneck
from models.conditional_vae import ConditionalVAE
from models.eight_schools import EightSchools, GaussianSchools
from models.helmholtz import HelmholtzMachine
from models.hierarchical_vae import HierarchicalVAE
from models.vae import VAE
from models.vrnn import VRNN
from tests import programs

ROWS = 6

_PLATES = {
    "forecaster": "series",
    "horseshoe": "rows",
    "item_response": "persons",
    "lda": "documents",
    "matrix_factorisation": "users",
    "mixed_hmm": "groups",
    "semi_supervised_vae": "unlabelled",
}
"""The plate of the rows, where the sizes of several are among the arguments."""


@dataclass(frozen=True)
class Case:
    """A program, an example of its arguments, and its targets (None: the sites that it observes)."""

    name: str
    program: Callable[..., Any]
    args: tuple[Any, ...] = (ROWS,)
    options: dict[str, Any] = field(default_factory=dict)


def models() -> Iterator[Case]:
    """The models, with their guides where they have one."""
    torch.manual_seed(0)
    parents, sizes = {"a": (), "b": ("a",), "c": ("a", "b")}, {"a": 2, "b": 3, "c": 2}
    tables = {"a": torch.tensor([0.3, 0.7]), "b": torch.rand(2, 3).softmax(-1), "c": torch.rand(2, 3, 2).softmax(-1)}
    helmholtz, vae, ladder = HelmholtzMachine(3), VAE(20, 3, [16]), HierarchicalVAE(32, 8)
    conditional, vrnn, x = ConditionalVAE(32, 8), VRNN(24, 24), torch.rand(ROWS, 20)
    image, strokes = torch.rand(ROWS, 3, 32, 32), torch.rand(ROWS, 4, 3).round()

    def case(name: str, program: Any, *args: Any, targets: str, **options: Any) -> Case:
        return Case(name, program, args or (ROWS,), {"targets": targets.split(), **options})

    yield case("BayesianClassifier", BayesianClassifier(20, 8, 10), x, targets="label")
    yield case("BayesianNetwork", BayesianNetwork(parents, tables).model, targets="c")
    yield case("BinomialChain", chains.BinomialChain(2).model, targets="y")
    yield case("BinomialStudent", chains.BinomialStudent(2).model, targets="y")
    yield case("BitChain", chains.BitChain(3).model, targets="y")
    yield case("BlockStudent", chains.BlockStudent(3, 3).model, targets="y")
    yield case("Bottleneck.classify", Bottleneck(20, 8, 10, (16,)).classify, x, targets="label")
    yield case("Classifier", Classifier(20, 8, 10), x, targets="label")
    yield case("ConditionalVAE", conditional.model, ROWS, 1, targets="x")
    yield case("ConditionalVAE.guide", conditional.guide, ROWS, 1, image, targets="z1 z5")
    yield Case("EightSchools", EightSchools(), (), {"targets": ["effects"]})
    yield Case("GaussianSchools", GaussianSchools(2), (), {"targets": ["effects"]})
    yield case("HelmholtzMachine", helmholtz.model, targets="y1 y2")
    yield case("HelmholtzMachine.guide", helmholtz.guide, ROWS, torch.rand(ROWS), torch.rand(ROWS), targets="z1 z2 z3 z4")
    yield case("HierarchicalVAE", ladder.model, targets="x")
    yield case("HierarchicalVAE.guide", ladder.guide, ROWS, image, targets="z1 z5")
    yield case("NeuralBayesianNetwork", NeuralBayesianNetwork(parents, sizes).model, targets="c")
    yield case("NormalStudent", chains.NormalStudent(3).model, targets="y")
    yield case("VAE", vae.model, targets="x", latents=["z"])
    yield case("VAE.guide", vae.guide, ROWS, x, targets="z")
    yield case("VRNN", vrnn.model, ROWS, 4, targets="pen4 move4")
    yield case("VRNN.guide", vrnn.guide, ROWS, 4, strokes, targets="z4")


def tutorial_programs(names: Collection[str] | None = None) -> Iterator[Case]:
    """The students of tests/programs, or those of some names. Each is made when it is asked for, and ends the one before."""
    for found in pkgutil.iter_modules(programs.__path__):
        if names is not None and found.name not in names:
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program = importlib.import_module(f"tests.programs.{found.name}").program()
        options = {"targets": program.options["targets"]} if "targets" in program.options else {}
        if found.name == "autoguide":  # whose targets have other names in the teacher
            options = {"targets": list(program.options["site_map"])}
        if found.name in _PLATES:
            options["rows"] = _PLATES[found.name]
        yield Case(found.name, program.student, program.args, options)
