"""Messages that tell the user why a program is not captured. Knows errors, but no programs."""

from pyro_kd.capture.sizes import DataDependentError
from pyro_kd.utils.locations import line_of_error

__all__ = ["RefusedError", "reason_of"]


class RefusedError(RuntimeError):
    """A run that must not be captured."""


def reason_of(error: Exception) -> str:
    """Why a program could not be traced, with file and line, and what to do about it."""
    if "get value out of a tracing tensor" in str(error) or "data-dependent" in str(error).lower():
        return (
            f"the program reads the value of a tensor{line_of_error(error)}, on which its path may depend. Write it with "
            "torch.where or a mask; or pass the value as a number in the arguments."
        )
    if isinstance(error, RefusedError):
        where = line_of_error(error)
        return str(error).splitlines()[0] + (f" It does so{where}." if where else "")
    if isinstance(error, DataDependentError):
        return str(error)
    message = str(error).strip().splitlines()[0] if str(error) else "no message"
    return f"{type(error).__name__}{line_of_error(error)}: {message}"
