"""The benchmark of searches: its vectors, and its runs of raw faiss."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from bench import search, vectors
from bench.harness import Figures
from bench.vectors import QUERIES, K, VectorFiles
from foretell.embedder.v1 import embedder_service_pb2 as pb


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VectorFiles:
    """6,000 vectors of 16 dimensions like 1,000 others."""
    monkeypatch.setattr(vectors, "MADE_TOGETHER", 1_500)
    items = vectors._scaled(np.random.default_rng(0).standard_normal((1_000, 16), np.float32))
    vectors._make(items, 6_000, tmp_path)
    assert np.array_equal(np.load(tmp_path / "vectors.npy")[:1_000], items)
    return VectorFiles(tmp_path)


def test_vectors_are_like_items(found: VectorFiles) -> None:
    rows, queries, truth = (found.read(name) for name in ("vectors", "queries", "truth"))
    assert rows.shape == (6_000, 16)
    assert queries.shape == (QUERIES, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    nearest = np.argsort(-(queries[:50] @ rows.T), axis=1)[:, :K]
    assert [{*row} for row in nearest.tolist()] == [{*row} for row in truth[:50].tolist()]
    to_items = (rows[1_000:] @ rows[:1_000].T).max(axis=1)
    assert 0.8 < to_items.mean() < 0.95  # of random directions it is 0.75
    assert len(np.unique(rows, axis=0)) == 6_000


def test_raw_faiss_runs_with_the_parameters_of_ours(found: VectorFiles, tmp_path: Path) -> None:
    peers = search.Peers(argparse.Namespace(threads=1, cache_dir=tmp_path, fresh=True))
    raw = peers.raw_faiss(found, effort=2, seconds=0.1)
    assert raw["recall_at_10"] > 0.7
    assert raw["width"] == 16
    assert raw["batch_queries_s"] > 100
    assert 0 < raw["build_s"] < 60


def test_recall_compares_ids() -> None:
    answers = [pb.SearchResponse(results=[pb.SearchResult(ids=["1", "2"])] * 2)]
    assert search._recall(answers, np.array([[2, 1], [2, 3]])) == 0.75


def test_sizes_are_columns() -> None:
    figures: Figures = {
        "n100k_p50_ms_c1": 1.5,
        "n1m_p50_ms_c1": 2.0,
        "n100k_build_s": 3,
        "load_before": 1,
    }
    assert search.table(figures).splitlines() == [
        "           n100k  n1m",
        "p50_ms_c1    1.5    2",
        "build_s        3    -",
    ]
