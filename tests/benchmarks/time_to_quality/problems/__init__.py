"""The applications of the comparison.

Each file has ``PRESETS`` of settings; ``OBJECTIVES``, the names of the library's losses, of which the first is the advised one; and
``build(seed, settings, place)``, which makes the :class:`~tests.benchmarks.time_to_quality.problem.Problem`. Sizes, steps, learning rates and
schedules are those of the examples' presets, by which the figures of docs/results.md were made, for both ways to train. Teachers are
trained once, and kept.
"""

from types import ModuleType

from tests.benchmarks.time_to_quality.problems import chain, continual, helmholtz, hierarchical_vae, vrnn

__all__ = ["PROBLEMS"]

PROBLEMS: dict[str, ModuleType] = {
    "chain": chain,
    "helmholtz": helmholtz,
    "continual": continual,
    "hierarchical_vae": hierarchical_vae,
    "vrnn": vrnn,
}
