"""Between the messages of the contract and the client's types: the only place that knows both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from foretell import checks, errors, limits, types
from foretell.common.v1 import common_pb2
from foretell.conditions import AllOf, AnyOf, Condition, Exists, NoneOf, OneOf, Range
from foretell.embedder.v1 import embedder_service_pb2 as epb
from foretell.predictor.v1 import event_service_pb2, model_service_pb2, prediction_service_pb2
from foretell.vectors import Vectors, from_block

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)

_KINDS: Final = {
    epb.COLLECTION_KIND_TEXT: types.CollectionKind.TEXT,
    epb.COLLECTION_KIND_VECTOR: types.CollectionKind.VECTOR,
    epb.COLLECTION_KIND_DERIVED: types.CollectionKind.DERIVED,
}
_REPEATS: Final = {
    prediction_service_pb2.REPEATS_ALLOWED: types.Repeats.ALLOWED,
    prediction_service_pb2.REPEATS_EXCLUDED: types.Repeats.EXCLUDED,
}
_REPEATS_TO_PROTO: Final = {value: key for key, value in _REPEATS.items()}
_METHODS: Final = {
    prediction_service_pb2.METHOD_MODEL: types.Method.MODEL,
    prediction_service_pb2.METHOD_CONTENT: types.Method.CONTENT,
    prediction_service_pb2.METHOD_PERSONAL_FREQUENCY: types.Method.PERSONAL_FREQUENCY,
    prediction_service_pb2.METHOD_POPULAR: types.Method.POPULAR,
}
_FALLBACKS: Final = {
    prediction_service_pb2.FALLBACK_REASON_UNSPECIFIED: None,
    prediction_service_pb2.FALLBACK_REASON_NO_MODEL: types.FallbackReason.NO_MODEL,
    prediction_service_pb2.FALLBACK_REASON_NO_HISTORY: types.FallbackReason.NO_HISTORY,
    prediction_service_pb2.FALLBACK_REASON_NO_ITEM_HEAD: types.FallbackReason.NO_ITEM_HEAD,
    prediction_service_pb2.FALLBACK_REASON_EMBEDDER_UNAVAILABLE: (
        types.FallbackReason.EMBEDDER_UNAVAILABLE
    ),
}
_SHORTFALLS: Final = {
    prediction_service_pb2.SHORTFALL_REASON_UNSPECIFIED: None,
    prediction_service_pb2.SHORTFALL_REASON_CATALOGUE_EXHAUSTED: (
        types.ShortfallReason.CATALOGUE_EXHAUSTED
    ),
    prediction_service_pb2.SHORTFALL_REASON_FILTERED: types.ShortfallReason.FILTERED,
}


# --- Shared ---------------------------------------------------------------------------------------


def failures_from_proto(
    messages: Iterable[common_pb2.ElementFailure], offset: int = 0
) -> tuple[types.Failure, ...]:
    """Failed elements; `offset` is added to their positions."""
    return tuple(
        types.Failure(message.index + offset, errors.from_status(message.status))
        for message in messages
    )


def strings(values: Sequence[str], field: str) -> Sequence[str]:
    """The values, unless they are one string, which Python would take for its letters.

    Raises:
        InvalidArgumentError: they are one string.
    """
    if isinstance(values, str):
        raise errors.InvalidArgumentError(
            f"{field} is one string; give a list of them", reason="NO_LIST", field=field
        )
    return values


def timings_from_proto(message: common_pb2.Timings) -> types.Timings:
    """Where the time went."""
    return types.Timings(
        message.total_us,
        message.queue_us,
        message.tokenize_us,
        message.forward_us,
        message.search_us,
    )


def timestamp_to_proto(timestamp: datetime) -> Timestamp:
    """A time with a zone, exact to the microsecond.

    Raises:
        ValueError: the time has no zone, so that nobody can know which moment it is.
    """
    if timestamp.tzinfo is None:
        raise ValueError(
            f"timestamp {timestamp.isoformat()} has no time zone; for UTC, give tzinfo=UTC"
        )
    seconds, rest = divmod(timestamp - _EPOCH, _SECOND)
    return Timestamp(seconds=seconds, nanos=rest.microseconds * 1000)


def timestamp_from_proto(message: Timestamp) -> datetime:
    """The time in UTC, to the microsecond."""
    return _EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def _cannot_be_sent(field: str, error: ValueError) -> errors.InvalidArgumentError:
    return errors.InvalidArgumentError(f"{field} cannot be sent: {error}", field=field)


def _vectors_or_none(
    message: epb.GetItemsResponse | epb.SearchResult, wanted: bool
) -> Vectors | None:
    return from_block(message.vectors) if wanted and message.HasField("vectors") else None


# --- Embedder -------------------------------------------------------------------------------------


def items_to_proto(items: Iterable[types.Item]) -> Iterator[epb.Item]:
    """Items of the contract.

    Raises:
        InvalidArgumentError: an item that no message can hold; it is named by position.
    """
    for index, item in enumerate(items):
        try:
            message = epb.Item(id=item.id, text=item.text, attributes=item.attributes)
        except ValueError as error:
            raise _cannot_be_sent(f"items[{index}]", error) from error
        yield message


def item_from_proto(message: epb.Item) -> types.Item:
    """An item of the client."""
    return types.Item(message.id, message.text, dict(message.attributes))


def embed_from_proto(message: epb.EmbedResponse) -> types.EmbedResult:
    """Vectors of texts."""
    return types.EmbedResult(
        from_block(message.vectors),
        failures_from_proto(message.failures),
        timings_from_proto(message.timings),
    )


def upsert_from_proto(message: epb.UpsertItemsResponse) -> types.UpsertResult:
    """The outcome of writing items."""
    return types.UpsertResult(
        message.upserted,
        message.encoded,
        failures_from_proto(message.failures),
        message.seq,
        timings_from_proto(message.timings),
    )


def put_from_proto(message: epb.PutVectorsResponse) -> types.PutResult:
    """The outcome of writing vectors."""
    return types.PutResult(message.written, failures_from_proto(message.failures), message.seq)


def delete_from_proto(message: epb.DeleteItemsResponse) -> types.DeleteResult:
    """The outcome of deleting items."""
    return types.DeleteResult(message.deleted, tuple(message.missing_ids), message.seq)


def items_from_proto(message: epb.GetItemsResponse, include_vectors: bool) -> types.ItemsResult:
    """Items by id."""
    return types.ItemsResult(
        tuple(item_from_proto(item) for item in message.items),
        _vectors_or_none(message, include_vectors),
        tuple(message.missing_ids),
    )


def filters_to_proto(
    filters: types.Filter | Sequence[types.Filter], where: Condition | None
) -> list[epb.QueryFilter]:
    """What the queries may answer; `where` holds for all of them.

    Raises:
        InvalidArgumentError: a condition is nested too deep to be sent.
    """
    if isinstance(filters, types.Filter):
        filters = [filters]
    if where is not None:
        filters = filters or [types.Filter()]
    return [_filter_to_proto(one, where) for one in filters]


def _filter_to_proto(query_filter: types.Filter, where: Condition | None) -> epb.QueryFilter:
    condition = query_filter.where
    if condition is None:
        condition = where
    elif where is not None:
        condition = where & condition
    return epb.QueryFilter(
        allow_ids=strings(query_filter.allow_ids, "allow_ids"),
        deny_ids=strings(query_filter.deny_ids, "deny_ids"),
        condition=None if condition is None else _condition_to_proto(condition),
    )


def _condition_to_proto(condition: Condition, depth: int = 1) -> epb.Condition:
    if depth > limits.CONDITION_DEPTH:
        raise checks.condition_too_deep("where")

    def parts(conditions: Iterable[Condition]) -> epb.Conditions:
        return epb.Conditions(
            conditions=[_condition_to_proto(each, depth + 1) for each in conditions]
        )

    match condition:
        case OneOf(key, values):
            return epb.Condition(one_of=epb.AttributeValues(key=key, values=values))
        case Range(key, gte, gt, lte, lt):
            named = {"gte": gte, "gt": gt, "lte": lte, "lt": lt}
            bounds = {name: bound for name, bound in named.items() if bound is not None}
            return epb.Condition(range=epb.AttributeRange(key=key, **bounds))
        case Exists(key):
            return epb.Condition(exists=key)
        case AllOf(conditions):
            return epb.Condition(all_of=parts(conditions))
        case AnyOf(conditions):
            return epb.Condition(any_of=parts(conditions))
        case NoneOf(conditions):
            return epb.Condition(none_of=parts(conditions))
    raise TypeError(f"where is a {type(condition).__name__}; attribute() makes conditions")


def search_from_proto(message: epb.SearchResponse, include_vectors: bool) -> types.SearchResult:
    """Hits of every query."""
    hits = tuple(
        types.SearchHits(
            tuple(result.ids),
            np.frombuffer(result.scores, dtype="<f4").astype(np.float32, copy=False),
            _vectors_or_none(result, include_vectors),
        )
        for result in message.results
    )
    return types.SearchResult(
        hits,
        failures_from_proto(message.failures),
        tuple(message.missing_ids),
        timings_from_proto(message.timings),
    )


def collection_from_proto(message: epb.Collection) -> types.Collection:
    """A collection as it stands."""
    return types.Collection(
        message.name,
        _KINDS.get(message.kind, types.CollectionKind.UNKNOWN),
        message.source,
        message.cols,
        message.items,
        message.seq,
        message.index,
    )


def changes_from_proto(message: epb.WatchItemsResponse) -> types.ItemChanges:
    """Changes of a collection."""
    return types.ItemChanges(
        tuple(message.ids),
        from_block(message.vectors)
        if message.HasField("vectors")
        else np.zeros((0, 0), np.float32),
        tuple(message.deleted_ids),
        message.seq,
        message.caught_up,
    )


def embedder_info_from_proto(message: epb.GetInfoResponse) -> types.EmbedderInfo:
    """What runs as the embedder."""
    return types.EmbedderInfo(
        version=message.version,
        encoder=message.encoder,
        pooling=message.pooling,
        cols=message.cols,
        max_tokens=message.max_tokens,
        device=message.device,
        libraries=dict(message.libraries),
        has_store=message.has_store,
        texts_encoded=message.texts_encoded,
        texts_cached=message.texts_cached,
        path=message.path,
        agreement_cosine=message.agreement_cosine,
        agreement_recall_at_10=message.agreement_recall_at_10,
    )


# --- Predictor ------------------------------------------------------------------------------------


def events_to_proto(
    events: Iterable[types.Event], field: str = "events"
) -> Iterator[event_service_pb2.Event]:
    """Events of the contract; `field` is what the request calls them.

    Raises:
        InvalidArgumentError: an event that no message can hold, or whose timestamp has no zone;
            it is named by position.
    """
    for index, event in enumerate(events):
        try:
            message = event_service_pb2.Event(
                user_id=event.user_id,
                behavior_type=event.behavior_type,
                item_id=event.item_id,
                text=event.text,
                event_id=event.event_id,
                attributes=event.attributes,
            )
            if event.timestamp is not None:
                message.timestamp.CopyFrom(timestamp_to_proto(event.timestamp))
        except ValueError as error:
            raise _cannot_be_sent(f"{field}[{index}]", error) from error
        yield message


def event_from_proto(message: event_service_pb2.Event) -> types.Event:
    """An event of the client."""
    timestamp = timestamp_from_proto(message.timestamp) if message.HasField("timestamp") else None
    return types.Event(
        message.user_id,
        message.behavior_type,
        timestamp,
        message.item_id,
        message.text,
        message.event_id,
        dict(message.attributes),
    )


def ingest_from_proto(message: event_service_pb2.IngestEventsResponse) -> types.IngestResult:
    """The outcome of storing events."""
    return types.IngestResult(
        message.accepted, message.duplicates, failures_from_proto(message.failures)
    )


def query_to_proto(query: types.PredictionQuery) -> prediction_service_pb2.PredictionQuery:
    """A query of the contract.

    Raises:
        InvalidArgumentError: an event of the history as in `events_to_proto`.
    """
    message = prediction_service_pb2.PredictionQuery(
        user_id=query.user_id,
        history=events_to_proto(query.history, "history"),
        allow_item_ids=strings(query.allow_item_ids, "allow_item_ids"),
        deny_item_ids=strings(query.deny_item_ids, "deny_item_ids"),
    )
    if query.k is not None:
        message.k = query.k
    if query.repeats is not None:
        message.repeats = _REPEATS_TO_PROTO[query.repeats]
    return message


def prediction_from_proto(
    message: prediction_service_pb2.Prediction, timings: common_pb2.Timings
) -> types.Prediction:
    """What a user is likely to do next."""
    return types.Prediction(
        behavior_types=_behavior_types(message.behavior_types),
        items=tuple(
            types.ScoredItem(
                item.item_id,
                item.interest_score,
                item.probability,
                _METHODS.get(item.method, types.Method.UNKNOWN),
                _behavior_types(item.behavior_types),
            )
            for item in message.items
        ),
        model_version=message.model_version,
        fallback_reason=_FALLBACKS.get(message.fallback_reason, types.FallbackReason.UNKNOWN),
        shortfall_reason=_SHORTFALLS.get(message.shortfall_reason, types.ShortfallReason.UNKNOWN),
        candidates=message.candidates,
        missing_ids=tuple(message.missing_ids),
        pending_texts=message.pending_texts,
        history_events=message.history_events,
        predicted_behavior_type=message.predicted_behavior_type,
        expected_gap_s=message.expected_gap_s or None,
        timings=timings_from_proto(timings),
    )


def _behavior_types(
    entries: Iterable[prediction_service_pb2.BehaviorTypeProbability],
) -> tuple[types.BehaviorTypeProbability, ...]:
    return tuple(
        types.BehaviorTypeProbability(entry.behavior_type, entry.probability) for entry in entries
    )


def predictions_from_proto(
    message: prediction_service_pb2.PredictManyResponse,
) -> types.PredictManyResult:
    """Predictions for many queries."""
    return types.PredictManyResult(
        tuple(prediction_from_proto(entry, message.timings) for entry in message.predictions),
        failures_from_proto(message.failures),
        timings_from_proto(message.timings),
    )


def model_from_proto(message: model_service_pb2.Model) -> types.Model:
    """A trained version."""
    return types.Model(
        version=message.version,
        model_type=message.model_type,
        active=message.active,
        registered_at=timestamp_from_proto(message.registered_at),
        behavior_types=tuple(message.behavior_types),
        items=message.items,
        repeats=_REPEATS.get(message.repeats),
        metrics=dict(message.metrics),
        parts=tuple(message.parts),
    )


def predictor_info_from_proto(message: model_service_pb2.GetInfoResponse) -> types.PredictorInfo:
    """What runs as the predictor."""
    return types.PredictorInfo(
        version=message.version,
        model_version=message.model_version,
        events=message.events,
        users=message.users,
        pending_texts=message.pending_texts,
        embedder_address=message.embedder_address,
        embedder_available=message.embedder_available,
        items=message.items,
        libraries=dict(message.libraries),
    )
