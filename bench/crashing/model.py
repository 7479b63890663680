"""What a store must hold after a kill, from the answers that its callers had.

Keys are cells with one value each, None where nothing is. A write sets some of them, all at once,
at its place in the store's order (`seq`), which its answer tells. So acknowledged writes can be put
in order however they were interleaved: the last one of a cell stands.

A write whose answer was lost was done wholly, at some place after all that had been acknowledged
when it was sent, or not at all. Repeated with its request_id it tells which; one that nobody
repeats leaves both possible, and `Model.check` tries every way in which it may have been done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

MOST_WAYS = 5_000
"""Ways of doing unknown writes that are tried; a few callers have some hundred at most."""


class Key(NamedTuple):
    """A cell: an id in a collection."""

    collection: str
    id: str


Value = str | None
"""What is in a cell, in a form that can be compared; None: nothing."""


class Kind(StrEnum):
    """What went wrong."""

    LOST = "lost"
    """Something acknowledged is not there."""
    RESURRECTED = "resurrected"
    """Something deleted, or never acknowledged, is there."""
    TORN = "torn"
    """A write that was in flight is there in part."""
    DUPLICATED = "duplicated"
    """Something is there twice."""
    DISAGREEMENT = "disagreement"
    """Two ways to read the same thing give different answers."""


class Violation(NamedTuple):
    """One thing that is wrong."""

    kind: Kind
    what: str


@dataclass(frozen=True, eq=False)
class Write:
    """A write as it was sent."""

    cells: Mapping[Key, Value]
    after: int = 0
    """The largest seq that had been acknowledged when it was sent."""


@dataclass(frozen=True)
class Done:
    """A write, and where it is in the store's order; between two seqs where that is unknown."""

    write: Write
    seq: float


@dataclass
class Model:
    """The cells by the acknowledged writes, and those of which nobody knows.

    Attributes:
        unknown: lost writes that nobody repeats.
        acknowledged_seq: the largest that any answer had.
    """

    unknown: list[Write] = field(default_factory=list)
    acknowledged_seq: int = 0
    _cells: dict[Key, tuple[float, Value]] = field(default_factory=dict)
    _floors: dict[str, float] = field(default_factory=dict)

    def acknowledge(self, done: Done) -> None:
        """A write was answered."""
        self.acknowledged_seq = max(self.acknowledged_seq, int(done.seq))
        _apply(self._cells, done)

    def value(self, key: Key) -> Value:
        """What is in a cell by the acknowledged writes."""
        return self._cells.get(key, (0, None))[1]

    def clear(self, collection: str, seq: int) -> None:
        """A collection was made anew: what was in it before that is gone."""
        self._floors[collection] = max(seq, self._floors.get(collection, 0))

    def check(
        self,
        observed: Mapping[Key, Value],
        collections: Collection[str],
        seq: int,
        repeated: Sequence[Done] = (),
    ) -> list[Violation]:
        """Compares with what the store held after the restart, and takes that over as known.

        Args:
            observed: all cells that had a value.
            collections: those that there were; only they are compared.
            seq: the store's last write then.
            repeated: lost writes that were repeated after that, with the seq that they got: up to
                `seq` where the first attempt had been done.
        """
        settled = [done for done in repeated if done.seq <= seq]
        left_out = [done.write for done in repeated if done.seq > seq]
        cells = dict(self._cells)
        for one in settled:
            _apply(cells, one)
        best: list[Violation] | None = None
        for way in _ways(self.unknown, cells):
            tried = dict(cells)
            for one in way:
                _apply(tried, one)
            done = [one.write for one in (*settled, *way)]
            not_done = [*left_out, *(write for write in self.unknown if write not in done)]
            found = self._compare(tried, observed, collections, done, not_done)
            if best is None or len(found) < len(best):
                best = found
            if not best:
                break
        assert best is not None
        if seq < self.acknowledged_seq:
            what = f"the last write is {seq}; {self.acknowledged_seq} was acknowledged"
            best.append(Violation(Kind.LOST, what))
        self._adopt(observed, collections, seq)
        for one in repeated:
            if one.seq > seq:
                self.acknowledge(one)
        return best

    def _compare(
        self,
        cells: Mapping[Key, tuple[float, Value]],
        observed: Mapping[Key, Value],
        collections: Collection[str],
        done: Sequence[Write],
        not_done: Sequence[Write],
    ) -> list[Violation]:
        """What differs if of the lost writes some were done and some not."""
        violations = []
        for key in cells.keys() | observed.keys():
            if key.collection not in collections:
                continue
            seq, expected = cells.get(key, (0, None))
            if seq <= self._floors.get(key.collection, -1):
                expected = None
            found = observed.get(key)
            if found == expected:
                continue
            if any(key in write.cells and write.cells[key] == expected for write in done) or any(
                key in write.cells and write.cells[key] == found for write in not_done
            ):
                kind = Kind.TORN
            else:
                kind = Kind.RESURRECTED if expected is None else Kind.LOST
            what = f"{key.collection}/{key.id} is {found!r}, not {expected!r} as of seq {seq:g}"
            violations.append(Violation(kind, what))
        return sorted(violations)

    def _adopt(
        self, observed: Mapping[Key, Value], collections: Collection[str], last: int
    ) -> None:
        """What was seen is known from here on, so that each violation is reported once."""
        for key in self._cells.keys() | observed.keys():
            if key.collection in collections:
                seq = min(self._cells.get(key, (0, None))[0], last)
                above = self._floors.get(key.collection, -1) + 0.5
                self._cells[key] = (max(seq, above), observed.get(key))
        self.acknowledged_seq = last
        self.unknown.clear()


def _apply(cells: dict[Key, tuple[float, Value]], done: Done) -> None:
    for key, value in done.write.cells.items():
        if key not in cells or cells[key][0] < done.seq:
            cells[key] = (done.seq, value)


def _ways(
    unknown: Sequence[Write], cells: Mapping[Key, tuple[float, Value]]
) -> Iterator[list[Done]]:
    """Every choice of which of the writes were done, and where among the acknowledged ones.

    Only places that differ for the write's own cells count. First that none was done.

    Raises:
        RuntimeError: there are too many: more writes were lost than a few callers can have.
    """
    if not unknown:
        yield []
        return
    places = [_places(write, cells) for write in unknown]
    orders = list(itertools.permutations(range(len(unknown))))
    if math.prod(len(some) + 1 for some in places) * len(orders) > MOST_WAYS:
        raise RuntimeError(f"{len(unknown)} lost writes leave too much open to check anything")
    step = 0.5 / (len(unknown) + 1)
    for chosen in itertools.product(*([None, *some] for some in places)):
        for order in orders if _share_cells(unknown) else orders[:1]:
            yield [
                Done(write, place + step * (1 + position))
                for write, place, position in zip(unknown, chosen, order, strict=True)
                if place is not None
            ]


def _places(write: Write, cells: Mapping[Key, tuple[float, Value]]) -> list[float]:
    """Seqs right after which it may have been done."""
    later = {cells[key][0] for key in write.cells if key in cells}
    return sorted({float(write.after), *(seq for seq in later if seq > write.after)})


def _share_cells(writes: Iterable[Write]) -> bool:
    keys = [key for write in writes for key in write.cells]
    return len(set(keys)) < len(keys)
