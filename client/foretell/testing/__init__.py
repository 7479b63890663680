"""An in-process fake of both services, for the tests of teams that call foretell.

    with foretell.testing.FakeServices() as fakes:
        client = foretell.Client(embedder=fakes.embedder_address, predictor=fakes.predictor_address)

Real gRPC on free ports of the loopback, dictionaries instead of disks, and rules instead of
networks, so that equal calls give equal answers. The contract holds as it does with the services:
limits, errors, failures of single elements, repeated writes, derived collections. What a test may
count on beyond it:

- Text vectors have 384 dimensions and length 1; texts that share words or parts of words are near
  one another.
- Without a model, items are those most like the latest items and texts of the history (cosine),
  then the user's most frequent ones, then the most popular ones. With one (`register_model`, then
  ActivateModel), an item's score is the inner product with the mean of the history's vectors.
- A behavior type's probability is the user's count of it, plus everybody's share of it, in
  proportion.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import grpc

from foretell.embedder.v1.embedder_service_pb2_grpc import add_EmbedderServiceServicer_to_server
from foretell.errors import ForetellError
from foretell.predictor.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from foretell.predictor.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from foretell.predictor.v1.prediction_service_pb2_grpc import (
    add_PredictionServiceServicer_to_server,
)
from foretell.testing.embedder import FakeEmbedder
from foretell.testing.events import FakeEvents
from foretell.testing.models import FakeModels
from foretell.testing.predictions import FakePredictions
from foretell.testing.server import Faults, Server
from foretell.types import Repeats

__all__ = ["FakeServices"]


class FakeServices:
    """Both services in this process, empty at first; they run while the `with` block does.

    Attributes:
        embedder_address: host:port of the embedder.
        predictor_address: host:port of the predictor.
    """

    embedder_address: str
    predictor_address: str

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._faults = Faults()
        self._embedder = FakeEmbedder(self._changed)
        self._events = FakeEvents(self._embedder)
        self._models = FakeModels(self._embedder, self._events)
        self._predictions = FakePredictions(self._embedder, self._events, self._models)
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        def register(server: grpc.Server) -> None:
            add_EventServiceServicer_to_server(self._events, server)
            add_PredictionServiceServicer_to_server(self._predictions, server)
            add_ModelServiceServicer_to_server(self._models, server)

        embedder = Server(
            lambda server: add_EmbedderServiceServicer_to_server(self._embedder, server),
            self._changed,
            self._faults,
        )
        predictor = Server(register, self._changed, self._faults)
        self._servers = [predictor, embedder]
        self.embedder_address = self._models.embedder_address = embedder.address
        self.predictor_address = predictor.address
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.stop()

    def register_model(
        self,
        version: str,
        *,
        behavior_types: Sequence[str],
        items: int = 1,
        repeats: Repeats = Repeats.ALLOWED,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Registers a version, which ActivateModel can then make the one that answers.

        Args:
            version: its name.
            behavior_types: those it knows.
            items: what Model.items says; 0: it predicts behavior types only.
            repeats: whether it answers what the user had before, where a query does not say.
            metrics: what Model.metrics says.

        Raises:
            InvalidArgumentError: no name of a version, or no behavior types.
            AlreadyExistsError: the version is registered.
        """
        with self._changed:
            self._models.register(version, behavior_types, items, repeats, metrics or {})

    def fail_next(self, method: str, error: ForetellError, *, times: int = 1) -> None:
        """Lets the next calls of a method fail, and do nothing.

        The client repeats a call that met UnavailableError, up to five attempts in all: give
        `times=5` to see the error itself.

        Args:
            method: its name, such as `Predict`; `ModelService/GetInfo` where two services have it.
            error: what the caller gets.
            times: how many calls.

        Raises:
            ValueError: no service has the method.
        """
        self._faults.add(method, error, times)

    def set_embedder_available(self, available: bool) -> None:
        """Whether predictions reach the embedder: without it they fall back, and say so."""
        with self._changed:
            self._models.embedder_available = available
