"""The demo on a person's own files, and what Ctrl-C leaves of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KINDS = ("view", "buy")
WORDS = ("tea", "bread", "juice", "cheese", "coffee", "soap", "rice", "milk", "salt", "plums")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("own files")
    items, events = folder / "items.csv", folder / "events.csv"
    rows = [f"item-{number},fresh {word}" for number, word in enumerate(WORDS)]
    items.write_text("\n".join(["item_id,text", *rows]))
    rows = [
        f"user-{user},{KINDS[step % 2]},item-{(user + step) % len(WORDS)},2026-02-{step + 1:02}"
        for user in range(40)
        for step in range(12)
    ]
    events.write_text("\n".join(["user_id,behavior_type,item_id,timestamp", *rows]))
    return items, events


def demo(files: tuple[Path, Path], out: Path) -> list[str | Path]:
    items, events = files
    options: list[str | Path] = ["--out", out, "--items", items, "--events", events]
    return [sys.executable, "-m", "serving.demo", "run", *options]


def processes(out: Path) -> list[int]:
    """Living processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has just ended
            continue
        if str(out).encode() in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.timeout(240)
def test_own_files_end_in_a_report(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.run(demo(files, out), capture_output=True, text=True, timeout=110)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "the encoder had to read 10 texts" in first.stdout
    assert "foretell predict user-" in first.stdout
    page = (out / "report.html").read_text()
    assert page.count('<section class="card">') >= 3
    assert "fresh " in page
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"foretell", "popular", "markov"} <= set(metrics["items"])
    assert metrics["cost"]["peak_memory_mb"]["embedder"] > 100
    for plot in ("training.png", "confusion_matrix.png", "roc.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
        assert plot in page
    assert processes(out) == []

    again = subprocess.run(demo(files, out), capture_output=True, text=True, timeout=110)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the encoder had to read 0 texts" in again.stdout
    assert "480 events" in again.stdout


def test_interrupt_stops_both_services(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        demo(files, out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        deadline = time.monotonic() + 60
        while len(processes(out)) < 4:  # the demo, both services and the training
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130, rest
    assert processes(out) == []


def test_a_file_that_is_missing_is_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        demo((tmp_path / "no.csv", tmp_path / "no.csv"), tmp_path / "out"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no.csv" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
