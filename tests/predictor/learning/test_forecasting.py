"""Forecasts of demand: the calendar, the method, its intervals, the backtest, and the command."""

import csv
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from foretell.errors import InvalidArgumentError
from predictor.__main__ import main
from predictor.learning.forecasting import backtest as backtests
from predictor.learning.forecasting import demand
from predictor.learning.forecasting.backtest import OWN, backtest, compare, measure, simple_rules
from predictor.learning.forecasting.periods import Calendar, Floats, Ints, Period, calendar
from predictor.learning.forecasting.smoothing import NEW_ITEMS, Smoothing, Spread

MONDAY = date(2026, 1, 5)


def times(*moments: str) -> Ints:
    found: Ints = np.array(moments, "M8[us]").astype(np.int64)
    return found


def daily(first: str, days: int) -> Ints:
    """Events at 8 and 20 o'clock."""
    begin = np.datetime64(first, "h")
    hours = (begin + 24 * np.arange(days))[:, None] + np.array([8, 20])
    found: Ints = hours.ravel().astype("M8[us]").astype(np.int64)
    return found


def edges(found: Calendar) -> list[str]:
    return [str(day) for day in found.edges]


# --- Periods -----------------------------------------------------------------------------------


def test_weeks_begin_on_monday_and_those_cut_at_the_ends_are_left_out() -> None:
    found = calendar(daily("2026-01-01", 31), Period("week"))  # Thursday to Saturday
    assert edges(found) == ["2026-01-05", "2026-01-12", "2026-01-19", "2026-01-26"]
    assert len(found.left_out) == 2
    assert "2025-12-29" in found.left_out[0]
    assert "2026-01-26" in found.left_out[1]


def test_a_week_that_ends_with_its_last_day_is_whole() -> None:
    found = calendar(daily("2026-01-05", 21), Period("week"))
    assert edges(found) == ["2026-01-05", "2026-01-12", "2026-01-19", "2026-01-26"]
    assert found.left_out == ()


def test_a_silence_that_is_usual_cuts_nothing() -> None:
    """A shop that is closed at weekends."""
    at = daily("2026-01-05", 28)
    weekday = (at // 86_400_000_000 + 3) % 7
    assert len(calendar(at[weekday < 5], Period("week"))) == 4


def test_months_have_their_own_lengths() -> None:
    found = calendar(daily("2026-01-01", 90), Period("month"))
    assert edges(found) == ["2026-01-01", "2026-02-01", "2026-03-01", "2026-04-01"]
    assert [str(day) for day in found.after(2)] == ["2026-04-01", "2026-05-01", "2026-06-01"]


def test_periods_of_days_end_with_the_last_whole_day() -> None:
    at = np.append(daily("2026-01-01", 33), times("2026-02-03T01:00"))
    found = calendar(at, Period("14d"))
    assert edges(found) == ["2026-01-06", "2026-01-20", "2026-02-03"]
    assert [str(day) for day in found.after(1)] == ["2026-02-03", "2026-02-17"]


@pytest.mark.parametrize(
    ("name", "season"),
    [("day", 7), ("1d", 7), ("week", 52), ("7d", 52), ("14d", 26), ("28d", 13), ("month", 12),
     ("182d", 2), ("364d", None), ("10d", None), ("400d", None)],
)  # fmt: skip
def test_seasons_are_whole_weeks_or_years(name: str, season: int | None) -> None:
    assert Period(name).season == season


def test_days_and_periods_before_1970_and_at_midnight() -> None:
    at = times("1969-12-29T00:00", "1970-01-04T23:00", "1970-01-05T00:00", "1970-01-11T23:59")
    found = calendar(at, Period("week"))
    assert edges(found) == ["1969-12-29", "1970-01-05", "1970-01-12"]
    assert found.of(at).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["", "fortnight", "0d", "-7d", "7", "7 d", "99999d"])
def test_other_names_of_periods_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="period") as caught:
        Period(name)
    assert caught.value.field == "period"


# --- The method --------------------------------------------------------------------------------


def smooth(
    counts: Sequence[Sequence[float]], horizon: int = 1, *, forgetting: float = 0.5,
    season: int | None = None, groups: Sequence[int] | None = None,
) -> Floats:  # fmt: skip
    table = np.array(counts, np.float64)
    days = np.ones(table.shape[1] + horizon)
    of = np.zeros(len(table), np.int64) if groups is None else np.array(groups)
    return Smoothing(forgetting, season).forecast(table, days, of)


def test_the_level_is_a_mean_that_forgets() -> None:
    # From the second period on, for the first one is that of the first event.
    expected = (0.25 * 4 + 0.5 * 2 + 1 * 8) / (0.25 + 0.5 + 1)
    assert smooth([[5, 4, 2, 8]], 2)[0] == pytest.approx([expected, expected])


def test_what_was_before_the_first_event_does_not_lower_a_series() -> None:
    assert smooth([[0] * 30 + [3, 3, 3]])[0, 0] == pytest.approx(3)
    begun = smooth([[0] * 30 + [3]])[0, 0]
    assert 0 < begun < 3


def test_expected_events_follow_the_lengths_of_periods() -> None:
    days = np.array([31, 28, 31, 30.0])
    expected = Smoothing(0.2, None).forecast(np.array([[62, 56, 62.0]]), days, np.zeros(1, int))
    assert expected[0] == pytest.approx([60])


def test_a_season_comes_back() -> None:
    week = [70, 10, 10, 10, 10, 70, 0]
    expected = smooth([week * 8 + week[:2]], 7, forgetting=0.1, season=7)[0]
    assert expected == pytest.approx(week[2:] + week[:2], rel=0.02, abs=1e-9)


def test_a_slow_series_takes_the_season_of_all() -> None:
    week = np.array([70, 10, 10, 10, 10, 70, 0])
    slow = np.zeros(56)
    slow[[3, 31, 52]] = 1
    expected = smooth([np.tile(week, 8).tolist(), slow.tolist()], 7, forgetting=0.05, season=7)[1]
    assert expected[0] > 3 * expected[1] > 0


def test_new_series_get_what_new_ones_of_their_group_brought() -> None:
    counts = np.zeros((60, 6))
    counts[:10, 5] = 4  # of the first group: ten new ones have just begun
    counts[50, :] = 9
    expected = smooth(counts.tolist(), groups=[0] * 30 + [1] * 30)
    first, second = expected[20, 0], expected[55, 0]
    assert first > second > 0
    # 40 events of 30 + 29 new ones in the last of five periods, and the prior.
    overall = 40 / (5 * (30 + 29))
    assert first == pytest.approx((40 + NEW_ITEMS * overall) / (5 * 30 + NEW_ITEMS))


def test_without_any_earlier_new_series_nothing_is_expected_of_one() -> None:
    assert smooth([[3, 3, 3], [0, 0, 0]], groups=[0, 1])[1, 0] == 0


# --- Intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [0.0, 0.3])
def test_intervals_cover_what_they_say(beyond: float) -> None:
    """Counts whose rate itself varies by `beyond` of its square, or not at all."""
    rng = np.random.default_rng(1)
    mean = rng.uniform(5, 200, (4, 800, 1))
    rate = mean * rng.gamma(1 / beyond, beyond, mean.shape) if beyond else mean
    counts = rng.poisson(rate).astype(np.float64)
    spread = Spread.of(mean[:2], counts[:2])
    assert spread.change[0] == pytest.approx(beyond, abs=0.06)
    for coverage in (0.8, 0.95):
        low, high = spread.interval(mean[2:], coverage)
        within = ((low <= counts[2:]) & (counts[2:] <= high)).mean()
        assert within == pytest.approx(coverage, abs=0.04)


def test_an_interval_of_nothing_is_nothing() -> None:
    low, high = Spread((1.0,), (0.0,)).interval(np.zeros((2, 1)), 0.95)
    assert not low.any()
    assert not high.any()
    nothing = np.zeros((1, 3, 1))
    assert Spread.of(nothing, nothing) == Spread((1.0,), (0.0,))


# --- Backtest ----------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    expected, happened = np.array([[[2.0], [5.0]]]), np.array([[[4.0], [4.0]]])
    found = measure(expected, happened, np.array([[1.0, -3.0], [0.0, 0.0]]))
    assert found["wape"] == pytest.approx(3 / 8)
    assert found["bias"] == pytest.approx(-1 / 8)
    assert found["mae"] == pytest.approx(1.5)
    assert found["mase"] == pytest.approx(2 / 2)  # of the first alone: the second never changed
    assert found["rmsse"] == pytest.approx(2 / np.sqrt(5))
    nothing = measure(expected, np.zeros_like(happened), np.zeros((2, 0)))
    assert nothing["wape"] is None
    assert nothing["rmsse"] is None


def test_simple_rules_by_hand() -> None:
    counts = np.arange(10.0)[None]
    rules = simple_rules(counts, [8], 2, season=3)
    assert rules["last_period"][0, 0].tolist() == [7, 7]
    assert rules["mean_of_last_4"][0, 0].tolist() == [5.5, 5.5]
    assert rules["seasonal_naive"][0, 0].tolist() == [5, 6]
    assert "seasonal_naive" not in simple_rules(counts, [2], 1, season=3)


def test_a_gain_has_an_interval_where_there_are_series_enough() -> None:
    rng = np.random.default_rng(0)
    happened = rng.poisson(20, (2, 200, 1)).astype(np.float64)
    changes = np.ones((200, 3))
    better = compare(happened + 1, happened + rng.normal(0, 5, happened.shape), happened, changes)
    assert better["wape_gain_low"] is not None
    assert better["wape_gain"] is not None
    assert better["wape_gain_high"] is not None
    assert 0 < better["wape_gain_low"] < better["wape_gain"] < better["wape_gain_high"]
    equal = compare(happened, happened, happened, changes)
    assert equal["wape_gain"] == equal["rmsse_gain_high"] == equal["better"] == 0
    few = compare(happened[:, :3], happened[:, :3] + 1, happened[:, :3], changes[:3])
    assert few["wape_gain"] is not None
    assert few["wape_gain_low"] is None


def test_a_season_is_found_and_beats_what_knows_none() -> None:
    rng = np.random.default_rng(2)
    week = np.array([3, 1, 1, 1, 1, 2, 0.5])
    counts = rng.poisson(rng.uniform(2, 30, (40, 1)) * np.tile(week, 8)).astype(np.float64)
    found = backtest(counts, np.ones(56), np.zeros(40, np.int64), 7, season=7)
    assert found.method.season == 7
    assert found.report["cuts"] == backtests.CUTS
    for rule in ("last_period", "mean_of_last_4", "seasonal_naive"):
        assert found.report["beats"][rule]["wape_gain_low"] > 0
    assert found.report["methods"][OWN]["coverage_80"] == pytest.approx(0.83, abs=0.06)


def test_what_comes_after_a_cut_does_not_count_before_it() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(9, (12, 20)).astype(np.float64)
    other = counts.copy()
    other[:, -1] = 1_000
    groups, method = np.zeros(12, np.int64), Smoothing(0.2, None)
    before = method.forecast(counts[:, :19], np.ones(20), groups)
    assert (before == method.forecast(other[:, :19], np.ones(20), groups)).all()
    found, changed = (backtest(each, np.ones(20), groups, 1, None) for each in (counts, other))
    own, huge = (each.report["methods"][OWN]["wape"] for each in (found, changed))
    assert own < 0.5 < huge


def test_too_few_periods_say_how_many_are_needed() -> None:
    with pytest.raises(InvalidArgumentError, match="needs 5 at least") as caught:
        backtest(np.ones((1, 4)), np.ones(4), np.zeros(1, np.int64), 3, None)
    assert caught.value.reason == "TOO_FEW_PERIODS"
    backtest(np.ones((1, 5)), np.ones(5), np.zeros(1, np.int64), 3, None)


# --- The command -------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def write_shop(folder: Path, days: int = 70) -> tuple[Path, Path]:
    """Milk every day, twice on Saturday; bread every other day; one cheese; cake never."""
    rows = ["user_id,behavior_type,item_id,timestamp"]
    for number in range(days):
        day = MONDAY + timedelta(days=number)
        bought = ["milk"] * (2 if day.weekday() == 5 else 1) + ["bread"] * (number % 2)
        bought += ["cheese"] * (number == 10)
        rows += [f"user-{number % 3},buy,{item},{day}T12:00:00Z" for item in bought]
        rows.append(f"user-1,view,cake,{day}T21:00:00Z")
    items = ["item_id,text,category", "milk,whole milk,dairy", "bread,rye bread,bakery",
             "cheese,mild cheese,dairy", "cake,cherry cake,bakery"]  # fmt: skip
    return write(folder / "events.csv", rows), write(folder / "items.csv", items)


def forecast(
    folder: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[dict[str, list[dict[str, str]]], dict[str, object]]:
    """Rows of the file by name, and the JSON."""
    out = folder / "forecast.csv"
    assert main(["forecast", *options, "--out", str(out), "--json"]) == 0
    rows: dict[str, list[dict[str, str]]] = {}
    with out.open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(next(iter(row.values())), []).append(row)
    return rows, json.loads(capsys.readouterr().out)


def test_demand_per_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, items = write_shop(tmp_path)
    rows, report = forecast(
        tmp_path, capsys, "--events", str(events), "--items", str(items), "--horizon", "2",
        "--behavior-type", "buy",
    )  # fmt: skip
    assert set(rows) == {"milk", "bread", "cheese", "cake"}
    milk = rows["milk"][0]
    assert float(milk["expected"]) == pytest.approx(8, abs=0.01)
    assert int(milk["low_95"]) <= int(milk["low_80"]) <= 8 <= int(milk["high_80"])
    assert int(milk["high_80"]) <= int(milk["high_95"])
    assert [row["period_start"] for row in rows["milk"]] == ["2026-03-16", "2026-03-23"]
    assert milk["period_end"] == "2026-03-23"
    assert float(rows["bread"][0]["expected"]) == pytest.approx(3.5, abs=0.1)
    assert float(rows["cheese"][0]["expected"]) < 0.2
    assert rows["cake"][0]["reason"].startswith("no events yet")
    assert rows["milk"][0]["reason"] == "own events"
    assert report["periods"] == 10
    assert report["series_without_events"] == 1
    assert list(tmp_path.glob(".forecast*")) == []


def test_demand_per_category_and_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, items = write_shop(tmp_path)
    rows, report = forecast(
        tmp_path, capsys, "--events", str(events), "--items", str(items), "--by", "category",
        "--period", "day", "--horizon", "7", "--behavior-type", "buy",
    )  # fmt: skip
    assert set(rows) == {"dairy", "bakery"}
    assert report["season"] == 7
    expected = [float(row["expected"]) for row in rows["dairy"]]
    assert max(expected) == expected[5] > 1.4  # Saturday


def test_items_may_be_absent_and_the_result_is_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events, _ = write_shop(tmp_path, days=73)  # three days of an eleventh week
    out = tmp_path / "forecast.csv"
    assert main(["forecast", "--events", str(events), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "left out: the week of 2026-03-16, in which the events end" in text
    assert "last_period" in text
    assert "2026-03-16,2026-03-23" in out.read_text()
    before = out.read_bytes()
    assert main(["forecast", "--events", str(events), "--out", str(out)]) == 0
    assert out.read_bytes() == before


def test_items_that_the_catalogue_lacks_are_counted_by_name_and_told_by_category(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events, items = write_shop(tmp_path)
    write(items, ["item_id,text,category", "bread,rye bread,bakery"])
    named = ["--events", str(events), "--items", str(items)]
    rows, _ = forecast(tmp_path, capsys, *named)
    assert set(rows) == {"bread", "milk", "cake", "cheese"}
    rows, report = forecast(tmp_path, capsys, *named, "--by", "category")
    assert set(rows) == {"bakery"}
    assert "left out: 151 events without an item with 'category'" in str(report["notes"])


EVENTS = "user_id,behavior_type,item_id,timestamp"
DAYS = [f"u,buy,a,{MONDAY + timedelta(days=day)}T12:00:00Z" for day in range(30)]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (["user_id,behavior_type,item_id", "u,buy,a"], [], "timestamp is missing"),
        ([EVENTS], [], "no usable rows"),
        ([EVENTS, DAYS[0]], [], "no whole period"),
        ([EVENTS, *[DAYS[0]] * 9], ["--period", "day"], "no whole period"),
        ([EVENTS, *DAYS[:3]], ["--period", "day", "--horizon", "2"], "needs 4 at least"),
        ([EVENTS, *DAYS], ["--period", "400d"], "no whole period"),
        ([EVENTS, *DAYS], ["--period", "often"], "none of day, week, month"),
        ([EVENTS, *DAYS], ["--behavior-type", "sell"], "there are: buy"),
        ([EVENTS, *DAYS], ["--by", "category"], "needs --items"),
        (["user_id,behavior_type,behavior_text,timestamp",
          *[day.replace(",a,", ",some words,") for day in DAYS]], [], "names an item"),
    ],
)  # fmt: skip
def test_what_cannot_be_forecast_says_why(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[str],
    options: list[str],
    said: str,
) -> None:
    events = write(tmp_path / "events.csv", rows)
    out = tmp_path / "out.csv"
    assert main(["forecast", "--events", str(events), "--out", str(out), *options]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_attribute_names_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events, items = write_shop(tmp_path)
    named = ["--events", str(events), "--items", str(items), "--out", str(tmp_path / "out.csv")]
    assert main(["forecast", *named, "--by", "brand"]) == 2
    assert "there are: category" in capsys.readouterr().err
    missing = ["--events", str(events), "--out", str(tmp_path / "nowhere" / "out.csv")]
    assert main(["forecast", *missing]) == 2
    assert "no folder that exists" in capsys.readouterr().err


def test_too_many_series_and_periods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events, items = write_shop(tmp_path)
    monkeypatch.setattr(demand, "CELLS", 39)
    named = ["--events", str(events), "--items", str(items), "--out", str(tmp_path / "out.csv")]
    assert main(["forecast", *named]) == 2
    assert "4 series of 10 periods are too many" in capsys.readouterr().err
    assert main(["forecast", *named, "--by", "category"]) == 0


def test_one_item_and_a_day_too_early_by_decades(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = datetime(1971, 1, 5, tzinfo=UTC).isoformat()
    events = write(tmp_path / "events.csv", [EVENTS, f"u,buy,a,{stray}", *DAYS[:28]])
    rows, _ = forecast(tmp_path, capsys, "--events", str(events))
    assert float(rows["a"][0]["expected"]) == pytest.approx(7, abs=0.5)
