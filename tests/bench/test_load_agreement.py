"""The load test beside k6, in short: what is compared, and what k6 counts."""

import argparse
from pathlib import Path

import pytest

from bench import load_agreement
from serving.process import started

GOOD = {"skipped": 0, "failed": 0, "p99_ms": 80.0, "late_p99_ms": 1.0}


@pytest.mark.parametrize("wrong", [{"skipped": 1}, {"failed": 1}, {"late_p99_ms": 10.0}])
def test_rounds_with_skipped_failed_or_late_calls_are_not_compared(wrong: dict[str, float]) -> None:
    assert load_agreement.comparable(GOOD, GOOD)
    assert not load_agreement.comparable({**GOOD, **wrong}, GOOD)


def test_k6_sends_what_is_due_and_its_warm_up_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_agreement, "WARM_UP_S", 1)
    answers = load_agreement._answers(tmp_path / "answers")
    with started("bench.echo", [str(answers), "--pause-ms", "50", "--sigma", "0"]) as server:
        k6 = load_agreement._k6(server.address, argparse.Namespace(rate=50, seconds=1))
    assert (k6["skipped"], k6["failed"]) == (0, 0)
    assert k6["answered_s"] == pytest.approx(50, abs=1)
    assert 50 <= k6["p50_ms"] <= k6["p99_ms"]
