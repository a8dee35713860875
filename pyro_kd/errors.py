"""The errors that pyro_kd raises.

The first layer of the package: it imports nothing, and everything may import it. Each class also derives from the
built-in exception that fits it, so that ``except ValueError`` works in code that does not know pyro_kd. A
message says what went wrong, at which site, and which line of user code mends it. It ends with the place in
docs/troubleshooting.md that explains errors of its class.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "ArchitectureMismatchError",
    "BatchesExhaustedError",
    "CheckError",
    "CheckpointError",
    "CorruptDataError",
    "CorruptExportError",
    "ExportMismatchError",
    "FolderInUseError",
    "InvalidParameterError",
    "InvalidProgramError",
    "MissingDataError",
    "MissingDeviceError",
    "NoParametersError",
    "NoTargetsError",
    "NoiseMismatchError",
    "NonFiniteLossError",
    "ObservedValueError",
    "OptimiserMismatchError",
    "PlateMismatchError",
    "ProcessGroupError",
    "ProcessMismatchError",
    "PyroKDError",
    "RunMismatchError",
    "SharedParameterError",
    "SupportMismatchError",
    "TeacherCacheError",
    "UnknownTargetError",
    "UnpairedSiteError",
    "UnsupportedDivergenceError",
    "UnsupportedExportError",
    "UnsupportedGradientError",
    "UnsupportedNoiseError",
    "WeightSelectionError",
]


class PyroKDError(Exception):
    """Base class of all errors of pyro_kd.

    Within a different message, as in ``f"step 3: {error}"``, an error stands without the name of the page.

    >>> print(NoTargetsError("no targets found."))
    no targets found. See docs/troubleshooting.md#notargetserror.
    """

    @property
    def message(self) -> str:
        """What went wrong, without the name of the page."""
        return super().__str__()

    @property
    def page(self) -> str:
        """The page and the heading that explain errors of this class, or of the nearest base class in this module."""
        known = next(base for base in type(self).__mro__ if base.__module__ == __name__)
        return f"docs/troubleshooting.md#{known.__name__.lower()}"

    def __str__(self) -> str:
        text = self.message
        if not text:
            return f"See {self.page}."
        separator = "\n" if "\n" in text else " "
        stop = "" if text.endswith((".", "?", "!")) else "."
        return f"{text}{stop}{separator}See {self.page}."

    def __format__(self, spec: str) -> str:
        return format(self.message, spec)


class InvalidProgramError(PyroKDError, TypeError):
    """A program, or other code of the user's, cannot be run: it is none, or takes other arguments than it is called with."""


class InvalidParameterError(PyroKDError, ValueError):
    """A trained parameter, or one of a distribution, has an invalid value, such as a scale below 0."""


class CheckError(PyroKDError, ValueError):
    """A check before training has found problems that would stop it."""


class NoTargetsError(PyroKDError, ValueError):
    """``targets`` is not given, and the call observes no site."""


class UnknownTargetError(PyroKDError, ValueError):
    """A name in ``targets`` is not a sample site of the teacher."""


class UnpairedSiteError(PyroKDError, ValueError):
    """A sample site exists in only one of the two programs."""


class NoiseMismatchError(PyroKDError, ValueError):
    """A site needs noise of a different law or shape than was recorded for it."""


class UnsupportedNoiseError(PyroKDError, NotImplementedError):
    """A site's distribution cannot be turned into a function of shared noise."""


class SupportMismatchError(PyroKDError, ValueError):
    """The two distributions at a site have supports that cannot be compared."""


class PlateMismatchError(PyroKDError, ValueError):
    """The two programs scale, mask or batch a site differently."""


class ObservedValueError(PyroKDError, ValueError):
    """An observed value is missing, depends on parameters or draws, or differs between the programs."""


class SharedParameterError(PyroKDError, ValueError):
    """Teacher and student hold the same parameter."""


class NoParametersError(PyroKDError, ValueError):
    """The loss does not depend on any parameter of the student."""


class UnsupportedDivergenceError(PyroKDError, NotImplementedError):
    """A divergence does not apply to the distributions at a site, or returns a tensor of the wrong shape."""


class UnsupportedGradientError(PyroKDError, NotImplementedError):
    """A gradient that the loss asks for does not exist, such as that of a discrete site, or would not reach an argument."""


class NonFiniteLossError(PyroKDError, FloatingPointError):
    """The loss, or a gradient of it, is NaN or infinite."""


class BatchesExhaustedError(PyroKDError, ValueError):
    """There are fewer batches than training steps need."""


class OptimiserMismatchError(PyroKDError, ValueError):
    """The optimiser holds parameters that are not the student's."""


class TeacherCacheError(PyroKDError, ValueError):
    """A cache of a teacher's draws cannot be written, is damaged, or belongs to a different teacher or version."""


class CheckpointError(PyroKDError, OSError):
    """A file of a training run cannot be written, or is truncated, foreign, or of a newer version."""


class ArchitectureMismatchError(CheckpointError):
    """A checkpoint holds different parameters than the student."""


class RunMismatchError(CheckpointError):
    """A checkpoint belongs to a run with a different teacher, loss or data."""


class FolderInUseError(CheckpointError):
    """A different training run writes checkpoints into the folder."""


class WeightSelectionError(PyroKDError, ValueError):
    """A student's network cannot start from its teacher's weights: names or shapes do not fit."""


class MissingDeviceError(PyroKDError, RuntimeError):
    """A device does not exist, or is not available."""


class ProcessGroupError(PyroKDError, RuntimeError):
    """Several processes cannot train together: one of them has failed or is gone, or something cannot be shared out."""


class ProcessMismatchError(PyroKDError, ValueError):
    """The processes of a training run differ where they must be equal: in teacher, parameters, batches or settings."""


class MissingDataError(PyroKDError, FileNotFoundError):
    """A file of a data set is not where it should be."""


class CorruptDataError(PyroKDError, ValueError):
    """A file of a data set is truncated, foreign or not trusted."""


class UnsupportedExportError(PyroKDError, NotImplementedError):
    """A program cannot be exported as a function of noise with a graph that is always the same."""


class ExportMismatchError(PyroKDError, ArithmeticError):
    """An exported program gives other values than the Pyro program on the same noise."""


class CorruptExportError(PyroKDError, ValueError):
    """A file of an exported program is truncated, damaged, foreign, not trusted, or of a newer version."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the candidate closest to ``name``; an empty string if none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listing(names: Iterable[str]) -> str:
    """Format names for an error message."""
    return ", ".join(repr(name) for name in names) or "(none)"
