import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell import Client, limits
from foretell.errors import FailedPreconditionError
from foretell.testing import FakeServices
from foretell.texts import text_id
from predictor.database import open_database
from predictor.events import Clock, EventStore, History
from predictor.ingestion import NewEvent, Outcome, delete_user, ingest
from predictor.learning.sources import read_store
from serving.database import Database


def event(
    user: str = "u",
    behavior_type: str = "view",
    time: int = 1,
    item: str | None = None,
    text: str | None = None,
    event_id: str | None = None,
) -> NewEvent:
    attributes = json.dumps({"at": str(time)})
    identity = text_id(text) if text else None
    return NewEvent(user, behavior_type, time, item, text, identity, event_id, attributes)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(tmp_path)
    yield database
    database.close()


@pytest.fixture
def store(db: Database) -> EventStore:
    return EventStore(db)


def write(store: EventStore, *events: NewEvent) -> tuple[int, int, list[int]]:
    """How many were stored and how many known, and the positions of those refused."""
    done = store.db.submit(lambda connection: ingest(connection, events)).result()
    refused = [at for at, outcome in enumerate(done) if outcome is Outcome.REFUSED]
    return done.count(Outcome.STORED), done.count(Outcome.DUPLICATE), refused


def test_history_is_in_the_order_of_time_and_then_of_ingest(store: EventStore) -> None:
    write(store, event(time=5, item="c"), event(time=3, item="a"))
    write(store, event(time=3, item="b"), event(user="other", time=4, item="x"))
    assert store.histories(["u"], 10)["u"].item_ids == ["a", "b", "c"]
    assert store.histories(["u"], 2)["u"].item_ids == ["b", "c"]
    assert store.histories(["nobody"], 10) == {}


def test_a_known_event_id_is_ignored_and_counted(store: EventStore) -> None:
    assert write(store, event(item="a", event_id="1"), event(item="b", event_id="1")) == (1, 1, [])
    assert write(store, event("v", event_id="1"), event(event_id="2")) == (1, 1, [])
    assert store.histories(["u"], 10)["u"].item_ids == ["a", ""]
    assert store.counts().users == 1


def test_types_beyond_the_limit_are_refused_and_known_ones_are_not(store: EventStore) -> None:
    types = [event(behavior_type=f"type {n}") for n in range(limits.BEHAVIOR_TYPES)]
    assert write(store, *types) == (limits.BEHAVIOR_TYPES, 0, [])
    # What was refused is not known afterwards.
    once_more = event(behavior_type="type 0", event_id="e")
    refused = event(behavior_type="too many", event_id="e")
    assert write(store, refused, refused, once_more, once_more) == (1, 1, [0, 1])
    more = (event(behavior_type="one more"), event(behavior_type="type 7", event_id="x"))
    assert write(store, *more) == (1, 0, [0])
    # With its last event a type goes, and makes room.
    store.db.submit(lambda connection: delete_user(connection, "u")).result()
    assert write(store, event(behavior_type="one more")) == (1, 0, [])
    assert store.type_counts() == {"one more": 1}


def test_deleting_a_user_leaves_others_texts_alone(store: EventStore) -> None:
    write(store, event("a", text="both"), event("a", text="mine"), event("b", text="both"))
    assert store.counts().pending_texts == 2
    assert store.db.submit(lambda connection: delete_user(connection, "a")).result() == 2
    assert store.db.submit(lambda connection: delete_user(connection, "a")).result() == 0
    assert dict(store.db.connection().execute("SELECT text, events FROM texts")) == {
        "both": 1,
        "mine": 0,
    }
    counts = store.counts()
    assert (counts.events, counts.users, counts.pending_texts) == (1, 1, 1)


def test_a_text_that_comes_back_is_new_again(store: EventStore) -> None:
    write(store, event("a", text="word"))
    store.db.submit(lambda c: c.execute("UPDATE texts SET state = 1")).result()
    store.db.submit(lambda connection: delete_user(connection, "a")).result()
    # Its deletion from the embedder may be on the way: only a new upsert brings it back for sure.
    write(store, event("b", text="word"))
    assert store.counts().pending_texts == 1


def test_popular_counts_items_most_frequent_first_then_latest(store: EventStore) -> None:
    write(store, *(event(item=item) for item in "abbca"), event(text="no item"))
    popular = store.popular()
    assert popular.events == 6
    assert list(popular.items.items()) == [("a", 2), ("b", 2), ("c", 1)]


def test_the_change_mark_moves_with_every_change(store: EventStore) -> None:
    marks = [store.change_mark()]
    write(store, event("a"))
    marks.append(store.change_mark())
    write(store, event("b"))
    marks.append(store.change_mark())
    store.db.submit(lambda connection: delete_user(connection, "b")).result()
    marks.append(store.change_mark())
    write(store, event("c"))
    marks.append(store.change_mark())
    assert marks[3] == marks[1]  # the same events as then
    assert len(set(marks)) == 4


def test_large_texts_end_a_page_early_and_none_is_lost(store: EventStore) -> None:
    text = "x" * limits.TEXT_CHARS
    write(store, *(event(time=n, text=f"{n}{text[10:]}") for n in range(500)))
    page, before = store.page("u", 1_000, None)
    assert 1 < len(page) < 500
    listed = page
    while before is not None:
        page, before = store.page("u", 1_000, before)
        listed += page
    assert [e.time_us for e in listed] == list(range(499, -1, -1))


def test_the_clock_gives_each_event_its_own_microsecond() -> None:
    clock = Clock()
    first = clock.reserve(1_000_000)  # a second ahead
    assert clock.reserve(1) == first + 1_000_000


def test_training_reads_the_store_while_the_service_has_it_open(store: EventStore) -> None:
    write(store, event("b", "buy", 7, item="i"), event("a", time=2, text="word"))
    with FakeServices() as fakes, Client(fakes.embedder_address) as client:
        source = read_store(store.db.path.parent, client)
    columns = source.columns
    assert [columns.user_ids[at] for at in columns.user] == ["b", "a"]
    assert [columns.behavior_types[at] for at in columns.behavior_type] == ["buy", "view"]
    assert columns.timestamp is not None
    assert columns.timestamp.tolist() == [7, 2]
    assert (columns.item_ids, columns.item.tolist()) == (["i"], [0, -1])
    assert (columns.texts, columns.text.tolist()) == (["word"], [-1, 0])
    assert source.lineage["store_last_event"] == 2


users = st.sampled_from("abc")
ingests = st.lists(
    st.builds(
        event,
        user=users,
        behavior_type=st.sampled_from(["view", "buy"]),
        time=st.integers(0, 3),
        item=st.none() | st.sampled_from("xyz"),
        text=st.none() | st.sampled_from(["one", "two", "three"]),
        event_id=st.none() | st.sampled_from("12345"),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(ingests | users, max_size=8))
def test_the_store_agrees_with_a_list(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[NewEvent] | str]
) -> None:
    """Ingests and deletions in any order, against the plainest model of them."""
    db = open_database(tmp_path_factory.mktemp("store"))
    try:
        _compare(EventStore(db), steps)
    finally:
        db.close()


def _compare(store: EventStore, steps: list[list[NewEvent] | str]) -> None:
    model: list[NewEvent] = []
    for step in steps:
        if isinstance(step, str):
            gone = store.db.submit(partial(delete_user, user_id=step)).result()
            assert gone == sum(e.user_id == step for e in model)
            model = [e for e in model if e.user_id != step]
        else:
            ids = {e.event_id for e in model if e.event_id}
            before = len(model)
            for one in step:
                if one.event_id is None or one.event_id not in ids:
                    ids.add(one.event_id or "")
                    model.append(one)
            assert write(store, *step) == (
                len(model) - before,
                len(step) - (len(model) - before),
                [],
            )
    _check(store, model)


def _check(store: EventStore, model: list[NewEvent]) -> None:
    for user in "abc":
        expected = sorted((e for e in model if e.user_id == user), key=lambda e: e.time_us)
        history = store.histories([user], 100, texts=True).get(user, History())
        assert list(history.behavior_types) == [e.behavior_type for e in expected]
        assert list(history.times_us) == [e.time_us for e in expected]
        assert list(history.item_ids) == [e.item_id or "" for e in expected]
        assert list(history.texts) == [e.text or "" for e in expected]
        listed, before = [], None
        while True:
            page, before = store.page(user, 2, before)
            listed += page
            if before is None:
                break
        assert [(e.time_us, e.event_id) for e in listed] == [
            (e.time_us, e.event_id or "") for e in reversed(expected)
        ]
    counts = store.counts()
    assert (counts.events, counts.users) == (len(model), len({e.user_id for e in model}))
    rows: list[tuple[str, int]] = (
        store.db.connection().execute("SELECT text, events FROM texts WHERE events > 0").fetchall()
    )
    texts = [e.text for e in model if e.text]
    assert dict(rows) == {text: texts.count(text) for text in set(texts)}
    types = [e.behavior_type for e in model]
    assert store.type_counts() == {name: types.count(name) for name in set(types)}


def test_history_uses_the_index(store: EventStore) -> None:
    plan = store.db.connection().execute(
        "EXPLAIN QUERY PLAN SELECT item_id FROM events INDEXED BY events_of_user"
        " WHERE user = 1 ORDER BY time DESC, event DESC LIMIT 5"
    )
    details = " ".join(row[3] for row in plan)
    assert "events_of_user" in details
    assert "TEMP B-TREE" not in details


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.db").write_bytes(b"no database" * 100)
    with pytest.raises(FailedPreconditionError, match="cannot be opened"):
        open_database(tmp_path)
