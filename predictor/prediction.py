"""What a user will do next: the model where it can answer, the fallbacks where it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.errors import ForetellError, UnavailableError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.vectors import Vectors, from_block
from predictor.activation import Models, ServedModel
from predictor.batching import Batcher
from predictor.events import EventStore, PastEvent
from predictor.fallback import Fallback
from predictor.reading import Reading, Request, read_batch
from predictor.retrieval import Hits, Retrieval, VectorSearch
from predictor.selection import Selection

RESERVE_SHARE = 0.2
"""Part of the time left that stays for an answer without the embedder."""


@dataclass(frozen=True, slots=True)
class Query:
    """Whose next behavior, and which items may be answered."""

    user_id: str = ""
    history: Sequence[PastEvent] = ()
    """Follows the stored events; in the order of time."""
    k: int | None = None
    """None: the default; all where `rank` is given."""
    allow: Sequence[str] = ()
    """Only these, if not empty."""
    deny: Sequence[str] = ()
    repeats: pb.Repeats.ValueType = pb.REPEATS_UNSPECIFIED
    rank: Sequence[str] | None = None
    """The items to order, of a Rank."""


class Predictor:
    """Answers queries; concurrent ones share forward passes and searches.

    Close it when no query is running any more.
    """

    def __init__(
        self,
        store: EventStore,
        models: Models,
        retrieval: Retrieval,
        history_events: int,
    ) -> None:
        self._store = store
        self._models = models
        self._retrieval = retrieval
        self._history_events = history_events
        self._fallback = Fallback(store, retrieval)
        self._worker = ThreadPoolExecutor(1, "sequence model")
        self._reader: Batcher[Request, Reading] = Batcher(self._read, limits.QUERIES)

    async def predict(
        self, query: Query, deadline: float | None
    ) -> tuple[pb.Prediction, common_pb2.Timings]:
        """The next behavior types and items.

        Args:
            query: a checked one.
            deadline: of the event loop's clock, until when an answer is of use; None: any time.
        """
        begin = time.perf_counter_ns()
        served = self._models.served
        excluded = _repeats_excluded(query, served)
        reading = await self._reader.submit(
            Request(
                served,
                query.user_id,
                query.history,
                await self._inline_vectors(served, query, deadline),
                excluded,
                self._history_events,
            )
        )
        read_us = (time.perf_counter_ns() - begin) // 1_000
        selection = Selection(
            query.k or (limits.K_DEFAULT if query.rank is None else len(set(query.rank))),
            _allowed(query),
            reading.own_items.union(query.deny),
        )
        prediction = pb.Prediction(
            behavior_types=[
                pb.BehaviorTypeProbability(behavior_type=name, probability=probability)
                for name, probability in reading.types
            ],
            model_version=served.name if served else "",
            pending_texts=reading.pending_texts,
            history_events=len(reading.history),
        )
        timings = common_pb2.Timings(
            forward_us=reading.forward_us, queue_us=max(0, read_us - reading.forward_us)
        )
        await self._items(query, served, reading, selection, prediction, timings, deadline)
        prediction.items.extend(selection.items)
        await self._missing(query, served, prediction)
        prediction.shortfall_reason = _shortfall(query, selection, prediction)
        timings.total_us = (time.perf_counter_ns() - begin) // 1_000
        return prediction, timings

    def close(self) -> None:
        """Ends the worker thread."""
        self._worker.shutdown()

    async def _read(self, requests: Sequence[Request]) -> list[Reading | ForetellError]:
        loop = asyncio.get_running_loop()
        return list(
            await loop.run_in_executor(self._worker, partial(read_batch, self._store, requests))
        )

    async def _inline_vectors(
        self, served: ServedModel | None, query: Query, deadline: float | None
    ) -> dict[str, Vectors]:
        """Vectors of texts of the inline history that no collection holds."""
        if served is None or served.texts is None:
            return {}
        items, texts = served.items, served.texts
        unknown = {
            event.text_id: event.text
            for event in query.history
            if event.text_id
            and event.text_id not in texts
            and not (items is not None and event.item_id in items)
        }
        if not unknown:
            return {}
        try:
            async with _before(deadline):
                answer = await self._retrieval.embed(list(unknown.values()), texts.collection)
        except ForetellError:
            return {}  # they count as pending
        vectors = from_block(answer.vectors)
        failed = {failure.index for failure in answer.failures}
        return {text_id: vectors[at] for at, text_id in enumerate(unknown) if at not in failed}

    async def _items(
        self,
        query: Query,
        served: ServedModel | None,
        reading: Reading,
        selection: Selection,
        prediction: pb.Prediction,
        timings: common_pb2.Timings,
        deadline: float | None,
    ) -> None:
        """Fills the selection: by the model if it can, else by the fallbacks."""
        prediction.fallback_reason = _fallback_reason(served, reading)
        content = True
        if served is not None and not prediction.fallback_reason:
            try:
                async with _before(deadline):
                    complete = await self._search(served, reading, selection, prediction, timings)
                if complete:
                    return
            except ForetellError:
                prediction.fallback_reason = pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
            content = False
        if content:
            with contextlib.suppress(ForetellError):
                async with _before(deadline):
                    await self._fallback.content(selection, reading.history)
        await self._fallback.personal(selection, served, query.user_id, query.history)
        await self._fallback.popular(selection, served)

    async def _search(
        self,
        served: ServedModel,
        reading: Reading,
        selection: Selection,
        prediction: pb.Prediction,
        timings: common_pb2.Timings,
    ) -> bool:
        """Adds the model's items; whether there are no others that may be answered."""
        assert served.items is not None
        assert reading.query is not None
        if selection.allow == []:
            return True
        deny: Sequence[str] = () if selection.allow else list(selection.deny)
        # What does not fit into the call's filter is left out afterwards.
        sent, rest = deny[: limits.FILTER_IDS], deny[limits.FILTER_IDS :]
        k = min(limits.K, max(served.version.config.candidates, selection.k) + len(rest))
        hits = await self._retrieval.search(
            VectorSearch(served.items.collection, reading.query, k, selection.allow or (), sent)
        )
        timings.search_us = hits.search_us
        _add(served, hits, selection, prediction)
        return selection.wanted <= 0 or len(hits.ids) < k

    async def _missing(
        self, query: Query, served: ServedModel | None, prediction: pb.Prediction
    ) -> None:
        """Names the ids of the query that do not exist, as far as is known."""
        named = dict.fromkeys(query.allow if query.rank is None else query.rank)
        named.update(dict.fromkeys(event.item_id for event in query.history if event.item_id))
        if named:
            existing = set(await self._fallback.existing(list(named), served))
            prediction.missing_ids.extend(i for i in named if i not in existing)


def _add(served: ServedModel, hits: Hits, selection: Selection, prediction: pb.Prediction) -> None:
    """Adds the best of a search, with probabilities over all that it found."""
    # Denied ids that were too many for the filter do not belong to the candidates.
    keep = np.array([item_id not in selection.deny for item_id in hits.ids], np.bool_)
    scores = hits.scores[keep]
    ids = [item_id for item_id, kept in zip(hits.ids, keep, strict=True) if kept]
    prediction.candidates = len(ids)
    probabilities = served.version.item_probabilities(scores)
    best = selection.k
    for item_id, score, probability in zip(
        ids[:best], scores[:best].tolist(), probabilities[:best].tolist(), strict=True
    ):
        selection.add(item_id, score, pb.METHOD_MODEL, probability)


def _fallback_reason(served: ServedModel | None, reading: Reading) -> pb.FallbackReason.ValueType:
    """Why the model cannot make the items, known before it is asked."""
    if not reading.history:
        return pb.FALLBACK_REASON_NO_HISTORY
    if served is None:
        return pb.FALLBACK_REASON_NO_MODEL
    if served.items is None:
        return pb.FALLBACK_REASON_NO_ITEM_HEAD
    return pb.FALLBACK_REASON_UNSPECIFIED


def _repeats_excluded(query: Query, served: ServedModel | None) -> bool:
    """Whether the user's own items are left out.

    A Rank orders the items that its caller names, so a model's default does not reduce them.
    """
    if query.repeats == pb.REPEATS_UNSPECIFIED and query.rank is None and served is not None:
        return served.version.config.repeats == "excluded"
    return query.repeats == pb.REPEATS_EXCLUDED


def _allowed(query: Query) -> Sequence[str] | None:
    """The only items that may be answered; None: all."""
    if query.rank is None:
        return query.allow or None
    if not query.allow:
        return query.rank
    allow = set(query.allow)
    return [item_id for item_id in query.rank if item_id in allow]


def _shortfall(
    query: Query, selection: Selection, prediction: pb.Prediction
) -> pb.ShortfallReason.ValueType:
    """Why there are fewer items than k."""
    short = selection.wanted
    if query.rank is not None and query.k is None:  # all that exist are all
        short -= len(set(query.rank) & set(prediction.missing_ids))
    if short <= 0:
        return pb.SHORTFALL_REASON_UNSPECIFIED
    if selection.allow is not None or selection.deny:
        return pb.SHORTFALL_REASON_FILTERED
    return pb.SHORTFALL_REASON_CATALOGUE_EXHAUSTED


@contextlib.asynccontextmanager
async def _before(deadline: float | None) -> AsyncIterator[None]:
    """Ends a block so early that an answer without it is still in time.

    Raises:
        UnavailableError: it was ended.
    """
    if deadline is None:
        yield
        return
    now = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(now + (deadline - now) * (1 - RESERVE_SHARE)):
            yield
    except TimeoutError:
        raise UnavailableError("the deadline is near", reason="DEADLINE_NEAR") from None
