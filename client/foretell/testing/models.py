"""ModelService in memory: versions without a network, whose vectors are the texts' own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of

import numpy as np

from foretell import checks, limits
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from foretell.predictor.v1 import model_service_pb2 as pb
from foretell.predictor.v1 import model_service_pb2_grpc as pb_grpc
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.projection import AffineLayer, Projection
from foretell.testing.collections import COLS, Collection
from foretell.testing.embedder import FakeEmbedder
from foretell.testing.events import FakeEvents
from foretell.testing.paging import make_token, read_token
from foretell.types import Repeats

_REPEATS = {
    Repeats.ALLOWED: prediction_pb.REPEATS_ALLOWED,
    Repeats.EXCLUDED: prediction_pb.REPEATS_EXCLUDED,
}
_LIST = "models"


class FakeModels(pb_grpc.ModelServiceServicer):
    """ModelService as its contract says.

    Attributes:
        active: the version that answers; None without one.
        embedder_address: what GetInfo says.
        embedder_available: whether predictions can use the embedder.
    """

    def __init__(self, embedder: FakeEmbedder, events: FakeEvents) -> None:
        self.active: pb.Model | None = None
        self.embedder_address = ""
        self.embedder_available = True
        self._previous = ""
        self._models: dict[str, pb.Model] = {}
        self._embedder = embedder
        self._events = events

    def register(
        self,
        version: str,
        behavior_types: Sequence[str],
        items: int,
        repeats: Repeats,
        metrics: Mapping[str, float],
    ) -> None:
        """What `python -m predictor register` does."""
        checks.name(version, "version")
        checks.count(len(behavior_types), "behavior_types", limits.BEHAVIOR_TYPES)
        if version in self._models:
            raise AlreadyExistsError(
                f"another version {version!r} is registered",
                reason="VERSION_EXISTS",
                field="version",
            )
        model = pb.Model(
            version=version,
            model_type="fake",
            behavior_types=behavior_types,
            items=items,
            repeats=_REPEATS[repeats],
            metrics=metrics,
        )
        model.registered_at.GetCurrentTime()
        self._models[version] = model

    def collection(self, of: str) -> Collection:
        """The active version's collection derived from `items` or `behaviors`."""
        assert self.active is not None
        return self._embedder.collections[f"{self.active.version}.{of}"]

    def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        """Lists the registered versions, newest first."""
        size = checks.page_size(request.page_size)
        newest = list(reversed(self._models))
        after = read_token(request.page_token, _LIST)
        if after and after not in self._models:
            raise checks.bad_page_token()
        begin = newest.index(after) + 1 if after else 0
        page = newest[begin : begin + size]
        more = begin + size < len(newest)
        return pb.ListModelsResponse(
            models=[self._models[version] for version in page],
            next_page_token=make_token(page[-1], _LIST) if more else "",
        )

    def ActivateModel(
        self, request: pb.ActivateModelRequest, context: object
    ) -> pb.ActivateModelResponse:
        """Publishes the version's collections and lets it answer."""
        model = self._find(request.version)
        if not model.active:
            self._publish(model)
            if self.active is not None:
                self._previous = self.active.version
                self.active.active = False
            model.active = True
            self.active = model
        return pb.ActivateModelResponse(model=model, previous_version=self._previous)

    def _publish(self, model: pb.Model) -> None:
        """Derived collections whose vectors are their sources' own."""
        identity = Projection((AffineLayer(np.eye(COLS, dtype=np.float32), np.zeros(COLS, "f4")),))
        for source in ("items", "behaviors"):
            request = embedder_pb.CreateCollectionRequest(
                name=f"{model.version}.{source}", derived=identity.to_derived(source)
            )
            with contextlib.suppress(AlreadyExistsError):  # from an activation before
                self._embedder.CreateCollection(request, None)

    def DeleteModel(
        self, request: pb.DeleteModelRequest, context: object
    ) -> pb.DeleteModelResponse:
        """Deletes a version and its collections."""
        model = self._find(request.version)
        if model.active:
            raise FailedPreconditionError(
                f"version {model.version!r} is active; activate another one first",
                reason="VERSION_ACTIVE",
                field="version",
            )
        del self._models[model.version]
        for source in ("items", "behaviors"):
            name = f"{model.version}.{source}"
            with contextlib.suppress(NotFoundError):  # it was never active
                self._embedder.DeleteCollection(
                    embedder_pb.DeleteCollectionRequest(name=name), None
                )
        return pb.DeleteModelResponse()

    def GetInfo(self, request: pb.GetInfoRequest, context: object) -> pb.GetInfoResponse:
        """Says that this is the fake."""
        events = self._events
        return pb.GetInfoResponse(
            version=version_of("foretell"),
            model_version=self.active.version if self.active else "",
            events=events.types.total(),
            users=len(events.by_user),
            embedder_address=self.embedder_address,
            embedder_available=self.embedder_available,
            items=len(self.collection("items").vectors) if self.active else 0,
            libraries={"grpcio": version_of("grpcio")},
        )

    def _find(self, version: str) -> pb.Model:
        checks.name(version, "version")
        if version not in self._models:
            raise NotFoundError(
                f"version {version!r} is not registered",
                reason="VERSION_NOT_FOUND",
                field="version",
            )
        return self._models[version]
