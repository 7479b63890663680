"""The report that train writes, as a user gets it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning import commands
from predictor.learning.data import to_events
from predictor.learning.quality.inspection import inspect
from predictor.learning.reports.data_report import data_report
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol
from predictor.models import model_dir
from predictor.models.version import EncoderConfig

DAY = 86_400
BEGIN = 1_700_000_000
SECRET = "my darkest secret"


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with a repeated event, a burst, a row without a time and a text of its own."""
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for user in range(50):
        at = BEGIN + int(rng.integers(0, 5 * DAY))
        for _ in range(8):
            at += int(rng.integers(DAY // 2, 3 * DAY))
            rows.append((f"u{user}", ("view", "buy")[user % 2], f"i{rng.integers(9)}", "", at))
    at = rows[5][4]
    rows.append(rows[3])
    rows += [("flood|er`", "view", f"i{n % 9}", f"t{n}", at) for n in range(150)]
    rows += [("flood|er`", "view", "i1", SECRET, at + DAY), ("u1", "view", "i1", "", "")]
    columns = ("user_id", "behavior_type", "item_id", "behavior_text", "timestamp")
    return write(tmp_path_factory.mktemp("data") / "events.csv", columns, rows)


def train(
    events: Path, embedder_address: str, out: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    arguments = ["train", "--events", str(events), "--out", str(out), "--epochs", "1"]
    arguments += ["--dims", "8", "--embedder", embedder_address, *more]
    status = commands.main(arguments)
    err = capsys.readouterr().err
    assert status == 0, err
    return err


def test_train_and_evaluate_write_the_report(
    events: Path, embedder_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = train(events, embedder_address, tmp_path / "v", capsys)
    assert "data: bursts: 150 of 552 events" in err
    assert "data: duplicates: 1 of 552 events" in err
    assert "timestamp is empty: 1" in err
    report = (tmp_path / "v" / "data_report.md").read_text()
    model_dir.load(tmp_path / "v")  # which checks every file against its sha256
    assert "data_report.md" in model_dir.read_config(tmp_path / "v").files
    for told in (
        "### Bursts",
        "### Duplicates",
        "### Refused rows",
        "`flooder`",
        "| popular NDCG@10 |",
        "kept; --clean drops them",
        "--clean would drop 151 of",
    ):
        assert told in report  # fmt: skip
    assert SECRET not in report + err
    arguments = ["evaluate", str(tmp_path / "v"), "--events", str(events), "--out"]
    arguments += [str(tmp_path / "again"), "--embedder", embedder_address]
    assert commands.main(arguments) == 0
    assert (tmp_path / "again" / "data_report.md").read_text() == report


def test_cleaning_drops_what_the_report_says(
    events: Path, embedder_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = train(events, embedder_address, tmp_path / "v", capsys, "--clean")
    assert "data: cleaning dropped 151 of 552 events (27.4 %)" in err
    report = (tmp_path / "v" / "data_report.md").read_text()
    assert "--clean dropped 151 of 552 events (27.4 %)" in report
    assert "- done: dropped: 150 events" in report
    lineage = json.loads((tmp_path / "v" / "lineage.json").read_text())
    assert lineage["data"]["events_dropped"] == 151


def test_data_that_cannot_be_divided_as_read_have_a_report() -> None:
    count = 40
    zeros = np.zeros(count, np.int64)
    columns = EventColumns(
        [f"u{n}" for n in range(count)], ["view"], ["i"], [],
        np.arange(count), zeros, zeros, zeros - 1, zeros + BEGIN * 1_000_000,
    )  # fmt: skip
    nothing = np.zeros((0, 4), np.float32)
    dataset = Dataset(
        to_events(columns), np.zeros((1, 4), np.float32), nothing,
        EncoderConfig(name="none", pooling="mean", cols=4), None, {}, [""],
        np.zeros(4, np.float32),
    )  # fmt: skip
    assert data_report(dataset, Protocol()) is None  # nobody has looked
    dataset = replace(dataset, inspection=inspect(columns, None, {}))
    report = data_report(dataset, Protocol()) or ""
    assert "### One time" in report
    assert "Nothing was measured: as read, a time split leaves no events to train on" in report
