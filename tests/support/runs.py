"""The runs of a loss: pairs of sites with their distributions and values."""

__all__ = ["runs_of"]


def runs_of(loss, student, teacher, *args):
    """One PairedRun per particle."""
    return [particle.run for particle in loss.particles(student, teacher, *args)]
