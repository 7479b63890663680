import contextlib
import csv
import io
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell import limits
from foretell.errors import FailedPreconditionError, ForetellError, InvalidArgumentError
from foretell.importing import EventReader, ItemReader, Summary, Target, TargetReader
from foretell.texts import clean_text
from foretell.types import Event, Item

NOW = datetime.now(UTC).replace(microsecond=0)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def events_csv(tmp_path: Path, text: str | bytes) -> Path:
    return write(tmp_path / "events.csv", text)


def test_events_of_every_column(tmp_path: Path) -> None:
    path = events_csv(
        tmp_path,
        "user_id,behavior_type,behavior_text,item_id,timestamp,event_id,channel,note\n"
        'ann,view,"a ""red"" mug, large",i1,2024-05-01T10:00:00+02:00,e1,web,\n'
        "bob,buy,,i2,2024-05-01,e2,,x\n",
    )
    reader = EventReader(path)
    assert list(reader) == [
        Event(
            "ann",
            "view",
            datetime(2024, 5, 1, 8, tzinfo=UTC),
            "i1",
            'a "red" mug, large',
            "e1",
            {"channel": "web"},
        ),
        Event("bob", "buy", datetime(2024, 5, 1, tzinfo=UTC), "i2", "", "e2", {"note": "x"}),
    ]
    assert reader.summary == Summary(rows=2, kept=2)
    assert reader.has_timestamps


def test_simplest_events_file_has_no_times_unless_a_start_is_given(tmp_path: Path) -> None:
    path = events_csv(
        tmp_path, "user_id,behavior_type,behavior_text\na,view,mug\na,,mug\na,buy,mug\n"
    )
    assert [event.timestamp for event in EventReader(path)] == [None, None]
    times = [event.timestamp for event in EventReader(path, start=NOW)]
    assert times == [NOW, NOW + timedelta(microseconds=2)]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("2024-05-01T10:00:00Z", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        ("2024-05-01 10:00:00.25", datetime(2024, 5, 1, 10, 0, 0, 250_000, tzinfo=UTC)),
        ("2024-05-01 10:00:00 UTC", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        (" 2024-05-01T10:00-05:30 ", datetime(2024, 5, 1, 15, 30, tzinfo=UTC)),
        ("20240501", datetime(2024, 5, 1, tzinfo=UTC)),
        ("20240501T1000", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        ("0", datetime(1970, 1, 1, tzinfo=UTC)),
        ("1714557600", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        ("1714557600.5", datetime(2024, 5, 1, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("1.7145576e9", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        ("1714557600123", datetime(2024, 5, 1, 10, 0, 0, 123_000, tzinfo=UTC)),
        ("1714557600123456", datetime(2024, 5, 1, 10, 0, 0, 123_456, tzinfo=UTC)),
    ],
)
def test_timestamps(tmp_path: Path, cell: str, expected: datetime) -> None:
    path = events_csv(tmp_path, f"user_id,behavior_type,item_id,timestamp\na,b,i,{cell}\n")
    assert [event.timestamp for event in EventReader(path)] == [expected]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("", "timestamp is empty"),
        ("yesterday", "timestamp cannot be read"),
        ("2024-13-01", "timestamp cannot be read"),
        ("0001-01-01T00:00:00+14:00", "timestamp cannot be read"),
        ("nan", "timestamp cannot be read"),
        ("1_000", "timestamp cannot be read"),
        ("1969-12-31T23:59:59.999999Z", "timestamp is before 1970"),
        ("-1", "timestamp is before 1970"),
        ("1e300", "timestamp is in the future"),
        ("9" * 5000, "timestamp is in the future"),
        ("9999-12-31", "timestamp is in the future"),
        pytest.param(
            (NOW + timedelta(days=1, hours=1)).isoformat(), "timestamp is in the future", id="soon"
        ),
    ],
)
def test_timestamps_that_cannot_stand(tmp_path: Path, cell: str, reason: str) -> None:
    path = events_csv(tmp_path, f"user_id,behavior_type,item_id,timestamp\na,b,i,{cell}\n")
    reader = EventReader(path)
    assert list(reader) == []
    assert reader.summary.refused == {reason: 1}


def test_a_clock_that_is_a_little_ahead_is_accepted(tmp_path: Path) -> None:
    ahead = NOW + timedelta(hours=23)
    path = events_csv(
        tmp_path, f"user_id,behavior_type,item_id,timestamp\na,b,i,{ahead.isoformat()}\n"
    )
    assert [event.timestamp for event in EventReader(path)] == [ahead]


def test_texts_are_mended_and_every_reason_is_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.csv",
        "item_id,text,url\n"
        " i1 ,<b>Tea &amp; milk</b>,https://a.example/?x=1&copy=2\n"
        "i2,Cafe\u0301  bar,\n"
        "i3,nul\x00 bell\x07,two\x00 words\n"
        f"i4,{'x' * (limits.TEXT_CHARS + 1)},{'y' * (limits.ATTRIBUTE_VALUE_CHARS + 1)}\n"
        "i5,plain,\n",
    )
    reader = ItemReader(path)
    assert list(reader) == [
        Item("i1", "Tea & milk", {"url": "https://a.example/?x=1&copy=2"}),
        Item("i2", "Caf\xe9 bar"),
        Item("i3", "nul bell", {"url": "two words"}),
        Item("i4", "x" * limits.TEXT_CHARS, {"url": "y" * limits.ATTRIBUTE_VALUE_CHARS}),
        Item("i5", "plain"),
    ]
    summary = reader.summary
    assert (summary.rows, summary.kept, summary.mended_rows) == (5, 5, 4)
    assert summary.mended == {
        "HTML": 1,
        "Unicode normal form": 1,
        "white space": 2,
        "control characters": 1,
        "text cut to 20,000 characters": 1,
        "attribute cut to 1,024 characters": 1,
    }
    assert "5 rows read, 5 kept (4 of them mended), 0 refused" in str(summary)
    assert "mended: white space: 2" in str(summary)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,b,i", "fewer cells than columns"),
        ("a,b,i,t,e,", "more cells than columns"),
        (",b,i,t,e", "user_id is empty"),
        (" ,b,i,t,e", "user_id is empty"),
        ("a,,i,t,e", "behavior_type is empty"),
        ("a,b,,,e", "neither item_id nor behavior_text"),
        ("a,b,,<br>,e", "neither item_id nor behavior_text"),
        (f"{'a' * 129},b,i,t,e", "user_id has more than 128 characters"),
        (f"a,b,{'i' * 129},t,e", "item_id has more than 128 characters"),
        (f"a,b,i,t,{'e' * 129}", "event_id has more than 128 characters"),
        (f"a,{'b' * 65},i,t,e", "behavior_type has more than 64 characters"),
        ("a\x00a,b,i,t,e", "user_id has control characters"),
        ("a,b,i\x85i,t,e", "item_id has control characters"),
        ("a,b,i,caf\udce9,e", "invalid UTF-8"),
        ("a\udcff,b,i,t,e", "invalid UTF-8"),
        ("a,b\udcff,i,t,e", "invalid UTF-8"),
        (f"a,b,i,{'t' * 200_000},e", "no CSV: field larger than field limit (131072)"),
    ],
)
def test_refused_rows_do_not_hurt_their_neighbours(tmp_path: Path, row: str, reason: str) -> None:
    text = f"user_id,behavior_type,item_id,behavior_text,event_id\n{row}\nok,b,i,t,other\n"
    reader = EventReader(events_csv(tmp_path, text.encode(errors="surrogateescape")))
    assert [event.user_id for event in reader] == ["ok"]
    assert reader.summary == Summary(rows=2, kept=1, refused=reader.summary.refused)
    assert reader.summary.refused == {reason: 1}


def test_ids_are_keys_and_change_by_nothing_but_outer_space(tmp_path: Path) -> None:
    ids = ["007", "a  b", "Cafe\u0301", "<b>", "a&amp;b", "1e5"]
    path = write(tmp_path / "items.csv", "item_id,text\n" + "".join(f" {i},t\n" for i in ids))
    assert [item.id for item in ItemReader(path)] == ids


def test_duplicates(tmp_path: Path) -> None:
    events = EventReader(
        events_csv(
            tmp_path,
            "user_id,behavior_type,item_id,event_id,timestamp\n"
            "a,view,i,e1,2024-01-01\n"
            "a,view,j,e1,2024-01-02\n"
            "a,buy,i,,2024-01-03\n"
            "a,buy,i,,2024-01-03\n",
        )
    )
    assert [(event.behavior_type, event.item_id) for event in events] == [
        ("view", "i"),
        ("buy", "i"),
        ("buy", "i"),
    ]
    assert events.summary.refused == {"an earlier row has the same event_id": 1}

    rejects = tmp_path / "rejects.csv"
    items = ItemReader(
        write(tmp_path / "items.csv", "item_id,text\ni,old\nj,other\n i ,new\n"), rejects=rejects
    )
    assert list(items) == [Item("j", "other"), Item("i", "new")]
    assert items.summary.refused == {"a later row has the same item_id": 1}
    assert (items.summary.rows, items.summary.kept, items.summary.mended_rows) == (3, 2, 1)
    assert list(csv.reader(rejects.read_text().splitlines())) == [
        ["rejected_row", "rejected_reason", "item_id", "text"],
        ["1", "a later row has the same item_id", "i", "old"],
    ]


def test_an_item_without_text_stands_and_is_counted(tmp_path: Path) -> None:
    reader = ItemReader(write(tmp_path / "items.csv", "item_id,text\ni,\nj,<br>\nk,tea\n"))
    assert list(reader) == [Item("i"), Item("j"), Item("k", "tea")]
    assert reader.summary.noted == {"item without text": 2}


def test_mended_rejects_can_be_imported_as_they_are(tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.csv"
    path = events_csv(
        tmp_path,
        b"user_id,behavior_type,behavior_text\na,view,mug\n,buy,mug\nb,view,\xff\nc,view\n",
    )
    reader = EventReader(path, rejects=rejects)
    assert len(list(reader)) == 1
    assert reader.summary.refused.total() == 3
    written = rejects.read_bytes()
    assert b"3,invalid UTF-8,b,view,\xff" in written  # the original bytes
    rejects.write_bytes(written.replace(b"2,user_id is empty,,", b"2,user_id is empty,a,"))
    again = EventReader(rejects)
    assert list(again) == [Event("a", "buy", None, "", "mug")]
    assert again.summary.refused.total() == 2


def test_rejects_never_overwrite_the_file_itself(tmp_path: Path) -> None:
    path = events_csv(tmp_path, "user_id,behavior_type,item_id\n")
    with pytest.raises(InvalidArgumentError, match="would overwrite"):
        EventReader(path, rejects=path)
    with pytest.raises(InvalidArgumentError, match="No such file"):
        list(EventReader(path, rejects=tmp_path / "no" / "rejects.csv"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "is empty"),
        ("\nuser_id,behavior_type,item_id\n", "is empty"),
        ("user,type,item_id\n", "columns user_id, behavior_type are missing; found: user, type"),
        ("user_id,behavior_type\n", "columns behavior_text or item_id are missing"),
        ("user_id;behavior_type;item_id\n", "must be separated by commas"),
        ("user_id,behavior_type,item_id,user_id\n", "more than one column user_id"),
        ("user_id,behavior_type,item_id,,\n", "more than one column without a name"),
        ("user_id,behavior_type,item_id,\n", "column name '' is no attribute's name"),
        (f"user_id,behavior_type,item_id,{'n' * 65}\n", "is no attribute's name"),
        (
            "user_id,behavior_type,item_id," + ",".join(f"a{i}" for i in range(65)) + "\n",
            "65 columns that would become attributes; at most 64 may be",
        ),
        (b"\xff\xfeu\x00s\x00", "is UTF-16; save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, header: str | bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EventReader(events_csv(tmp_path, header))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="No such file"):
        EventReader(tmp_path / "missing.csv")
    with pytest.raises(InvalidArgumentError, match=r"extension '\.tsv'"):
        EventReader(tmp_path / "events.tsv")
    with pytest.raises(InvalidArgumentError, match="cannot be read as Parquet"):
        EventReader(write(tmp_path / "events.parquet", b"PAR1 no it is not"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InvalidArgumentError, match="Is a directory"):
        EventReader(tmp_path / "folder.csv")


def test_byte_order_mark_quoted_newlines_and_empty_lines(tmp_path: Path) -> None:
    reader = EventReader(
        events_csv(
            tmp_path,
            b"\xef\xbb\xbfuser_id , behavior_type,behavior_text\r\n"
            b'a,view,"two\r\nlines"\r\n\r\nb,view,one\r\n',
        )
    )
    assert [(event.user_id, event.text) for event in reader] == [("a", "two lines"), ("b", "one")]
    assert reader.summary.rows == 2
    assert reader.fraction() == 1.0


def test_behavior_types_are_limited(tmp_path: Path) -> None:
    rows = "".join(f"a,type{i},x\n" for i in range(limits.BEHAVIOR_TYPES + 2))
    reader = EventReader(events_csv(tmp_path, f"user_id,behavior_type,item_id\n{rows}a,type0,x\n"))
    assert len(list(reader)) == limits.BEHAVIOR_TYPES + 1
    assert reader.summary.refused == {"more than 1,000 behavior types": 2}


def test_targets(tmp_path: Path) -> None:
    path = write(
        tmp_path / "targets.csv", "user_id,item_id,behavior_type,extra\na,i,,z\na,,buy,\na,,,\n"
    )
    reader = TargetReader(path)
    assert list(reader) == [Target("a", "i"), Target("a", "", "buy")]
    assert reader.summary.refused == {"neither item_id nor behavior_type": 1}
    with pytest.raises(InvalidArgumentError, match="item_id or behavior_type are missing"):
        TargetReader(write(tmp_path / "other.csv", "user_id\na\n"))


def test_columns_say_what_events_say(tmp_path: Path) -> None:
    path = events_csv(
        tmp_path,
        "user_id,behavior_type,item_id,behavior_text,timestamp\n"
        "a,view,i,,2024-01-01\nb,buy,,tea,2024-01-02\na,view,i,tea,2024-01-03\n,x,y,z,0\n",
    )
    reader = EventReader(path)
    events, columns = list(reader), reader.read_columns()
    assert reader.summary.kept == len(columns) == 3
    assert columns.timestamp is not None
    assert [
        (
            columns.user_ids[columns.user[i]],
            columns.behavior_types[columns.behavior_type[i]],
            columns.item_ids[columns.item[i]] if columns.item[i] >= 0 else "",
            columns.texts[columns.text[i]] if columns.text[i] >= 0 else "",
            datetime.fromtimestamp(columns.timestamp[i] / 1e6, UTC),
        )
        for i in range(len(columns))
    ] == [(e.user_id, e.behavior_type, e.item_id, e.text, e.timestamp) for e in events]
    assert (columns.item_ids, columns.texts) == (["i"], ["tea"])


def test_columns_of_a_file_without_times(tmp_path: Path) -> None:
    columns = EventReader(
        events_csv(tmp_path, "user_id,behavior_type,behavior_text\na,view,mug\n")
    ).read_columns()
    assert columns.timestamp is None
    assert columns.item_ids == []
    assert columns.item.tolist() == [-1]


def test_parquet_of_every_type_with_an_obvious_text(tmp_path: Path) -> None:
    moment = datetime(2024, 5, 1, 10, tzinfo=timezone(timedelta(hours=2)))
    table = pa.table(
        {
            "user_id": pa.array([1, 2, None, 4], pa.int64()),
            "behavior_type": pa.array(["view", "buy", "buy", "buy"]).dictionary_encode(),
            "item_id": pa.array([7.0, float("nan"), 8.0, 9.0]),
            "behavior_text": pa.array([b"tea", b"cup", b"pot", b"\xff"]),
            "timestamp": pa.array([moment] * 4, pa.timestamp("ns", "Europe/Berlin")),
            "day": pa.array([moment.date()] * 4),
            "new": pa.array([True, False, None, None]),
        }
    )
    path = tmp_path / "events.parquet"
    pyarrow.parquet.write_table(table, path)
    reader = EventReader(path)
    assert list(reader) == [
        Event("1", "view", moment, "7", "tea", "", {"day": "2024-05-01", "new": "true"}),
        Event("2", "buy", moment, "", "cup", "", {"day": "2024-05-01", "new": "false"}),
    ]
    assert reader.summary.refused == {"user_id is empty": 1, "invalid UTF-8": 1}
    assert reader.fraction() == 1.0


def test_parquet_of_a_type_without_a_text(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pyarrow.parquet.write_table(pa.table({"item_id": ["i"], "text": ["t"], "tags": [["x"]]}), path)
    with pytest.raises(InvalidArgumentError, match="column tags is list"):
        ItemReader(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(FailedPreconditionError, match=r"pip install 'foretell\[parquet\]'"):
        EventReader(tmp_path / "events.parquet")


# --- Properties -----------------------------------------------------------------------------------

FEW = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
IDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=20)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(clean_text)
TEXTS = TEXTS.filter(lambda text: clean_text(text) == text)
TIMES = st.datetimes(datetime(1970, 1, 1), datetime(2024, 1, 1), timezones=st.just(UTC))


@FEW
@given(st.lists(st.builds(Event, IDS, IDS, TIMES, IDS, TEXTS), max_size=20), st.booleans())
def test_clean_events_come_back_as_they_were(
    tmp_path: Path, events: list[Event], parquet: bool
) -> None:
    events = [e for e in events if clean_text(e.behavior_type) == e.behavior_type]
    names = ["user_id", "behavior_type", "timestamp", "item_id", "behavior_text"]
    rows = [[e.user_id, e.behavior_type, e.timestamp, e.item_id, e.text] for e in events]
    if parquet:
        path = tmp_path / "events.parquet"
        types = [pa.string(), pa.string(), pa.timestamp("us", "UTC"), pa.string(), pa.string()]
        arrays = [pa.array([r[i] for r in rows], kind) for i, kind in enumerate(types)]
        pyarrow.parquet.write_table(pa.table(arrays, names=names), path)
    else:
        path = tmp_path / "events.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    reader = EventReader(path)
    assert list(reader) == events
    assert reader.summary == Summary(rows=len(events), kept=len(events))


@FEW
@given(st.binary(max_size=400), st.sampled_from(["events", "items", "targets", "bare"]))
def test_arbitrary_bytes_give_rows_or_a_foretell_error(
    tmp_path: Path, data: bytes, kind: str
) -> None:
    header = {
        "events": b"user_id,behavior_type,item_id,behavior_text,timestamp,event_id,x\n",
        "items": b"item_id,text,x\n",
        "targets": b"user_id,item_id,behavior_type\n",
        "bare": b"",
    }[kind]
    reader_of = {"items": ItemReader, "targets": TargetReader}.get(kind, EventReader)
    path = write(tmp_path / "any.csv", header + data)
    try:
        reader = reader_of(path, rejects=tmp_path / "rejects.csv")
        kept = list(reader)
    except ForetellError:
        assert kind == "bare"
        return
    check_counts(reader.summary, len(kept), tmp_path / "rejects.csv")


CELLS = st.one_of(
    st.sampled_from(["a", "b", "", " ", "i1", "view", "buy", "<b>x</b>", "2024-01-01", "17e8"]),
    st.text(max_size=8),
    st.binary(max_size=3).map(lambda b: b.decode(errors="surrogateescape")),
)


@FEW
@given(st.lists(st.lists(CELLS, min_size=5, max_size=7), max_size=12))
def test_counts_add_up(tmp_path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    names = ["user_id", "behavior_type", "item_id", "timestamp", "event_id", "behavior_text"]
    csv.writer(text).writerows([names, *rows])
    path = write(tmp_path / "any.csv", text.getvalue().encode(errors="surrogateescape"))
    reader = EventReader(path, rejects=tmp_path / "rejects.csv")
    events = list(reader)
    assert reader.summary.rows == len(rows)
    check_counts(reader.summary, len(events), tmp_path / "rejects.csv")
    again = EventReader(path)
    assert len(again.read_columns()) == len(events)
    assert again.summary == reader.summary
    # What was kept is clean: reading it once more mends nothing.
    for event in events:
        assert event.user_id
        assert event.item_id or event.text
        assert event.user_id == event.user_id.strip()


def check_counts(summary: Summary, kept: int, rejects: Path) -> None:
    assert summary.kept == kept
    assert summary.rows == summary.kept + summary.refused.total()
    assert summary.mended_rows <= summary.kept
    assert all(n <= summary.mended_rows for n in summary.mended.values())
    with rejects.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        refused = list(csv.reader(file))[1:]
    assert len(refused) == summary.refused.total()
    assert all(1 <= int(row[0]) <= summary.rows for row in refused)


@FEW
@given(st.binary(max_size=300), st.integers(0, 10_000))
def test_damaged_parquet_gives_rows_or_a_foretell_error(
    tmp_path: Path, noise: bytes, at: int
) -> None:
    path = tmp_path / "items.parquet"
    pyarrow.parquet.write_table(pa.table({"item_id": ["i", "j"], "text": ["t", "u"]}), path)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : at + len(noise)] = noise
    path.write_bytes(data)
    # A damaged footer may claim columns or rows that never were; what it gives is not the point.
    with contextlib.suppress(ForetellError):
        list(ItemReader(path))
