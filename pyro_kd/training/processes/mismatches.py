"""What is said where processes differ that must be equal. Knows texts by name, and nothing of how they are exchanged."""

from collections.abc import Mapping, Sequence

from pyro_kd.errors import ProcessMismatchError

__all__ = ["different_names", "different_settings"]


def different_names(everywhere: Sequence[Sequence[str]]) -> ProcessMismatchError | None:
    """The error where a process trains a parameter that another one lacks; None where there is no such parameter.

    Args:
        everywhere: the names of the parameters of each process, by rank.
    """
    owner = {name: rank for rank, names in enumerate(everywhere) for name in names}
    for rank, names in enumerate(everywhere):
        for name in owner.keys() - names:
            return ProcessMismatchError(
                f"process {owner[name]} of {len(everywhere)} has made the parameter {name!r} in a step, and process {rank} has "
                "not. Make every parameter in every process before training: run the program once on arguments that reach all of its "
                "pyro.param and pyro.module statements."
            )
    return None


def different_settings(everywhere: Sequence[Mapping[str, str]]) -> ProcessMismatchError | None:
    """The error where settings differ; None where all are equal.

    Args:
        everywhere: the settings of each process, by rank.
    """
    first = everywhere[0]
    for rank, found in enumerate(everywhere):
        differ = [name for name in {**first, **found} if first.get(name) != found.get(name)]
        if differ:
            shown = "; ".join(
                f"{name}: {first.get(name, 'not there')} in process 0, {found.get(name, 'not there')} in process {rank}"
                for name in differ[:5]
            )
            more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
            remedy = "Run the same script in all of them, and make the teacher from the same seed, or load it from a file."
            if all(name.startswith("buffer ") for name in differ):
                remedy = (
                    "Give each buffer the same form in all of them; one that is made from the rows of a process can be "
                    "register_buffer(..., persistent=False)."
                )
            return ProcessMismatchError(
                f"the processes of this run differ: {shown}{more}. No step is taken with them. {remedy}"
            )
    return None
