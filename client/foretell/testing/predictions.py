"""PredictionService in memory: answers by rules that a person can work out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from foretell import checks, limits
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.predictor.v1 import prediction_service_pb2_grpc as pb_grpc
from foretell.testing.collections import Collection as VectorCollection
from foretell.testing.collections import Row
from foretell.testing.embedder import FakeEmbedder
from foretell.testing.events import FakeEvents
from foretell.testing.models import FakeModels
from foretell.texts import text_id

CONTENT_EVENTS: Final = 3
"""Latest events with an item or a text from which a content answer starts."""

CANDIDATES: Final = 200
"""Best items over which a model's item probabilities sum to 1."""

Scores = Mapping[str, float]
"""Item id to interest score."""

Stage = tuple[pb.Method.ValueType, Callable[[], Scores]]
"""A method and what it finds."""


@dataclass(frozen=True)
class _Asked:
    """A query, read."""

    history: Sequence[event_pb.Event]
    """Oldest first."""
    k: int
    eligible: Collection[str]
    """Items that may be answered."""
    filtered: bool
    """Whether some may not."""
    missing: Sequence[str]
    """Items named that do not exist."""
    absent: int
    """Items of a Rank that do not exist, and so are none too few."""


class FakePredictions(pb_grpc.PredictionServiceServicer):
    """PredictionService as its contract says.

    Behavior types: the user's counts, and one event's worth of everybody's shares. Items of a
    model: the inner product with the mean of the history's vectors, in its collection.
    """

    def __init__(self, embedder: FakeEmbedder, events: FakeEvents, models: FakeModels) -> None:
        self._embedder = embedder
        self._events = events
        self._models = models

    def Predict(self, request: pb.PredictRequest, context: object) -> pb.PredictResponse:
        """Predicts for one user."""
        checks.prediction_query(request.query)
        return pb.PredictResponse(prediction=self._answer(request.query))

    def PredictMany(
        self, request: pb.PredictManyRequest, context: object
    ) -> pb.PredictManyResponse:
        """Predicts for many users."""
        checks.count(len(request.queries), "queries", limits.QUERIES)
        good, failures = checks.split(
            request.queries,
            lambda query, index: checks.prediction_query(query, f"queries[{index}]"),
        )
        predictions = [pb.Prediction() for _ in request.queries]
        for index in good:
            predictions[index] = self._answer(request.queries[index])
        return pb.PredictManyResponse(predictions=predictions, failures=failures)

    def Rank(self, request: pb.RankRequest, context: object) -> pb.RankResponse:
        """Orders the caller's items for a user."""
        checks.ids(request.item_ids, "item_ids", limits.RANK_ITEMS)
        checks.prediction_query(request.query)
        return pb.RankResponse(prediction=self._answer(request.query, request.item_ids))

    def _answer(
        self, query: pb.PredictionQuery, rank: Sequence[str] | None = None
    ) -> pb.Prediction:
        asked = self._read(query, rank)
        model = self._models.active
        reason = self._fallback_reason(model, asked.history)
        types = self._types(model, asked.history)
        prediction = pb.Prediction(
            behavior_types=types,
            predicted_behavior_type=types[0].behavior_type if types else "",
            model_version=model.version if model else "",
            fallback_reason=reason,
            missing_ids=asked.missing,
            history_events=len(asked.history),
        )
        chosen: set[str] = set()
        for method, find in self._stages(reason, asked.history):
            scores = find()
            open_ids = (scores.keys() & asked.eligible) - chosen
            best = sorted(open_ids, key=lambda item_id: (-scores[item_id], item_id))
            probabilities: Sequence[float] = [0.0] * len(best)
            if method == pb.METHOD_MODEL:
                best = best[:CANDIDATES]
                probabilities = _softmax([scores[item_id] for item_id in best])
                prediction.candidates = len(best)
            room = asked.k - len(prediction.items)
            for item_id, probability in list(zip(best, probabilities, strict=True))[:room]:
                chosen.add(item_id)
                prediction.items.add(
                    item_id=item_id,
                    interest_score=scores[item_id],
                    probability=probability,
                    method=method,
                    behavior_types=types if model and rank is not None else (),
                )
        if len(prediction.items) < asked.k - asked.absent:
            prediction.shortfall_reason = (
                pb.SHORTFALL_REASON_FILTERED
                if asked.filtered
                else pb.SHORTFALL_REASON_CATALOGUE_EXHAUSTED
            )
        return prediction

    def _read(self, query: pb.PredictionQuery, rank: Sequence[str] | None) -> _Asked:
        history = self._events.history(query.user_id)
        own = {event.item_id for event in (*history, *query.history)}
        history = [*history, *query.history]
        known = self._embedder.collections["items"].items
        denied = set(query.deny_item_ids)
        if self._excluded(query.repeats, rank):
            denied |= own - {""}
        allowed = set(query.allow_item_ids)
        if rank is not None:
            allowed = allowed & set(rank) if allowed else set(rank)
        restricted = bool(query.allow_item_ids) or rank is not None
        named = [*(query.allow_item_ids if rank is None else rank)]
        inline = [event.item_id for event in query.history if event.item_id]
        k = len(set(rank)) if rank is not None else limits.K_DEFAULT
        return _Asked(
            history,
            query.k if query.HasField("k") else k,
            {i for i in (allowed if restricted else known) if i in known and i not in denied},
            restricted or bool(denied),
            [item_id for item_id in dict.fromkeys([*named, *inline]) if item_id not in known],
            0 if rank is None or query.HasField("k") else len(set(rank) - known.keys()),
        )

    def _excluded(self, repeats: pb.Repeats.ValueType, rank: Sequence[str] | None) -> bool:
        """Whether the user's own items are left out; a Rank's are named by its caller."""
        if repeats == pb.REPEATS_UNSPECIFIED and rank is None and self._models.active:
            repeats = self._models.active.repeats
        return repeats == pb.REPEATS_EXCLUDED

    def _fallback_reason(
        self, model: model_pb.Model | None, history: Sequence[event_pb.Event]
    ) -> pb.FallbackReason.ValueType:
        if not history:
            return pb.FALLBACK_REASON_NO_HISTORY
        if model is None:
            return pb.FALLBACK_REASON_NO_MODEL
        if not model.items:
            return pb.FALLBACK_REASON_NO_ITEM_HEAD
        if not self._models.embedder_available:
            return pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
        return pb.FALLBACK_REASON_UNSPECIFIED

    def _types(
        self, model: model_pb.Model | None, history: Sequence[event_pb.Event]
    ) -> list[pb.BehaviorTypeProbability]:
        """Probabilities of the next behavior type, most probable first."""
        everybody = self._events.types
        names = list(model.behavior_types if model else everybody)
        total = sum(everybody[name] for name in names)
        own = Counter(event.behavior_type for event in history)
        weights = {
            name: own[name] + (everybody[name] / total if total else 1 / len(names))
            for name in names
        }
        return [
            pb.BehaviorTypeProbability(
                behavior_type=name, probability=weights[name] / sum(weights.values())
            )
            for name in sorted(names, key=lambda name: (-weights[name], name))
        ]

    def _stages(
        self, reason: pb.FallbackReason.ValueType, history: Sequence[event_pb.Event]
    ) -> Iterator[Stage]:
        """The methods that may answer, in the order of fallback."""
        if not reason:
            yield pb.METHOD_MODEL, lambda: self._by_model(history)
        elif self._models.embedder_available:
            yield pb.METHOD_CONTENT, lambda: self._by_content(history)
        yield pb.METHOD_PERSONAL_FREQUENCY, lambda: _shares(_items(history), len(history))
        yield pb.METHOD_POPULAR, self._by_popularity

    def _by_model(self, history: Sequence[event_pb.Event]) -> Scores:
        items, behaviors = self._models.collection("items"), self._models.collection("behaviors")
        rows = [self._vector(event, items, behaviors) for event in history]
        found = [row for row in rows if row is not None]
        query = np.mean(found, axis=0) if found else np.zeros(items.cols, np.float32)
        return _products(items, query)

    def _by_content(self, history: Sequence[event_pb.Event]) -> Scores:
        """The largest cosine with any of the latest items or texts; not these items' own."""
        items = self._embedder.collections["items"]
        behaviors = self._embedder.collections["behaviors"]
        latest = [event for event in history if event.item_id or event.text][-CONTENT_EVENTS:]
        best: dict[str, float] = {}
        for event in latest:
            row = self._vector(event, items, behaviors)
            if row is not None:
                for item_id, score in _products(items, row).items():
                    best[item_id] = max(score, best.get(item_id, score))
        for event in latest:
            best.pop(event.item_id, None)
        return best

    def _by_popularity(self) -> Scores:
        known = dict.fromkeys(self._embedder.collections["items"].items, 0.0)
        return known | _shares(self._events.items, self._events.types.total())

    def _vector(
        self, event: event_pb.Event, items: VectorCollection, behaviors: VectorCollection
    ) -> Row | None:
        """The vector of an event's item, or of its text; None where it has neither."""
        if event.item_id in items.vectors:
            return items.vectors[event.item_id]
        if not event.text:
            return None
        known = behaviors.vectors.get(text_id(event.text))
        return self._embedder.vector(event.text) if known is None else known


def _items(history: Sequence[event_pb.Event]) -> Counter[str]:
    return Counter(event.item_id for event in history if event.item_id)


def _shares(counts: Counter[str], events: int) -> dict[str, float]:
    return {item_id: count / events for item_id, count in counts.items()}


def _products(collection: VectorCollection, query: Row) -> Scores:
    ids = list(collection.vectors)
    return dict(zip(ids, (collection.matrix(ids) @ query).tolist(), strict=True))


def _softmax(scores: Sequence[float]) -> list[float]:
    if not scores:
        return []
    weights = np.exp(np.array(scores) - max(scores))
    probabilities: list[float] = (weights / weights.sum()).tolist()
    return probabilities
