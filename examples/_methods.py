"""The names of the methods that the experiments compare, as tables and pictures show them, and what they mean.

A name may be followed by a comma and details: ``surrogate (ours), mean W2², 0.1``.
"""

from collections.abc import Iterable, Mapping

__all__ = [
    "FITTED",
    "FORCED",
    "LOCAL",
    "MARGINAL",
    "MULTI_SAMPLE",
    "ON_POLICY",
    "SCRATCH",
    "SELECTED",
    "SURROGATE",
    "TEACHER",
    "explain",
]

TEACHER = "teacher"
SCRATCH = "scratch"
LOCAL = "local"
SURROGATE = "surrogate (ours)"
FORCED = "local first (ours)"
MULTI_SAMPLE = "K samples (ours)"
MARGINAL = "exact marginal (ours)"
ON_POLICY = "on policy (ours)"
SELECTED = "from the teacher's weights (ours)"
FITTED = "from fitted layers (ours)"

MEANINGS = {
    TEACHER: "the model that the students learn from",
    SCRATCH: "a student that learns from the data alone",
    LOCAL: "local distillation, where each site of the student is trained on the teacher's values of the sites before it",
    SURROGATE: "surrogate distillation, where the student makes its own latents from the teacher's noise",
    FORCED: "teacher forcing in the first steps, so local distillation, and then surrogate distillation",
    MULTI_SAMPLE: "the K-sample bound, which compares mixtures over K samples of the latents",
    MARGINAL: "the KL of the targets, with all states of the latents summed out",
    ON_POLICY: "after local distillation, surrogate distillation on histories that the student draws and the teacher scores",
    SELECTED: "the distillation that is advised, of a student that starts with the weights of some of the teacher's units",
    FITTED: "the same, with layers that are fitted to the teacher's by least squares before",
}


def explain(names: Iterable[str], further: Mapping[str, str] | None = None) -> str:
    """A sentence that says what the names in a table or picture mean.

    Args:
        names: names of models, each a method's name, with or without details after a comma.
        further: meanings that the experiment adds, by name; these are always named.
    """
    methods = {name.split(",")[0] for name in names}
    meanings = {name: meaning for name, meaning in MEANINGS.items() if name in methods} | dict(further or {})
    return "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items()) + "." if meanings else ""
