"""A warning that is given once for each pair of programs."""

import warnings

__all__ = ["warn_once"]


def warn_once(text: str, told: set[str]) -> None:
    """Warn the caller's caller, unless the text is among those that were given.

    Args:
        text: of the warning.
        told: the warnings that were given; added to.
    """
    if text not in told:
        told.add(text)
        warnings.warn(text, stacklevel=3)
