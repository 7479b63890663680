"""How long the embedder takes to start again, and how fast it takes vectors.

A vector collection of 384 dimensions is filled through gRPC (PutVectors, calls of 256, a few in
flight, the client in a process of its own), the server is stopped and started: from its snapshot,
and from SQLite after the snapshots were removed. Raw SQLite beside it: one thread, a table of id
and vector, transactions of 256 rows, synced like the embedder's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import grpc
import numpy as np

from bench.harness import Budget, Figures, finish, load, parser, say, versions
from embedder.search.index import TAIL_LEAST
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.vectors import Vectors, to_block
from serving.process import ServiceProcess, start

EPILOG = """
figures (N: n1m, or what --rows makes of it):
  item_writes_s             vectors acknowledged per second, on the disk when they are
  raw_sqlite_rows_s         the same into a plain table, without gRPC
  N_snapshot_start_s        process start until ready, from a snapshot; files in the page cache
  N_snapshot_cold_start_s   the same after they were dropped from it
  N_rebuild_start_s         the same without snapshots, from SQLite alone
  N_snapshot_load_s, N_rebuild_load_s
                            the part of it that reads vectors
  empty_start_s             imports and model: a start with an empty data directory
  N_sqlite_bytes_per_vector, N_snapshot_bytes_per_vector
                            on disk
  N_accelerated             1: the snapshot has an accelerator; 0: the budget ended before
"""

COLLECTION = "bench"
COLS = 384
CALL_ROWS = 256
IN_FLIGHT = 4
STARTS = 3
"""Of which the median is taken."""
RAW_ROWS = 100_000

LOADED = re.compile(r"loaded (\d+) vectors in ([\d.]+) s")


def main() -> int:
    """Runs the benchmark."""
    options = parser("restart", __doc__ or "", 1_200)
    options.epilog = EPILOG
    options.add_argument("--rows", type=int, default=1_000_000, metavar="N",
                         help="vectors (default: %(default)s)")  # fmt: skip
    options.add_argument("--dir", type=Path, metavar="DIR",
                         help="where the data directory is made for the run")  # fmt: skip
    args = options.parse_args()
    budget = Budget(args.budget_s)
    figures: Figures = {"load_before": load()}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        figures |= _measure(Path(folder), args.rows, args.threads, budget)
    for name, value in figures.items():
        say(f"{name:36} {value}")
    finish("restart", versions("numpy", "grpcio") | {"sqlite": sqlite3.sqlite_version}, figures)
    return 0


def _measure(folder: Path, rows: int, threads: int, budget: Budget) -> Figures:
    size = f"n{rows // 1_000_000}m" if rows >= 1_000_000 else f"n{rows // 1_000}k"
    figures: Figures = {"raw_sqlite_rows_s": _raw_sqlite(folder / "raw.sqlite")}
    data = folder / "data"
    with _serving(data, threads, folder) as (server, seconds, _):
        figures["empty_start_s"] = seconds
        stub = rpc.EmbedderServiceStub(grpc.insecure_channel(server.address))
        vector = pb.VectorCollection(cols=COLS)
        stub.CreateCollection(pb.CreateCollectionRequest(name=COLLECTION, vector=vector))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            took = pool.submit(_fill, server.address, rows).result()
        figures["item_writes_s"] = rows / took
        say(f"{rows:,} vectors in {took:.1f} s: {rows / took:,.0f}/s")
        figures[f"{size}_accelerated"] = int(accelerated(stub, rows, budget))
    database = sum(path.stat().st_size for path in data.glob("embedder.sqlite*"))
    figures[f"{size}_sqlite_bytes_per_vector"] = database / rows
    snapshots = data / "snapshots"
    kept = sum(path.stat().st_size for path in snapshots.rglob("*") if path.is_file())
    figures[f"{size}_snapshot_bytes_per_vector"] = kept / rows
    figures |= _starts(data, threads, folder, rows, f"{size}_snapshot", STARTS, budget)
    for path in data.rglob("*"):
        if path.is_file():
            _forget(path)
    with _serving(data, threads, folder, rows) as (_, seconds, _):
        figures[f"{size}_snapshot_cold_start_s"] = seconds
    shutil.rmtree(snapshots)
    return figures | _starts(data, threads, folder, rows, f"{size}_rebuild", 1, budget)


def _starts(
    data: Path, threads: int, folder: Path, rows: int, name: str, times: int, budget: Budget
) -> Figures:
    """Starts and kills a server; a clean stop would write a snapshot."""
    starts, loads = [], []
    for _ in range(times):
        with _serving(data, threads, folder, rows) as (server, seconds, loading):
            server.kill()
        starts.append(seconds)
        loads.append(loading)
        say(f"{name}: {seconds:.2f} s until ready, {loading:.2f} s of it for the vectors")
        if not budget.left:
            break
    return {f"{name}_start_s": median(starts), f"{name}_load_s": median(loads)}


@contextlib.contextmanager
def _serving(
    data: Path, threads: int, folder: Path, rows: int | None = None
) -> Iterator[tuple[ServiceProcess, float, float]]:
    """A server; seconds until it was ready, and of those for the vectors, of which it has `rows`.

    Raises:
        RuntimeError: it has another number of vectors.
    """
    log = folder / "embedder.log"
    log.write_text("")
    arguments = ["--data-dir", str(data), "--port", "0", "--threads", str(threads)]
    begin = time.perf_counter()
    server = start("embedder", arguments, timeout_s=600, log=log)
    seconds = time.perf_counter() - begin
    try:
        found = LOADED.search(log.read_text())
        if found is None or (rows is not None and int(found[1]) != rows):
            raise RuntimeError(f"the embedder has not {rows} vectors; see {log}")
        yield server, seconds, float(found[2])
    finally:
        server.stop()
        if server.process.stdout is not None:
            server.process.stdout.close()


def _fill(address: str, rows: int) -> float:
    """Puts vectors, in a process of its own; seconds from the first call to the last answer."""
    options = [("grpc.max_send_message_length", -1)]
    stub = rpc.EmbedderServiceStub(grpc.insecure_channel(address, options))
    rng = np.random.default_rng(1)
    centers = rng.standard_normal((1_000, COLS), np.float32)
    begin = time.perf_counter()
    waiting: deque[grpc.Future[pb.PutVectorsResponse]] = deque()
    for first in range(0, rows, CALL_ROWS):
        count = min(CALL_ROWS, rows - first)
        if len(waiting) == IN_FLIGHT:
            waiting.popleft().result()
        request = pb.PutVectorsRequest(
            collection=COLLECTION,
            ids=[f"item {number}" for number in range(first, first + count)],
            vectors=to_block(_vectors(rng, centers, count)),
        )
        waiting.append(stub.PutVectors.future(request, timeout=120))
    for call in waiting:
        call.result()
    return time.perf_counter() - begin


def _vectors(rng: np.random.Generator, centers: Vectors, count: int) -> Vectors:
    """Unit vectors around some centers, as items are."""
    rows = centers[rng.integers(len(centers), size=count)]
    rows = rows + rng.standard_normal(rows.shape, np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def accelerated(stub: rpc.EmbedderServiceStub, rows: int, budget: Budget) -> bool:
    """Waits until the collection has its accelerator, or half of the budget is spent."""
    while budget.spent < budget.seconds / 2:
        for one in stub.ListCollections(pb.ListCollectionsRequest()).collections:
            if one.name == COLLECTION and (one.indexed > rows - TAIL_LEAST or rows < 100_000):
                return one.indexed > 0
        time.sleep(1)
    return False


def _raw_sqlite(path: Path) -> float:
    """Rows per second of SQLite alone."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((CALL_ROWS, COLS), np.float32)
    blobs = [row.tobytes() for row in rows]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE vectors (id TEXT PRIMARY KEY, vector BLOB NOT NULL)")
        begin = time.perf_counter()
        for first in range(0, RAW_ROWS, CALL_ROWS):
            ids = (f"item {number}" for number in range(first, first + CALL_ROWS))
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?)", zip(ids, blobs, strict=True)
            )
            connection.execute("COMMIT")
        seconds = time.perf_counter() - begin
    path.unlink()
    return RAW_ROWS / seconds


def _forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
