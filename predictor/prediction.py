"""What a user will do next: the model where it can answer, the fallbacks where it cannot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.errors import DeadlineExceededError, ForetellError, UnavailableError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.vectors import Vectors, from_block
from predictor.activation import Models, ServedModel
from predictor.batching import Batcher
from predictor.events import EventStore, History
from predictor.fallback import Fallback, PopularItems
from predictor.finding import Finder, Wanted
from predictor.patience import Patience
from predictor.ranking import item_types
from predictor.reading import Reading, Request, read_batch
from predictor.retrieval import Retrieval
from predictor.selection import Selection
from serving import tracing
from serving.metrics import Observe, unobserved

log = logging.getLogger(__name__)

NO_HISTORY = History()

_WITHOUT_MODEL = {
    pb.FALLBACK_REASON_NO_HISTORY,
    pb.FALLBACK_REASON_NO_MODEL,
    pb.FALLBACK_REASON_NO_ITEM_HEAD,
}
"""Reasons for which the embedder is asked for similar items."""


@dataclass(frozen=True, slots=True)
class Query:
    """Whose next behavior, and which items may be answered."""

    user_id: str = ""
    history: History = NO_HISTORY
    """Follows the stored events."""
    k: int | None = None
    """None: the default; all where `rank` is given."""
    allow: Sequence[str] = ()
    """Only these, if not empty."""
    deny: Sequence[str] = ()
    repeats: pb.Repeats.ValueType = pb.REPEATS_UNSPECIFIED
    rank: Sequence[str] | None = None
    """The items to order, of a Rank."""


@dataclass(slots=True)
class _Answering:
    """One query on its way to its answer."""

    query: Query
    reading: Reading
    prediction: pb.Prediction
    selection: Selection
    complete: bool = False
    """Whether there are no other items to add."""


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
        observe: Observe = unobserved,
    ) -> None:
        self.answered: Counter[pb.FallbackReason.ValueType] = Counter()
        """Answers by why the model did not make their items."""
        self._observe = observe
        self._store = store
        self._models = models
        self._retrieval = retrieval
        self._history_events = history_events
        self._popular = PopularItems(store)
        self._worker = ThreadPoolExecutor(1, "sequence model")
        self._reader: Batcher[Request, Reading] = Batcher(self._read, limits.QUERIES)
        self._finder = Finder(retrieval, self._worker)

    async def predict(
        self, queries: Sequence[Query], into: Sequence[pb.Prediction], deadline: float | None
    ) -> common_pb2.Timings:
        """The next behavior types and items of some users.

        Args:
            queries: checked ones; at most limits.QUERIES.
            into: an empty message for each, which is filled.
            deadline: of the event loop's clock, until when an answer is of use; None: any time.
        """
        begin = time.perf_counter_ns()
        served, patience = self._models.served, Patience(deadline)
        requests = await self._requests(queries, served, patience)
        submitted = time.perf_counter_ns()
        with tracing.span("read and forward"):
            readings = await self._reader.submit(requests)
        waited_us = (time.perf_counter_ns() - submitted) // 1_000
        timings = common_pb2.Timings()
        for reading in readings:  # of one batch
            timings.queue_us = max(0, waited_us - reading.worked_us)
            timings.forward_us = reading.forward_us
        answering = [
            _answering(query, served, reading, prediction)
            for query, reading, prediction in zip(queries, readings, into, strict=True)
        ]
        await self._find(served, answering, patience, timings)
        await self._complete(served, answering, patience)
        self.answered.update(prediction.fallback_reason for prediction in into)
        timings.total_us = (time.perf_counter_ns() - begin) // 1_000
        return timings

    def close(self) -> None:
        """Ends the worker thread."""
        self._worker.shutdown()

    async def _read(self, requests: Sequence[Request]) -> list[Reading]:
        work = partial(read_batch, self._store, requests)
        readings = await asyncio.get_running_loop().run_in_executor(self._worker, work)
        forward_us = max(reading.forward_us for reading in readings)
        if forward_us:  # there is a model
            self._observe(forward_us / 1e6, len(readings))
        return readings

    async def _requests(
        self, queries: Sequence[Query], served: ServedModel | None, patience: Patience
    ) -> list[Request]:
        """What to read for each query, with the vectors of its texts that no collection holds."""
        unknown = [_unknown_texts(query.history, served) for query in queries]
        vectors: Sequence[Mapping[str, Vectors]] = [{}] * len(queries)
        if served is not None and served.texts is not None and any(unknown):
            name = served.texts.collection
            vectors = await asyncio.gather(
                *(self._embedded(texts, name, patience) for texts in unknown)
            )
        return [
            Request(
                served,
                query.user_id,
                query.history,
                of_texts,
                _repeats_excluded(query, served),
                self._history_events,
            )
            for query, of_texts in zip(queries, vectors, strict=True)
        ]

    async def _embedded(
        self, texts: Mapping[str, str], collection: str, patience: Patience
    ) -> dict[str, Vectors]:
        """The vectors of texts, by text_id like these; the embedder may lack some."""
        if not texts:
            return {}
        try:
            async with patience.waiting():
                answer = await self._retrieval.embed(list(texts.values()), collection)
        except ForetellError:
            return {}  # they count as pending
        vectors = from_block(answer.vectors)
        failed = {failure.index for failure in answer.failures}
        return {text_id: vectors[at] for at, text_id in enumerate(texts) if at not in failed}

    async def _find(
        self,
        served: ServedModel | None,
        answering: Sequence[_Answering],
        patience: Patience,
        timings: common_pb2.Timings,
    ) -> None:
        """Adds the model's items to the answers that it can make."""
        asked: list[_Answering] = []
        wanted: list[Wanted] = []
        for one in answering:
            if one.prediction.fallback_reason or served is None or one.reading.query is None:
                continue
            if one.selection.allow == []:
                one.complete = True
                continue
            asked.append(one)
            wanted.append(
                Wanted(
                    served,
                    one.reading.query,
                    one.reading.history,
                    one.selection.k,
                    one.selection.allow,
                    one.selection.deny,
                    not _repeats_excluded(one.query, served),
                )
            )
        if not wanted:
            return
        try:
            async with patience.waiting():
                answers = await self._finder.find(wanted)
        except UnavailableError:  # the deadline is near
            for one in asked:
                one.prediction.fallback_reason = pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
            return
        for one, found in zip(asked, answers, strict=True):
            if found.error is not None:
                _note(found.error)
                one.prediction.fallback_reason = pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
                continue
            ids, scores = found.candidates
            best = len(found.probabilities)
            rows = zip(ids[:best], scores[:best].tolist(), found.probabilities, strict=True)
            for item_id, score, probability in rows:
                one.selection.add(item_id, score, pb.METHOD_MODEL, probability)
            one.prediction.candidates = len(scores)
            one.complete = one.selection.wanted <= 0 or found.exhausted
        timings.search_us = max(found.search_us for found in answers)
        timings.forward_us += max(found.rank_us for found in answers)

    async def _complete(
        self, served: ServedModel | None, answering: Sequence[_Answering], patience: Patience
    ) -> None:
        """Adds what the fallbacks have, and what is said of the items as a whole."""
        fallback = Fallback(self._popular, self._retrieval, served, patience)
        short = [one for one in answering if not one.complete]
        if short:
            await asyncio.gather(*(_fall_back(fallback, one) for one in short))
        named = [_named(one.query) for one in answering]
        existing = set(await fallback.existing(list(dict.fromkeys(chain.from_iterable(named)))))
        for one, ids in zip(answering, named, strict=True):
            if one.query.rank is not None:
                await self._item_types(served, one)
            one.prediction.missing_ids.extend(each for each in ids if each not in existing)
            one.prediction.shortfall_reason = _shortfall(one.query, one.selection, one.prediction)

    async def _item_types(self, served: ServedModel | None, one: _Answering) -> None:
        """Adds to each item what the user would do with it, if the version has learned that."""
        items = one.prediction.items
        if served is None or served.version.item_type_model is None or not items:
            return
        loop = asyncio.get_running_loop()
        ids = [item.item_id for item in items]
        work = partial(item_types, served, one.reading.history, ids)
        probabilities = await loop.run_in_executor(self._worker, work)
        names = served.version.config.behavior_types
        for item, row in zip(items, probabilities, strict=True):
            for at in np.argsort(-row, kind="stable").tolist():
                item.behavior_types.add(behavior_type=names[at], probability=float(row[at]))


def _unknown_texts(history: History, served: ServedModel | None) -> dict[str, str]:
    """text_id to text of events whose vector no collection holds."""
    if served is None or served.texts is None or not len(history):
        return {}
    items, texts = served.items, served.texts
    return {
        text_id: text
        for text_id, text, item_id in zip(
            history.text_ids, history.texts, history.item_ids, strict=True
        )
        if text_id and text_id not in texts and not (items is not None and item_id in items)
    }


def _answering(
    query: Query, served: ServedModel | None, reading: Reading, prediction: pb.Prediction
) -> _Answering:
    """Begins an answer with all but its items."""
    for name, probability in reading.types:
        prediction.behavior_types.add(behavior_type=name, probability=probability)
    prediction.model_version = served.name if served else ""
    prediction.fallback_reason = _fallback_reason(served, reading)
    prediction.pending_texts = reading.pending_texts
    prediction.history_events = len(reading.history)
    prediction.predicted_behavior_type = reading.predicted_type
    prediction.expected_gap_s = reading.expected_gap_s
    k = query.k or (limits.K_DEFAULT if query.rank is None else len(set(query.rank)))
    deny = reading.own_items.union(query.deny)
    return _Answering(
        query, reading, prediction, Selection(k, _allowed(query), deny, prediction.items)
    )


async def _fall_back(fallback: Fallback, one: _Answering) -> None:
    """Adds items without the model, until there are enough or no others."""
    query, selection = one.query, one.selection
    if one.prediction.fallback_reason in _WITHOUT_MODEL:
        await fallback.content(selection, one.reading.history)
    await fallback.personal(selection, query.user_id, query.history)
    await fallback.popular(selection)


def _named(query: Query) -> dict[str, None]:
    """The ids that the query names as existing, each once and in order."""
    named = dict.fromkeys(query.allow if query.rank is None else query.rank)
    named.update(dict.fromkeys(filter(None, query.history.item_ids)))
    return named


def _note(error: ForetellError) -> None:
    """Logs what is not the embedder's mere absence, which is logged once where it is found."""
    if not isinstance(error, UnavailableError | DeadlineExceededError):
        log.warning("the search for items failed: %s", error.message)


def _fallback_reason(served: ServedModel | None, reading: Reading) -> pb.FallbackReason.ValueType:
    """Why the model cannot make the items, known before it is asked."""
    if not len(reading.history):
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
