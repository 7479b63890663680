"""Searches vectors with one library and prints a JSON object.

python vector_search.py faiss FOLDER --factory IVF512,RaBitQfs,RFlat --nprobe 8 --k-factor 3.2
python vector_search.py usearch FOLDER
python vector_search.py hnswlib FOLDER

FOLDER has the files of bench/vectors.py. A graph's search width is the least of SEARCH_WIDTHS with
which it reaches RECALL, as are faiss' nprobe and efSearch where --tune is given.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import numpy as np

RECALL = 0.98
CALL = 64
"""Queries a call."""
K = 10
SEARCH_WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PROBES = (4, 8, 16, 32, 64, 128)
M, EF_CONSTRUCTION = 32, 200
"""Of graphs; 32 neighbours as faiss' HNSW32."""


class _Usearch:
    widths = SEARCH_WIDTHS

    def __init__(self, options):
        from usearch.index import Index

        self.threads = options.threads
        self.index = Index(
            ndim=options.cols, metric="ip", dtype="f32", connectivity=M,
            expansion_add=EF_CONSTRUCTION,
        )  # fmt: skip

    def add(self, vectors):
        self.index.add(np.arange(len(vectors)), vectors, threads=self.threads)

    def widen(self, width):
        self.index.expansion_search = width

    def search(self, queries):
        return self.index.search(queries, K, threads=self.threads).keys


class _Hnswlib:
    widths = SEARCH_WIDTHS

    def __init__(self, options):
        import hnswlib

        self.index = hnswlib.Index(space="ip", dim=options.cols)
        self.index.init_index(max_elements=options.rows, ef_construction=EF_CONSTRUCTION, M=M)
        self.index.set_num_threads(options.threads)

    def add(self, vectors):
        self.index.add_items(vectors)

    def widen(self, width):
        self.index.set_ef(width)

    def search(self, queries):
        return self.index.knn_query(queries, K)[0]


class _Faiss:
    """The factory string's last part may be RFlat: the best of k_factor * K hits are taken by the
    vectors themselves."""

    def __init__(self, options):
        import faiss

        faiss.omp_set_num_threads(options.threads)
        if options.blas_threshold:
            faiss.cvar.distance_compute_blas_threshold = options.blas_threshold
        self.faiss, self.options = faiss, options
        self.index = faiss.index_factory(options.cols, options.factory, faiss.METRIC_INNER_PRODUCT)
        self.widths = (options.nprobe,)
        if options.tune:
            self.widths = SEARCH_WIDTHS if "HNSW" in options.factory else PROBES

    def add(self, vectors):
        rng = np.random.default_rng(0)
        if not self.index.is_trained:
            count = min(len(vectors), self.options.trained_on)
            self.index.train(vectors[np.sort(rng.choice(len(vectors), count, replace=False))])
        self.index.add(vectors)

    def widen(self, width):
        if "HNSW" in self.options.factory:
            parameters = self.faiss.SearchParametersHNSW(efSearch=width)
        else:
            parameters = self.faiss.SearchParametersIVF(nprobe=width)
        if self.options.factory.endswith(",RFlat"):
            parameters = self.faiss.IndexRefineSearchParameters(
                k_factor=self.options.k_factor, base_index_params=parameters
            )
        self.parameters = parameters

    def search(self, queries):
        return self.index.search(queries, K, params=self.parameters)[1]


LIBRARIES = {"faiss": _Faiss, "usearch": _Usearch, "hnswlib": _Hnswlib}


def main():
    """Builds, tunes, measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--factory")
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--k-factor", type=float)
    parser.add_argument("--trained-on", type=int)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--blas-threshold", type=int)
    options = parser.parse_args()
    # Mapped: only what the library keeps counts as its memory.
    vectors = np.load(options.folder / "vectors.npy", mmap_mode="r")
    queries = np.load(options.folder / "queries.npy")
    truth = np.load(options.folder / "truth.npy")
    options.rows, options.cols = vectors.shape

    vectors[:: 4096 // 64].sum()  # into the page cache
    gc.collect()
    before = memory()
    begin = time.perf_counter()
    library = LIBRARIES[options.library](options)
    library.add(vectors)
    build_s = time.perf_counter() - begin
    result = {"build_s": build_s, "bytes_per_vector": (memory() - before) / len(vectors)}
    for width in library.widths:
        library.widen(width)
        found = np.concatenate([library.search(some) for some in calls(queries)])
        same = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
        result |= {"width": width, "recall_at_10": sum(same) / truth.size}
        if result["recall_at_10"] >= RECALL:
            break
    rates, until = [], time.perf_counter() + options.seconds
    while len(rates) < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        for some in calls(queries):
            library.search(some)
        rates.append(len(queries) / (time.perf_counter() - begin))
    single = []
    for query in queries[:512]:
        begin = time.perf_counter()
        library.search(query[None])
        single.append(time.perf_counter() - begin)
    result |= {
        "batch_queries_s": statistics.median(rates),
        "single_p99_ms": 1000 * float(np.quantile(single, 0.99)),
    }
    print(json.dumps(result), flush=True)  # noqa: T201


def calls(queries):
    """Queries in calls of CALL."""
    return [queries[start : start + CALL] for start in range(0, len(queries), CALL)]


def memory():
    """Bytes of this process that no file backs."""
    with Path("/proc/self/status").open() as file:
        (line,) = (line for line in file if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
