"""A predictor's parts, tiny versions, and predictor processes of a test's own."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from foretell import _channel
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as embedder_grpc
from foretell.predictor.v1 import event_service_pb2_grpc as event_grpc
from foretell.predictor.v1 import model_service_pb2_grpc as model_grpc
from foretell.predictor.v1 import prediction_service_pb2_grpc as prediction_grpc
from foretell.projection import AffineLayer, Projection
from predictor.__main__ import main as predictor_main
from predictor.models.calibration import ItemCalibration, TypeCalibration
from predictor.models.history import history_batch
from predictor.models.model_dir import write
from predictor.models.sequence.network import NetworkConfig, SequenceNetwork
from predictor.models.version import EncoderConfig, Golden, Version, VersionConfig
from serving.process import ServiceProcess, started

DIMS = 8


class Stubs:
    """Plain stubs of a predictor, without the client's retries."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.events = event_grpc.EventServiceStub(channel)
        self.predictions = prediction_grpc.PredictionServiceStub(channel)
        self.models = model_grpc.ModelServiceStub(channel)


@pytest.fixture
def connect() -> Iterator[Callable[[str], Stubs]]:
    """Connects to predictors."""
    with contextlib.ExitStack() as channels:

        def to(address: str) -> Stubs:
            options = _channel.ClientSettings().options()
            options = [option for option in options if option[0] != "grpc.service_config"]
            return Stubs(channels.enter_context(grpc.insecure_channel(address, options=options)))

        yield to


@pytest.fixture
def start_predictor(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts predictors on one data directory, with further flags; stops those that still run."""
    with contextlib.ExitStack() as running:

        def start(embedder: str, *arguments: str) -> ServiceProcess:
            flags = ["--port", "0", "--data-dir", str(tmp_path / "data"), "--embedder", embedder]
            flags += ["--heartbeat-s", "0.2", "--drain-s", "0", *arguments]
            return running.enter_context(
                started("predictor", flags, log=tmp_path / "predictor.log")
            )

        yield start


@pytest.fixture(scope="session")
def shared_predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    """One predictor without an embedder, for tests that change nothing."""
    directory = tmp_path_factory.mktemp("shared")
    flags = ["--port", "0", "--embedder", "127.0.0.1:1", "--data-dir", str(directory / "data")]
    with (
        started("predictor", flags, log=directory / "log") as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        yield Stubs(channel)


CATALOGUE = {
    f"{kind}-{number}": f"{adjective} {kind}"
    for kind in ("coffee", "tea", "bread", "cheese", "apple", "soap")
    for number, adjective in enumerate(("organic", "cheap", "fine", "large", "small"))
}
"""Items of the catalogue that the tests share."""


@pytest.fixture(scope="session")
def catalogue_embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """An embedder whose `items` are CATALOGUE."""
    directory = tmp_path_factory.mktemp("catalogue-embedder")
    flags = ["--port", "0", "--data-dir", str(directory / "data")]
    with started("embedder", flags, log=directory / "log") as service:
        with grpc.insecure_channel(service.address) as channel:
            embedder_grpc.EmbedderServiceStub(channel).UpsertItems(
                embedder_pb.UpsertItemsRequest(
                    items=[embedder_pb.Item(id=i, text=text) for i, text in CATALOGUE.items()]
                )
            )
        yield service


@pytest.fixture
def embedder(catalogue_embedder: ServiceProcess) -> Iterator[embedder_grpc.EmbedderServiceStub]:
    """Stub of the catalogue's embedder."""
    with grpc.insecure_channel(catalogue_embedder.address) as channel:
        yield embedder_grpc.EmbedderServiceStub(channel)


def tiny_version(directory: Path, name: str, encoder: EncoderConfig, **changes: Any) -> Path:
    """Writes a version with random weights; `seed`, learned `parts` by name and any field of its
    config may be given."""
    parts: dict[str, Any] = changes.pop("parts", {})
    seed = changes.pop("seed", 1)
    item_ids: Sequence[str] = changes.pop("item_ids", tuple(CATALOGUE))
    config = VersionConfig(
        version=name,
        encoder=encoder,
        behavior_types=("view", "buy", "search"),
        history_length=20,
        network=NetworkConfig(behavior_types=3, dims=DIMS, hidden=16),
        repeats="allowed",
        has_items=True,
        has_texts=True,
        has_times=True,
        type_calibration=TypeCalibration(temperature=1.5, biases=(0.0, 0.0, 0.0)),
        item_calibration=ItemCalibration(score=0.5),
        candidates=20,
    ).model_copy(update=changes)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape = replace(config.network, behavior_types=len(config.behavior_types))
    types = config.type_calibration.model_copy(update={"biases": (0.0,) * shape.behavior_types})
    config = config.model_copy(update={"network": shape, "type_calibration": types})
    network = SequenceNetwork(shape).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5)
    weight = rng.standard_normal((config.dims, encoder.cols)).astype(np.float32)
    golden = history_batch(
        rng.standard_normal((6, config.dims)).astype(np.float32),
        np.array([True, True, False, True, True, True]),
        np.array([0, 1, 2, 0, 1, 1]),
        np.array([0, 10, 10, 50, 60, 100]) * 1_000_000,
        np.array([0, 2, 4]),
    )
    outputs = network.predict(golden)
    probabilities = config.type_calibration.probabilities(outputs.type_logits)
    ids = tuple(item_ids) if config.has_items else ()
    version = Version(
        config,
        network,
        Projection((AffineLayer(weight, np.zeros(config.dims, np.float32)),)),
        ids,
        np.arange(len(ids)),
        rng.standard_normal((len(ids), config.dims)).astype(np.float32) * 0.3,
        Golden(golden, probabilities, outputs.queries),
        **parts,
        reports={"metrics.json": {"types": {"foretell": {"accuracy": 0.5}}}, "lineage.json": {}},
    )
    write(directory, version, "", {})
    return directory


@pytest.fixture(scope="session")
def encoder(catalogue_embedder: ServiceProcess) -> EncoderConfig:
    """The encoder of the catalogue's embedder."""
    with grpc.insecure_channel(catalogue_embedder.address) as channel:
        stub = embedder_grpc.EmbedderServiceStub(channel)
        info = stub.GetInfo(embedder_pb.GetInfoRequest())
    return EncoderConfig(name=info.encoder, pooling=info.pooling, cols=info.cols)


@pytest.fixture(scope="session")
def write_version(encoder: EncoderConfig) -> Callable[..., Path]:
    """Writes a version for the catalogue: `write_version(DIRECTORY, NAME, **changes)`."""

    def write_(directory: Path, name: str, **changes: Any) -> Path:
        return tiny_version(directory, name, changes.pop("encoder", encoder), **changes)

    return write_


@pytest.fixture(scope="session")
def register_in() -> Callable[[Path, Path], None]:
    """`register_in(DIRECTORY, DATA_DIR)` runs `python -m predictor register`."""

    def run(directory: Path, data_dir: Path) -> None:
        assert predictor_main(["register", str(directory), "--data-dir", str(data_dir)]) == 0

    return run


@pytest.fixture(scope="session")
def stubs_of() -> Callable[[grpc.Channel], Stubs]:
    """The stubs of a channel."""
    return Stubs


@pytest.fixture
def make_version(tmp_path: Path, write_version: Callable[..., Path]) -> Callable[..., Path]:
    """Writes versions of this test's own: `make_version(NAME, **changes)`."""

    def make(name: str, **changes: Any) -> Path:
        return write_version(tmp_path / "versions" / name, name, **changes)

    return make


@pytest.fixture
def register(tmp_path: Path, register_in: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """Registers a version in the data directory of `start_predictor`."""
    return lambda directory: register_in(directory, tmp_path / "data")


@pytest.fixture(scope="session")
def catalogue() -> dict[str, str]:
    """Id and text of each item of the catalogue's embedder."""
    return dict(CATALOGUE)


@pytest.fixture
def absent() -> str:
    """An address where no embedder is."""
    return "127.0.0.1:1"


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """`eventually(check)` returns once `check()` is true; fails when that takes too long."""

    def wait(check: Callable[[], bool], timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not check():
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.02)

    return wait
