"""Arrays as an ArviZ object: the only module that knows ArviZ's versions.

ArviZ 0.x makes an ``InferenceData`` with ``from_dict(prior=..., ...)``, ArviZ 1.x a ``DataTree`` from one nested dictionary. Both
are read in the same way: ``data["prior"]["z"]``. This module knows NumPy arrays, but no programs and no tensors.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["import_arviz", "to_arviz"]


def import_arviz() -> Any:
    """Import ``arviz``, without the warning about future versions that 0.23 gives at import.

    Raises:
        ModuleNotFoundError: ArviZ is not installed. The message has the command that installs it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ModuleNotFoundError as error:
        if error.name != "arviz":
            raise
        raise ModuleNotFoundError(
            "to_inference_data needs ArviZ, which is not installed: pip install arviz", name="arviz"
        ) from error
    return arviz


def to_arviz(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Mapping[str, Sequence[str]]],
    coords: Mapping[str, Any],
    *,
    arviz: Any = None,
) -> Any:
    """One ArviZ object with several groups.

    Args:
        groups: group -> variable -> array. Arrays have shape (chain, draw, ...) in groups of draws, and lack the first two dimensions
            in ``observed_data``. Groups without variables are left out.
        dims: group -> variable -> names of the dimensions after chain and draw.
        coords: dimension -> labels along it; by default they count from 0.
        arviz: the module to use; None imports it.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        ModuleNotFoundError: ArviZ is not installed.
    """
    arviz = import_arviz() if arviz is None else arviz
    is_new = int(arviz.__version__.split(".")[0]) >= 1
    from_dict = arviz.from_dict if is_new else lambda groups, **named: arviz.from_dict(**groups, **named)
    whole: Any = None
    for group, variables in groups.items():
        if not variables:
            continue
        # One call per group: the term of a site and its draws have the same name, but different dimensions.
        own = {name: list(dims.get(group, {}).get(name, ())) for name in variables}
        used = {dim: labels for dim, labels in coords.items() if any(dim in names for names in own.values())}
        one = {group: dict(variables)}
        part = from_dict(one, dims=own, coords=used)
        if whole is None:
            whole = part
        else:
            whole[group] = part[group]
    return whole
