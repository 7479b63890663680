"""The seed article's file: user_id, behavior_type, behavior_text, and nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predictor.learning import commands
from predictor.models import model_dir

COLUMNS = ["user_id", "behavior_type", "behavior_text"]
SENTENCES = {
    "click": ("opened the page of", "clicked on", "had a quick look at"),
    "buy": ("ordered and paid for", "bought two of", "checked out with"),
    "comment": ("wrote a review about", "complained about", "praised"),
}
THINGS = ("a red kettle", "running shoes", "the new phone", "a wool blanket", "garden chairs")


def write(path: Path, rows: list[tuple[str, ...]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who click, buy and comment in turn; now and then they click once more."""
    rng = np.random.default_rng(0)
    rows: list[tuple[str, ...]] = []
    for user in range(60):
        for _ in range(8):
            thing = THINGS[rng.integers(len(THINGS))]
            steps = ["click"] * int(rng.integers(1, 3)) + ["buy", "comment"]
            for kind in steps:
                sentence = SENTENCES[kind][rng.integers(3)]
                rows.append((f"user {user}", kind, f"{sentence} {thing}"))
    return write(tmp_path_factory.mktemp("article") / "user_behavior.csv", rows)


@pytest.fixture(scope="module")
def printed(
    events: Path, embedder_address: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    from contextlib import redirect_stdout
    from io import StringIO

    out = tmp_path_factory.mktemp("models") / "article"
    arguments = ["train", "--events", str(events), "--out", str(out), "--json"]
    with redirect_stdout(StringIO()) as stdout:
        status = commands.main([*arguments, "--embedder", embedder_address])
    assert status == 0
    return out, json.loads(stdout.getvalue())


def test_both_tables_have_what_was_asked_for(printed: tuple[Path, dict[str, Any]]) -> None:
    _, report = printed
    for name in ("own_text", "next_type"):
        table = report[name]
        for field in ("train_accuracy", "validation_accuracy", "majority_accuracy"):
            assert 0 < table[field] <= 1
        confusion = np.array(table["confusion_matrix"])
        assert confusion.shape == (3, 3)
        assert confusion.sum() == table["validation_rows"]
        assert np.trace(confusion) / confusion.sum() == pytest.approx(table["validation_accuracy"])
        assert sorted(table["behavior_types"]) == ["buy", "click", "comment"]
    assert "items" not in report


def test_a_rows_own_text_gives_its_type_away(printed: tuple[Path, dict[str, Any]]) -> None:
    table = printed[1]["own_text"]
    assert table["validation_accuracy"] > 0.95
    assert table["validation_accuracy"] > table["majority_accuracy"] + 0.3
    rows = table["train_rows"] + table["validation_rows"]
    assert table["validation_rows"] / rows == pytest.approx(0.2, abs=0.04)


def test_the_next_type_is_predicted_from_earlier_rows_alone(
    printed: tuple[Path, dict[str, Any]],
) -> None:
    table = printed[1]["next_type"]
    # After a second click, a buy or a comment the next type is certain; after a first click it is
    # a coin's toss: 0.85 is what can be known, and the row's own text would give 1.
    assert 0.75 < table["validation_accuracy"] < 0.93
    assert table["validation_accuracy"] > table["majority_accuracy"] + 0.2
    assert printed[1]["protocol"]["split"] == "random"


def test_the_version_has_types_and_texts_but_no_items(
    printed: tuple[Path, dict[str, Any]],
) -> None:
    version = model_dir.load(printed[0])
    version.check_golden()
    assert not version.config.has_items
    assert version.config.has_texts
    assert not version.config.has_times
    assert version.item_ids == ()


def test_the_tables_are_printed_for_people(
    events: Path, embedder_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--events", str(events), "--out", str(tmp_path / "v"), "--epochs", "1"]
    assert commands.main([*arguments, "--embedder", embedder_address]) == 0
    out, err = capsys.readouterr()
    for expected in ("own_text", "next_type", "validation_accuracy", "true \\ predicted"):
        assert expected in out
    assert "epoch" in err


BAD: dict[str, tuple[list[tuple[str, ...]], list[str], str]] = {
    "one type": (
        [(f"u{n % 5}", "click", f"text {n}") for n in range(50)],
        COLUMNS,
        "have the behavior type 'click'",
    ),
    "one user": (
        [("only me", ("click", "buy")[n % 2], f"text {n}") for n in range(50)],
        COLUMNS,
        "user 'only me'",
    ),
    "empty": ([], COLUMNS, "no usable rows"),
    "no usable row": ([("", "click", "x"), ("u", "", "y")], COLUMNS, "no usable rows"),
    "missing column": ([("u", "x")], ["user_id", "behavior_text"], "behavior_type"),
    "too few": ([("a", "click", "x"), ("b", "buy", "y")], COLUMNS, "too few"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_set_is_told_in_one_line(
    case: str, tmp_path: Path, embedder_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, columns, complaint = BAD[case]
    events = write(tmp_path / "events.csv", rows, columns)
    arguments = ["train", "--events", str(events), "--out", str(tmp_path / "v"), "--json"]
    assert commands.main([*arguments, "--embedder", embedder_address]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert complaint in last[0]
    assert err.rstrip().endswith(last[0])
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either --events"),
        (["--events", "a.csv", "--store", "b"], "either --events"),
        (["--store", "no-such-folder", "--encoder", "bert"], "--encoder"),
        (["--store", "b", "--items", "c.csv", "--embedder", "x:1"], "--items goes with"),
        (["--events", "does-not-exist.csv"], "does-not-exist.csv"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["train", "--out", str(tmp_path / "v"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_a_share_must_lie_between_0_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    for share in ("0", "1", "-0.1", "much"):
        with pytest.raises(SystemExit) as caught:
            commands.main(["train", "--out", "v", "--events", "e", "--test-share", share])
        assert caught.value.code == 2
    assert "--test-share" in capsys.readouterr().err
