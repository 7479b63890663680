"""Vectors to search: those of Complete Journey's product texts, and noisy ones like them.

The noise has the covariance of the item vectors and half their spread (NOISE), so that what is made
lies where items lie: of 100,000 such vectors a query's nearest has a cosine of 0.93 on average and
the tenth one of 0.88; of the items themselves 0.98 and 0.92. Queries are noisy item vectors of
their own.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from bench import datasets
from bench.harness import say
from foretell import AsyncClient
from foretell.vectors import Vectors
from serving import process

VERSION = 1
"""Of what follows: files of another one are written anew."""

QUERIES = 2_048

K = 10

NOISE = 0.5

MADE_TOGETHER = 65_536


@dataclass(frozen=True)
class VectorFiles:
    """What peers read too."""

    folder: Path
    """With vectors.npy, float32 (count, cols) of length 1; queries.npy, the same of QUERIES rows;
    and truth.npy, int64 (QUERIES, K): the rows nearest to each."""

    def read(self, name: str) -> Vectors:
        """One of them, in memory."""
        numbers: Vectors = np.load(self.folder / f"{name}.npy")
        return numbers


def files(count: int, cache: Path, threads: int) -> VectorFiles:
    """Files of `count` vectors, made where they are missing; `threads` of the encoder."""
    texts = _texts(cache)
    key = hashlib.sha256("\n".join([str(VERSION), *texts]).encode()).hexdigest()[:12]
    folder = cache.expanduser() / "data" / f"vectors-{key}"
    items, made = folder / "items.npy", folder / str(count)
    if not items.exists():
        folder.mkdir(parents=True, exist_ok=True)
        say(f"encoding {len(texts)} item texts")
        np.save(items, asyncio.run(_encoded(texts, threads)))
    if not made.exists():
        new = Path(tempfile.mkdtemp(dir=folder))
        _make(np.load(items), count, new)
        new.rename(made)
    return VectorFiles(made)


def _texts(cache: Path) -> list[str]:
    with datasets.files("journey", Path(), cache).items.open(encoding="utf-8") as file:
        return list(dict.fromkeys(row["text"] for row in csv.DictReader(file)))


async def _encoded(texts: Sequence[str], threads: int) -> Vectors:
    """Vectors of the default encoder, scaled to length 1."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", "0", "--data-dir", folder, "--threads", str(threads)]
        with process.started("embedder", arguments, log=Path(folder) / "log") as service:
            async with AsyncClient(embedder=service.address) as client:
                found = [
                    (await client.embed(texts[start : start + 256])).vectors
                    for start in range(0, len(texts), 256)
                ]
    return _scaled(np.concatenate(found))


def _make(items: Vectors, count: int, folder: Path) -> None:
    """The items themselves first, as many as fit; then noisy ones."""
    say(f"making {count:,} vectors")
    rng = np.random.default_rng(VERSION)
    variances, axes = np.linalg.eigh(np.cov(items.T))
    noise = (axes * (NOISE * np.sqrt(np.maximum(variances, 0)))).T.astype(np.float32)

    def noisy(some: int) -> Vectors:
        drawn = rng.standard_normal((some, len(noise)), np.float32)
        return _scaled(items[rng.integers(0, len(items), some)] + drawn @ noise)

    vectors = np.empty((count, items.shape[1]), np.float32)
    vectors[: len(items)] = items[:count]
    for start in range(len(items), count, MADE_TOGETHER):
        end = min(count, start + MADE_TOGETHER)
        vectors[start:end] = noisy(end - start)
    queries = noisy(QUERIES)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "truth.npy", faiss.knn(queries, vectors, K, faiss.METRIC_INNER_PRODUCT)[1])


def _scaled(vectors: Vectors) -> Vectors:
    scaled: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled
