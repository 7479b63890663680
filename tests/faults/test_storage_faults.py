"""A database that another process holds, and a full disk: told clearly, and over by itself."""

import contextlib
import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from foretell import Client, Event, Item
from foretell.errors import DeadlineExceededError, ResourceExhaustedError
from serving.process import ServiceProcess

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]

QUICK_S = 5.0
"""Far less than a service waits for a database, far more than a read takes on a busy machine."""


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """The database is another process's, as by a backup that takes too long."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=30)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield


def test_writes_wait_for_a_held_database_and_reads_do_not(
    own_embedder: ServiceProcess, start_predictor: Start, tmp_path: Path, eventually: Eventually
) -> None:
    embedder, predictor = own_embedder.address, start_predictor(own_embedder.address).address
    with ThreadPoolExecutor(2) as calls, Client(embedder, predictor) as client:
        client.upsert_items([Item("shoes", "red shoes")])
        client.ingest_events([Event("ann", "view", item_id="shoes", text="nice")])
        eventually(lambda: client.predictor_info().pending_texts == 0)
        with held(tmp_path / "embedder" / "embedder.sqlite"), held(tmp_path / "data" / "events.db"):
            begin = time.monotonic()
            upserted = calls.submit(client.upsert_items, [Item("coat", "red coat")])
            ingested = calls.submit(client.ingest_events, [Event("ann", "buy", item_id="shoes")])
            with pytest.raises(DeadlineExceededError):
                client.upsert_items([Item("hat")], request_id="late", timeout_s=0.3)
            with pytest.raises(DeadlineExceededError):
                client.ingest_events([Event("bob", "buy", text="late")], request_id="late",
                                     timeout_s=0.3)  # fmt: skip
            assert client.search(texts=["shoes"], k=1).hits[0].ids == ("shoes",)
            assert [item.item_id for item in client.predict("ann", k=1).items] == ["shoes"]
            assert len(client.list_events("ann").elements) == 1
            assert time.monotonic() - begin < QUICK_S
            assert not upserted.done()
            assert not ingested.done()
        assert upserted.result(30).upserted == ingested.result(30).accepted == 1
        # A late write may have been done after its caller had left; repeated, it is there once.
        assert client.ingest_events([Event("bob", "buy", text="late")], request_id="late").accepted
        assert client.upsert_items([Item("hat")], request_id="late").upserted
        assert len(client.list_events("bob").elements) == 1
        assert {item.id for item in client.list_items().elements} == {"shoes", "coat", "hat"}
        eventually(lambda: client.predictor_info().pending_texts == 0)
    for log in ("embedder.log", "predictor.log"):
        assert "Traceback" not in (tmp_path / log).read_text()


def test_a_predictors_full_disk_is_told_and_loses_nothing(
    start_predictor: Start, embedder_address: str, tmp_path: Path, eventually: Eventually
) -> None:
    """The kernel refuses to let a file grow (RLIMIT_FSIZE), as with a quota."""
    service = start_predictor(embedder_address)
    pid, data = service.process.pid, tmp_path / "data"
    kept = [Event("ann", "view", text=f"kept {n}", event_id=f"kept {n}") for n in range(20)]
    many = [Event("bob", "view", text=f"{n} " + "x" * 2_000) for n in range(1_000)]
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
