"""The runs of a loss: pairs of sites with their distributions and values, and the values of the terms."""

__all__ = ["only_run", "runs_of", "values_of"]


def runs_of(loss, student, teacher, *args):
    """One PairedRun per particle."""
    return [particle.run for particle in loss.particles(student, teacher, *args)]


def only_run(loss, student, teacher, *args):
    """The run of a loss with one particle."""
    (run,) = runs_of(loss, student, teacher, *args)
    return run


def values_of(terms):
    """Name of the site -> value of its term, from the result of ``loss.terms``."""
    return {name: float(term.value.detach()) for name, term in terms.items()}
