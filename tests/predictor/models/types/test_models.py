"""Type models: features against a plain reading of histories, files, and what is left out."""

from __future__ import annotations

from collections.abc import Callable

import lightgbm
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from predictor.models.history import NONE, UNKNOWN, Histories
from predictor.models.types import item_features as type_pairs
from predictor.models.types import models as type_models
from predictor.models.types.features import View, history_features
from predictor.models.types.models import NO_HISTORY, ItemTypeModel, Rule, TypeModel
from predictor.models.types.tables import ITEM_PRIOR, Floats, ItemTypes

TYPES, ITEMS = 3, 7
RULE = Rule(1.2, (0.1, 0.0, -0.1), (1.0, 1.5, 0.7))


def histories_of(lengths: list[int], seed: int = 0) -> Histories:
    """Random histories with unknown types, missing, unknown and new items, and pauses."""
    rng = np.random.default_rng(seed)
    size = sum(lengths)
    gaps = rng.choice([0, 1_000_000, 60_000_000, 7_200_000_000], size)
    timestamp = np.concatenate([np.cumsum(gaps[:0])] + [
        1_700_000_000_000_000 + np.cumsum(rng.choice(gaps, length)) for length in lengths if length
    ]).astype(np.int64)  # fmt: skip
    ends = np.cumsum(lengths)
    last = [timestamp[end - 1] if length else 0 for end, length in zip(ends, lengths, strict=True)]
    return Histories(
        rng.integers(-2, ITEMS + 2, size),
        rng.choice([UNKNOWN, 0, 1, 2], size, p=[0.1, 0.3, 0.3, 0.3]),
        timestamp,
        np.array(lengths, np.int64),
        np.array(last, np.int64),
    )


@pytest.fixture(scope="module")
def table() -> ItemTypes:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(ITEMS, 4))
    vectors[2] = 0
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return ItemTypes(
        rng.integers(0, 9, (ITEMS, TYPES)).astype(np.float32),
        rng.dirichlet(np.ones(TYPES), ITEMS).astype(np.float32),
        np.array([0.5, 0.3, 0.2], np.float32),
        (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float16),
    )


def trees(features: Floats) -> str:
    """Some trees over features."""
    true = np.arange(len(features)) % TYPES
    parameters = {"objective": "multiclass", "num_class": TYPES, "min_data_in_leaf": 2}
    parameters |= {"verbose": -1, "num_threads": 1}
    return lightgbm.train(parameters, lightgbm.Dataset(features, true), 3).model_to_string()


PAIRS = (np.repeat(np.arange(40), 2), np.tile(np.arange(-1, ITEMS + 1), 9)[:80])


@pytest.fixture(scope="module")
def next_type(table: ItemTypes) -> TypeModel:
    empty = TypeModel("", table, RULE, True)
    return TypeModel(trees(empty.features(histories_of([5] * 40))), table, RULE, True)


@pytest.fixture(scope="module")
def item_type(table: ItemTypes) -> ItemTypeModel:
    empty = ItemTypeModel("", table, RULE, True)
    found = empty.features(histories_of([5] * 40), *PAIRS)
    return ItemTypeModel(trees(found), table, RULE, True)


def one(histories: Histories, row: int) -> Histories:
    """One of the histories, as serving has it."""
    end = int(histories.lengths[: row + 1].sum())
    events = slice(end - int(histories.lengths[row]), end)
    return type_models.some_of(histories, slice(row, row + 1), events)


def test_one_user_is_read_like_a_batch(
    next_type: TypeModel, item_type: ItemTypeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [0, 1, 2, 30, 0, 400, 3, 0]
    histories = histories_of(lengths)
    row = np.repeat(np.arange(len(lengths)), 9)
    item = np.tile(np.arange(-1, ITEMS + 1), len(lengths))
    whole = next_type.features(histories)
    pairs = item_type.features(histories, row, item)
    monkeypatch.setattr(type_models, "CHUNK_EVENTS", 20)
    monkeypatch.setattr(type_pairs, "CHUNK_COMPARISONS", 50)
    np.testing.assert_allclose(next_type.features(histories), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        item_type.features(histories, row, item), pairs, rtol=1e-4, atol=1e-5
    )
    for at in range(len(lengths)):
        user = one(histories, at)
        np.testing.assert_allclose(next_type.features(user)[0], whole[at], rtol=1e-4, atol=1e-5)
        found = item_type.features(user, np.zeros(9, np.int64), item[:9])
        np.testing.assert_allclose(found, pairs[row == at], rtol=1e-4, atol=1e-5)


def view_of(table: ItemTypes, types: list[int], items: list[int], seconds: list[int]) -> View:
    size = len(types)
    histories = Histories(
        np.array(items, np.int64),
        np.array(types, np.int64),
        np.array(seconds, np.int64) * 1_000_000,
        np.array([size], np.int64),
        np.array([seconds[-1] * 1_000_000 if seconds else 0], np.int64),
    )
    seen = table.seen(histories.item)
    return View(histories, seen, table.prior, has_times=True, has_items=True)


def test_features_are_what_they_say(table: ItemTypes) -> None:
    types = [0, 1, 0, 1, 1, 2, 0, 0]
    items = [0, 1, 2, 3, 3, 5, 6, 6]
    seconds = [0, 10, 20, 5_000, 5_001, 9_000, 9_010, 9_030]
    view = view_of(table, types, items, seconds)
    groups = {name: values[0] for name, values in history_features(view).items()}
    weights = 0.5 ** (np.arange(8)[::-1] / 4.0)
    sums = np.array([weights[np.array(types) == code].sum() for code in range(TYPES)])
    shares = (sums + 0.5 * table.prior) / (weights.sum() + 0.5)
    np.testing.assert_allclose(groups["shares"][2 * TYPES : 3 * TYPES], shares, rtol=1e-5)
    assert groups["last_types"].tolist() == [0, 0, 2, 1, 1, 0, 1, 0, 0]
    run, before = groups["runs"][:2]
    assert np.expm1(run) == pytest.approx(2)
    assert before == 2
    assert np.expm1(groups["runs"][4:]) == pytest.approx([0, 3, 2])
    # After a 0 came 1, 1 and 0; with no decay, two events of the shares besides.
    decayed = 0.5 ** (np.arange(8)[::-1] / 32.0)
    shares = np.array([decayed[np.array(types) == code].sum() for code in range(TYPES)])
    shares = (shares + 0.5 * table.prior) / (decayed.sum() + 0.5)
    row = (np.array([1, 2, 0]) + 2 * shares) / 5
    np.testing.assert_allclose(groups["transitions"][4:7], row, rtol=1e-5)
    assert np.expm1(groups["sessions"][0]) == pytest.approx(3)
    assert np.expm1(groups["sessions"][1 + TYPES]) == pytest.approx(3)
    assert np.expm1(groups["gaps"][:3]) == pytest.approx([20, 10, 3_999], rel=1e-3)
    assert groups["length"] == pytest.approx(np.log1p(8))


def test_own_events_with_the_item(table: ItemTypes) -> None:
    view = view_of(table, [0, 1, 2, 1, UNKNOWN], [3, 4, 3, 3, 8], [0, 1, 2, 3, 4])
    item = np.array([3, 4, 0, 8, NONE, UNKNOWN])
    row = np.zeros(len(item), np.int64)
    found = type_pairs.pair_features(view, row, item, table.seen(item), table)["own"]
    # Counts by type, the last one's type and age, and all of them.
    assert found.tolist() == [
        [1, 1, 1, 1, 1, 3],
        [0, 1, 0, 1, 3, 1],
        [0, 0, 0, NONE, -1, 0],
        [0, 0, 0, UNKNOWN, 0, 1],
        [0, 0, 0, NONE, -1, 0],
        [0, 0, 0, NONE, -1, 0],
    ]


def test_affinity_follows_the_nearest_items(table: ItemTypes) -> None:
    view = view_of(table, [0, 1], [0, 1], [0, 1])
    item = np.array([0, 1])
    found = type_pairs.pair_features(view, np.zeros(2, np.int64), item, table.seen(item), table)
    sharpest = found["affinity"][:, 1 + 2 * TYPES + 1 :]
    assert sharpest[0, 0] > sharpest[1, 0]
    assert sharpest[0, 1] < sharpest[1, 1]
    np.testing.assert_allclose(found["affinity"][:, 0], 1, atol=1e-3)


def test_the_time_of_the_prediction_is_not_read(next_type: TypeModel) -> None:
    histories = histories_of([9, 30])
    later = Histories(
        histories.item, histories.type, histories.timestamp, histories.lengths,
        histories.as_of + 10**12,
    )  # fmt: skip
    np.testing.assert_array_equal(next_type.features(later), next_type.features(histories))


def test_the_tables_leave_own_events_out_and_know_nothing_of_new_items(table: ItemTypes) -> None:
    item = np.array([0, ITEMS + 1, UNKNOWN, NONE])
    alone = table.seen(item, np.concatenate([table.counts[:1], np.zeros((3, TYPES))]))
    np.testing.assert_allclose(alone.expected[0], table.usual[0], rtol=1e-5)
    np.testing.assert_allclose(alone.expected[1:], np.tile(table.prior, (3, 1)), rtol=1e-5)
    assert alone.popularity.tolist() == [0, 0, 0, 0]
    total = table.counts[0].sum()
    shares = (table.counts[0] + ITEM_PRIOR * table.usual[0]) / (total + ITEM_PRIOR)
    np.testing.assert_allclose(table.seen(item).expected[0], shares, rtol=1e-5)
    assert not table.vectors_of(item)[1:].any()


def test_answers_are_probabilities_and_the_rule_weighs_them(
    next_type: TypeModel, item_type: ItemTypeModel
) -> None:
    histories = histories_of([0, 3, 50])
    row, item = np.array([0, 2, 2]), np.array([1, 1, ITEMS + 5])
    for found in (next_type.predict(histories), item_type.predict(histories, row, item)):
        assert found.shape == (3, TYPES)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    chosen = next_type.choose(np.array([[0.4, 0.3, 0.3], [0.5, 0.2, 0.3]], np.float32))
    assert chosen.tolist() == [1, 0]
    nothing = np.zeros(0, np.int64)
    assert item_type.predict(NO_HISTORY, nothing, nothing).shape == (0, TYPES)
    none = Histories(nothing, nothing, nothing, nothing, nothing)
    assert next_type.predict(none).shape == (0, TYPES)


def test_many_types_and_neither_times_nor_items() -> None:
    types = 12
    table = ItemTypes(
        np.zeros((0, types), np.float32), np.zeros((0, types), np.float32),
        np.full(types, 1 / types, np.float32), np.zeros((0, 0), np.float16),
    )  # fmt: skip
    histories = histories_of([0, 5, 40])
    some = TypeModel("", table, RULE, False).features(histories)
    moved = Histories(
        histories.item, histories.type, histories.timestamp * 2, histories.lengths, histories.as_of
    )
    np.testing.assert_array_equal(TypeModel("", table, RULE, False).features(moved), some)
    assert np.isfinite(some).all()


def test_files_come_back(next_type: TypeModel, item_type: ItemTypeModel) -> None:
    histories = histories_of([0, 3, 50])
    row, item = np.array([0, 1, 2]), np.array([1, 2, ITEMS])
    files = next_type.files() | item_type.files()
    again = TypeModel.load(files, TYPES), ItemTypeModel.load(files, TYPES)
    np.testing.assert_array_equal(again[0].predict(histories), next_type.predict(histories))
    np.testing.assert_array_equal(
        again[1].predict(histories, row, item), item_type.predict(histories, row, item)
    )
    assert again[0].rule == RULE
    assert again[1].has_times


Change = Callable[[dict[str, bytes]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("next_type.txt"), "next_type.txt is missing"),
        (lambda files: files.update({"next_type.json": b"{"}), "next_type.json"),
        (lambda files: files.update({"next_type.json": b"[]"}), "next_type.json"),
        (lambda files: _replace(files, "json", b'"format": 1', b'"format": 2'), "format 2"),
        (lambda files: _replace(files, "json", b"1.2", b"NaN"), "next_type.json"),
        (lambda files: _replace(files, "json", b"1.5", b"0.0"), "not positive"),
        (lambda files: _replace(files, "json", b"true", b"1"), "has_times"),
        (lambda files: files.update({"next_type.safetensors": b"no"}), "next_type.safetensors"),
        (lambda files: files.update({"next_type.txt": b"tree\nno"}), "next_type.txt"),
        (lambda files: files.update({"next_type.txt": b"\xff"}), "next_type.txt"),
        (lambda files: _take_trees(files), "features, types"),
    ],
)
def test_damaged_files_are_refused(
    next_type: TypeModel, item_type: ItemTypeModel, change: Change, message: str
) -> None:
    files = next_type.files() | item_type.files()
    change(files)
    with pytest.raises(ValueError, match=message):
        TypeModel.load(files, TYPES)


def _replace(files: dict[str, bytes], end: str, before: bytes, after: bytes) -> None:
    data = files[f"next_type.{end}"]
    assert before in data
    files[f"next_type.{end}"] = data.replace(before, after)


def _take_trees(files: dict[str, bytes]) -> None:
    files["next_type.txt"] = files["item_type.txt"]


def test_a_version_of_other_types_is_refused(next_type: TypeModel) -> None:
    with pytest.raises(ValueError, match="3 behavior types, not 4"):
        TypeModel.load(next_type.files(), 4)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("counts", np.zeros((ITEMS - 1, TYPES), np.float32)),
        ("counts", np.full((ITEMS, TYPES), -1, np.float32)),
        ("usual", np.full((ITEMS, TYPES), np.nan, np.float32)),
        ("prior", np.zeros((TYPES, 1), np.float32)),
        ("vectors", np.zeros((ITEMS, 4), np.float32)),
        ("vectors", np.zeros((ITEMS + 1, 4), np.float16)),
    ],
)
def test_odd_tables_are_refused(table: ItemTypes, name: str, values: NDArray[np.generic]) -> None:
    parts = {key: getattr(table, key) for key in ("counts", "usual", "prior", "vectors")}
    odd = ItemTypes(**(parts | {name: values}))
    data = save({key: getattr(odd, key) for key in parts})
    with pytest.raises(ValueError, match=r"shape|cannot be"):
        ItemTypes.read(data)
