"""What a run does on the value of a tensor: once seen, and then verified in every run of the graph.

Tracing a run into a graph of tensors follows one path of Python code, so that code which reads a tensor's value (``if
mask.any():``) cannot be traced. In a user's program that is the end of it. In the libraries below (is this scale constant, are these
counts equal, is there a NaN) the answer is nearly always the same: :class:`Decisions` notes the answers of an ordinary run, gives
them again while the run is traced, and leaves behind the conditions under which they hold. A call of the graph for which one does
not hold is done again without the graph.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_kd.capture.sizes import Read, tensors_turned_into_numbers
from pyro_kd.utils.locations import line_at_work
from pyro_kd.utils.tensors import READERS

__all__ = ["Decisions", "NewDecisionError"]

_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, torch.equal}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_REPORTS = {  # Pyro's ELBOs read a number for the report, of which the value without gradients will do, and warn of NaN
    Tensor.item: Tensor.detach,
    Tensor.__bool__: lambda value: False,
    Tensor.register_hook: lambda value: None,
}
_LIBRARIES = ("pyro_kd.", "pyro.", "torch.")


class NewDecisionError(RuntimeError):
    """A run decides otherwise than the one before it."""


class Decisions(TorchFunctionMode):
    """Notes the answers where a library reads a tensor's value, or gives those noted before.

    Args:
        noted: the ``answers`` of an earlier run; None notes new ones.

    Attributes:
        answers: by the place in the code that asked, in the order of the run. (A place that has asked in the earlier run may not ask
            again: some checks are made once.)
        conditions: boolean scalars, where answers are given again: whether they are the true ones.
        reads: tensors of which the values were turned into Python numbers without an operation that could be traced.
    """

    def __init__(self, noted: Mapping[Any, Sequence[Any]] | None = None) -> None:
        super().__init__()
        self.answers: defaultdict[Any, list[Any]] = defaultdict(list)
        self.conditions: list[Tensor] = []
        self.reads: list[Read] = []
        self._noted = None if noted is None else {place: iter(answers) for place, answers in noted.items()}

    def __enter__(self) -> "Decisions":
        READERS.append(lambda value: float(self._answer("number", Tensor.item, (value,))))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        READERS.pop()
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._noted is not None:
            self.reads += [Read(tensor, line_at_work()) for tensor in tensors_turned_into_numbers(func, args)]
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor"):  # methods that are written in Python
            frame = frame.f_back
        reader, place = str(frame.f_globals.get("__name__")), (frame.f_code, frame.f_lineno)
        if func is torch.nn.functional.one_hot and len(args) == 2 and args[1] > 0:  # torch's looks at the values
            return (args[0].unsqueeze(-1) == torch.arange(args[1], device=args[0].device)).long()
        if not reader.startswith(_LIBRARIES):
            return func(*args, **(kwargs or {}))
        if func in _INDEXING:  # a scalar tensor among the indices is read as a number
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(self._answer(place, Tensor.item, (i,)) if _is_scalar(i) else i for i in index)
            return func(args[0], index, *args[2:])
        if reader in ("pyro.util", "pyro.infer.util") and func in _REPORTS:
            return _REPORTS[func](args[0])
        if func not in _READS:
            return func(*args, **(kwargs or {}))
        return self._answer(place, func, args)

    def _answer(self, place: Any, func: Any, args: Any) -> Any:
        """What a read gives, or gave in the run before."""
        if self._noted is None:
            answer = func(*args)
            self.answers[place].append(answer)
            return answer
        answer = next(self._noted.get(place, iter(())), None)
        if answer is None:
            raise NewDecisionError("the program reads a value that it did not read in the run before")
        with torch.no_grad():
            if func is torch.equal:
                if args[0].shape == args[1].shape:
                    self.conditions.append((args[0] == args[1]).all() == answer)
            else:
                self.conditions.append((args[0] == answer).reshape(()))
        return answer


def _is_scalar(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype not in (torch.bool, torch.uint8)
