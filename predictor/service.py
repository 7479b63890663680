"""The three services: parse, call, answer."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Sequence
from importlib import metadata
from itertools import islice
from typing import Any, NamedTuple

import grpc
import torch

from foretell import checks, limits
from foretell.common.v1 import common_pb2
from foretell.errors import ForetellError
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import event_service_pb2_grpc as event_grpc
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import model_service_pb2_grpc as model_grpc
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.predictor.v1 import prediction_service_pb2_grpc as prediction_grpc
from foretell.texts import text_id
from predictor import ingestion, registry
from predictor.activation import Models
from predictor.behaviors import BehaviorTexts
from predictor.embedder import Embedder
from predictor.events import EventStore, History, PastEvent, StoredEvent
from predictor.ingestion import NewEvent, Outcome
from predictor.page_tokens import decode, encode
from predictor.prediction import NO_HISTORY, Predictor, Query
from serving.admission import Admission
from serving.calls import note
from serving.idempotency import each_once, once

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

ANSWER_S = 0.05
"""What remains of a caller's deadline for the way back."""


AT_ONCE = 100
"""Events of a call up to which they are read on the event loop: about a millisecond."""


class _Arrival(NamedTuple):
    """A call's events on their way into the store."""

    request: event_pb.IngestEventsRequest
    events: Sequence[NewEvent]
    """Those that could be read."""
    positions: Sequence[int]
    """Of these in the request."""
    failures: Sequence[common_pb2.ElementFailure]
    """Of the others."""


class EventService(event_grpc.EventServiceServicer):
    """Users' histories."""

    def __init__(self, store: EventStore, texts: BehaviorTexts) -> None:
        self._store = store
        self._texts = texts

    async def IngestEvents(
        self, request: event_pb.IngestEventsRequest, context: Context
    ) -> event_pb.IngestEventsResponse:
        """Stores events."""
        note(batch=len(request.events))
        checks.count(len(request.events), "events", limits.BATCH)
        checks.request_id(request.request_id)
        if len(request.events) <= AT_ONCE:
            arrival = self._arrival(request)
        else:
            arrival = await asyncio.to_thread(self._arrival, request)
        response = await self._store.db.write_part(_ingest, arrival)
        if any(event.text for event in request.events):
            self._texts.changed()
        return response

    def _arrival(self, request: event_pb.IngestEventsRequest) -> _Arrival:
        good, failures = checks.split(
            request.events, lambda event, at: checks.event(event, f"events[{at}]")
        )
        clock = self._store.now(len(good))
        new = [_new_event(request.events[at], clock + n) for n, at in enumerate(good)]
        return _Arrival(request, new, good, failures)

    async def ListEvents(
        self, request: event_pb.ListEventsRequest, context: Context
    ) -> event_pb.ListEventsResponse:
        """Lists a user's events, newest first."""
        checks.identifier(request.user_id, "user_id")
        size = checks.page_size(request.page_size)
        before = decode(request.page_token, int, request.user_id)
        page, following = await asyncio.to_thread(self._store.page, request.user_id, size, before)
        return event_pb.ListEventsResponse(
            events=[_event(request.user_id, event) for event in page],
            next_page_token=encode(following, request.user_id),
        )

    async def DeleteUser(
        self, request: event_pb.DeleteUserRequest, context: Context
    ) -> event_pb.DeleteUserResponse:
        """Deletes a user's events."""
        checks.identifier(request.user_id, "user_id")
        checks.request_id(request.request_id)

        def apply(connection: sqlite3.Connection) -> event_pb.DeleteUserResponse:
            return event_pb.DeleteUserResponse(
                deletion_id=ingestion.new_deletion_id(),
                deleted_events=ingestion.delete_user(connection, request.user_id),
            )

        response, fresh = await self._store.db.write(
            once(apply, request, event_pb.DeleteUserResponse)
        )
        if fresh:
            # The user's name is what was to be deleted: it is not in the log.
            log.info("deletion %s: %d events", response.deletion_id, response.deleted_events)
            self._texts.changed()
        return response


class PredictionService(prediction_grpc.PredictionServiceServicer):
    """What users will do next.

    Args:
        predictor: who answers.
        max_queue_s: how long a call may wait for the queries of others; see Admission. That its
            deadline is kept is the predictor's own concern: a fallback is always quick.
    """

    def __init__(self, predictor: Predictor, max_queue_s: float) -> None:
        self._predictor = predictor
        self._admission = Admission(max_queue_s, limits.QUERIES)

    async def Predict(
        self, request: prediction_pb.PredictRequest, context: Context
    ) -> prediction_pb.PredictResponse:
        """Predicts for one user."""
        checks.prediction_query(request.query)
        response = prediction_pb.PredictResponse()
        with self._admission.admitted(1):
            timings = await self._predictor.predict(
                [_query(request.query)], [response.prediction], _deadline(context)
            )
        response.timings.CopyFrom(timings)
        return response

    async def PredictMany(
        self, request: prediction_pb.PredictManyRequest, context: Context
    ) -> prediction_pb.PredictManyResponse:
        """Predicts for many users."""
        begin = time.perf_counter_ns()
        note(batch=len(request.queries))
        checks.count(len(request.queries), "queries", limits.QUERIES)
        good, failures = checks.split(
            request.queries, lambda query, at: checks.prediction_query(query, f"queries[{at}]")
        )
        response = prediction_pb.PredictManyResponse(failures=failures)
        predictions = [response.predictions.add() for _ in request.queries]
        with self._admission.admitted(len(good)):
            timings = await self._predictor.predict(
                [_query(request.queries[at]) for at in good],
                [predictions[at] for at in good],
                _deadline(context),
            )
        timings.total_us = (time.perf_counter_ns() - begin) // 1_000
        response.timings.CopyFrom(timings)
        return response

    async def Rank(
        self, request: prediction_pb.RankRequest, context: Context
    ) -> prediction_pb.RankResponse:
        """Orders the caller's items for a user."""
        checks.ids(request.item_ids, "item_ids", limits.RANK_ITEMS)
        checks.prediction_query(request.query)
        response = prediction_pb.RankResponse()
        with self._admission.admitted(1):
            timings = await self._predictor.predict(
                [_query(request.query, list(request.item_ids))],
                [response.prediction],
                _deadline(context),
            )
        response.timings.CopyFrom(timings)
        return response


class ModelService(model_grpc.ModelServiceServicer):
    """Trained versions."""

    def __init__(
        self, store: EventStore, models: Models, embedder: Embedder, deadline_s: float
    ) -> None:
        self._store = store
        self._models = models
        self._embedder = embedder
        self._deadline_s = deadline_s

    async def ListModels(
        self, request: model_pb.ListModelsRequest, context: Context
    ) -> model_pb.ListModelsResponse:
        """Lists the registered versions."""
        size = checks.page_size(request.page_size)
        before = decode(request.page_token, str, "")
        connection = self._store.db.connection()
        page, following = registry.page(connection, size, before)
        active = registry.active(connection).version
        return model_pb.ListModelsResponse(
            models=[model.to_proto(active) for model in page],
            next_page_token=encode(following, ""),
        )

    async def ActivateModel(
        self, request: model_pb.ActivateModelRequest, context: Context
    ) -> model_pb.ActivateModelResponse:
        """Makes a version the active one."""
        checks.name(request.version, "version")
        checks.request_id(request.request_id)
        return await self._models.activate(request, self._deadline(context))

    async def DeleteModel(
        self, request: model_pb.DeleteModelRequest, context: Context
    ) -> model_pb.DeleteModelResponse:
        """Deletes a version."""
        checks.name(request.version, "version")
        checks.request_id(request.request_id)
        return await self._models.delete(request, self._deadline(context))

    async def GetInfo(
        self, request: model_pb.GetInfoRequest, context: Context
    ) -> model_pb.GetInfoResponse:
        """Says what runs here."""
        counts = await asyncio.to_thread(self._store.counts)
        served = self._models.served
        return model_pb.GetInfoResponse(
            version=metadata.version("foretell"),
            model_version=served.name if served else "",
            events=counts.events,
            users=counts.users,
            pending_texts=counts.pending_texts,
            embedder_address=self._embedder.address,
            embedder_available=self._embedder.available,
            items=len(served.items) if served and served.items is not None else 0,
            libraries={
                "torch": torch.__version__,
                "grpcio": grpc.__version__,
                "sqlite": sqlite3.sqlite_version,
            },
        )

    def _deadline(self, context: Context) -> float:
        now = asyncio.get_running_loop().time()
        return min(_deadline(context) or now + self._deadline_s, now + self._deadline_s)


def _deadline(context: Context) -> float | None:
    """Until when the caller waits, by the event loop's clock, less the way back; None: for ever."""
    remaining = context.time_remaining()
    if remaining is None:
        return None
    return asyncio.get_running_loop().time() + remaining - min(ANSWER_S, remaining / 10)


def _new_event(event: event_pb.Event, clock_us: int) -> NewEvent:
    return NewEvent(
        event.user_id,
        event.behavior_type,
        event.timestamp.ToMicroseconds() if event.HasField("timestamp") else clock_us,
        event.item_id or None,
        event.text or None,
        text_id(event.text) if event.text else None,
        event.event_id or None,
        json.dumps(dict(event.attributes), ensure_ascii=False) if event.attributes else None,
    )


def _ingest(
    connection: sqlite3.Connection, arrivals: Sequence[_Arrival]
) -> list[event_pb.IngestEventsResponse | ForetellError]:
    """Stores the events of all calls that wait for a commit: a few statements for all of them."""

    def apply(chosen: Sequence[int]) -> list[event_pb.IngestEventsResponse]:
        some = [arrivals[at] for at in chosen]
        outcomes = iter(
            ingestion.ingest(connection, [event for each in some for event in each.events])
        )
        return [_ingested(each, list(islice(outcomes, len(each.events)))) for each in some]

    requests = [arrival.request for arrival in arrivals]
    return each_once(connection, apply, requests, event_pb.IngestEventsResponse)


def _ingested(arrival: _Arrival, outcomes: list[Outcome]) -> event_pb.IngestEventsResponse:
    refused = [
        checks.failure(at, checks.too_many_types())
        for at, outcome in zip(arrival.positions, outcomes, strict=True)
        if outcome is Outcome.REFUSED
    ]
    return event_pb.IngestEventsResponse(
        accepted=outcomes.count(Outcome.STORED),
        duplicates=outcomes.count(Outcome.DUPLICATE),
        failures=sorted([*arrival.failures, *refused], key=lambda failure: failure.index),
    )


def _event(user_id: str, stored: StoredEvent) -> event_pb.Event:
    event = event_pb.Event(
        user_id=user_id,
        behavior_type=stored.behavior_type,
        item_id=stored.item_id,
        text=stored.text,
        event_id=stored.event_id,
        attributes=stored.attributes,
    )
    event.timestamp.FromMicroseconds(stored.time_us)
    return event


def _query(query: prediction_pb.PredictionQuery, rank: list[str] | None = None) -> Query:
    return Query(
        query.user_id,
        _inline(query.history) if query.history else NO_HISTORY,
        query.k if query.HasField("k") else None,
        list(query.allow_item_ids),
        list(query.deny_item_ids),
        query.repeats,
        rank,
    )


def _inline(events: Sequence[event_pb.Event]) -> History:
    """A request's own events in the order of their times; those without one are of now."""
    now = time.time_ns() // 1_000
    history = [
        PastEvent(
            event.behavior_type,
            event.timestamp.ToMicroseconds() if event.HasField("timestamp") else now + at,
            event.item_id,
            text_id(event.text) if event.text else "",
            event.text,
        )
        for at, event in enumerate(events)
    ]
    return History.of(sorted(history, key=lambda event: event.time_us))
