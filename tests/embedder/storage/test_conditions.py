"""Attributes in SQLite, and conditions as SQL against the definition in Python."""

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedder.storage import records, store
from embedder.storage.conditions import Conditions, matching
from embedder.storage.records import ItemRow
from embedder.storage.store import Store
from embedder.storage.verify import verify
from embedder.storage.writer import _item_row
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.testing.conditions import matches

TEXT = pb.COLLECTION_KIND_TEXT

keys = st.sampled_from(["a", "b", "it's", "price"])
values = st.one_of(
    st.sampled_from(["", "x", "X", "a\0b", "a\0c", "1", "1.0", "+1", "1e0", ".5", "5.", "-2"]),
    st.sampled_from(
        ["1e400", "nan", "inf", "1_0", " 1", "1 ", "1\n", "٣", "0x1", "1,0", "0" * 999]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    st.floats(allow_nan=False).map(str),
)
attributes = st.dictionaries(keys, values, max_size=4)
numbers = st.one_of(
    st.sampled_from([-2.0, 0.0, 0.5, 1.0, 5.0]), st.floats(allow_nan=False, allow_infinity=False)
)


def _range(key: str, lower: str, low: float, upper: str, high: float) -> pb.Condition:
    bounds: dict[str, Any] = {lower: min(low, high), upper: max(low, high)}
    bounds.pop("none", None)
    return pb.Condition(range=pb.AttributeRange(key=key, **bounds))


def _combined(kind: str, parts: list[pb.Condition]) -> pb.Condition:
    combined: dict[str, Any] = {kind: pb.Conditions(conditions=parts)}
    return pb.Condition(**combined)


leaves = st.one_of(
    st.builds(
        lambda key, some: pb.Condition(one_of=pb.AttributeValues(key=key, values=some)),
        keys,
        st.lists(values, min_size=1, max_size=3),
    ),
    keys.map(lambda key: pb.Condition(exists=key)),
    st.builds(
        _range,
        keys,
        st.sampled_from(["gt", "gte", "none"]),
        numbers,
        st.sampled_from(["lt", "lte"]),
        numbers,
    ),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.builds(
        _combined,
        st.sampled_from(["all_of", "any_of", "none_of"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def row(id: str, some: dict[str, str]) -> ItemRow:
    return _item_row(pb.Item(id=id, attributes=some), behavior=False)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Store(tmp_path_factory.mktemp("store"), "aa" * 16, "one")
    yield made
    made.close()


def collection(opened: Store, name: str) -> int:
    """Number of a new text collection."""
    return opened.database.submit(lambda c: store.add_collection(c, name, TEXT, 2)).result().number


def put(opened: Store, number: int, items: dict[str, dict[str, str]]) -> None:
    rows = [row(id, some) for id, some in items.items()]
    opened.database.submit(lambda c: records.put_items(c, number, rows, {}, 1)).result()


def delete(opened: Store, number: int, ids: list[str]) -> None:
    opened.database.submit(lambda c: records.delete_ids(c, number, TEXT, ids, 1)).result()


def drop(opened: Store, number: int) -> None:
    opened.database.submit(lambda c: records.drop_collection(c, number)).result()


def tables(connection: sqlite3.Connection) -> tuple[int, int]:
    """Rows of both tables."""
    values = connection.execute("SELECT COUNT(*) FROM attribute_values").fetchone()[0]
    return values, connection.execute("SELECT COUNT(*) FROM item_attributes").fetchone()[0]


batches = st.lists(
    st.one_of(
        st.dictionaries(st.sampled_from("1234567"), attributes, min_size=1, max_size=5),
        st.lists(st.sampled_from("1234567"), min_size=1, max_size=3, unique=True),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=120, deadline=None)
@given(batches=batches, some=st.lists(conditions, min_size=1, max_size=4))
def test_sql_answers_as_the_definition(
    opened: Store, batches: list[dict[str, dict[str, str]] | list[str]], some: list[pb.Condition]
) -> None:
    """Through inserts, replacements and deletions; what is not used any more leaves no trace."""
    number, other = collection(opened, "one"), collection(opened, "other")
    put(opened, other, {"1": {"a": "x", "price": "1"}})
    connection = opened.database.connection()
    known: dict[str, dict[str, str]] = {}
    for batch in batches:
        if isinstance(batch, dict):
            put(opened, number, batch)
            known |= batch
        else:
            delete(opened, number, batch)
            known = {id: each for id, each in known.items() if id not in batch}
        for condition in some:
            expected = [id for id, each in known.items() if matches(condition, each)]
            found = matching(connection, number, condition)
            assert sorted(found) == sorted(expected)
    pairs = [pair for each in known.values() for pair in each.items()]
    assert tables(connection) == (2 + len(set(pairs)), 2 + len(pairs))
    for each in (number, other):
        drop(opened, each)
    assert tables(connection) == (0, 0)


def test_conditions_answer_after_a_restart(tmp_path: Path) -> None:
    opened = Store(tmp_path, "aa" * 16, "one")
    number = collection(opened, "one")
    put(opened, number, {"1": {"a": "x"}, "2": {"a": "3"}})
    opened.close()
    opened = Store(tmp_path, "aa" * 16, "one")
    put(opened, number, {"1": {"a": "4"}})
    condition = _range("a", "gte", 3, "lt", 10)
    assert sorted(matching(opened.database.connection(), number, condition)) == ["1", "2"]
    opened.close()


def test_verify_compares_attributes_with_the_items(tmp_path: Path) -> None:
    opened = Store(tmp_path, "aa" * 16, "one")
    number = collection(opened, "one")
    put(opened, number, {"1": {"a": "1", "b": "x"}, "2": {"a": "1", "c": "a\0b"}})
    assert verify(tmp_path).findings == []

    def spoil(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE attribute_values SET as_number = 2 WHERE value = '1'")
        connection.execute("UPDATE attribute_values SET value = 'y' WHERE value = 'x'")

    opened.database.submit(spoil).result()
    opened.close()
    assert verify(tmp_path).findings == [
        "attribute that reads as another number: '1'",
        "attribute that no condition finds: collection 1, '1'",
        "attributes without an item: 1",
    ]


def test_an_answer_is_kept_until_the_collection_changes(opened: Store) -> None:
    number = collection(opened, "kept")
    put(opened, number, {"1": {"a": "x"}})
    connection = opened.database.connection()
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    known = Conditions()
    condition = pb.Condition(exists="a")
    first = known.ids(connection, number, 5, condition)
    assert known.ids(connection, number, 5, condition) is first
    assert len(statements) == 1
    put(opened, number, {"2": {"a": "x"}})
    assert sorted(known.ids(connection, number, 6, condition)) == ["1", "2"]
    assert known.ids(connection, number, 6, pb.Condition(exists="b")) == ()
    connection.set_trace_callback(None)


def test_answers_are_kept_within_bounds(opened: Store) -> None:
    number = collection(opened, "bounds")
    put(opened, number, {str(n): {"a": "x", "b": "x", "c": str(n)} for n in range(10)})
    connection = opened.database.connection()
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    known = Conditions(cache_bytes=2_000)  # an id takes 58
    all_of = [pb.Condition(exists=key) for key in "abc"]
    for condition in (all_of[0], all_of[1], all_of[0], all_of[2], all_of[0], all_of[1]):
        known.ids(connection, number, 1, condition)
    assert len(statements) == 4  # `b` was used least lately when `c` came
    small = Conditions(cache_bytes=500)
    for _ in range(2):
        small.ids(connection, number, 1, all_of[0])
    assert len(statements) == 6
    connection.set_trace_callback(None)


def test_a_long_evaluation_ends_when_nobody_waits(opened: Store) -> None:
    number = collection(opened, "long")
    put(opened, number, {str(n): {"a": str(n)} for n in range(5_000)})
    condition = pb.Condition(none_of=pb.Conditions(conditions=[_range("a", "gt", 1, "lt", 4_000)]))
    connection = opened.database.connection()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        matching(connection, number, condition, lambda: True)
    left = threading.Event()
    assert len(matching(connection, number, condition, left.is_set)) == 1_002
