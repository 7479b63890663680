"""Items without a model, or where the model cannot be asked.

In order: what is similar to the user's latest items and texts, what the user had most, what all
users have lately, and at last anything that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence

from foretell import limits
from foretell.errors import ForetellError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from predictor.activation import ServedModel
from predictor.events import EventStore, History, Popularity
from predictor.patience import Patience
from predictor.retrieval import Retrieval
from predictor.selection import Selection

CONTENT_EVENTS = 3
"""Latest events, of different items or texts, that content answers start from."""

POPULAR_COST = 20
"""Counting popular items anew waits this many times as long as it took: 5 % of a core at most."""

CHUNK = 64
"""Candidates that are first looked up in the catalogue at once; then four times as many."""


class Fallback:
    """The methods of fallback for one request; each adds to the selection what it finds."""

    def __init__(
        self,
        popular: PopularItems,
        retrieval: Retrieval,
        served: ServedModel | None,
        patience: Patience,
    ) -> None:
        self._popular = popular
        self._retrieval = retrieval
        self._catalog = None
        if served is not None and served.items is not None and served.items.caught_up.is_set():
            self._catalog = served.items
        self._patience = patience

    async def content(self, selection: Selection, history: History) -> None:
        """Adds what is similar to the latest items and texts; not these items themselves.

        Without the embedder there is nothing to add.
        """
        ids, texts = _latest(history)
        if not (ids or texts) or selection.allow == []:
            return
        k = min(limits.K, selection.k + len(selection.deny) + len(ids))
        try:
            async with self._patience.waiting():
                similar = await self._retrieval.similar(ids, texts, k, selection.allow or ())
        except ForetellError:
            return
        for item_id in sorted(similar, key=lambda item_id: (-similar[item_id], item_id)):
            if item_id not in ids:
                selection.add(item_id, similar[item_id], pb.METHOD_CONTENT)

    async def personal(self, selection: Selection, user_id: str, inline: History) -> None:
        """Adds what the user had before: most often first, of equals the latest."""
        if selection.wanted <= 0:
            return
        events = 0
        items: list[str] = []
        if user_id:
            events, items = await asyncio.to_thread(self._popular.store.items_of, user_id)
        latest_first = [item_id for item_id in reversed(inline.item_ids) if item_id] + items
        # A Counter keeps the order of first occurrence among equals.
        ranked = dict(Counter(latest_first).most_common())
        await self._add_counted(
            selection, ranked, events + len(inline), pb.METHOD_PERSONAL_FREQUENCY
        )

    async def popular(self, selection: Selection) -> None:
        """Adds what all users have lately; then what the catalogue has, with a score of 0."""
        if selection.wanted <= 0:
            return
        popularity = await self._popular.get()
        await self._add_counted(selection, popularity.items, popularity.events, pb.METHOD_POPULAR)
        if selection.wanted <= 0:
            return
        async for ids in self._catalogue(selection):
            for item_id in ids:
                selection.add(item_id, 0.0, pb.METHOD_POPULAR)
                if selection.wanted <= 0:
                    return

    async def existing(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that the catalogue has, as far as is known."""
        catalog = self._catalog
        # What is not in memory may have been upserted a moment ago: the embedder knows.
        unknown = [item_id for item_id in ids if catalog is None or item_id not in catalog]
        if not unknown:
            return list(ids)
        try:
            async with self._patience.waiting():
                missing = await self._retrieval.missing(unknown)
        except ForetellError:
            missing = set() if catalog is None else set(unknown)
        return [item_id for item_id in ids if item_id not in missing]

    async def _add_counted(
        self,
        selection: Selection,
        ranked: dict[str, int],
        events: int,
        method: pb.Method.ValueType,
    ) -> None:
        """Adds ids in their order, their count's share of `events` as score."""
        candidates = iter(selection.open(ranked))
        size = max(CHUNK, selection.wanted)
        while selection.wanted > 0 and (chunk := list(itertools.islice(candidates, size))):
            for item_id in await self.existing(chunk):
                selection.add(item_id, ranked[item_id] / events, method)
            size *= 4

    async def _catalogue(self, selection: Selection) -> AsyncIterator[Iterable[str]]:
        """All items that may be answered, in no order that means anything."""
        if selection.allow is not None:
            yield await self.existing(list(selection.open(selection.allow)))
        elif self._catalog is not None:
            yield self._catalog
        else:
            token = ""
            with contextlib.suppress(ForetellError):  # nobody to ask: no more is known
                while True:
                    async with self._patience.waiting():
                        ids, token = await self._retrieval.first_items(token)
                    yield ids
                    if not token:
                        return


def _latest(history: History) -> tuple[list[str], list[str]]:
    """The latest items, and texts of events without one; each once."""
    seen: dict[str, bool] = {}
    for item_id, text in zip(reversed(history.item_ids), reversed(history.texts), strict=True):
        if item_id or text:
            seen.setdefault(item_id or text, bool(item_id))
        if len(seen) == CONTENT_EVENTS:
            break
    return [name for name in seen if seen[name]], [name for name in seen if not seen[name]]


class PopularItems:
    """Counts of the latest events, made anew only when events came and not too often."""

    def __init__(self, store: EventStore) -> None:
        self.store = store
        self._lock = asyncio.Lock()
        self._value = Popularity(0, {})
        self._mark: tuple[int, int] | None = None
        self._next = 0.0

    async def get(self) -> Popularity:
        """The counts: at most POPULAR_COST times as old as it takes to make them."""
        async with self._lock:
            if time.monotonic() >= self._next:
                mark = await asyncio.to_thread(self.store.change_mark)
                if mark != self._mark:
                    begin = time.monotonic()
                    self._value = await asyncio.to_thread(self.store.popular)
                    self._mark = mark
                    end = time.monotonic()
                    self._next = end + POPULAR_COST * (end - begin)
            return self._value
