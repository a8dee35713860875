"""What a run does on the value of a tensor: once seen, and then verified in every run of the graph.

Tracing a run into a graph of tensors follows one path of Python code, so that code which reads a tensor's value (``if
mask.any():``) cannot be traced. In a user's program that is the end of it. In this library's own checks the answer is nearly
always the same: :class:`Decisions` notes the answers of an ordinary run, gives them again while the run is traced, and leaves
behind the conditions under which they hold. A call of the graph for which one does not hold is done again without the graph.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Decisions"]

_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.item, torch.equal}


class Decisions(TorchFunctionMode):
    """Notes the answers where this library reads a tensor's value, or gives those noted before.

    Args:
        noted: the ``answers`` of an earlier run; None notes new ones.

    Attributes:
        answers: by the place in the code that asked, in the order of the run. (A place that has asked in the earlier run may not ask
            again: some checks are made once.)
        conditions: boolean scalars, where answers are given again: whether they are the true ones.
    """

    def __init__(self, noted: Mapping[Any, Sequence[Any]] | None = None) -> None:
        super().__init__()
        self.answers: defaultdict[Any, list[Any]] = defaultdict(list)
        self.conditions: list[Tensor] = []
        self._noted = None if noted is None else {place: iter(answers) for place, answers in noted.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _READS:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        reader, place = str(frame.f_globals.get("__name__")), (frame.f_code, frame.f_lasti)
        if reader in ("pyro.util", "pyro.infer.util") and isinstance(args[0], Tensor):
            # Pyro's ELBOs: a number for the report, of which the value without gradients will do, and a warning of NaN.
            return args[0].detach() if func is Tensor.item else False
        if not reader.startswith("pyro_kd."):
            return func(*args, **(kwargs or {}))
        if self._noted is None:
            answer = func(*args, **(kwargs or {}))
            self.answers[place].append(answer)
            return answer
        answer = next(self._noted[place])
        with torch.no_grad():
            if func is torch.equal:
                if args[0].shape == args[1].shape:
                    self.conditions.append((args[0] == args[1]).all() == answer)
            else:
                self.conditions.append((args[0] == answer).reshape(()))
        return answer
