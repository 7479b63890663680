"""Versions: registered, activated in every process, rolled back, deleted."""

import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from foretell import Client
from foretell.errors import ForetellError, NotFoundError, from_rpc_error
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.projection import AffineLayer, Projection
from foretell.types import Item
from predictor import registry
from predictor.__main__ import main as predictor_main
from predictor.database import open_database
from predictor.models import model_dir
from predictor.models.version import EncoderConfig
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.predictor.conftest import Stubs

Start = Callable[..., ServiceProcess]
Connect = Callable[[str], "Stubs"]
Make = Callable[..., Path]
Register = Callable[[Path], None]
Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture
def client(catalogue_embedder: ServiceProcess) -> Iterator[Client]:
    with Client(embedder=catalogue_embedder.address) as connected:
        yield connected


def activate(stubs: "Stubs", version: str, **more: str) -> model_pb.ActivateModelResponse:
    request = model_pb.ActivateModelRequest(version=version, **more)
    return stubs.models.ActivateModel(request, timeout=30)


def refused(call: Callable[[], object]) -> ForetellError:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return from_rpc_error(error.value)


def version_of(stubs: "Stubs") -> str:
    return stubs.models.GetInfo(model_pb.GetInfoRequest()).model_version


def predict(stubs: "Stubs") -> pb.Prediction:
    query = pb.PredictionQuery(user_id="ann", k=5)
    return stubs.predictions.Predict(pb.PredictRequest(query=query), timeout=30).prediction


def ingest(stubs: "Stubs") -> None:
    event = event_pb.Event(user_id="ann", behavior_type="buy", item_id="tea-1")
    stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=[event]))


def names(client: Client) -> set[str]:
    return {collection.name for collection in client.list_collections()}


def test_activation_rollback_and_deletion(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess, tmp_path: Path,
) -> None:  # fmt: skip
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    ingest(stubs)
    assert version_of(stubs) == ""
    register(make_version("one", seed=1))
    register(make_version("two", seed=2, repeats="excluded", behavior_types=("buy", "view")))
    register(tmp_path / "versions" / "one")  # again: nothing changes
    models = stubs.models.ListModels(model_pb.ListModelsRequest()).models
    assert [model.version for model in models] == ["two", "one"]
    assert list(models[0].behavior_types) == ["buy", "view"]
    assert models[0].repeats == pb.REPEATS_EXCLUDED
    assert models[0].metrics == {"types.accuracy": 0.5}
    page = stubs.models.ListModels(model_pb.ListModelsRequest(page_size=1))
    rest = stubs.models.ListModels(
        model_pb.ListModelsRequest(page_size=1, page_token=page.next_page_token)
    )
    assert [model.version for model in (*page.models, *rest.models)] == ["two", "one"]
    assert rest.next_page_token == ""

    first = activate(stubs, "one")
    assert (first.model.version, first.model.active, first.previous_version) == ("one", True, "")
    by_one = predict(stubs)
    assert by_one.model_version == "one"
    second = activate(stubs, "two", request_id="r")
    assert second.previous_version == "one"
    assert activate(stubs, "two", request_id="r") == second
    assert activate(stubs, "two").previous_version == "one"  # active already
    by_two = predict(stubs)
    assert by_two.model_version == "two"
    assert "tea-1" not in [item.item_id for item in by_two.items]  # repeats are excluded
    assert names(client) >= {"one.items", "one.behaviors", "two.items", "two.behaviors"}

    activate(stubs, "one")
    assert predict(stubs) == by_one
    assert activate(stubs, "two", request_id="r") == second  # the first answer; nothing happens
    assert version_of(stubs) == "one"
    request = model_pb.DeleteModelRequest(version="one")
    assert refused(lambda: stubs.models.DeleteModel(request)).reason == "VERSION_ACTIVE"
    request = model_pb.DeleteModelRequest(version="two", request_id="d")
    stubs.models.DeleteModel(request)
    stubs.models.DeleteModel(request)
    request.request_id = "e"
    assert refused(lambda: stubs.models.DeleteModel(request)).reason == "VERSION_NOT_FOUND"
    assert "two.items" not in names(client)
    assert "two.behaviors" not in names(client)
    assert not (tmp_path / "data" / "models" / "two").exists()
    assert refused(lambda: activate(stubs, "two")).reason == "VERSION_NOT_FOUND"
    assert predict(stubs) == by_one
    register(tmp_path / "versions" / "two")  # it may come again
    assert activate(stubs, "two").previous_version == "one"
    clean(stubs, client)


def clean(stubs: "Stubs", client: Client) -> None:
    """Leaves the shared embedder without this test's collections."""
    for name in names(client):
        if name.split(".")[0] in ("one", "two", "three"):
            # The predictor misses the active version's, and may be making them anew just now.
            with contextlib.suppress(NotFoundError):
                client.delete_collection(name)


def test_every_process_swaps_without_dropping_a_request(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess,
) -> None:  # fmt: skip
    # A stopped process counts as live for five heartbeats, and must still do so when it is late.
    services = [start_predictor(catalogue_embedder.address, "--heartbeat-s", "2") for _ in "ab"]
    stubs = [connect(service.address) for service in services]
    ingest(stubs[0])
    register(make_version("one", seed=1))
    register(make_version("two", seed=2))
    activate(stubs[0], "one")
    assert [version_of(each) for each in stubs] == ["one", "one"]
    stop = threading.Event()
    seen: list[list[str]] = [[], []]
    failed: list[BaseException] = []

    def load(at: int) -> None:
        while not stop.is_set():
            try:
                answer = predict(stubs[at])
                assert not answer.fallback_reason
                assert len(answer.items) == 5
                seen[at].append(answer.model_version)
            except BaseException as error:
                failed.append(error)
                raise

    callers = [threading.Thread(target=load, args=(at,)) for at in (0, 1, 0, 1)]
    for caller in callers:
        caller.start()
    try:
        for version in ("two", "one", "two"):
            activate(stubs[1], version)
            assert [version_of(each) for each in stubs] == [version, version]
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failed
    assert set(seen[0]) == set(seen[1]) == {"one", "two"}

    # One that does not follow is named; one that is gone does not count.
    os.kill(services[1].process.pid, signal.SIGSTOP)
    try:
        request = model_pb.ActivateModelRequest(version="one")
        late = refused(lambda: stubs[0].models.ActivateModel(request, timeout=6))
    finally:
        os.kill(services[1].process.pid, signal.SIGCONT)
    assert late.reason == "PROCESSES_LATE"
    assert str(services[1].process.pid) in late.metadata["processes"]
    assert str(services[0].process.pid) not in late.metadata["processes"]
    assert activate(stubs[0], "one").previous_version == "two"
    assert [version_of(each) for each in stubs] == ["one", "one"]
    services[1].kill()
    assert activate(stubs[0], "two").previous_version == "one"
    clean(stubs[0], client)


def test_a_restarted_process_serves_the_active_version(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess, absent: str, eventually: Eventually,
) -> None:  # fmt: skip
    service = start_predictor(catalogue_embedder.address)
    stubs = connect(service.address)
    ingest(stubs)
    register(make_version("one"))
    activate(stubs, "one")
    before = predict(stubs)
    service.kill()
    again = connect(start_predictor(catalogue_embedder.address).address)
    assert predict(again) == before
    # Without the embedder it starts as well, and predicts types at least.
    alone = connect(start_predictor(absent).address)
    answer = predict(alone)
    assert answer.model_version == "one"
    assert answer.fallback_reason == pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
    assert len(answer.behavior_types) == 3
    request = model_pb.ActivateModelRequest(version="one")
    late = refused(lambda: alone.models.ActivateModel(request, timeout=1))
    assert (late.code, late.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TOO_SLOW")
    assert f"the embedder at {absent}" in late.message
    clean(stubs, client)


def test_collections_that_the_embedder_lost_are_published_anew(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess, eventually: Eventually,
) -> None:  # fmt: skip
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    ingest(stubs)
    register(make_version("one"))
    activate(stubs, "one")
    before = predict(stubs)
    client.delete_collection("one.items")
    eventually(lambda: not predict(stubs).fallback_reason)
    eventually(lambda: list(predict(stubs).items) == list(before.items))
    clean(stubs, client)


def test_a_publication_cut_off_by_kill_9_is_completed(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess, tmp_path: Path,
) -> None:  # fmt: skip
    """What is left of it: a collection without residuals, and a row that says so."""
    directory = make_version("one")
    register(directory)
    service = start_predictor(catalogue_embedder.address)
    stubs = connect(service.address)
    ingest(stubs)
    activate(stubs, "one")
    whole = predict(stubs)
    service.kill()
    clean(stubs, client)
    client.create_derived_collection(
        "one.items", source="items", projection=model_dir.load(directory).projection
    )
    with contextlib.closing(open_database(tmp_path / "data")) as db:
        db.submit(lambda connection: registry.set_published(connection, "one", False)).result()
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    activate(stubs, "one")
    assert predict(stubs) == whole
    clean(stubs, client)


def test_collections_of_another_model_of_this_name_are_replaced(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess, encoder: EncoderConfig,
) -> None:  # fmt: skip
    """Left from a predictor whose data directory is gone: other weights, other dimensions."""
    rng = np.random.default_rng(0)
    layer = AffineLayer(
        rng.standard_normal((3, encoder.cols)).astype(np.float32), np.zeros(3, np.float32)
    )
    for source in ("items", "behaviors"):
        client.create_derived_collection(f"three.{source}", source, Projection((layer,)))
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    ingest(stubs)
    register(make_version("three"))
    activate(stubs, "three")
    assert len(predict(stubs).items) == 5
    cols = {each.name: each.cols for each in client.list_collections()}
    assert cols["three.items"] == cols["three.behaviors"] == 8
    clean(stubs, client)


def test_what_cannot_be_served_is_refused_and_changes_nothing(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess, encoder: EncoderConfig, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    ingest(stubs)
    register(make_version("one"))
    activate(stubs, "one")
    before = predict(stubs)
    # Another encoder's vectors.
    other = encoder.model_copy(update={"pooling": "cls"})
    register(make_version("two", encoder=other))
    error = refused(lambda: activate(stubs, "two"))
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "ENCODER_MISMATCH"
    assert "two.items" not in names(client)
    # Files damaged after registration.
    register(make_version("three"))
    weights = tmp_path / "data" / "models" / "three" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    error = refused(lambda: activate(stubs, "three"))
    assert (error.code, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_MODEL_DIRECTORY",
    )
    assert "weights.safetensors" in error.message
    # A directory that is damaged, foreign or of a name that is taken is not registered.
    capfd.readouterr()
    damaged = make_version("four")
    (damaged / "golden.safetensors").write_bytes(b"")
    for directory, message in (
        (damaged, "golden.safetensors"),
        (tmp_path, "config.json"),
        (wrong_answers(make_version("five")), "golden"),
    ):
        arguments = ["register", str(directory), "--data-dir", str(tmp_path / "data")]
        assert predictor_main(arguments) != 0
        assert message in capfd.readouterr().err
    taken = make_version("other-one", seed=5)
    rename(taken, "one")
    assert predictor_main(["register", str(taken), "--data-dir", str(tmp_path / "data")]) != 0
    assert "another version 'one'" in capfd.readouterr().err
    assert predict(stubs) == before
    clean(stubs, client)


def wrong_answers(directory: Path) -> Path:
    """A version whose files are whole, but whose answers are not its golden ones."""
    config = json.loads((directory / "config.json").read_text())
    config["type_calibration"]["temperature"] = 9.0
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def rename(directory: Path, name: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["version"] = name
    (directory / "config.json").write_text(json.dumps(config))


def test_a_version_trained_from_the_running_service(
    start_predictor: Start, connect: Connect, register: Register, client: Client,
    catalogue_embedder: ServiceProcess, catalogue: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    """Users walk through the kinds in one order; what is learned of that is answered."""
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    kinds = ["coffee", "tea", "bread", "cheese", "apple", "soap"]
    rng = random.Random(0)

    def walk(user: str, begin: int, steps: int) -> list[event_pb.Event]:
        events = []
        for step in range(steps):
            kind, behavior_type = kinds[(begin + step) % 6], ("view", "buy")[step % 2]
            item_id = f"{kind}-{rng.randrange(5)}"
            event = event_pb.Event(user_id=user, behavior_type=behavior_type, item_id=item_id)
            event.timestamp.FromSeconds(1_000_000 + 600 * step + begin)
            events.append(event)
        return events

    for number in range(60):
        request = event_pb.IngestEventsRequest(events=walk(f"user {number}", number % 6, 16))
        assert stubs.events.IngestEvents(request).accepted == 16
    arguments = ["train", "--store", str(tmp_path / "data"), "--out", str(tmp_path / "one")]
    arguments += ["--embedder", catalogue_embedder.address, "--split", "leave-one-out"]
    assert predictor_main([*arguments, "--epochs", "8", "--json"]) == 0
    register(tmp_path / "one")
    assert activate(stubs, "one").model.items == len(catalogue)
    hits = types = 0
    for begin in range(6):
        query = pb.PredictionQuery(history=walk("", begin, 7), k=5)
        answer = stubs.predictions.Predict(pb.PredictRequest(query=query)).prediction
        assert not answer.fallback_reason
        kind = kinds[(begin + 7) % 6]
        hits += sum(item.item_id.startswith(kind) for item in answer.items)
        types += answer.behavior_types[0].behavior_type == "buy"
    assert hits > 15  # of 30; by chance 5
    assert types == 6
    clean(stubs, client)


def test_an_item_that_comes_back_has_its_text_only(
    start_predictor: Start, connect: Connect, make_version: Make, register: Register,
    client: Client, catalogue_embedder: ServiceProcess,
) -> None:  # fmt: skip
    """Residuals of items that are gone are left out at publication, without an error."""
    client.upsert_items([Item("extra", "an extra item")])
    register(make_version("one", item_ids=("tea-1", "never there", "extra")))
    client.delete_items(["extra"])
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    ingest(stubs)
    assert activate(stubs, "one").model.items == 3
    assert not predict(stubs).fallback_reason
    clean(stubs, client)


@pytest.mark.parametrize("own", [3, None, [1], {"a": "x", "b": 10**400, "c": float("nan")}])
def test_a_report_of_another_form_has_no_figures(own: object) -> None:
    own_metrics = registry._own_metrics
    assert own_metrics({"items": own, "types": {"foretell": own}}) == {}
    assert own_metrics({"types": {"foretell": {"accuracy": 0.5}}}) == {"types.accuracy": 0.5}
