import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.encoding.batcher import Batcher
from embedder.encoding.text_cache import ROW_OVERHEAD_BYTES, CacheFile, TextCache, text_hash
from foretell.texts import text_id


class Nothing:
    """A disk without texts."""

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, Any]:
        return {}

    def keep(self, vectors: Mapping[bytes, Any]) -> None:
        pass


@pytest.fixture
def cache(batcher: Batcher, backend: Any) -> TextCache:
    return TextCache(batcher, Nothing(), backend.cols, 1_000_000)


def encoded(backend: Any) -> list[str]:
    return sorted(text for texts in backend.batches for text in texts)


def test_the_key_is_the_id_of_a_behavior_text() -> None:
    assert text_hash("Größe ☃").hex() == text_id("Größe ☃")


async def test_a_text_is_encoded_once(cache: TextCache, backend: Any, vector_of: Any) -> None:
    first = await cache.encode(["a", "b", "a"])
    second = await cache.encode(["b", "c", "a"])
    assert encoded(backend) == ["a", "b", "c"]
    assert (first.new, second.new, cache.texts_cached) == (2, 1, 3)
    assert np.array_equal(second.vectors, np.array([vector_of(t) for t in "bca"]))


async def test_no_texts_are_no_work(cache: TextCache, backend: Any) -> None:
    result = await cache.encode([])
    assert result.vectors.shape == (0, backend.cols)
    assert backend.batches == []


async def test_concurrent_calls_encode_a_text_once(cache: TextCache, backend: Any) -> None:
    calls = await asyncio.gather(*(cache.encode(["same", f"own {i}"]) for i in range(10)))
    assert encoded(backend).count("same") == 1
    assert sum(call.new for call in calls) == 11
    assert all(np.array_equal(call.vectors[0], calls[0].vectors[0]) for call in calls)


async def test_when_the_first_caller_leaves_the_next_one_encodes(
    cache: TextCache, backend: Any, vector_of: Any
) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(texts: list[str]) -> None:
        entered.set()
        assert go.wait(30)

    backend.before = hold
    running = asyncio.ensure_future(cache.encode(["running"]))
    assert await asyncio.to_thread(entered.wait, 30)
    first = asyncio.ensure_future(cache.encode(["shared"]))
    second = asyncio.ensure_future(cache.encode(["shared"]))
    while text_hash("shared") not in cache._in_flight:
        await asyncio.sleep(0)
    first.cancel()
    go.set()
    result = await second
    assert np.array_equal(result.vectors[0], vector_of("shared"))
    await running
    assert cache._in_flight == {}


async def test_an_error_reaches_all_and_is_not_kept(
    cache: TextCache, backend: Any, vector_of: Any
) -> None:
    def fail(texts: list[str]) -> None:
        raise RuntimeError("broken")

    backend.before = fail
    outcomes = await asyncio.gather(
        cache.encode(["a"]), cache.encode(["a"]), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]
    backend.before = lambda texts: None
    assert np.array_equal((await cache.encode(["a"])).vectors[0], vector_of("a"))


async def test_memory_holds_the_latest_up_to_its_limit(batcher: Batcher, backend: Any) -> None:
    row_bytes = backend.cols * 4 + ROW_OVERHEAD_BYTES
    cache = TextCache(batcher, Nothing(), backend.cols, 3 * row_bytes)
    await cache.encode(["a", "b", "c"])
    await cache.encode(["a"])
    await cache.encode(["d"])  # drops b, the least recently used
    assert (await cache.encode(["a", "c", "d"])).new == 0
    assert (await cache.encode(["b"])).new == 1


async def test_a_cache_file_is_shared_and_knows_the_encoder(
    tmp_path: Path, batcher: Batcher, backend: Any
) -> None:
    def open_cache(file: CacheFile) -> TextCache:
        return TextCache(batcher, file, backend.cols, 0)

    one, other, foreign = (CacheFile(tmp_path / "cache", id * 16) for id in ("aa", "aa", "bb"))
    first = await open_cache(one).encode(["a", "b"])
    one.close()
    second = await open_cache(other).encode(["b", "c"])
    assert second.new == 1
    assert np.array_equal(second.vectors[0], first.vectors[1])
    assert (await open_cache(foreign).encode(["a"])).new == 1
    other.close()
    foreign.close()


async def test_a_cache_file_that_cannot_be_written_is_only_slower(
    tmp_path: Path, batcher: Batcher, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = CacheFile(tmp_path, "aa" * 16)
    file._database.submit(lambda c: c.execute("DROP TABLE texts") and None).result()
    file._database.submit(
        lambda c: c.execute("CREATE TABLE texts (key CHECK (0), vector)") and None
    ).result()
    cache = TextCache(batcher, file, backend.cols, 0)
    assert (await cache.encode(["a"])).new == 1
    assert (await cache.encode(["a"])).new == 1
    file.close()


def test_ten_thousand_keys_are_found(tmp_path: Path) -> None:
    file = CacheFile(tmp_path, "aa" * 16)
    keys = [text_hash(str(i)) for i in range(10_000)]
    file.keep({key: np.full(4, i, np.float32) for i, key in enumerate(keys)})
    file.close()
    file = CacheFile(tmp_path, "aa" * 16)
    rows = file.find([*keys, b"unknown key 1234"])
    assert len(rows) == 10_000
    assert all(rows[key][0] == i for i, key in enumerate(keys))
    file.close()
