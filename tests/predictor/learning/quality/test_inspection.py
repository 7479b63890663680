"""Each kind of fault is found where it is planted, with its counts, and nothing in clean data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns, Summary
from foretell.types import Item
from predictor.learning.quality.findings import Finding, Mask
from predictor.learning.quality.inspection import Inspection, inspect, without
from predictor.models.history import Ints

SECOND = 1_000_000
DAY = 86_400 * SECOND
BEGIN = 1_700_000_000 * SECOND
NOW = BEGIN + 1_000 * DAY

Row = tuple[str, str, str, str, int]
"""user, type, item, text, microseconds."""

some = settings(max_examples=40)


def columns_of(rows: list[Row], *, times: bool = True) -> EventColumns:
    """As an importer reads them: codes in order of appearance."""
    users, user = coded([row[0] for row in rows])
    kinds, kind = coded([row[1] for row in rows])
    items, item = coded([row[2] for row in rows])
    texts, text = coded([row[3] for row in rows])
    stamps = np.array([row[4] for row in rows], np.int64) if times else None
    return EventColumns(users, kinds, items, texts, user, kind, item, text, stamps)


def coded(values: list[str]) -> tuple[list[str], Ints]:
    names = {value: at for at, value in enumerate(dict.fromkeys(filter(None, values)))}
    return list(names), np.array([names.get(value, -1) for value in values], np.int64)


def clean_rows(seed: int, users: int = 30, largest: int = 4) -> list[Row]:
    """A shop: baskets at odd times, in the order of time, in which nothing is odd.

    Args:
        largest: items of a basket, at most.
    """
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for user in range(users):
        at = BEGIN + int(rng.integers(0, 50 * DAY))
        for _ in range(int(rng.integers(4, 8))):
            at += int(rng.exponential(3 * DAY)) // SECOND * SECOND + 61 * SECOND
            size = int(np.exp(rng.uniform(0, np.log(largest + 1))))
            for item in rng.choice(max(20, largest), size, replace=False).tolist():
                rows.append((f"u{user}", ("view", "buy")[int(rng.integers(2))], f"i{item}", "", at))
    return sorted(rows, key=lambda row: row[4])


def look(rows: list[Row], items: list[Item] | None = None) -> Inspection:
    return inspect(columns_of(rows), items, {}, NOW)


def names(found: Inspection) -> set[str]:
    return {finding.name for finding in found.findings}


def only(found: Inspection, name: str) -> Finding:
    (finding,) = (each for each in found.findings if each.name == name)
    return finding


def touched(finding: Finding) -> list[int]:
    assert finding.events is not None
    return np.flatnonzero(finding.events).tolist()


@some
@given(st.integers(0, 10_000), st.sampled_from([1, 4, 160]))
def test_nothing_is_found_in_clean_data(seed: int, largest: int) -> None:
    """Baskets of 160 lines, as groceries have, are baskets."""
    rows = clean_rows(seed, largest=largest)
    assert names(look(rows)) == set()
    # In a file without times the order of the rows is no time.
    assert names(inspect(columns_of(rows, times=False), None, {}, NOW)) == set()


@some
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 3))
def test_events_that_repeat_another_are_found(seed: int, planted: int, copies: int) -> None:
    rows = clean_rows(seed)
    chosen = np.random.default_rng(seed).choice(len(rows), planted, replace=False).tolist()
    added = [rows[at] for at in chosen for _ in range(copies)]
    found = look([*rows, *added])
    finding = only(found, "duplicates")
    assert touched(finding) == list(range(len(rows), len(rows) + len(added)))
    assert finding.drops
    _, left = found.cleaned()
    same(left, columns_of(rows))


def test_equal_rows_of_one_day_may_be_two_events() -> None:
    rows = [(*row[:4], row[4] // DAY * DAY) for row in clean_rows(0)]
    finding = only(look([*rows, rows[0]]), "duplicates")
    assert touched(finding)[-1] == len(rows)
    assert not finding.drops


def test_two_of_one_thing_in_different_texts_or_types_are_no_duplicates() -> None:
    rows = clean_rows(0)
    user, kind, item, _, at = rows[0]
    other = {"view": "buy", "buy": "view"}[kind]
    assert "duplicates" not in names(look([*rows, (user, kind, item, "x", at)]))
    assert "duplicates" not in names(look([*rows, (user, other, item, "", at + 1)]))


@some
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 5))
def test_impossible_times_are_found(seed: int, early: int, late: int) -> None:
    rows = clean_rows(seed)
    bad: list[Row] = [("u0", "view", f"e{n}", "", n * SECOND) for n in range(early)]
    bad += [("u1", "view", f"l{n}", "", NOW + 1 + n * SECOND) for n in range(late)]
    found = look([*bad[:early], *rows, *bad[early:]])
    finding = only(found, "impossible_times")
    assert touched(finding) == [*range(early), *range(len(rows) + early, len(rows) + len(bad))]
    assert f"{early} before 1990, {late} after now" in finding.found
    _, left = found.cleaned()
    same(left, columns_of(rows))


def test_a_clock_of_its_own_is_not_impossible() -> None:
    rows = [(*row[:4], row[4] - BEGIN) for row in clean_rows(0)]
    found = look(rows)
    assert names(found) == {"own_clock"}
    assert not found.droppable.any()


def test_equal_times_are_told() -> None:
    found = look([(*row[:4], BEGIN) for row in clean_rows(0)])
    assert "one_time" in names(found)
    assert "bursts" not in names(found)


def test_rows_out_of_order_are_found_where_the_file_claims_order() -> None:
    rows = clean_rows(0)
    mine = [at for at, row in enumerate(rows) if row[0] == "u3"]
    moved = [*rows[: mine[-1]], *rows[mine[-1] + 1 :]]
    moved.insert(mine[0], rows[mine[-1]])  # u3's last event before u3's first
    finding = only(look(moved), "out_of_order")
    assert touched(finding) == [mine[0] + 1]
    # Each user's events in order, one user after the other: nothing is wrong.
    assert "out_of_order" not in names(look(sorted(rows, key=lambda row: row[0])))
    # A file in no order claims none.
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    assert "out_of_order" not in names(look([rows[at] for at in order]))


@some
@given(st.integers(0, 10_000), st.integers(100, 400), st.booleans())
def test_a_flood_of_events_in_a_second_is_a_burst(seed: int, size: int, same_instant: bool) -> None:
    rows = clean_rows(seed)
    at = BEGIN + 70 * DAY
    flood: list[Row] = [
        ("u5", "view", f"i{n}", "", at + (0 if same_instant else n * 1_000)) for n in range(size)
    ]
    found = look([*rows, *flood])
    finding = only(found, "bursts")
    assert touched(finding) == list(range(len(rows), len(rows) + size))
    assert finding.examples == ("u5",)
    _, left = found.cleaned()
    same(left, columns_of(rows))


def test_a_day_of_events_is_no_burst_where_times_are_dates() -> None:
    rows = [(*row[:4], row[4] // DAY * DAY) for row in clean_rows(0)]
    many: list[Row] = [("u5", "view", f"m{n}", "", BEGIN // DAY * DAY) for n in range(300)]
    assert "bursts" not in names(look([*rows, *many]))


@some
@given(st.integers(0, 10_000), st.integers(60, 120), st.integers(30, 40_000), st.integers(0, 2))
def test_equal_gaps_are_a_programs(seed: int, events: int, gap: int, jitter: int) -> None:
    rows, rng = clean_rows(seed), np.random.default_rng(seed)
    gap = max(gap, 40 * jitter)  # within 5 % of one another
    times = BEGIN + (np.arange(events) * gap + rng.integers(0, 1 + jitter, events)) * SECOND
    bot: list[Row] = [("bot", "view", f"i{n % 7}", "", int(at)) for n, at in enumerate(times)]
    found = look([*rows, *bot])
    finding = only(found, "bots")
    assert touched(finding) == list(range(len(rows), len(rows) + events))
    assert finding.examples == ("bot",)
    assert "1 too regularly" in finding.found
    _, left = found.cleaned()
    same(left, columns_of(rows))


@pytest.mark.parametrize("days", [1, 7])
def test_every_day_at_the_same_time_is_a_persons_habit(days: int) -> None:
    habit: list[Row] = [("h", "view", "i1", "", BEGIN + n * days * DAY) for n in range(100)]
    assert "bots" not in names(look([*clean_rows(0), *habit]))


def test_more_actions_a_day_than_a_person_has() -> None:
    rng = np.random.default_rng(0)
    # No gap is like another, and no second has two events.
    times = np.cumsum(rng.integers(1, 30, 3_000)) * SECOND
    bot: list[Row] = [("bot", "view", f"i{n % 7}", "", BEGIN + int(at)) for n, at in
                      enumerate(times)]  # fmt: skip
    found = look([*clean_rows(0), *bot])
    assert "1 too often" in only(found, "bots").found
    # Half as many a person may have.
    assert "bots" not in names(look([*clean_rows(0), *bot[:1_500]]))


def test_users_with_one_event_and_large_users() -> None:
    rows = clean_rows(0)
    rng = np.random.default_rng(1)
    times = np.sort(rng.integers(0, 90 * 86_400, 400)) * SECOND
    large: list[Row] = [("big", "view", f"i{n % 20}", "", BEGIN + int(at)) for n, at in
                        enumerate(times)]  # fmt: skip
    found = look([*rows, ("once", "view", "i1", "", BEGIN), *large])
    assert touched(only(found, "users_with_one_event")) == [len(rows)]
    assert touched(only(found, "large_users")) == list(range(len(rows) + 1, len(rows) + 401))
    assert only(found, "large_users").examples == ("big",)
    assert not found.droppable.any()


def test_missing_items_and_texts_are_counted_where_others_have_them() -> None:
    rows = clean_rows(0)
    mixed = [(*row[:2], "", "a text", row[4]) if n % 10 == 0 else row for n, row in
             enumerate(rows)]  # fmt: skip
    found = look(mixed)
    tenth = list(range(0, len(rows), 10))
    assert touched(only(found, "events_without_item")) == tenth
    assert len(touched(only(found, "events_without_text"))) == len(rows) - len(tenth)


def test_constants_are_told() -> None:
    rows = [(row[0], "view", "i1", "hello", row[4]) for row in clean_rows(0)]
    found = look(rows)
    assert {"one_behavior_type", "one_item", "one_text"} <= names(found)
    assert only(found, "one_item").examples == ("i1",)
    assert "hello" not in str(found)


def test_rare_types_and_spellings() -> None:
    rows = clean_rows(0)
    more: list[Row] = [("u1", kind, "i1", "", BEGIN + 80 * DAY) for kind in
                       ("Buy", "add to cart", "add_to_cart", "AddToCart", "grade A", "grade A-",
                        "1-1", "11")]  # fmt: skip
    found = look([*rows, *more])
    # "buy" is frequent, so "Buy" is the variant; of equals the first stands.
    assert touched(only(found, "spelling_variants")) == [len(rows) + n for n in (0, 2, 3)]
    assert "Buy = buy" in only(found, "spelling_variants").examples
    assert touched(only(found, "rare_types")) == list(range(len(rows), len(rows) + len(more)))
    assert not found.droppable.any()


def test_items_without_text_without_events_and_unknown_ones() -> None:
    rows = clean_rows(0)
    items = [Item(f"i{n}", f"thing {n}" if n != 2 else "") for n in range(19)] + [Item("new", "n")]
    found = look(rows, items)
    assert touched(only(found, "items_without_text")) == [
        at for at, row in enumerate(rows) if row[2] == "i2"
    ]
    assert only(found, "items_without_events").examples == ("new",)
    unknown = only(found, "unknown_items")
    assert touched(unknown) == [at for at, row in enumerate(rows) if row[2] == "i19"]
    assert unknown.examples == ("i19",)


def test_events_without_any_item_say_nothing_of_the_items() -> None:
    rows = [(*row[:2], "", f"text {n}", row[4]) for n, row in enumerate(clean_rows(0))]
    assert names(look(rows, [Item("i1", "one")])) == set()


def test_refused_rows_are_told_with_their_reasons() -> None:
    refused = Counter({"timestamp is empty": 2, "an earlier row has the same event_id": 1})
    summary = Summary(rows=100, kept=97, refused=refused)
    found = inspect(columns_of(clean_rows(0)), None, {"events e.csv": summary}, NOW)
    told = only(found, "refused_rows").found
    assert "3 of 100 rows" in told
    assert "timestamp is empty: 2; an earlier row has the same event_id: 1" in told


def test_cleaning_that_would_leave_nothing_is_refused() -> None:
    flood: list[Row] = [("u", "view", f"i{n}", "", BEGIN) for n in range(200)]
    flood += [("v", "view", f"i{n}", "", BEGIN + SECOND) for n in range(200)]
    with pytest.raises(InvalidArgumentError, match="would drop all 400 events") as error:
        look(flood).cleaned()
    assert error.value.field == "clean"


@pytest.mark.parametrize("rows", [
    [("u", "view", "i", "", BEGIN)],
    [("u", "view", "", "t", BEGIN)] * 3,
    [("u", "view", "i", "", 0)] * 2,
    [(f"u{n}", "view", "i", "t", BEGIN + n) for n in range(5)],
])  # fmt: skip
def test_the_smallest_sets_can_be_looked_at(rows: list[Row]) -> None:
    for times in (True, False):
        found = inspect(columns_of(rows, times=times), [Item("i", "")], {}, NOW)
        assert str(found)


@some
@given(st.integers(0, 10_000), st.data())
def test_dropped_events_leave_no_trace(seed: int, data: st.DataObject) -> None:
    rows = clean_rows(seed, users=4)
    dropped: Mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows),
                                                max_size=len(rows))))  # fmt: skip
    kept = [row for row, gone in zip(rows, dropped, strict=True) if not gone]
    same(without(columns_of(rows), dropped), columns_of(kept))
    left = without(columns_of(rows, times=False), dropped)
    assert left.timestamp is None


def same(one: EventColumns, other: EventColumns) -> None:
    """Whether they are equal, vocabularies and all."""
    for name in EventColumns.__slots__:
        left, right = getattr(one, name), getattr(other, name)
        assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, name


def test_what_was_done_follows_cleaning() -> None:
    rows = clean_rows(0)
    found = look([*rows, rows[0]])
    assert found.done(only(found, "duplicates")).startswith("kept")
    cleaned, _ = found.cleaned()
    assert cleaned.done(only(cleaned, "duplicates")) == "dropped: 1 events"
    assert f"cleaning dropped 1 of {len(rows) + 1} events" in str(cleaned)
    assert str(replace(found, findings=())) == "data: nothing odd was found"
