import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import harness
from bench.harness import Budget, Peer

PYTHON = Peer("python", Path(sys.executable))

Write = Callable[[str], str]


def test_the_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    harness.finish("some", {"python": "3"}, {"a_s": 1.23456789, "b": 7, "c_ms": None})
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {
        "bench": "some",
        "versions": {"python": "3"},
        "hardware": harness.hardware(),
        "figures": {"a_s": 1.23457, "b": 7, "c_ms": None},
    }


def test_a_figure_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        harness.finish("some", {}, {"a": float("nan")})


def test_hardware_names_the_cores() -> None:
    assert f"{harness.cores()} cores" in harness.hardware()


def test_versions_are_those_installed() -> None:
    found = harness.versions("numpy")
    assert found.keys() == {"python", "foretell-services", "numpy"}


def test_a_budget_runs_out() -> None:
    budget = Budget(0.0)
    assert budget.left == 0
    assert 0 < Budget(1_000).left <= 1_000


def test_options_that_every_benchmark_has() -> None:
    parser = harness.parser("some", "What it does.\n", 60)
    options = parser.parse_args([])
    assert (options.budget_s, options.threads, options.fresh) == (60, 2, False)
    assert options.cache_dir == harness.CACHE


def test_tables_line_up() -> None:
    text = harness.table(["a", "long"], {"x": {"a": "1.25"}, "name": {"a": "2", "long": "3"}})
    assert text.splitlines() == [
        "         a  long",
        "x     1.25     -",
        "name     2     3",
    ]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a script to where those of peers are."""
    monkeypatch.setattr(harness, "PEERS", tmp_path)

    def write(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        return "script.py"

    return write


def test_a_peer_says_one_object_a_line(script: Write) -> None:
    name = script(
        "import json, os, sys\n"
        "print(json.dumps({'arguments': sys.argv[1:]}))\n"
        "print(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))\n"
    )
    assert list(PYTHON.run(name, ["--x", "1"], 2)) == [
        {"arguments": ["--x", "1"]},
        {"threads": "2"},
    ]


def test_a_peer_that_fails_says_why(script: Write) -> None:
    name = script("print('{}')\nraise SystemExit('no such thing')")
    run = PYTHON.run(name, [], 1)
    assert next(run) == {}
    with pytest.raises(RuntimeError, match=r"script\.py ended with 1:\nno such thing"):
        next(run)


def test_a_peer_that_nobody_listens_to_any_more_is_ended(script: Write) -> None:
    name = script("import time\nprint('{}', flush=True)\ntime.sleep(600)\n")
    run = PYTHON.run(name, [], 1)
    next(run)
    run.close()  # waits for the process to end


def test_what_a_peer_has_installed() -> None:
    assert PYTHON.versions("pytest") == {"pytest": pytest.__version__}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that make environments: written down, not run, but for the folder."""
    given: list[list[str]] = []

    def run(command: list[Any], **_: object) -> None:
        given.append([str(part) for part in command])
        if "venv" in command:
            command[-1].mkdir(parents=True)

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(harness, "PEERS", tmp_path)
    (tmp_path / "some.txt").write_text("some==1\n")
    return given


def test_an_environment_is_made_once_for_each_content_of_its_file(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    first = harness.peer("some", tmp_path / "cache")
    make, install = commands
    folder = first.python.parent.parent
    assert make == [sys.executable, "-m", "venv", str(folder)]
    assert install[0] == str(first.python)
    assert install[-2:] == ["-r", str(tmp_path / "some.txt")]
    assert harness.peer("some", tmp_path / "cache") == first
    assert len(commands) == 2
    (tmp_path / "some.txt").write_text("some==2\n")
    assert harness.peer("some", tmp_path / "cache").python != first.python
    assert len(commands) == 4


def test_an_environment_that_was_cut_short_is_made_anew(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    folder = harness.peer("some", tmp_path / "cache").python.parent.parent
    (folder / ".ready").unlink()
    (folder / "half").touch()
    harness.peer("some", tmp_path / "cache")
    assert not (folder / "half").exists()
    assert (folder / ".ready").exists()


KEY = {"version": "1"}


class Measured:
    """A measurement that yields these, and counts how often it is made."""

    def __init__(self, *results: dict[str, Any]) -> None:
        self.results = results
        self.runs = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.runs += 1
        yield from self.results


def test_a_result_is_measured_once_for_a_key(tmp_path: Path) -> None:
    first, second = Measured({"epochs": 1}, {"epochs": 2}), Measured({"epochs": 9})
    assert harness.kept(tmp_path, "peer", KEY, first) == ({"epochs": 2}, False)
    assert harness.kept(tmp_path, "peer", KEY, second) == ({"epochs": 2}, True)
    assert second.runs == 0
    assert harness.kept(tmp_path, "peer", {"version": "2"}, second) == ({"epochs": 9}, False)
    assert harness.kept(tmp_path, "other", KEY, second) == ({"epochs": 9}, False)


def test_a_result_that_is_not_enough_or_not_wanted_is_measured_again(tmp_path: Path) -> None:
    harness.kept(tmp_path, "peer", KEY, Measured({"epochs": 1}))
    more = Measured({"epochs": 5})
    found = harness.kept(tmp_path, "peer", KEY, more, enough=lambda result: result["epochs"] > 1)
    assert found == ({"epochs": 5}, False)
    again = Measured({"epochs": 6})
    assert harness.kept(tmp_path, "peer", KEY, again, fresh=True) == ({"epochs": 6}, False)


def test_a_measurement_that_breaks_off_leaves_what_it_had(tmp_path: Path) -> None:
    def measure() -> Iterator[dict[str, Any]]:
        yield {"epochs": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.kept(tmp_path, "peer", KEY, measure)
    assert harness.kept(tmp_path, "peer", KEY, Measured()) == ({"epochs": 1}, True)
