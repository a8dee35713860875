"""Point masses that no term covers, although they are left out as functions of a draw that is compared."""

from collections.abc import Collection, Mapping

from torch import Tensor

from pyro_kd.errors import UnpairedSiteError, listing
from pyro_kd.losses.paired_run import PairedRun
from pyro_kd.sites.classification import covered_points
from pyro_kd.sites.pairing import names_in_student

__all__ = ["check_left_out"]


def check_left_out(run: PairedRun, site_map: Mapping[str, str], fresh: Collection[str]) -> None:
    """Raise where a point mass has a gradient to trained parameters that no term has, such as a guide's scales behind its draws.

    It can be seen where the student is given all draws, and where gradients are on. If other sites are compared as well, they may
    depend on the point masses, and nothing is said.

    Args:
        run: a run of both programs.
        site_map, fresh: options of the loss.

    Raises:
        UnpairedSiteError: there is such a point mass.
    """
    to_student = names_in_student(site_map)
    draws = [to_student.get(pair.name, pair.name) for pair in run.pairs]
    are_given = all(pair.is_target or pair.is_given for pair in run.pairs)
    if not (draws and are_given and all((run.student.nodes[name]["infer"] or {}).get("is_auxiliary") for name in draws)):
        return
    points = covered_points(run.student, draws)
    trained = [
        name
        for name, site in points.items()
        if isinstance(site["value"], Tensor) and site["value"].requires_grad and name not in fresh
    ]
    if trained and "*" not in fresh:
        raise UnpairedSiteError(
            f"the loss leaves out the point masses {listing(trained)}, as functions of the draws "
            f"{listing(pair.name for pair in run.pairs)} alone. They depend on parameters of the student too, which would not be "
            f"trained. Make them targets in place of the draws: targets={trained}."
        )
