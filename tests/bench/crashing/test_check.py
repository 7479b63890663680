"""The check of an embedder's contents notices every lie of a fake."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.crashing.embedder import contents
from bench.crashing.embedder.check import Reading, read
from bench.crashing.embedder.contents import ITEMS, PASSING, PROJECTIONS, STEADY, VECTORS
from bench.crashing.embedder.follow import Follower
from bench.crashing.model import Key
from foretell import Client
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.testing import FakeServices
from foretell.testing.embedder import FakeEmbedder
from foretell.vectors import Vectors

VALUES = {f"item {n:03}": f"{contents.TEXTS[n % 20]}|{contents.SHADES[n % 4]}" for n in range(60)}
ROWS = {f"vector {n:04}": contents.ROWS[n] for n in range(20)}
RESIDUALS = {"item 003": "1", "item 007": "9"}


@pytest.fixture
def fakes() -> Iterator[FakeServices]:
    """An embedder with contents of every kind."""
    with FakeServices() as services, Client(embedder=services.embedder_address) as client:
        client.create_vector_collection(VECTORS, contents.COLS)
        for name, projection in PROJECTIONS.items():
            client.create_derived_collection(name, ITEMS, projection)
        client.upsert_items(contents.item(id, value) for id, value in VALUES.items())
        client.put_vectors(VECTORS, list(ROWS), [contents.ROW_OF[name] for name in ROWS.values()])
        rows = [contents.RESIDUAL_OF[name] for name in RESIDUALS.values()]
        client.put_vectors(STEADY, list(RESIDUALS), rows)
        yield services


@pytest.fixture
def embedder(fakes: FakeServices) -> FakeEmbedder:
    return fakes._embedder


def reading_of(fakes: FakeServices) -> Reading:
    with Client(embedder=fakes.embedder_address) as client:
        text_vectors = dict(zip(contents.TEXTS, client.embed(contents.TEXTS).vectors, strict=True))
        return read(client, text_vectors, (1,))


def test_the_truth_is_read_as_it_is(fakes: FakeServices) -> None:
    reading = reading_of(fakes)
    assert reading.violations == []
    expected = {Key(ITEMS, id): value for id, value in VALUES.items()}
    expected |= {Key(VECTORS, id): name for id, name in ROWS.items()}
    expected |= {Key(STEADY, id): name for id, name in RESIDUALS.items()}
    assert reading.cells == expected
    assert reading.vectors.keys() == {ITEMS, VECTORS, STEADY, PASSING}


def other_vector(fake: FakeEmbedder) -> None:
    items = fake.collections[ITEMS].vectors
    items["item 001"] = items["item 002"]


def unknown_text(fake: FakeEmbedder) -> None:
    fake.collections[ITEMS].items["item 001"].text = "a text of nobody's"


def other_row(fake: FakeEmbedder) -> None:
    rows = fake.collections[VECTORS].vectors
    rows["vector 0001"] = rows["vector 0001"] * np.float32(1.001)


def no_projection(fake: FakeEmbedder) -> None:
    derived = fake.collections[STEADY].vectors
    derived["item 001"] = -derived["item 001"]


def missing_in_derived(fake: FakeEmbedder) -> None:
    derived = fake.collections[PASSING]
    del derived.items["item 001"], derived.vectors["item 001"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (other_vector, "vector of another text"),
        (unknown_text, "nobody wrote the text"),
        (other_row, "nobody wrote the vector"),
        (no_projection, "no projection of the vector"),
        (missing_in_derived, "differ in"),
    ],
)
def test_damaged_contents_are_noticed(
    fakes: FakeServices, embedder: FakeEmbedder, damage: Callable[[FakeEmbedder], None], said: str
) -> None:
    damage(embedder)
    assert any(said in what for _, what in reading_of(fakes).violations)


def unlisted(answer: pb.ListItemsResponse) -> None:
    del answer.items[0]


def listed_otherwise(answer: pb.ListItemsResponse) -> None:
    for item in answer.items:
        item.attributes["shade"] = "grey"


def listed_twice(answer: pb.ListItemsResponse) -> None:
    answer.items.append(answer.items[-1])


def counted(answer: pb.ListCollectionsResponse) -> None:
    for collection in answer.collections:
        collection.items += 1


def told_less(answer: pb.WatchItemsResponse) -> None:
    answer.deleted_ids.append(answer.ids[0])


def told_otherwise(answer: pb.WatchItemsResponse) -> None:
    answer.vectors.data = bytes(len(answer.vectors.data))


def gone_found(answer: pb.SearchResponse) -> None:
    answer.results[0].ids[0] = "item 200"


def other_scores(answer: pb.SearchResponse) -> None:
    scores = np.frombuffer(answer.results[0].scores, "<f4") + np.float32(0.01)
    answer.results[0].scores = scores.tobytes()


def too_few(answer: pb.SearchResponse) -> None:
    for result in answer.results:
        result.scores = result.scores[:-4]
        del result.ids[-1]


def too_few_that_match(answer: pb.SearchResponse) -> None:
    """Only one search has a single query: that by a condition."""
    if len(answer.results) == 1:
        del answer.results[0].ids[-1]
        answer.results[0].scores = answer.results[0].scores[:-4]


def not_itself(answer: pb.SearchResponse) -> None:
    """The index lacks the nearest items; those further away are right."""
    for result in answer.results:
        result.scores = result.scores[4 * 15 :]
        del result.ids[:15]


@pytest.mark.parametrize(
    ("method", "lie", "said"),
    [
        ("ListItems", unlisted, "does not list it like that"),
        ("ListItems", listed_otherwise, "does not list it like that"),
        ("ListItems", listed_twice, "does not list each id once"),
        ("ListCollections", counted, "items and lists"),
        ("WatchItems", told_less, "WatchItems of items"),
        ("WatchItems", told_otherwise, "WatchItems of items"),
        ("Search", gone_found, "which is not there"),
        ("Search", other_scores, "scores of other vectors"),
        ("Search", too_few, "items of 60"),
        ("Search", too_few_that_match, "in items the condition red is wrong about"),
        ("Search", not_itself, "does not find it"),
    ],
)
def test_answers_that_differ_are_noticed(
    fakes: FakeServices,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    lie: Callable[..., None],
    said: str,
) -> None:
    with Client(embedder=fakes.embedder_address) as client:
        stub = client._embedder
        honest = getattr(stub, method)

        def unary(request: object, **options: object) -> object:
            answer = honest(request, **options)
            lie(answer)
            return answer

        def stream(request: object, **options: Any) -> Lying:
            return Lying(honest(request, **options), lie)

        monkeypatch.setattr(stub, method, stream if method == "WatchItems" else unary)
        vectors = client.embed(contents.TEXTS).vectors
        reading = read(client, dict(zip(contents.TEXTS, vectors, strict=True)), (1,))
    assert any(said in what for _, what in reading.violations), reading.violations


class Lying:
    """A call of WatchItems whose messages are changed on their way."""

    def __init__(self, call: object, lie: Callable[..., None]) -> None:
        self._call = call
        self._lie = lie

    def __iter__(self) -> Iterator[object]:
        for message in self._call:  # type: ignore[attr-defined]
            self._lie(message)
            yield message

    def cancel(self) -> None:
        self._call.cancel()  # type: ignore[attr-defined]


class TestFollower:
    def test_it_goes_on_where_it_was(self, fakes: FakeServices) -> None:
        follower = Follower(ITEMS)
        with Client(embedder=fakes.embedder_address) as client:
            assert follower.catch_up(client, reading_of(fakes).vectors[ITEMS]) == []
            client.delete_items(["item 001"])
            client.upsert_items([contents.item("item 002", "salmon|")])
            vectors = reading_of(fakes).vectors[ITEMS]
            assert follower.catch_up(client, vectors) == []

    @pytest.mark.parametrize("id", ["item 001", "item 002"])
    def test_it_notices_a_change_that_nobody_told(
        self, fakes: FakeServices, embedder: FakeEmbedder, id: str
    ) -> None:
        follower = Follower(ITEMS)
        with Client(embedder=fakes.embedder_address) as client:
            before: dict[str, Vectors] = reading_of(fakes).vectors[ITEMS]
            assert follower.catch_up(client, before) == []
            forgotten = {**before, id: before["item 003"]}
            del forgotten["item 004"]
            (one, other) = sorted(follower.catch_up(client, forgotten))
            assert id in one
            assert "item 004" in other

    def test_it_notices_a_store_that_went_back(
        self, fakes: FakeServices, embedder: FakeEmbedder
    ) -> None:
        follower = Follower(ITEMS)
        with Client(embedder=fakes.embedder_address) as client:
            vectors = reading_of(fakes).vectors[ITEMS]
            follower.catch_up(client, vectors)
            embedder._seq = 1
            assert "after_seq is" in follower.catch_up(client, vectors)[0]
