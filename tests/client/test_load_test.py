"""The load test's parts: schedules, counts, the search, the workload."""

from __future__ import annotations

import pickle
from itertools import islice, pairwise

import numpy as np
import pytest

from foretell import InvalidArgumentError
from foretell.load_test.find_max import PRECISION, broken, find_max
from foretell.load_test.run import Measured
from foretell.load_test.schedule import Arrivals, Phase, arrivals, parse_rates
from foretell.load_test.tally import ANSWERED, DEGRADED, SKIPPED, Tally, record
from foretell.load_test.workload import Workload, Zipf, parse_mix


def test_rates_are_one_or_steps_or_a_ramp() -> None:
    assert parse_rates("100", 5) == [Phase(100, 100, 5)]
    assert [phase.rate for phase in parse_rates("100,200.5", 5)] == [100, 200.5]
    ramp = parse_rates("100-400", 10)
    assert (ramp[0].start_rate, ramp[-1].end_rate) == (100, 400)
    assert all(a.end_rate == b.start_rate for a, b in pairwise(ramp))
    assert sum(phase.seconds for phase in ramp) == pytest.approx(10)


@pytest.mark.parametrize("text", ["", "0", "-5", "100,", "100,0", "a", "1-2-3", "nan"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--rate") as caught:
        parse_rates(text, 5)
    assert caught.value.field == "rate"


def together(phase: Phase, kind: Arrivals, shares: int) -> np.ndarray:
    each = [
        arrivals(phase, kind, share, shares, np.random.default_rng([7, share]))
        for share in range(shares)
    ]
    assert all((np.diff(due) >= 0).all() for due in each)
    return np.sort(np.concatenate(each))


@pytest.mark.parametrize("shares", [1, 3])
def test_constant_arrivals_are_dealt_out_at_equal_distances(shares: int) -> None:
    due = together(Phase(50, 50, 2), Arrivals.CONSTANT, shares)
    np.testing.assert_allclose(due, np.arange(100) / 50, atol=1e-9)


@pytest.mark.parametrize("shares", [1, 4])
def test_poisson_arrivals_have_exponential_distances(shares: int) -> None:
    due = together(Phase(1_000, 1_000, 20), Arrivals.POISSON, shares)
    pauses = np.diff(due)
    assert len(due) == pytest.approx(20_000, rel=0.03)
    # Exponential: the standard deviation is the mean, and 1/e of the pauses are longer than it.
    assert pauses.std() == pytest.approx(pauses.mean(), rel=0.05)
    assert (pauses > pauses.mean()).mean() == pytest.approx(np.exp(-1), abs=0.02)


@pytest.mark.parametrize("kind", list(Arrivals))
def test_the_rate_of_a_ramp_grows_evenly(kind: Arrivals) -> None:
    due = together(Phase(0, 2_000, 10), kind, 2)
    assert due.max() <= 10
    assert len(due) == pytest.approx(10_000, rel=0.05)
    assert (due < 5).mean() == pytest.approx(0.25, abs=0.02)  # the area under the rate


def test_a_tally_adds_up_and_survives_the_way_between_processes() -> None:
    one, other = Tally(), Tally()
    for tally, latencies in ((one, [0.001] * 98), (other, [0.5, 1.0])):
        for seconds in latencies:
            tally.outcomes[ANSWERED] += 1
            record(tally.latency, seconds)
            record(tally.lateness, 0.0001)
    other.outcomes.update([SKIPPED, SKIPPED, "UNAVAILABLE", DEGRADED])
    total = Tally.sum(pickle.loads(pickle.dumps(tally)) for tally in (one, other))
    figures = total.figures(rate=10.4, seconds=10)
    assert (figures["calls"], figures["skipped"], figures["failed"]) == (104, 2, 1)
    assert figures["failures"] == {"UNAVAILABLE": 1}
    assert figures["answered_s"] == pytest.approx(10.1)
    assert total.bad == 4
    # Three digits.
    assert figures["p50_ms"] == pytest.approx(1, rel=1e-3)
    assert figures["p99_ms"] == pytest.approx(500, rel=1e-3)
    assert figures["p999_ms"] == pytest.approx(1000, rel=1e-3)


def test_nothing_answered_has_no_latency() -> None:
    figures = Tally().figures(rate=1, seconds=1)
    assert figures["p99_ms"] is figures["max_ms"] is figures["late_p99_ms"] is None


def test_a_mix_has_weights() -> None:
    assert parse_mix("predict=3,ingest") == {"predict": 0.75, "ingest": 0.25}


@pytest.mark.parametrize("text", ["", "buy=1", "predict=0", "predict=x", "rank,rank", "rank=inf"])
def test_other_mixes_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--mix"):
        parse_mix(text)


def test_few_users_and_items_are_in_most_calls() -> None:
    drawn = Zipf(1_000, 1.0).draw(np.random.default_rng(0), 20_000)
    assert (drawn == 0).mean() == pytest.approx(1 / sum(1 / n for n in range(1, 1_001)), rel=0.1)
    assert (drawn < 10).mean() > 0.35
    assert drawn.max() < 1_000


def test_requests_follow_the_mix_and_the_seed() -> None:
    items = [("tea", "green tea"), ("mug", "large mug"), ("pot", "tea pot")]
    workload = Workload(parse_mix("predict=2,rank,ingest,embed,search"), 5, 1.0, items)
    one, other = (
        [
            (name, request)
            for name, request in islice(workload.requests(np.random.default_rng(3)), 600)
        ]
        for _ in range(2)
    )
    names = [name for name, _ in one]
    assert names == [name for name, _ in other]
    assert names.count("predict") / len(names) == pytest.approx(2 / 6, abs=0.06)
    for name, request in one:
        match name:
            case "rank":
                assert set(request.item_ids) <= {"tea", "mug", "pot"}
                assert len(request.item_ids) == len(set(request.item_ids))
            case "ingest":
                assert request.request_id
                assert request.events[0].item_id in ("tea", "mug", "pot")
    ids = [request.request_id for name, request in one if name == "ingest"]
    assert len(ids) == len(set(ids))  # a repeated one would be answered from memory


def measured(rate: float, p99_ms: float, late_ms: float = 0.1, bad: int = 0) -> Measured:
    tally = Tally()
    for _ in range(1_000 - bad):
        record(tally.latency, p99_ms / 1e3)
        record(tally.lateness, late_ms / 1e3)
    tally.outcomes.update({ANSWERED: 1_000 - bad, "RESOURCE_EXHAUSTED": bad})
    return Measured(Phase(rate, rate, 1), {"predict": tally})


def test_what_breaks_an_objective() -> None:
    assert broken(measured(1, 49), 50) == ()
    assert broken(measured(1, 49, bad=1), 50) == ()
    (reason,) = broken(measured(1, 60), 50)
    assert "p99 is 60" in reason
    # A service that refuses fast does not hold it, nor does a generator that is late prove it.
    (reason,) = broken(measured(1, 1, bad=20), 50)
    assert "2.0% of the calls" in reason
    (reason,) = broken(measured(1, 49, late_ms=40), 50)
    assert "generator" in reason


@pytest.mark.parametrize("first", [10, 731, 5_000])
def test_the_highest_rate_is_found_from_below_and_above(first: float) -> None:
    limit = 731.0
    rate, probes = find_max(lambda rate: measured(rate, 5 if rate <= limit else 80), 50, first)
    assert rate is not None
    assert limit / (1 + PRECISION) <= rate <= limit
    assert sum(probe.rate == rate for probe in probes) == 2
    assert len(probes) <= 15


def test_a_rate_that_held_by_luck_is_not_the_answer() -> None:
    tried: list[float] = []

    def measure(rate: float) -> Measured:
        lucky = rate <= 550 and rate not in tried
        tried.append(rate)
        return measured(rate, 5 if rate <= 500 or lucky else 80)

    rate, _ = find_max(measure, 50, 100)
    assert rate is not None
    assert 500 / (1 + PRECISION) <= rate <= 500


def test_where_no_rate_holds_there_is_none() -> None:
    rate, probes = find_max(lambda rate: measured(rate, 80), 50, 100)
    assert rate is None
    assert all(probe.reasons for probe in probes)
