"""What a user will do next: the model where it can answer, the fallbacks where it cannot."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.errors import DeadlineExceededError, ForetellError, UnavailableError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.vectors import Vectors, from_block
from predictor.activation import Models, ServedModel
from predictor.batching import Batcher
from predictor.events import EventStore, PastEvent
from predictor.fallback import Fallback, PopularItems
from predictor.models.version import Version
from predictor.patience import Patience
from predictor.ranking import Ranked, RankRequest, item_types, rank_batch
from predictor.reading import Reading, Request, read_batch
from predictor.retrieval import Retrieval, VectorSearch
from predictor.selection import Selection
from serving import tracing
from serving.metrics import Observe, unobserved

log = logging.getLogger(__name__)

NOTHING = np.zeros(0, np.float32)


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


@dataclass(frozen=True, slots=True)
class _Answering:
    """One query on its way to its answer."""

    query: Query
    served: ServedModel | None
    reading: Reading
    prediction: pb.Prediction
    timings: common_pb2.Timings
    patience: Patience


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
        self._ranker: Batcher[RankRequest, Ranked] = Batcher(self._rank, limits.QUERIES)
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
        served, patience = self._models.served, Patience(deadline)
        text_vectors = await self._inline_vectors(served, query, patience)
        submitted = time.perf_counter_ns()
        with tracing.span("read and forward"):
            reading = await self._reader.submit(
                Request(
                    served,
                    query.user_id,
                    query.history,
                    text_vectors,
                    _repeats_excluded(query, served),
                    self._history_events,
                )
            )
        waited_us = (time.perf_counter_ns() - submitted) // 1_000 - reading.worked_us
        timings = common_pb2.Timings(queue_us=max(0, waited_us), forward_us=reading.forward_us)
        prediction = pb.Prediction(
            behavior_types=[
                pb.BehaviorTypeProbability(behavior_type=name, probability=probability)
                for name, probability in reading.types
            ],
            model_version=served.name if served else "",
            fallback_reason=_fallback_reason(served, reading),
            pending_texts=reading.pending_texts,
            history_events=len(reading.history),
            predicted_behavior_type=reading.predicted_type,
            expected_gap_s=reading.expected_gap_s,
        )
        answering = _Answering(query, served, reading, prediction, timings, patience)
        await self._items(answering)
        self.answered[prediction.fallback_reason] += 1
        timings.total_us = (time.perf_counter_ns() - begin) // 1_000
        return prediction, timings

    def close(self) -> None:
        """Ends the worker thread."""
        self._worker.shutdown()

    async def _read(self, requests: Sequence[Request]) -> list[Reading | ForetellError]:
        loop = asyncio.get_running_loop()
        work = partial(read_batch, self._store, requests)
        readings = await loop.run_in_executor(self._worker, work)
        forward_us = max(reading.forward_us for reading in readings)
        if forward_us:  # there is a model
            self._observe(forward_us / 1e6, len(readings))
        return list(readings)

    async def _rank(self, requests: Sequence[RankRequest]) -> list[Ranked | ForetellError]:
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._worker, partial(rank_batch, requests)))

    async def _inline_vectors(
        self, served: ServedModel | None, query: Query, patience: Patience
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
            async with patience.waiting():
                answer = await self._retrieval.embed(list(unknown.values()), texts.collection)
        except ForetellError:
            return {}  # they count as pending
        vectors = from_block(answer.vectors)
        failed = {failure.index for failure in answer.failures}
        return {text_id: vectors[at] for at, text_id in enumerate(unknown) if at not in failed}

    async def _items(self, answering: _Answering) -> None:
        """Puts the items into the prediction: the model's if it can, else the fallbacks'."""
        query, prediction = answering.query, answering.prediction
        fallback = Fallback(self._popular, self._retrieval, answering.served, answering.patience)
        selection = Selection(
            query.k or (limits.K_DEFAULT if query.rank is None else len(set(query.rank))),
            _allowed(query),
            answering.reading.own_items.union(query.deny),
        )
        complete = False
        if prediction.fallback_reason:
            await fallback.content(selection, answering.reading.history)
        else:
            try:
                async with answering.patience.waiting():
                    complete = await self._search(answering, selection)
            except ForetellError as error:
                _note(error)
                prediction.fallback_reason = pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
        if not complete:
            await fallback.personal(selection, query.user_id, query.history)
            await fallback.popular(selection)
        prediction.items.extend(selection.items)
        if query.rank is not None:
            await self._item_types(answering)
        prediction.missing_ids.extend(await _missing(query, fallback))
        prediction.shortfall_reason = _shortfall(query, selection, prediction)

    async def _item_types(self, answering: _Answering) -> None:
        """Adds to each item what the user would do with it, if the version has learned that."""
        served, items = answering.served, answering.prediction.items
        if served is None or served.version.item_type_model is None or not items:
            return
        loop = asyncio.get_running_loop()
        ids = [item.item_id for item in items]
        work = partial(item_types, served, answering.reading.history, ids)
        probabilities = await loop.run_in_executor(self._worker, work)
        names = served.version.config.behavior_types
        for item, row in zip(items, probabilities, strict=True):
            for at in np.argsort(-row, kind="stable").tolist():
                item.behavior_types.add(behavior_type=names[at], probability=float(row[at]))

    async def _search(self, answering: _Answering, selection: Selection) -> bool:
        """Adds the model's items; whether there are no others that may be answered.

        Raises:
            ForetellError: the embedder does not answer.
        """
        served, reading = answering.served, answering.reading
        assert served is not None
        assert served.items is not None
        assert reading.query is not None
        if selection.allow == []:
            return True
        if selection.allow is None and not served.asked_for(selection.k):
            found = await self._ranked(answering, served, selection, Ranked([], NOTHING))
            return self._added(answering, selection, found)
        deny: Sequence[str] = () if selection.allow else list(selection.deny)
        # What does not fit into the call's filter is left out afterwards.
        sent, rest = deny[: limits.FILTER_IDS], deny[limits.FILTER_IDS :]
        k = min(limits.K, max(served.asked_for(selection.k), selection.k) + len(rest))
        with tracing.span("search"):
            hits = await self._retrieval.search(
                VectorSearch(served.items.collection, reading.query, k, selection.allow or (), sent)
            )
        answering.timings.search_us = hits.search_us
        found = Ranked(hits.ids, hits.scores)
        if rest:  # denied ids that were too many for the filter do not belong to the candidates
            keep = np.array([item_id not in selection.deny for item_id in hits.ids], np.bool_)
            found = Ranked(list(itertools.compress(hits.ids, keep)), hits.scores[keep])
        if served.version.ranker is not None:
            found = await self._ranked(answering, served, selection, found)
        return self._added(answering, selection, found) or len(hits.ids) < k

    def _added(self, answering: _Answering, selection: Selection, found: Ranked) -> bool:
        """Adds the candidates to the answer; whether they are enough."""
        assert answering.served is not None
        _add(answering.served.version, found, selection)
        answering.prediction.candidates = len(found.ids)
        return selection.wanted <= 0

    async def _ranked(
        self, answering: _Answering, served: ServedModel, selection: Selection, found: Ranked
    ) -> Ranked:
        """The second stage: what Search found, and what the ranker adds, in its order."""
        begin = time.perf_counter_ns()
        assert answering.reading.query is not None
        with tracing.span("rank"):
            ranked = await self._ranker.submit(
                RankRequest(
                    served,
                    answering.reading.history,
                    answering.reading.query,
                    dict(zip(found.ids, found.scores.tolist(), strict=True)),
                    selection.allow is None,
                    not _repeats_excluded(answering.query, served),
                    selection.deny,
                )
            )
        answering.timings.forward_us += (time.perf_counter_ns() - begin) // 1_000
        return ranked


async def _missing(query: Query, fallback: Fallback) -> list[str]:
    """The ids that the query names and that do not exist, as far as is known."""
    named = dict.fromkeys(query.allow if query.rank is None else query.rank)
    named.update(dict.fromkeys(event.item_id for event in query.history if event.item_id))
    if not named:
        return []
    existing = set(await fallback.existing(list(named)))
    return [item_id for item_id in named if item_id not in existing]


def _note(error: ForetellError) -> None:
    """Logs what is not the embedder's mere absence, which is logged once where it is found."""
    if not isinstance(error, UnavailableError | DeadlineExceededError):
        log.warning("the search for items failed: %s", error.message)


def _add(version: Version, found: Ranked, selection: Selection) -> None:
    """Adds the best of the candidates, with probabilities over all of them."""
    best = found.scores[: selection.k]
    probabilities = version.item_probabilities(best, found.scores)
    for item_id, score, probability in zip(
        found.ids[: selection.k], best.tolist(), probabilities.tolist(), strict=True
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
