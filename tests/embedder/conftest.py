"""Stand-ins for the encoder, and collections over a store in a temporary folder."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.encoding.batcher import Batcher
from embedder.encoding.encoder import TokenBatch
from embedder.encoding.text_cache import TextCache
from embedder.storage.collections import Collections
from embedder.storage.store import Store
from embedder.storage.writer import Writer
from foretell.vectors import Vectors

COLS = 12


def hashed(text: str) -> Vectors:
    """The stand-in's vector of a text, shape (COLS,)."""
    seed = [ord(character) for character in text]
    row = np.random.default_rng(seed).standard_normal(COLS)
    return np.asarray(row / np.linalg.norm(row), np.float32)


@dataclass
class FakeBackend:
    """An encoder whose vectors are random but the same for the same text."""

    device: str = "cpu"
    cols: int = COLS
    batch_tokens: int = 256
    workers: int = 1
    batches: list[list[str]] = field(default_factory=list)
    """The texts of each forward pass."""
    before: Callable[[list[str]], None] = lambda texts: None
    """Called with the texts of a batch before it is encoded."""

    def encode(self, batch: TokenBatch) -> Vectors:
        texts = [
            "".join(map(chr, batch.ids[start:end]))
            for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        ]
        self.before(texts)
        self.batches.append(texts)
        return np.array([hashed(text) for text in texts], np.float32)

    def fingerprint(self) -> str:
        return "fake"


def tokenize(texts: Sequence[str]) -> TokenBatch:
    """A character is a token."""
    return TokenBatch.of([[ord(character) for character in text] for text in texts])


@dataclass
class Opened:
    """Collections with all that they need."""

    collections: Collections
    writer: Writer
    backend: FakeBackend
    store: Store
    close: Callable[[], None]


Open = Callable[[], Opened]


@pytest.fixture
def vector_of() -> Callable[[str], Vectors]:
    return hashed


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def batcher(backend: FakeBackend) -> AsyncIterator[Batcher]:
    made = Batcher(backend, tokenize)
    yield made
    made.close()


@pytest.fixture
def make_batcher(backend: FakeBackend) -> Iterator[Callable[..., Batcher]]:
    with ExitStack() as stack:

        def make(**options: Any) -> Batcher:
            made = Batcher(backend, tokenize, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def open_collections(tmp_path: Path) -> Iterator[Open]:
    """Opens the collections of one data directory; again after `close`, as after a restart."""
    with ExitStack() as stack:

        def opened() -> Opened:
            backend = FakeBackend()
            store = Store(tmp_path / "data", "ab" * 16, "fake")
            batcher = Batcher(backend, tokenize)

            def close() -> None:
                batcher.close()
                store.close()

            stack.callback(close)
            texts = TextCache(batcher, store, COLS, 1_000_000)
            collections = Collections(store, COLS)
            return Opened(collections, Writer(collections, texts), backend, store, close)

        yield opened
