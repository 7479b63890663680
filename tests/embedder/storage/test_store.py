from pathlib import Path

import numpy as np
import pytest

from embedder.storage import records, store
from embedder.storage.records import ItemRow
from embedder.storage.store import Store
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import FailedPreconditionError

VECTOR = np.array([1, 2], np.float32)
ONE, OTHER = "aa" * 16, "bb" * 16


def test_a_data_directory_belongs_to_one_process(tmp_path: Path) -> None:
    first = Store(tmp_path / "data", ONE, "one")
    with pytest.raises(FailedPreconditionError) as raised:
        Store(tmp_path / "data", ONE, "one")
    assert raised.value.reason == "DATA_DIR_IN_USE"
    assert str(tmp_path / "data") in raised.value.message
    first.close()
    Store(tmp_path / "data", ONE, "one").close()


def test_a_data_directory_belongs_to_one_encoder(tmp_path: Path) -> None:
    Store(tmp_path / "data", ONE, "one").close()
    with pytest.raises(FailedPreconditionError, match="filled by the encoder one") as raised:
        Store(tmp_path / "data", OTHER, "other")
    assert raised.value.reason == "OTHER_ENCODER"
    # The same encoder from another place is the same encoder, and the refusal freed the lock.
    Store(tmp_path / "data", ONE, "/elsewhere/one").close()


def test_seqs_grow_over_restarts(tmp_path: Path) -> None:
    opened = Store(tmp_path, ONE, "one")
    first = [opened.database.submit(store.next_seq).result() for _ in range(3)]
    opened.close()
    opened = Store(tmp_path, ONE, "one")
    assert store.current_seq(opened.database.connection()) == first[-1]
    assert opened.database.submit(store.next_seq).result() == first[-1] + 1
    opened.close()


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    opened = Store(tmp_path, ONE, "one")
    submit = opened.database.submit
    kind = pb.COLLECTION_KIND_TEXT
    number = submit(lambda c: store.add_collection(c, "t", kind, 2)).result().number

    def put(*rows: ItemRow, seq: int) -> list[str]:
        vectors = {row.hash: VECTOR for row in rows if row.hash is not None}
        moved = submit(lambda c: records.put_items(c, number, rows, vectors, seq)).result()
        return [row.id for row in moved]

    a, b = ItemRow("a", "x", b"x", "{}"), ItemRow("b", "", None, "{}")
    assert put(a, b, seq=5) == ["a", "b"]
    assert put(a, b, seq=6) == []
    assert put(ItemRow("a", "x", b"x", '{"k": "v"}'), ItemRow("b", " ", None, "{}"), seq=7) == []
    assert put(a, ItemRow("b", "x", b"x", "{}"), seq=8) == ["b"]
    found = list(records.changed_vectors(opened.database.connection(), number, kind, -1))
    assert found == [("a", VECTOR.tobytes(), 5), ("b", VECTOR.tobytes(), 8)]
    later = list(records.changed_vectors(opened.database.connection(), number, kind, 5))
    assert later == found[1:]
    opened.close()


def test_tombstones_last_until_the_id_returns(tmp_path: Path) -> None:
    opened = Store(tmp_path, ONE, "one")
    submit = opened.database.submit
    kind = pb.COLLECTION_KIND_VECTOR
    number = submit(lambda c: store.add_collection(c, "v", kind, 2)).result().number
    submit(lambda c: records.put_vectors(c, number, [("a", b"1"), ("b", b"2")], 2)).result()
    gone = submit(lambda c: records.delete_ids(c, number, kind, ["b", "a", "c"], 3)).result()
    assert gone == ["b", "a"]
    submit(lambda c: records.put_vectors(c, number, [("a", b"3")], 4)).result()
    opened.close()
    opened = Store(tmp_path, ONE, "one")
    assert records.tombstones(opened.database.connection(), number) == {"b": 3}
    opened.close()
