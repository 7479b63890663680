"""The service, from its settings to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc
import torch
from prometheus_client import CollectorRegistry

from foretell.errors import ForetellError
from foretell.predictor.v1 import event_service_pb2, model_service_pb2, prediction_service_pb2
from foretell.predictor.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from foretell.predictor.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from foretell.predictor.v1.prediction_service_pb2 import FallbackReason
from foretell.predictor.v1.prediction_service_pb2_grpc import (
    add_PredictionServiceServicer_to_server,
)
from predictor.activation import Models
from predictor.behaviors import BehaviorTexts
from predictor.database import open_database
from predictor.embedder import Embedder
from predictor.events import EventStore
from predictor.prediction import Predictor
from predictor.processes import Presence
from predictor.retention import Retention
from predictor.retrieval import Retrieval
from predictor.service import EventService, ModelService, PredictionService
from predictor.settings import PROGRAM, PredictorSettings
from serving import logs
from serving.metrics import Batches, Reading, State
from serving.server import Register, run_to_end, serve

log = logging.getLogger(PROGRAM)

RESTART_S = 1.0
"""Pause before a background task that failed begins anew."""


@contextlib.asynccontextmanager
async def application(
    settings: PredictorSettings, registry: CollectorRegistry
) -> AsyncIterator[Register]:
    """All parts of the service, running; gives what adds its servicers to a server.

    Its state is added to the registry of metrics.
    """
    torch.set_num_threads(settings.threads)
    async with contextlib.AsyncExitStack() as stack:
        db = open_database(settings.data_dir)
        stack.callback(db.close)
        embedder = Embedder(settings.embedder, settings.embedder_security)
        stack.push_async_callback(embedder.close)
        presence = Presence(db, settings.heartbeat_s)
        await presence.beat()
        stack.push_async_callback(presence.leave)
        store = EventStore(db)
        models = Models(db, settings.data_dir, embedder, presence)
        stack.push_async_callback(models.close)
        texts = BehaviorTexts(db, embedder, presence)
        retention = Retention(db, presence, settings.retention_days, settings.retention)
        retrieval = Retrieval(embedder, settings.embedder_deadline_ms / 1_000)
        passes = Batches(registry, "forward", "a pass of the sequence model", "queries")
        predictor = Predictor(store, models, retrieval, settings.history_events, passes)
        stack.callback(predictor.close)
        await embedder.probe()
        await models.swap()
        await stack.enter_async_context(
            _background(
                lambda: presence.run(models.look),
                models.run,
                texts.run,
                embedder.run,
                retention.run,
            )
        )

        def add_servicers(server: grpc.aio.Server) -> Sequence[str]:
            add_EventServiceServicer_to_server(EventService(store, texts), server)
            add_PredictionServiceServicer_to_server(
                PredictionService(predictor, settings.max_queue_ms / 1_000), server
            )
            add_ModelServiceServicer_to_server(
                ModelService(store, models, embedder, settings.activation_deadline_s), server
            )
            return [
                file.DESCRIPTOR.services_by_name[name].full_name
                for file, name in (
                    (event_service_pb2, "EventService"),
                    (prediction_service_pb2, "PredictionService"),
                    (model_service_pb2, "ModelService"),
                )
            ]

        registry.register(State(_readings(store, models, embedder, retention, texts, predictor)))
        yield add_servicers


def _readings(
    store: EventStore,
    models: Models,
    embedder: Embedder,
    retention: Retention,
    texts: BehaviorTexts,
    predictor: Predictor,
) -> list[Reading]:
    """What the service's page of metrics says of its state."""

    def active() -> dict[str, float]:
        return {} if models.served is None else {models.served.name: 1.0}

    def answered() -> dict[str, float]:
        return {
            reason.removeprefix("FALLBACK_REASON_").lower() if number else "none": count
            for reason, number in FallbackReason.items()
            for count in [predictor.answered[number]]
        }

    return [
        Reading("foretell_events", "Events stored.", lambda: store.counts().events),
        Reading("foretell_users", "Users with an event.", lambda: store.counts().users),
        Reading(
            "foretell_pending_texts",
            "Behavior texts without a vector.",
            lambda: store.counts().pending_texts,
        ),
        Reading(
            "foretell_text_lag_seconds",
            "For how long the oldest behavior text without a vector waits.",
            texts.lag_s,
        ),
        Reading(
            "foretell_predictions",
            "Predictions by why the model did not make their items; none: it did.",
            answered,
            label="fallback_reason",
            counts=True,
        ),
        Reading(
            "foretell_embedder_available",
            "Whether the embedder answered lately.",
            lambda: float(embedder.available),
        ),
        Reading(
            "foretell_events_expired_total",
            "Events deleted because they were older than their type is kept.",
            lambda: dict(retention.deleted),
            label="behavior_type",
            counts=True,
        ),
        Reading("foretell_model_info", "The active model's version.", active, label="version"),
    ]


@contextlib.asynccontextmanager
async def _background(*runs: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Background tasks for as long as the block runs."""
    tasks = [asyncio.create_task(_restarted(run)) for run in runs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _restarted(run: Callable[[], Awaitable[None]]) -> None:
    """Runs a task that never ends; a failure is a bug, but not the end of the service."""
    while True:
        try:
            await run()
        except Exception:
            log.exception("a background task failed and begins anew")
        await asyncio.sleep(RESTART_S)


async def _serve(settings: PredictorSettings, share_port: bool) -> None:
    registry = CollectorRegistry()
    async with application(settings, registry) as add_servicers:
        await serve(PROGRAM, settings, add_servicers, registry=registry, share_port=share_port)


def run(settings: PredictorSettings, share_port: bool = False) -> int:
    """Exit status 0 after SIGTERM or SIGINT; 2 and one line where it cannot start."""
    logs.configure(PROGRAM, settings.log_format)
    log.info("settings: %s", settings.describe())
    try:
        run_to_end(_serve(settings, share_port))
    except ForetellError as error:  # of the settings, the data directory, the disk
        sys.stderr.write(f"{PROGRAM}: {error.message}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the service was ready
        return 130
    return 0
