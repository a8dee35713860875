"""Everything static that a run depends on: whatever its programs can reach that is neither an argument nor a tensor of a module.

A graph is traced with the numbers, names, functions and modules that the programs have at that time: ``Dropout.p``, an option of a
loss, a global. :class:`StaticState` divides what objects reach into tensors, which are inputs of a graph, and everything else, which
it notes. Later it tells whether this has changed. :mod:`pyro_kd.capture.static_walk` describes what it can find.
"""

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

from pyro_kd.capture.static_walk import StaticWalk

__all__ = ["StaticState"]


class StaticState:
    """A note of everything static that some objects reach.

    Args:
        roots: the objects, by names for messages.
        ignored: paths that are left out, with everything that is only reached through them.

    Attributes:
        modules: the modules that were found.
        tensors: the tensors that were found, of any shapes, and that no module holds as a parameter or buffer.
        tokens: everything else that was found, by its path from a root. If tokens are equal, a graph can be used again.
    """

    def __init__(self, roots: Mapping[str, Any], ignored: Iterable[str] = ()) -> None:
        self._roots, self._ignored = roots, frozenset(ignored)
        walk = StaticWalk(roots, self._ignored)
        self.modules, self.tensors, self.tokens = walk.modules, walk.tensors, walk.tokens
        self._watched = walk
        self._lengths, self._items = walk.lengths(), list(walk.items())

    def is_equal(self, notes: "dict[frozenset[str], StaticState]") -> bool:
        """Whether everything is equal to what was noted, perhaps in different objects, which are watched from now on.

        Args:
            notes: the current notes by their ignored paths; missing ones are added.
        """
        now = notes.get(self._ignored)
        if now is None:
            now = notes[self._ignored] = StaticState(self._roots, self._ignored)
        if now.tokens != self.tokens:
            return False
        vars(self).update(vars(now))
        return True

    def differences(self, other: "StaticState") -> set[str]:
        """Paths at which two notes differ, and all other paths to the same objects."""
        paths = self.tokens.keys() | other.tokens.keys()
        found = {path for path in paths if self.tokens.get(path) != other.tokens.get(path)}
        for tokens in (self.tokens, other.tokens):
            found |= {path for path, token in tokens.items() if token[0] == "seen" and token[1] in found}
        return found

    def is_untouched(self) -> bool:
        """Whether all noted objects are still the same ones. Takes microseconds."""
        walk = self._watched
        try:
            return (
                not any(walk.empty)
                and walk.lengths() == self._lengths
                and all(map(is_, walk.items(), self._items))
                and all(held.tobytes() == content for held, content in walk.arrays)
                and all(members == copy for members, copy in walk.sets)
            )
        except (AttributeError, KeyError, RuntimeError, ValueError):  # an attribute was deleted, or a cell emptied
            return False
