"""What is looked for in the first run of a pair: what makes a loss mean something else than it seems to."""

from collections.abc import Mapping

from pyro_kd.losses.order import warn_of_order
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.losses.shared_draws import warn_of_shared_draws
from pyro_kd.sites.observed import warn_of_factors
from pyro_kd.sites.pairing import names_in_student

__all__ = ["look_at_first_run"]


def look_at_first_run(
    run: PairedRun, site_map: Mapping[str, str], told: set[str], *, compares_conditionals: bool = True
) -> None:
    """Warn of factors, of draws that rows share, and of sites in a different order.

    Args:
        run: a run of both programs.
        site_map: of the loss.
        told: the warnings that were given, which are not repeated; added to.
        compares_conditionals: whether the loss compares each site given those before it.
    """
    warn_of_factors(run.student, run.teacher, told)
    warn_of_shared_draws(run, told)
    if compares_conditionals:
        warn_of_order(run, names_in_student(site_map), told)
