"""What the model lets pass, and what it does not: a checker that cannot fail is worth nothing."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.crashing import model as model_module
from bench.crashing.model import Done, Key, Kind, Model, Value, Write

A, B, C = Key("items", "a"), Key("items", "b"), Key("items", "c")


def write(after: int = 0, **cells: Value) -> Write:
    return Write({Key("items", id): value for id, value in cells.items()}, after)


def acknowledged(*writes: Write) -> Model:
    """A model after writes that were answered one after the other, with seq 1, 2, ..."""
    model = Model()
    for seq, each in enumerate(writes, 1):
        model.acknowledge(Done(each, seq))
    return model


def kinds(
    model: Model, observed: Mapping[Key, Value], seq: int, repeated: tuple[Done, ...] = ()
) -> list[Kind]:
    return [each.kind for each in model.check(observed, {"items"}, seq, repeated)]


def test_what_was_acknowledged_is_expected() -> None:
    model = acknowledged(write(a="1", b="1"), write(a="2"), write(b=None))
    assert kinds(model, {A: "2"}, 3) == []


def test_answers_may_come_in_any_order() -> None:
    model = Model()
    model.acknowledge(Done(write(a="new"), 2))
    model.acknowledge(Done(write(a="old", b="1"), 1))
    assert kinds(model, {A: "new", B: "1"}, 2) == []


def test_a_missing_item_is_lost() -> None:
    assert kinds(acknowledged(write(a="1")), {}, 1) == [Kind.LOST]


def test_an_older_value_is_a_lost_write() -> None:
    assert kinds(acknowledged(write(a="1"), write(a="2")), {A: "1"}, 2) == [Kind.LOST]


def test_a_deleted_item_that_is_there_is_resurrected() -> None:
    assert kinds(acknowledged(write(a="1"), write(a=None)), {A: "1"}, 2) == [Kind.RESURRECTED]


def test_what_nobody_wrote_is_resurrected() -> None:
    assert kinds(acknowledged(write(a="1")), {A: "1", B: "?"}, 1) == [Kind.RESURRECTED]


def test_a_store_that_went_back_has_lost_something() -> None:
    assert kinds(acknowledged(write(a="1"), write(a="1")), {A: "1"}, 1) == [Kind.LOST]


def test_a_violation_is_reported_once() -> None:
    model = acknowledged(write(a="1"), write(b="1"))
    assert kinds(model, {B: "1"}, 2) == [Kind.LOST]
    assert kinds(model, {B: "1"}, 2) == []


def test_other_collections_are_not_compared() -> None:
    model = acknowledged(Write({Key("gone", "a"): "1"}))
    assert kinds(model, {}, 1) == []


def test_what_was_in_a_collection_before_it_was_made_anew_is_gone() -> None:
    model = acknowledged(write(a="1"))
    model.clear("items", 2)
    model.acknowledge(Done(write(b="1"), 3))
    assert kinds(model, {B: "1"}, 3) == []
    model = acknowledged(write(a="1"))
    model.clear("items", 2)
    assert kinds(model, {A: "1"}, 2) == [Kind.RESURRECTED]


class TestLostWrites:
    """Writes that were in flight at the kill."""

    def model(self, *unknown: Write) -> Model:
        made = acknowledged(write(a="1", b="1"))
        made.unknown.extend(unknown)
        return made

    def test_one_may_be_there_or_not(self) -> None:
        lost = write(1, a="2", b=None, c="2")
        assert kinds(self.model(lost), {A: "1", B: "1"}, 1) == []
        assert kinds(self.model(lost), {A: "2", C: "2"}, 2) == []

    @pytest.mark.parametrize("observed", [{A: "2", B: "1"}, {A: "1"}, {A: "1", B: "1", C: "2"}])
    def test_half_of_one_is_torn(self, observed: dict[Key, Value]) -> None:
        assert set(kinds(self.model(write(1, a="2", b=None, c="2")), observed, 2)) == {Kind.TORN}

    def test_one_may_lie_between_acknowledged_ones(self) -> None:
        lost = write(1, a="lost", b="lost")
        for observed, wrong in [
            ({A: "later", B: "lost"}, False),  # done before the later one
            ({A: "lost", B: "lost"}, False),  # after it
            ({A: "later", B: "1"}, False),  # not at all
            ({A: "lost", B: "1"}, True),
        ]:
            model = self.model(lost)
            model.acknowledge(Done(write(a="later"), 3))
            assert bool(kinds(model, observed, 4)) == wrong, observed

    def test_one_cannot_be_older_than_what_was_known_when_it_was_sent(self) -> None:
        model = self.model(write(2, a="lost", b="lost"))
        model.acknowledge(Done(write(a="known"), 2))
        assert kinds(model, {A: "known", B: "lost"}, 3) == [Kind.TORN]

    def test_two_may_be_done_in_either_order(self) -> None:
        one, other = write(1, a="x", b="x"), write(1, b="y", c="y")
        for observed, wrong in [
            ({A: "x", B: "x", C: "y"}, False),
            ({A: "x", B: "y", C: "y"}, False),
            ({A: "1", B: "y", C: "y"}, False),
            ({A: "x", B: "1", C: "y"}, True),
            ({A: "1", B: "x", C: "y"}, True),
        ]:
            assert bool(kinds(self.model(one, other), observed, 3)) == wrong, observed

    def test_repeated_one_tells_whether_it_had_been_done(self) -> None:
        lost = write(1, a="2", b="2")
        assert kinds(self.model(), {A: "2", B: "2"}, 2, (Done(lost, 2),)) == []
        assert kinds(self.model(), {A: "1", B: "1"}, 2, (Done(lost, 3),)) == []
        said_done, said_not_done = Done(lost, 2), Done(lost, 3)
        assert set(kinds(self.model(), {A: "1", B: "1"}, 2, (said_done,))) == {Kind.TORN}
        assert set(kinds(self.model(), {A: "2", B: "2"}, 2, (said_not_done,))) == {Kind.TORN}

    def test_repeated_it_counts_as_acknowledged(self) -> None:
        model = self.model()
        assert kinds(model, {A: "1", B: "1"}, 2, (Done(write(a="2"), 3),)) == []
        assert kinds(model, {A: "1", B: "1"}, 3) == [Kind.LOST]

    def test_what_was_found_is_expected_from_then_on(self) -> None:
        model = self.model(write(1, a="2"))
        assert kinds(model, {A: "2", B: "1"}, 2) == []
        assert kinds(model, {A: "1", B: "1"}, 2) == [Kind.LOST]

    def test_too_many_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model_module, "MOST_WAYS", 10)
        with pytest.raises(RuntimeError, match="3 lost writes"):
            kinds(self.model(*(write(1, a=str(n)) for n in range(3))), {}, 1)


IDS = "abcd"
WRITES = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(IDS), st.sampled_from([*"12345678", None]), min_size=1),
        st.sampled_from(["acknowledged", "acknowledged", "repeated", "unknown"]),
        st.booleans(),
        st.integers(0, 3),
    ),
    max_size=12,
)
"""Of each write: its cells, what became of its answer, whether it was done if that was lost, how
many writes before it were still in flight when it was sent."""


def present(cells: Mapping[Key, Value]) -> dict[Key, Value]:
    return {key: value for key, value in cells.items() if value is not None}


@given(WRITES, st.sampled_from(IDS), st.sampled_from([*"12345678", None]))
def test_an_honest_store_passes_and_a_changed_cell_does_not(
    writes: list[tuple[dict[str, Value], str, bool, int]], id: str, value: Value
) -> None:
    model = Model()
    store: dict[Key, Value] = {}
    seq = 0
    repeated: list[Done] = []
    not_done: list[Write] = []
    for cells, fate, done, in_flight in writes:
        if fate == "unknown" and len(model.unknown) == 2:
            fate = "repeated"
        sent = write(max(0, seq - in_flight), **cells)
        if done or fate == "acknowledged":
            seq += 1
            store |= sent.cells
        if fate == "acknowledged":
            model.acknowledge(Done(sent, seq))
        elif fate == "unknown":
            model.unknown.append(sent)
        elif done:
            repeated.append(Done(sent, seq))
        else:
            not_done.append(sent)
    repeated += (Done(each, seq + 1 + number) for number, each in enumerate(not_done))
    observed = present(store)
    key = Key("items", id)
    assert model.check(observed, {"items"}, seq, repeated) == []
    # What the model has taken over is exact but for what was repeated after the reading.
    again = dict(observed)
    for each in not_done:
        again |= each.cells
    again = present(again)
    assert model.check(again, {"items"}, seq + len(not_done)) == []
    if again.get(key) != value:
        changed = present({**again, key: value})
        assert len(model.check(changed, {"items"}, seq + len(not_done))) == 1
