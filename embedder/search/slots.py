"""Ids, seqs and vectors by slot: a table that only grows.

A slot's vector never changes, so that whoever knows how many slots there were may read them beside
a change. A replaced or deleted vector leaves a dead slot behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors

Slots = NDArray[np.int64]

LEAST = 64
"""Slots that a table has room for at first."""


class SlotTable:
    """What an index holds, slot by slot.

    Attributes:
        ids: of each slot, dead ones included.
        slots: by id, those alive.
        seqs: of each slot's last change, -1 where it is dead; longer than there are slots.
        rows: float32 (room, cols); as long as `seqs`.
    """

    def __init__(self, cols: int) -> None:
        self.ids: list[str] = []
        self.slots: dict[str, int] = {}
        self.seqs = np.empty(0, np.int64)
        self.rows: Vectors = np.empty((0, cols), np.float32)

    @classmethod
    def over(cls, ids: list[str], seqs: NDArray[np.int64], rows: Vectors) -> SlotTable:
        """A table of these arrays themselves; `seqs` and `rows` may have room behind the ids."""
        table = cls(rows.shape[1])
        table.ids, table.seqs, table.rows = ids, seqs, rows
        table.slots = {ids[slot]: slot for slot in table.live().tolist()}
        return table

    def __len__(self) -> int:
        """Slots, dead ones included."""
        return len(self.ids)

    @property
    def dead(self) -> int:
        """Slots that are dead."""
        return len(self.ids) - len(self.slots)

    @property
    def room(self) -> int:
        """Slots that fit without copying."""
        return len(self.rows)

    def live(self, first: int = 0) -> Slots:
        """Slots alive from `first` on."""
        return np.flatnonzero(self.seqs[first : len(self.ids)] >= 0) + first

    def find(self, ids: Iterable[str]) -> Slots:
        """Slots of those of the ids that are there."""
        left, found = iter(ids), []
        # A million at once would keep all other threads of Python waiting.
        while some := list(islice(left, 8_192)):
            slots = np.fromiter(map(self.slots.get, some, repeat(-1)), np.int64, len(some))
            found.append(slots[slots >= 0])
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def reserve(self, slots: int) -> None:
        """Makes room, twice as much as there was at least.

        Searches may go on: what they read is the same in the old arrays and in the new ones.
        Memory counts only once it is written to.
        """
        if slots <= self.room:
            return
        count, room = len(self.ids), max(slots, 2 * self.room, LEAST)
        rows = np.empty((room, self.rows.shape[1]), np.float32)
        seqs = np.empty(room, np.int64)
        rows[:count] = self.rows[:count]
        seqs[:count] = self.seqs[:count]
        self.rows, self.seqs = rows, seqs

    def write(self, vectors: Vectors, seqs: int | NDArray[np.int64]) -> None:
        """Puts vectors behind the last slot, where no search looks before `name`."""
        first, end = len(self.ids), len(self.ids) + len(vectors)
        self.reserve(end)
        self.rows[first:end] = vectors
        self.seqs[first:end] = seqs

    def name(self, ids: Sequence[str]) -> None:
        """Makes what was written the vectors of different ids; not beside a search."""
        self.bury(ids)
        first = len(self.ids)
        self.ids.extend(ids)
        self.slots.update(zip(ids, range(first, first + len(ids)), strict=True))

    def bury(self, ids: Sequence[str]) -> None:
        """Forgets those of the ids that are there; not beside a search."""
        dead = [self.slots.pop(id) for id in ids if id in self.slots]
        self.seqs[dead] = -1


class Compaction:
    """A copy of a table without its dead slots, made while the table goes on changing."""

    def __init__(self, source: SlotTable) -> None:
        """Copies what is alive; searches and changes may go on meanwhile."""
        self._source = source
        self._seen = len(source)
        live = source.live()
        self._live = live = live[live < self._seen]  # some may have come in between
        ids = [source.ids[slot] for slot in live.tolist()]
        self.table = SlotTable.over(ids, np.zeros(len(live), np.int64), source.rows[live])

    def catch_up(self) -> None:
        """Carries over what changed since; the table must not change meanwhile."""
        source, table = self._source, self.table
        table.seqs[: len(self._live)] = source.seqs[self._live]
        gone = np.flatnonzero(table.seqs[: len(self._live)] < 0)
        for slot in gone.tolist():
            table.slots.pop(table.ids[slot])
        new = source.live(self._seen)
        table.write(source.rows[new], source.seqs[new])
        table.name([source.ids[slot] for slot in new.tolist()])
