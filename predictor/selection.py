"""Which items an answer may name, and those that it names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from foretell.predictor.v1 import prediction_service_pb2 as pb


class Selection:
    """Up to `k` items, each once, in the order in which methods add them.

    Args:
        k: items wanted.
        allow: only these, if not None.
        deny: none of these.
        items: the answer's repeated ScoredItem, which is filled.
    """

    def __init__(
        self, k: int, allow: Sequence[str] | None, deny: Collection[str], items: Any
    ) -> None:
        self.k = k
        self.deny = deny
        self.allow = None if allow is None else [i for i in dict.fromkeys(allow) if i not in deny]
        self.items = items
        self._allowed = None if self.allow is None else set(self.allow)
        self._chosen: set[str] = set()

    @property
    def wanted(self) -> int:
        """Items that are still to be found."""
        return self.k - len(self._chosen)

    def open(self, ids: Iterable[str]) -> Iterator[str]:
        """Those of the ids that may be added when they are reached."""
        return filter(self._may, ids)

    def add(
        self, item_id: str, score: float, method: pb.Method.ValueType, probability: float = 0.0
    ) -> None:
        """Adds an item, if it may be and there is room."""
        if self.wanted > 0 and self._may(item_id):
            self._chosen.add(item_id)
            self.items.add(
                item_id=item_id, interest_score=score, probability=probability, method=method
            )

    def _may(self, item_id: str) -> bool:
        return (
            item_id not in self._chosen
            and item_id not in self.deny
            and (self._allowed is None or item_id in self._allowed)
        )
