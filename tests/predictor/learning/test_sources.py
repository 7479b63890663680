"""Reading data and getting vectors for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from foretell import Client
from foretell.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from foretell.importing import EventColumns
from foretell.types import EmbedderInfo, EmbedResult, Failure, Item, Timings
from predictor.learning import sources
from predictor.learning.sentiment import SENTENCES
from predictor.learning.sources import Source


class Lengths:
    """Stands for a client: the vector of a text is its length, twice."""

    def __init__(self, *errors: Exception) -> None:
        self.asked: list[list[str]] = []
        self.errors = list(errors)

    def embed(self, texts: Sequence[str], *, timeout_s: float) -> EmbedResult:
        assert timeout_s > 0
        if self.errors:
            raise self.errors.pop(0)
        self.asked.append(list(texts))
        vectors = np.array([[len(text)] * 2 for text in texts], np.float32)
        failures = tuple(
            Failure(n, NotFoundError("no such word")) for n, t in enumerate(texts) if t == "bad"
        )
        return EmbedResult(vectors, failures, Timings())

    def embedder_info(self) -> EmbedderInfo:
        return EmbedderInfo("0", "lengths", "mean", 2, 9, "cpu", {}, False, 0, 0, "", 1.0, 1.0)


def encode(texts: list[str], client: Lengths) -> list[list[float]]:
    vectors: list[list[float]] = sources.encode(texts, 2, cast(Client, client)).tolist()
    return vectors


def test_each_text_is_encoded_once_and_an_empty_one_never() -> None:
    client = Lengths()
    assert encode(["aa", "", "b", "aa"], client) == [[2, 2], [0, 0], [1, 1], [2, 2]]
    assert client.asked == [["aa", "b"]]
    assert encode([], client) == []


def test_many_texts_go_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "EMBED_TEXTS", 2)
    client = Lengths()
    texts = ["a" * n for n in (3, 1, 5, 2, 4)]
    assert encode(texts, client) == [[len(text)] * 2 for text in texts]
    assert [len(batch) for batch in client.asked] == [2, 2, 1]


def test_a_busy_embedder_is_waited_for() -> None:
    client = Lengths(ResourceExhaustedError("later", retry_after_s=0.01))
    assert encode(["aa"], client) == [[2, 2]]


def test_a_refused_text_is_an_error() -> None:
    with pytest.raises(NotFoundError, match="no such word"):
        encode(["bad"], Lengths())


def test_only_texts_of_events_without_an_item_are_encoded() -> None:
    columns = EventColumns(
        ["u"], ["view", "buy"], ["known", "unknown"], ["of an item", "of none", "of a stranger"],
        np.zeros(3, np.int64), np.array([0, 1, 0]), np.array([0, -1, 1]), np.arange(3), None,
    )  # fmt: skip
    client = Lengths()
    source = Source(columns, [Item("other", ""), Item("known", "text")], None, {})
    dataset = sources.with_vectors(source, cast(Client, client))
    (asked,) = client.asked
    of_data = [text for text in asked if text not in SENTENCES]  # those that say what is praise
    assert of_data == ["of a stranger", "of none", "text"]
    assert dataset.item_vectors.tolist() == [[0, 0], [4, 4]]
    assert dataset.text_vectors.tolist() == [[0, 0], [7, 7], [13, 13]]
    assert dataset.encoder.name == "lengths"


def test_without_an_items_file_the_items_are_the_ids_of_the_events(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    file.write_text("user_id,behavior_type,item_id\nu,buy,7\nu,buy,8\nv,buy,7\n")
    dataset = sources.with_vectors(sources.read_files(file, None), cast(Client, Lengths()))
    assert dataset.events.item_ids == ("7", "8")
    assert dataset.events.has_items
    assert dataset.item_vectors.tolist() == [[0, 0], [0, 0]]


def test_no_store_and_an_empty_store_are_told_apart(tmp_path: Path) -> None:
    from predictor.database import open_database

    client = cast(Client, Lengths())
    with pytest.raises(InvalidArgumentError, match="does not exist"):
        sources.read_store(tmp_path, client)
    assert list(tmp_path.iterdir()) == []  # reading makes nothing
    open_database(tmp_path).close()
    with pytest.raises(InvalidArgumentError, match="no events"):
        sources.read_store(tmp_path, client)


def test_an_encoder_needs_an_embedder_of_ones_own(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidArgumentError, match="--encoder"),
        sources.embedder("127.0.0.1:1", tmp_path, "bert"),
    ):
        pass
    with (
        pytest.raises(InvalidArgumentError, match="--pooling"),
        sources.embedder("127.0.0.1:1", tmp_path, None, "cls"),
    ):
        pass


def test_vectors_by_the_first_token_are_others(tmp_path: Path, embedder_address: str) -> None:
    with sources.embedder(None, tmp_path, None, "cls") as client:
        info = client.embedder_info()
        first = sources.encode(["green tea"], info.cols, client)
    with sources.embedder(embedder_address, tmp_path, None) as client:
        mean = sources.encode(["green tea"], info.cols, client)
    assert info.pooling == "cls"
    assert np.abs(first - mean).max() > 0.01


def test_an_embedder_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(FailedPreconditionError, match=r"embedder\.log"),
        sources.embedder(None, tmp_path, str(tmp_path / "no-such-encoder")),
    ):
        pass


def test_an_embedder_is_started_for_the_block_and_keeps_vectors(tmp_path: Path) -> None:
    texts = ["green tea", "black tea"]
    with sources.embedder(None, tmp_path, None) as client:
        cols = client.embedder_info().cols
        first = sources.encode(texts, cols, client)
        assert client.embedder_info().texts_encoded >= 2
    with sources.embedder(None, tmp_path, None) as client:
        begin = client.embedder_info().texts_encoded
        assert np.array_equal(sources.encode(texts, cols, client), first)
        assert client.embedder_info().texts_encoded == begin
