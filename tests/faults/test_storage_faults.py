"""A database that another process holds, and a full disk: told clearly, and over by itself."""

import contextlib
import resource
import signal
import socket
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from foretell import Client, Event, Item
from foretell.errors import DeadlineExceededError, ResourceExhaustedError
from serving.process import ServiceProcess

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]

QUICK = ("--precision", "float32")
"""Spares a start the measuring of a faster path."""

CALLS = 20
"""In flight at each service when it is to stop."""

PATIENCE_S = 15.0
"""Far less than a service waits for a database, far more than a read takes on a busy machine."""


@contextlib.contextmanager
def held(*files: Path) -> Iterator[None]:
    """The databases are another process's, as by a backup that takes too long."""
    with contextlib.ExitStack() as holders:
        for file in files:
            holder = sqlite3.connect(file, isolation_level=None, timeout=30)
            holders.callback(holder.close)
            holder.execute("BEGIN IMMEDIATE")
        yield


def test_a_held_database(
    start_embedder: Start, start_predictor: Start, free_ports: tuple[int, int], tmp_path: Path,
    eventually: Eventually,
) -> None:  # fmt: skip
    """Writes wait for it and reads do not; a service that is to stop waits for these writes."""
    embedder_port, predictor_port = map(str, free_ports)
    data = str(tmp_path / "embedder")
    embedder = start_embedder(*QUICK, "--data-dir", data, "--metrics-port", embedder_port)
    predictor = start_predictor(embedder.address, "--metrics-port", predictor_port)
    files = tmp_path / "embedder" / "embedder.sqlite", tmp_path / "data" / "events.db"
    with (
        ThreadPoolExecutor(2 * CALLS) as calls,
        Client(embedder.address, predictor.address) as client,
    ):
        client.upsert_items([Item("shoes", "red shoes")])
        client.ingest_events([Event("ann", "view", item_id="shoes", text="nice")])
        eventually(lambda: client.predictor_info().pending_texts == 0)
        late = [Event("bob", "buy", text="late")]
        with held(*files):
            begin = time.monotonic()
            upserted = calls.submit(client.upsert_items, [Item("coat", "red coat")])
            ingested = calls.submit(client.ingest_events, [Event("ann", "buy", item_id="shoes")])
            with pytest.raises(DeadlineExceededError):
                client.upsert_items([Item("hat")], request_id="late", timeout_s=0.3)
            with pytest.raises(DeadlineExceededError):
                client.ingest_events(late, request_id="late", timeout_s=0.3)
            assert client.search(texts=["shoes"], k=1).hits[0].ids == ("shoes",)
            assert [item.item_id for item in client.predict("ann", k=1).items] == ["shoes"]
            assert len(client.list_events("ann").elements) == 1
            assert time.monotonic() - begin < PATIENCE_S
            assert not upserted.done()
            assert not ingested.done()
        assert upserted.result(30).upserted == ingested.result(30).accepted == 1
        # A late write may have been done after its caller had left; repeated, it is there once.
        assert client.ingest_events(late, request_id="late").accepted == 1
        assert client.upsert_items([Item("hat")], request_id="late").upserted == 1
        assert len(client.list_events("bob").elements) == 1
        assert {item.id for item in client.list_items().elements} == {"shoes", "coat", "hat"}
        eventually(lambda: client.predictor_info().pending_texts == 0)

        with held(*files):
            upserts = [
                calls.submit(client.upsert_items, [Item(str(n), "shoes")]) for n in range(CALLS)
            ]
            ingests = [
                calls.submit(client.ingest_events, [Event(f"user {n}", "view", item_id="shoes")])
                for n in range(CALLS)
            ]
            eventually(lambda: in_flight(embedder_port, "UpsertItems") == CALLS)
            eventually(lambda: in_flight(predictor_port, "IngestEvents") == CALLS)
            for service in (embedder, predictor):
                service.process.send_signal(signal.SIGTERM)
            eventually(lambda: refuses(embedder.address) and refuses(predictor.address))
        assert sum(call.result(30).upserted for call in upserts) == CALLS
        assert sum(call.result(30).accepted for call in ingests) == CALLS
        assert embedder.process.wait(30) == predictor.process.wait(30) == 0
    for log in ("embedder.log", "predictor.log"):
        assert "Traceback" not in (tmp_path / log).read_text()


def refuses(address: str) -> bool:
    """Whether nobody listens there any more."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


def in_flight(port: str, method: str) -> float:
    """Calls that have begun and not ended, by a service's page of metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = [line.decode().split() for line in page]
    counted = {"grpc_server_started_total": 0.0, "grpc_server_handled_total": 0.0}
    for name, value in (line for line in lines if len(line) == 2):
        kind = name.partition("{")[0]
        if kind in counted and f'grpc_method="{method}"' in name:
            counted[kind] += float(value)
    started, handled = counted.values()
    return started - handled


def test_a_predictors_full_disk_is_told_and_loses_nothing(
    start_predictor: Start, embedder_address: str, tmp_path: Path, eventually: Eventually
) -> None:
    """The kernel refuses to let a file grow (RLIMIT_FSIZE), as with a quota."""
    service = start_predictor(embedder_address)
    pid, data = service.process.pid, tmp_path / "data"
    kept = [Event("ann", "view", text=f"kept {n}", event_id=f"kept {n}") for n in range(20)]
    many = [Event("bob", "view", item_id="a", attributes={"padding": "x" * 1_000})] * 2_000
    with Client(predictor=service.address) as client:
        client.ingest_events(kept)
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        largest = max(path.stat().st_size for path in data.iterdir() if path.is_file())
        # The log of the service may grow.
        limit = max(largest, (tmp_path / "predictor.log").stat().st_size) + 200_000
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        for _ in range(2):
            with pytest.raises(ResourceExhaustedError) as raised:
                client.ingest_events(many)
            assert raised.value.reason == "DISK_FULL"
            assert raised.value.retry_after_s
        assert client.list_events("bob").elements == ()
        assert client.predict("ann").history_events == len(kept)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert client.ingest_events(many).accepted == len(many)
        assert client.ingest_events(kept).duplicates == len(kept)
        eventually(lambda: client.predictor_info().pending_texts == 0)
        assert client.delete_user("bob").deleted_events == len(many)
        service.kill()
    assert "Traceback" not in (tmp_path / "predictor.log").read_text()
    with Client(predictor=start_predictor(embedder_address).address) as client:
        assert {event.text for event in client.list_events("ann").elements} == {
            event.text for event in kept
        }
        assert client.delete_user("ann").deleted_events == len(kept)
        eventually(lambda: client.predictor_info().pending_texts == 0)
