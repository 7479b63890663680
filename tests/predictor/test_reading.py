import asyncio
from typing import cast

import numpy as np
import pytest

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.importing import EventColumns
from foretell.texts import text_id
from foretell.vectors import Vectors, to_block
from predictor.activation import ServedModel
from predictor.catalog import Catalog
from predictor.events import History, PastEvent
from predictor.learning.data import history_of, to_events, training_targets
from predictor.models.calibration import ItemCalibration, TypeCalibration
from predictor.models.history import HistoryBatch
from predictor.models.sequence.network import NetworkConfig
from predictor.models.version import EncoderConfig, Version, VersionConfig
from predictor.reading import tokens, type_shares

DIMS = 4
TYPES = ("view", "buy")


class FakeVersion:
    def __init__(self) -> None:
        self.config = VersionConfig(
            version="v",
            encoder=EncoderConfig(name="e", pooling="mean", cols=3),
            behavior_types=TYPES,
            history_length=5,
            network=NetworkConfig(behavior_types=2, dims=DIMS, hidden=4),
            repeats="allowed",
            has_items=True,
            has_texts=True,
            has_times=True,
            type_calibration=TypeCalibration(biases=(0.0, 0.0)),
            item_calibration=ItemCalibration(),
            candidates=10,
        )


def catalog(name: str, vectors: dict[str, Vectors]) -> Catalog:
    made = Catalog(name, DIMS)
    made.apply(
        pb.WatchItemsResponse(
            ids=list(vectors), vectors=to_block(np.stack(list(vectors.values()))), seq=1
        )
    )
    return made


@pytest.fixture
async def served() -> ServedModel:
    rng = np.random.default_rng(0)
    items = {i: rng.standard_normal(DIMS).astype(np.float32) for i in ("a", "b")}
    texts = {text_id(t): rng.standard_normal(DIMS).astype(np.float32) for t in ("one", "two")}
    return ServedModel(
        cast("Version", FakeVersion()), catalog("v.items", items), catalog("v.behaviors", texts)
    )


ROWS = [
    ("view", 10, "a", ""),
    ("buy", 10, "", "one"),
    ("view", 13, "gone", "two"),
    ("view", 1_000_013, "gone", ""),
    ("buy", 9_000_013, "b", "one"),
    ("buy", 9_000_014, "", "two"),
    ("view", 9_000_014, "a", "two"),
]


def past(row: tuple[str, int, str, str]) -> PastEvent:
    name, time_us, item, text = row
    return PastEvent(name, time_us, item, text_id(text) if text else "", text)


async def test_serving_reads_a_history_as_training_does(served: ServedModel) -> None:
    """The same tokens from the catalogues as from training's arrays."""
    assert served.items is not None
    assert served.texts is not None
    texts = ["one", "two"]
    columns = EventColumns(
        ["u"],
        list(TYPES),
        ["a", "gone", "b"],
        texts,
        np.zeros(len(ROWS), np.int64),
        np.array([TYPES.index(row[0]) for row in ROWS]),
        np.array([["a", "gone", "b"].index(row[2]) if row[2] else -1 for row in ROWS]),
        np.array([texts.index(row[3]) if row[3] else -1 for row in ROWS]),
        np.array([row[1] for row in ROWS]),
    )
    events = to_events(columns, ["a", "b"])
    targets = training_targets(events)

    def vectors(source: Catalog, ids: list[str]) -> Vectors:
        out = np.zeros((len(ids), DIMS), np.float32)
        known = np.zeros(len(ids), np.bool_)
        source.fill(ids, out, known)
        assert known.all()
        return out

    trained = history_of(
        targets,
        slice(0, len(targets)),
        5,
        vectors(served.items, list(events.item_ids)),
        vectors(served.texts, [text_id(text) for text in events.texts]),
    )
    ends = targets.end.tolist()
    batch, pending = tokens(
        served, [History.of(past(row) for row in ROWS[:end]).last(5) for end in ends], {}
    )
    for name in HistoryBatch.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(batch, name), getattr(trained, name), name)
    assert pending == [0] * len(ends)


async def test_texts_without_a_vector_are_counted_and_given_ones_used(served: ServedModel) -> None:
    new, given = past(("view", 1, "", "new")), past(("view", 2, "", "given"))
    covered = past(("view", 3, "a", "covered by its item"))
    vector = np.full(DIMS, 7, np.float32)
    batch, pending = tokens(
        served,
        [History.of([new]), History.of([given, covered, new])],
        {given.text_id: vector},
    )
    assert pending == [1, 1]
    assert batch.known.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(batch.vectors[1], vector)
    assert batch.lengths.tolist() == [1, 3]


async def test_an_unknown_type_has_an_index_of_its_own(served: ServedModel) -> None:
    batch, _ = tokens(served, [History.of([past(("never seen", 1, "a", ""))])], {})
    assert batch.types.tolist() == [len(TYPES)]


async def test_a_catalog_follows_changes_and_starts_over_after_a_loss() -> None:
    made = catalog("c", {f"i{n}": np.full(DIMS, n, np.float32) for n in range(2_000)})
    assert len(made) == 2_000
    assert not made.caught_up.is_set()
    made.apply(
        pb.WatchItemsResponse(
            ids=["i5", "new"],
            vectors=to_block(np.full((2, DIMS), -1.0)),
            deleted_ids=["i7", "never"],
            seq=9,
            caught_up=True,
        )
    )
    assert made.caught_up.is_set()
    assert len(made) == 2_000
    out, known = np.zeros((4, DIMS), np.float32), np.zeros(4, np.bool_)
    made.fill(["i5", "i7", "new", "i1999"], out, known)
    assert known.tolist() == [True, False, True, True]
    assert out[:, 0].tolist() == [-1, 0, -1, 1999]
    made.lost()
    made.apply(pb.WatchItemsResponse(ids=["x"], vectors=to_block(np.ones((1, DIMS))), seq=3))
    assert list(made) == ["x"]


def test_type_shares_weigh_the_latest_and_are_smoothed() -> None:
    history = ["view", "buy"]
    shares = type_shares(history, {"view": 1, "buy": 1, "return": 2})
    assert sum(p for _, p in shares) == pytest.approx(1)
    assert [name for name, _ in shares] == ["return", "buy", "view"]
    assert type_shares([], {"view": 3, "buy": 1}) == [("view", 0.75), ("buy", 0.25)]
    assert type_shares([], {}) == []
    assert type_shares(history[:1], {}) == [("view", 1.0)]


async def test_reading_holds_no_event_loop(served: ServedModel) -> None:
    """A catalogue can be read from a worker thread while the loop changes it."""
    assert served.items is not None
    batch, _ = await asyncio.to_thread(tokens, served, [History.of([past(ROWS[0])])], {})
    assert batch.known.tolist() == [True]
