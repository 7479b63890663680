"""What a million items and a million events take: memory of the services, and disk.

Each is measured at two sizes, N/2 and N; the figure is what the second half added, times a million
by its number: an extrapolation unless N is two million. Services run by themselves with their
defaults; memory is the resident set, after the filling and again after a new start.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np

from bench.harness import Budget, Figures, finish, load, parser, say, versions
from bench.restart import COLLECTION, COLS, accelerated
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import event_service_pb2_grpc as event_rpc
from foretell.vectors import to_block
from predictor.catalog import Catalog
from serving.process import ServiceProcess, started

EPILOG = """
figures, all for a million more (disk: SQLite without its write-ahead log):
  embedder_bytes_per_million_items
                        resident after a start: a collection of 384 dimensions with its accelerator,
                        from a snapshot
  embedder_filled_bytes_per_million_items
                        the same after they were written, before a new start
  embedder_disk_bytes_per_million_items, embedder_snapshot_bytes_per_million_items
                        of them; a text and its attributes come on top
  predictor_disk_bytes_per_million_events
                        events of a user, a type, an item and a time, 100 a user
  predictor_disk_bytes_per_million_events_with_ids
                        with an event_id, a UUID, too
  predictor_rss_bytes_per_million_events
                        growth of the resident set while they came
  predictor_bytes_per_million_items
                        a model's vectors of 64 dimensions in each predictor process
  accelerated           1: the collection had its accelerator at both sizes; 0: out of budget
  measured_items, measured_events
                        N of the items and of the events
"""

MILLION = 1_000_000
DIMS = 64
CALL_ROWS = 1_000
PER_USER = 100
ITEMS = 12_101


def main() -> int:
    """Runs the benchmark."""
    options = parser("memory", __doc__ or "", 1_200)
    options.epilog = EPILOG
    options.add_argument("--items", type=int, default=200_000, metavar="N",
                         help="items at most (default: %(default)s)")  # fmt: skip
    options.add_argument("--events", type=int, default=1_000_000, metavar="N",
                         help="events at most (default: %(default)s)")  # fmt: skip
    args = options.parse_args()
    budget = Budget(args.budget_s)
    figures: Figures = {
        "load_before": load(),
        "measured_items": args.items,
        "measured_events": args.events,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures |= _items(folder, args.items, budget)
        say(f"{budget.spent:.0f} s")
        before = budget.spent
        figures |= _events(folder / "plain", args.events, ids=False)
        say(f"{budget.spent:.0f} s")
        if budget.left > 2 * (budget.spent - before):
            with_ids = _events(folder / "ids", args.events, ids=True)
            disk = "predictor_disk_bytes_per_million_events"
            figures[f"{disk}_with_ids"] = with_ids[disk]
    figures["predictor_bytes_per_million_items"] = _catalog(args.items)
    for figure, value in figures.items():
        say(f"{figure:48} {value:,.0f}")
    finish("memory", versions("numpy", "grpcio") | {"sqlite": sqlite3.sqlite_version}, figures)
    return 0


def _items(folder: Path, count: int, budget: Budget) -> Figures:
    """A vector collection of the embedder."""
    data = folder / "embedder"
    filled, again, disk, kept, done = [], [], [], [], []
    for begin, end in ((0, count // 2), (count // 2, count)):
        with _service("embedder", data) as service:
            with grpc.insecure_channel(service.address) as channel:
                stub = rpc.EmbedderServiceStub(channel)
                _put(stub, begin, end)
                done.append(accelerated(stub, end, budget))
            filled.append(_rss(service))
        disk.append(_bytes(data, "*.sqlite"))
        kept.append(_bytes(data / "snapshots", "**/*"))
        with _service("embedder", data) as service:
            again.append(_rss(service))
    return {
        "accelerated": int(all(done)),
        "embedder_bytes_per_million_items": _slope(again, count),
        "embedder_filled_bytes_per_million_items": _slope(filled, count),
        "embedder_disk_bytes_per_million_items": _slope(disk, count),
        "embedder_snapshot_bytes_per_million_items": _slope(kept, count),
    }


def _put(stub: rpc.EmbedderServiceStub, begin: int, end: int) -> None:
    if not begin:
        vector = pb.VectorCollection(cols=COLS)
        stub.CreateCollection(pb.CreateCollectionRequest(name=COLLECTION, vector=vector))
    rng = np.random.default_rng(begin)
    for at in range(begin, end, CALL_ROWS):
        ids = [f"item-{number}" for number in range(at, min(at + CALL_ROWS, end))]
        vectors = to_block(rng.standard_normal((len(ids), COLS)).astype(np.float32))
        stub.PutVectors(pb.PutVectorsRequest(collection=COLLECTION, ids=ids, vectors=vectors))


def _events(data: Path, count: int, *, ids: bool) -> Figures:
    """A predictor's events."""
    grown, disk = [], []
    with (
        _service("predictor", data, "--embedder", "127.0.0.1:1") as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        stub = event_rpc.EventServiceStub(channel)
        for begin, end in ((0, count // 2), (count // 2, count)):
            _ingest(stub, begin, end, ids=ids)
            grown.append(_rss(service))
            disk.append(_used(data / "events.db"))
    return {
        "predictor_disk_bytes_per_million_events": _slope(disk, count),
        "predictor_rss_bytes_per_million_events": _slope(grown, count),
    }


def _ingest(stub: event_rpc.EventServiceStub, begin: int, end: int, *, ids: bool) -> None:
    rng = np.random.default_rng(begin)
    users = max(1, end // PER_USER)
    for at in range(begin, end, CALL_ROWS):
        events = []
        for number in range(at, min(at + CALL_ROWS, end)):
            event = event_pb.Event(
                user_id=f"user-{rng.integers(users)}",
                behavior_type=("view", "cart", "buy")[number % 3],
                item_id=f"item-{rng.integers(ITEMS)}",
                event_id=str(uuid.uuid4()) if ids else "",
            )
            event.timestamp.FromSeconds(1_700_000_000 + number)
            events.append(event)
        stub.IngestEvents(event_pb.IngestEventsRequest(events=events))


def _catalog(count: int) -> float:
    """A model's vectors as each predictor process has them, in this process."""
    rng = np.random.default_rng(0)
    catalog = Catalog(COLLECTION, DIMS)
    sizes = []
    for begin, end in ((0, count // 2), (count // 2, count)):
        for at in range(begin, end, CALL_ROWS):
            ids = [f"item-{number}" for number in range(at, min(at + CALL_ROWS, end))]
            vectors = to_block(rng.standard_normal((len(ids), DIMS)).astype(np.float32))
            changes = pb.WatchItemsResponse(ids=ids, vectors=vectors, seq=1)
            catalog.apply(changes)
        sizes.append(_resident(Path("/proc/self/status")))
    return _slope(sizes, count)


def _slope(sizes: list[int], count: int) -> float:
    """What a million more would take, by what the second half took."""
    return (sizes[1] - sizes[0]) / (count - count // 2) * MILLION


@contextlib.contextmanager
def _service(name: str, data: Path, *arguments: str) -> Iterator[ServiceProcess]:
    flags = ["--port", "0", "--data-dir", str(data), *arguments]
    with started(name, flags, log=data.with_suffix(".log")) as service:
        yield service


def _rss(service: ServiceProcess) -> int:
    return _resident(Path(f"/proc/{service.process.pid}/status"))


def _resident(status: Path) -> int:
    """Bytes of a process that are in memory."""
    lines = status.read_text().splitlines()
    return 1_024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def _bytes(folder: Path, names: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(names) if path.is_file())


def _used(path: Path) -> int:
    """Bytes of an SQLite file's pages that are in use."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        pages, free, size = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
    return (pages - free) * size


if __name__ == "__main__":
    sys.exit(main())
