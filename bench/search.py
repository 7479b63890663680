"""How fast vectors are searched, how many of the nearest are found, and what an index costs.

A vector collection of 384 dimensions (bench/vectors.py) in `python -m embedder` with its default
settings, searched through gRPC for the 10 nearest; raw faiss in a process of its own, with the same
factory string and parameters over the same vectors, hits scored again by the vectors themselves
(RFlat) as ours are; usearch and hnswlib, graphs, each with the least search width that reaches a
recall of 0.98. Figures, with N = n100k and, with --full, n1m:

- N_recall_at_10: of the answers, against exact search; N_reported_recall_at_10: as the server says.
- N_batch_queries_s: calls of 64 queries through gRPC, 4 in flight; N_in_process_batch_queries_s:
  the same calls of VectorIndex without gRPC, one after another.
- N_raw_faiss_batch_queries_s: the same calls of faiss; N_raw_faiss_recall_at_10 and so on.
- N_ratio_raw_faiss, N_ratio_in_process: of the two to raw faiss.
- N_queries_s_cC, N_p50_ms_cC, N_p99_ms_cC: C callers, each with one query a call.
- N_build_s: training, adding, and measuring the recall, beside no searches; N_put_s: writing the
  vectors through gRPC, in calls of 4,096, before.
- N_bytes_per_vector: memory of the server that the vectors took, ids and SQLite's caches included;
  N_raw_faiss_bytes_per_vector: of faiss with its copy of the vectors.
- n100k_PEER_...: of usearch and hnswlib.
- load_before: running processes at the start, above about 0.5 figures are lower bounds;
  peers_from_cache: 1 where those of the peers are an earlier run's.

--kinds compares, in raw faiss, kinds of indexes that were considered.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import grpc
import numpy as np

from bench import harness, vectors
from bench.harness import Budget, Figures, Peer, say
from bench.vectors import QUERIES, K, VectorFiles
from embedder.search import accelerators
from embedder.search.index import IndexOptions, VectorIndex
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.vectors import Vectors, to_block
from serving import process

SIZES = {"n100k": 100_000, "n1m": 1_000_000}

COLLECTION = "bench"

PUT = 4_096
"""Vectors in a call."""

CALL = 64
"""Queries in a large call."""

IN_FLIGHT = 4
"""Large calls at a time."""

CALLERS = (1, 16, 64)

GRAPHS = ("usearch", "hnswlib")

SEARCH = "/foretell.embedder.v1.EmbedderService/Search"

KINDS: Mapping[str, Mapping[str, Any]] = {
    "IVF{lists},RaBitQfs,RFlat": {"k_factor": 3.2},
    "IVF{lists},PQ192x4fs,RFlat": {"k_factor": 12.8},
    "IVF{lists},SQ8,RFlat": {"k_factor": 1.6},
    "IVF{lists},Flat": {},
    "HNSW32,SQ8,RFlat": {"k_factor": 3.2},
    "HNSW32,Flat": {},
}
"""Of --kinds: factory strings, and how many times K hits are scored again. PQ192x4fs is of 384
dimensions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("search", __doc__ or "", budget_s=1200)
    parser.add_argument("--full", action="store_true", help="1,000,000 vectors as well")
    parser.add_argument("--kinds", action="store_true",
                        help="compare kinds of indexes in raw faiss, and nothing else")  # fmt: skip
    options = parser.parse_args(arguments)
    budget = Budget(options.budget_s)
    faiss.omp_set_num_threads(options.threads)
    figures: Figures = {"load_before": harness.load()}
    versions = harness.versions("faiss-cpu", "grpcio", "numpy")
    peers = Peers(options)
    for name in SIZES if options.full else ("n100k",):
        found = vectors.files(SIZES[name], options.cache_dir, options.threads)
        # Each measurement takes about as long as another; there are some 10 of a size.
        seconds = min(10.0, max(1.0, budget.left / 100))
        if options.kinds:
            say(kinds_table(name, peers.kinds(found, seconds)))
            continue
        measured = _ours(found, options.threads, seconds)
        raw = peers.raw_faiss(found, int(measured["effort"]), seconds)
        measured |= {f"raw_faiss_{figure}": value for figure, value in raw.items()}
        measured["ratio_raw_faiss"] = measured["batch_queries_s"] / raw["batch_queries_s"]
        measured["ratio_in_process"] = (
            measured["in_process_batch_queries_s"] / raw["batch_queries_s"]
        )
        if name == "n100k":
            for graph in GRAPHS:
                result = peers.graph(graph, found, seconds)
                measured |= {f"{graph}_{figure}": value for figure, value in result.items()}
        figures |= {f"{name}_{figure}": value for figure, value in measured.items()}
        say(table(figures))
    figures["peers_from_cache"] = int(peers.from_cache)
    harness.finish("search", versions | peers.versions, figures)
    return 0


# --- Ours --------------------------------------------------------------------------------------


def _ours(found: VectorFiles, threads: int, seconds: float) -> dict[str, float]:
    """Figures of the server and of the index in this process."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", "0", "--data-dir", f"{folder}/data", "--threads", str(threads)]
        with process.started("embedder", arguments, log=Path(folder) / "log") as service:
            figures = asyncio.run(_served(service, found, seconds))
    return figures | _in_process(found, threads, seconds)


async def _served(
    service: process.ServiceProcess, found: VectorFiles, seconds: float
) -> dict[str, float]:
    figures: dict[str, float] = {}
    rows, queries, truth = (found.read(name) for name in ("vectors", "queries", "truth"))
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(service.address, options) as channel:
        stub: Any = rpc.EmbedderServiceStub(channel)
        before = _memory(service.process.pid)
        figures["put_s"] = await _put(stub, rows)
        collection = await _indexed(stub, len(rows))
        figures["bytes_per_vector"] = (_memory(service.process.pid) - before) / len(rows)
        figures["reported_recall_at_10"] = collection.recall_at_10
        # Bytes in and out: the client is to take little of the processors' time.
        search: Any = channel.unary_unary(SEARCH)
        single = [_request(query[None]) for query in queries]
        large = [_request(queries[at : at + CALL]) for at in range(0, QUERIES, CALL)]
        answers = [pb.SearchResponse.FromString(await search(request)) for request in large]
        figures["recall_at_10"] = _recall(answers, truth)
        for callers in CALLERS:
            times = await _load(search, single, callers, seconds)
            figures[f"queries_s_c{callers}"] = len(times) / seconds
            for share in (50, 99):
                figures[f"p{share}_ms_c{callers}"] = 1000 * float(np.percentile(times, share))
        rates = [
            CALL * len(await _load(search, large, IN_FLIGHT, seconds / 3)) / (seconds / 3)
            for _ in range(3)
        ]
        figures["batch_queries_s"] = median(rates)
    return figures


async def _put(stub: Any, rows: Vectors) -> float:
    """Writes all vectors, two calls at a time; seconds."""
    await stub.CreateCollection(
        pb.CreateCollectionRequest(name=COLLECTION, vector=pb.VectorCollection(cols=rows.shape[1]))
    )
    started = time.perf_counter()
    starts = iter(range(0, len(rows), PUT))

    async def put() -> None:
        for start in starts:
            some = rows[start : start + PUT]
            ids = [str(row) for row in range(start, start + len(some))]
            await stub.PutVectors(
                pb.PutVectorsRequest(collection=COLLECTION, ids=ids, vectors=to_block(some))
            )

    await asyncio.gather(put(), put())
    return time.perf_counter() - started


async def _indexed(stub: Any, count: int) -> pb.Collection:
    """Waits until the index holds about all vectors."""
    while True:
        listed = await stub.ListCollections(pb.ListCollectionsRequest())
        one: pb.Collection
        (one,) = (each for each in listed.collections if each.name == COLLECTION)
        if one.indexed >= 0.98 * count and one.HasField("recall_at_10"):
            return one
        await asyncio.sleep(0.5)


async def _load(
    search: Any, requests: Sequence[bytes], callers: int, seconds: float
) -> list[float]:
    """Seconds of each call of some callers, each of which begins the next when one has ended."""
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def call(first: int) -> None:
        number = first
        while (begin := time.perf_counter()) < until:
            await search(requests[number % len(requests)])
            times.append(time.perf_counter() - begin)
            number += callers

    await asyncio.gather(*(call(first) for first in range(callers)))
    return times


def _request(queries: Vectors) -> bytes:
    request = pb.SearchRequest(collection=COLLECTION, vectors=to_block(queries), k=K)
    return request.SerializeToString()


def _recall(answers: Sequence[pb.SearchResponse], truth: Vectors) -> float:
    results = [result for answer in answers for result in answer.results]
    same = [
        len({*map(int, result.ids)} & {*nearest.tolist()})
        for result, nearest in zip(results, truth, strict=True)
    ]
    return sum(same) / truth.size


def _in_process(found: VectorFiles, threads: int, seconds: float) -> dict[str, float]:
    """Building the index, and searching it without gRPC."""
    rows, queries = found.read("vectors"), found.read("queries")
    index = VectorIndex(rows.shape[1], IndexOptions(threads=threads))
    for start in range(0, len(rows), PUT):
        some = rows[start : start + PUT]
        index.put([str(row) for row in range(start, start + len(some))], some, start + 1)
    begin = time.perf_counter()
    while index.maintain():
        pass
    build_s = time.perf_counter() - begin
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        for start in range(0, QUERIES, CALL):
            index.search(queries[start : start + CALL], K)
        rates.append(QUERIES / (time.perf_counter() - begin))
    accelerator = index.frozen().accelerator
    return {
        "build_s": build_s,
        "in_process_batch_queries_s": median(rates),
        "effort": 0 if accelerator is None else accelerator.effort,
    }


def _memory(pid: int) -> int:
    """Bytes of a process that no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


# --- Peers -------------------------------------------------------------------------------------


class Peers:
    """Other libraries in processes of their own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.from_cache = False
        self.versions: dict[str, str] = {}
        self._options = options

    def raw_faiss(self, found: VectorFiles, effort: int, seconds: float) -> dict[str, float]:
        """faiss as VectorIndex uses it; always measured anew, for the ratio."""
        count = len(found.read("vectors"))
        hits = 32  # for K and the spare ones
        factory = accelerators.factory("ivf_rabitq", count) + ",RFlat"
        arguments = ["--factory", factory, "--nprobe", str(accelerators.probes(hits, effort))]
        arguments += ["--k-factor", str(hits * effort / K)]
        say(f"raw faiss: {' '.join(arguments)}")
        return self._faiss(found, arguments, seconds)

    def kinds(self, found: VectorFiles, seconds: float) -> dict[str, dict[str, float]]:
        """Figures by factory string; each with the least nprobe or efSearch of good recall."""
        count = len(found.read("vectors"))
        results = {}
        for pattern, more in KINDS.items():
            factory = pattern.format(lists=accelerators.lists(count))
            say(factory)
            arguments = ["--factory", factory, "--tune"]
            arguments += [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
            results[factory] = self._faiss(found, arguments, seconds)
        return results

    def graph(self, name: str, found: VectorFiles, seconds: float) -> dict[str, float]:
        """Figures of usearch or hnswlib."""
        peer = harness.peer(name, self._options.cache_dir)
        versions = {f"{name}/{each}": version for each, version in peer.versions(name).items()}
        self.versions |= versions
        key = {
            "versions": versions,
            "hardware": harness.hardware(),
            "script": hashlib.sha256((harness.PEERS / SCRIPT).read_bytes()).hexdigest(),
            "vectors": [found.folder.parent.name, found.folder.name],
            "threads": self._options.threads,
        }

        def measure() -> Iterator[dict[str, Any]]:
            say(name)
            yield from self._run(peer, name, found, [], seconds)

        result, cached = harness.kept(
            self._options.cache_dir, f"search-{name}", key, measure, fresh=self._options.fresh
        )
        self.from_cache |= cached
        return result

    def _faiss(
        self, found: VectorFiles, arguments: Sequence[str], seconds: float
    ) -> dict[str, float]:
        count = accelerators.TRAINED_ON * accelerators.lists(len(found.read("vectors")))
        more = ["--trained-on", str(count)]
        more += ["--blas-threshold", str(faiss.cvar.distance_compute_blas_threshold)]
        peer = Peer("faiss", Path(sys.executable))
        (result,) = self._run(peer, "faiss", found, [*arguments, *more], seconds)
        return result

    def _run(
        self, peer: Peer, library: str, found: VectorFiles, more: Sequence[str], seconds: float
    ) -> Iterator[dict[str, Any]]:
        threads = self._options.threads
        arguments = [library, str(found.folder), "--threads", str(threads)]
        return peer.run(SCRIPT, [*arguments, "--seconds", str(seconds), *more], threads)


SCRIPT = "vector_search.py"


# --- Figures -----------------------------------------------------------------------------------


def table(figures: Figures) -> str:
    """Sizes as columns."""
    rows: dict[str, dict[str, str]] = {}
    for figure, value in figures.items():
        size, _, name = figure.partition("_")
        if size in SIZES:
            rows.setdefault(name, {})[size] = f"{value:.4g}"
    return harness.table([*SIZES], rows)


def kinds_table(size: str, results: Mapping[str, Mapping[str, float]]) -> str:
    """One kind a row."""
    rows = {
        f"{size} {factory}": {name: f"{value:.4g}" for name, value in result.items()}
        for factory, result in results.items()
    }
    return harness.table(list(next(iter(results.values()))), rows)


if __name__ == "__main__":
    sys.exit(main())
