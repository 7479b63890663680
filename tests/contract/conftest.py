"""The same contract tests run against the fake and against the real services."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from foretell.common.v1 import common_pb2
from foretell.embedder.v1.embedder_service_pb2 import GetInfoRequest
from foretell.embedder.v1.embedder_service_pb2_grpc import EmbedderServiceStub
from foretell.predictor.v1.event_service_pb2_grpc import EventServiceStub
from foretell.predictor.v1.model_service_pb2_grpc import ModelServiceStub
from foretell.predictor.v1.prediction_service_pb2_grpc import PredictionServiceStub
from foretell.projection import AffineLayer, Projection
from foretell.testing import FakeServices
from serving.process import started

MESSAGE_BYTES = 64 * 1024 * 1024
COLS = 384

RegisterModel = Callable[[str, Sequence[str]], None]
"""Registers a version of this name and these behavior types, with an item head."""


_numbers = itertools.count()


@dataclass
class Services:
    """Both services, wherever they run."""

    embedder_address: str
    predictor_address: str
    register_model: RegisterModel
    start_bare: Callable[[contextlib.ExitStack], Services]
    """Starts services where nothing was ever ingested and no version registered."""
    logs: Sequence[Path] = ()
    embedder: EmbedderServiceStub = field(init=False)
    events: EventServiceStub = field(init=False)
    predictions: PredictionServiceStub = field(init=False)
    models: ModelServiceStub = field(init=False)

    def connect(self) -> contextlib.ExitStack:
        """Makes the stubs; closes their channels when the stack is closed."""
        stack = contextlib.ExitStack()
        embedder, predictor = (
            stack.enter_context(self.channel(address))
            for address in (self.embedder_address, self.predictor_address)
        )
        self.embedder = EmbedderServiceStub(embedder)
        self.events = EventServiceStub(predictor)
        self.predictions = PredictionServiceStub(predictor)
        self.models = ModelServiceStub(predictor)
        return stack

    def channel(self, address: str) -> grpc.Channel:
        """A channel that takes messages of the contract's size."""
        sizes = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
        return grpc.insecure_channel(address, options=[(name, MESSAGE_BYTES) for name in sizes])


@pytest.fixture(scope="session", params=["fake", "real"])
def services(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    with contextlib.ExitStack() as stack:
        if request.param == "fake":
            found = _fake(stack)
        else:
            found = _real(stack, tmp_path_factory.mktemp("contract"))
        stack.enter_context(found.connect())
        yield found


@pytest.fixture(autouse=True)
def no_stack_traces(services: Services) -> Iterator[None]:
    """No input makes a service log a stack trace."""
    known = {log: log.stat().st_size for log in services.logs}
    yield
    for log, size in known.items():
        assert b"Traceback" not in log.read_bytes()[size:]


@pytest.fixture
def bare(services: Services) -> Iterator[Services]:
    """Services where nothing was ever ingested and no version registered."""
    with contextlib.ExitStack() as stack:
        found = services.start_bare(stack)
        stack.enter_context(found.connect())
        yield found


def _fake(stack: contextlib.ExitStack) -> Services:
    fakes = stack.enter_context(FakeServices())
    return Services(
        fakes.embedder_address,
        fakes.predictor_address,
        lambda version, types: fakes.register_model(version, behavior_types=types),
        _fake,
    )


def _real(stack: contextlib.ExitStack, folder: Path) -> Services:
    embedder = stack.enter_context(
        started(
            "embedder",
            ["--port", "0", "--data-dir", str(folder / "embedder")],
            log=folder / "embedder.log",
        )
    )
    return _real_predictor(stack, folder, embedder.address)


def _real_predictor(stack: contextlib.ExitStack, folder: Path, embedder: str) -> Services:
    """A predictor with a data directory of its own."""
    data = folder / f"predictor-{next(_numbers)}"
    # A prediction on a busy machine must not fall back because of its haste.
    flags = ["--port", "0", "--data-dir", str(data), "--embedder-deadline-ms", "30000"]
    predictor = stack.enter_context(
        started("predictor", [*flags, "--embedder", embedder], log=folder / "predictor.log")
    )
    return Services(
        embedder,
        predictor.address,
        _registrar(data, folder, embedder),
        lambda stack: _real_predictor(stack, folder, embedder),
        (folder / "embedder.log", folder / "predictor.log"),
    )


def _registrar(data: Path, folder: Path, embedder_address: str) -> RegisterModel:
    """Registers untrained versions, with which everything but their taste can be tested."""
    from predictor import registry
    from predictor.database import open_database
    from predictor.models import model_dir
    from predictor.models.calibration import ItemCalibration, TypeCalibration
    from predictor.models.history import history_batch
    from predictor.models.sequence.network import NetworkConfig, SequenceNetwork
    from predictor.models.version import EncoderConfig, Golden, Version, VersionConfig

    def register(version: str, behavior_types: Sequence[str]) -> None:
        with grpc.insecure_channel(embedder_address) as channel:
            info = EmbedderServiceStub(channel).GetInfo(GetInfoRequest(), timeout=30)
        dims = 8
        random = np.random.default_rng(0)
        weight = random.normal(size=(dims, info.cols)).astype(np.float32)
        network = SequenceNetwork(NetworkConfig(len(behavior_types), dims, 8)).eval()
        config = VersionConfig(
            version=version,
            encoder=EncoderConfig(name=info.encoder, pooling=info.pooling, cols=info.cols),
            behavior_types=tuple(behavior_types),
            history_length=50,
            network=network.config,
            repeats="allowed",
            has_items=True,
            has_texts=True,
            has_times=True,
            type_calibration=TypeCalibration(biases=(0.0,) * len(behavior_types)),
            item_calibration=ItemCalibration(),
            candidates=200,
        )
        golden = history_batch(
            np.ones((2, dims), np.float32),
            np.ones(2, np.bool_),
            np.zeros(2, np.int64),
            np.array([0, 5_000_000]),
            np.array([2]),
        )
        outputs = network.predict(golden)
        made = Version(
            config,
            network,
            Projection((AffineLayer(weight, np.zeros(dims, np.float32)),)),
            ("nowhere",),
            np.arange(1),
            np.ones((1, dims), np.float32),
            Golden(
                golden,
                config.type_calibration.probabilities(outputs.type_logits),
                outputs.queries,
            ),
            reports={"metrics.json": {"types": {"foretell": {"accuracy": 0.5}}}},
        )
        directory = folder / f"version-{next(_numbers)}"
        model_dir.write(directory, made, "", {})
        database = open_database(data)
        try:
            registry.register(database, data, directory)
        finally:
            database.close()

    return register


@pytest.fixture
def unique() -> str:
    """A name that no other test has: of a collection, or the beginning of an id."""
    return f"t{next(_numbers)}"


@dataclass(frozen=True)
class Fault:
    """What a google.rpc.Status says."""

    code: grpc.StatusCode
    reason: str
    field: str


def fault_of(status: status_pb2.Status) -> Fault:
    """Reads a status, which must have one ErrorInfo of foretell's and at most one BadRequest."""
    infos, requests = [], []
    for detail in status.details:
        match detail.TypeName():
            case "google.rpc.ErrorInfo":
                infos.append(error_details_pb2.ErrorInfo.FromString(detail.value))
            case "google.rpc.BadRequest":
                requests.append(error_details_pb2.BadRequest.FromString(detail.value))
    assert [info.domain for info in infos] == ["foretell"]
    assert len(requests) <= 1
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    fields = [violation.field for each in requests for violation in each.field_violations]
    assert len(fields) <= 1
    return Fault(code, infos[0].reason, "".join(fields))


Refused = Callable[..., None]
"""(call, request, code, reason, field=""): the call fails, with this."""

Failed = Callable[[Sequence[common_pb2.ElementFailure]], dict[int, tuple[str, str, str]]]
"""failures: position to (code, reason, field)."""


@pytest.fixture(scope="session")
def refused() -> Refused:
    def check(
        call: Callable[..., Any], request: Message | bytes, code: str, reason: str, field: str = ""
    ) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=60)
        error = caught.value
        details: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
        assert "grpc-status-details-bin" in details, f"{error.code()}: {error.details()}"
        status = status_pb2.Status.FromString(details["grpc-status-details-bin"])
        assert status.code == error.code().value[0]
        assert status.message == error.details()
        fault = fault_of(status)
        assert (fault.code.name, fault.reason, fault.field) == (code, reason, field)

    return check


@pytest.fixture(scope="session")
def failed() -> Failed:
    def read(
        failures: Sequence[common_pb2.ElementFailure],
    ) -> dict[int, tuple[str, str, str]]:
        assert [each.index for each in failures] == sorted(each.index for each in failures)
        faults = {each.index: fault_of(each.status) for each in failures}
        return {at: (each.code.name, each.reason, each.field) for at, each in faults.items()}

    return read
