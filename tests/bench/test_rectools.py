import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import harness, rectools


class FakePeer:
    """Says these lines for its script, and remembers with what it was run."""

    name = "rectools"

    def __init__(self) -> None:
        self.lines = [line(1, 60, 0.1), line(2, 60, 0.3), line(3, 60, 0.2)]
        self.runs: list[list[str]] = []

    def versions(self, *distributions: str) -> dict[str, str]:
        return dict.fromkeys(distributions, "1.0")

    def run(self, script: str, arguments: Sequence[str], threads: int) -> Iterator[dict[str, Any]]:
        assert (harness.PEERS / script).is_file()
        self.runs.append(list(arguments))
        yield from self.lines


def line(number: int, seconds: float, ndcg: float) -> dict[str, Any]:
    measured = {"recall_at_10": 2 * ndcg, "ndcg_at_10": ndcg}
    return {"epoch": number, "seconds": seconds, "validation": measured, "test": measured}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> FakePeer:
    made = FakePeer()
    monkeypatch.setattr(harness, "peer", lambda name, cache: made)
    return made


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id\n1,2\n")
    return path


def epochs(
    events: Path, seconds: float, load: float = 0.0, *, timed: bool = False
) -> tuple[int, bool, bool]:
    """Number of epochs, whether it came to its end, whether from the cache."""
    result, cached = rectools.epochs(
        events, events.parent / "cache", seconds, 2, load, timed=timed, fresh=False
    )
    return len(result["epochs"]), result["complete"], cached


def test_an_earlier_run_is_taken_if_it_was_as_long(peer: FakePeer, events: Path) -> None:
    assert epochs(events, 200) == (3, False, False)
    assert epochs(events, 200) == (3, False, True)
    assert epochs(events, 100) == (3, False, True)
    assert epochs(events, 1_000) == (3, False, False)
    assert len(peer.runs) == 2


def test_an_earlier_run_that_came_to_its_end_is_taken(peer: FakePeer, events: Path) -> None:
    peer.lines.append({"complete": True})
    assert epochs(events, 200) == (3, True, False)
    assert epochs(events, 1_000) == (3, True, True)


def test_times_of_a_busier_machine_are_not_taken(peer: FakePeer, events: Path) -> None:
    assert epochs(events, 200, load=4.0) == (3, False, False)
    assert epochs(events, 200, load=5.0, timed=True) == (3, False, True)
    assert epochs(events, 200, load=0.1) == (3, False, True)
    assert epochs(events, 200, load=0.1, timed=True) == (3, False, False)
    assert epochs(events, 200, load=0.0, timed=True) == (3, False, True)


def test_other_data_are_measured_anew(peer: FakePeer, events: Path) -> None:
    epochs(events, 200)
    events.write_text("user_id,item_id\n1,3\n")
    assert epochs(events, 200) == (3, False, False)


def test_the_script_is_told_what_to_do(peer: FakePeer, events: Path) -> None:
    epochs(events, 200)
    (arguments,) = peer.runs
    assert arguments[0] == str(events)
    assert arguments[arguments.index("--seconds") + 1] == "200"
    assert arguments[arguments.index("--threads") + 1] == "2"


def test_the_best_epoch_is_that_of_validation() -> None:
    assert rectools.best([line(1, 60, 0.1), line(2, 60, 0.3), line(3, 60, 0.2)])["epoch"] == 2


def test_alone_it_says_what_the_cache_will_have(
    peer: FakePeer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(harness, "load", lambda: 0.0)
    (tmp_path / "beauty").mkdir()
    (tmp_path / "beauty" / "sequences.txt").write_text("1 5 6 7\n")
    (tmp_path / "beauty" / "titles.tsv").write_text("5\tSoap\n")
    arguments = ["--data", str(tmp_path), "--cache-dir", str(tmp_path), "--budget-s", "100"]
    for cached in (0, 1):
        assert rectools.main(arguments) == 0
        figures = json.loads(capsys.readouterr().out)["figures"]
        assert figures["rectools_epoch_s"] == 60
        assert figures["rectools_recall_at_10"] == 0.6
        assert figures["rectools_from_cache"] == cached
