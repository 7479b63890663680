"""Training end to end, with the command, on small files and a real embedder."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predictor.learning import commands, sources, training
from predictor.learning.data import history_of
from predictor.learning.measures import evaluation
from predictor.learning.sequence.fitting import FitConfig
from predictor.learning.splits import Protocol
from predictor.models import model_dir
from predictor.models.calibration import ItemCalibration
from serving.process import ServiceProcess

KINDS = ("coffee", "tea", "bread", "cheese", "soap", "pasta", "rice", "juice")
TYPES = ("view", "cart", "buy")

Write = Callable[[str, list[str], list[tuple[Any, ...]]], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def write(path: Path, columns: list[str], rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def items(folder: Path) -> Path:
    rows = [(f"{kind}-{n}", f"{kind} number {n}") for kind in KINDS for n in range(6)]
    return write(folder / "items.csv", ["item_id", "text"], rows)


@pytest.fixture(scope="module")
def events(folder: Path) -> Path:
    """A world with a rule: kinds follow one another in a circle, and so do types."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(120):
        kind = int(rng.integers(len(KINDS)))
        for step in range(int(rng.integers(8, 20))):
            at = 1_700_000_000 + user * 50 + step * 86_400
            kind = (kind + 1) % len(KINDS)
            for _ in range(int(rng.integers(1, 3))):
                rows.append(
                    (f"u{user}", TYPES[(user + step) % 3], f"{KINDS[kind]}-{rng.integers(6)}", at)
                )
    return write(folder / "events.csv", ["user_id", "behavior_type", "item_id", "timestamp"], rows)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = commands.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def trained(
    folder: Path, items: Path, events: Path, embedder_address: str
) -> tuple[Path, dict[str, Any]]:
    """A version, and what `train --json` printed."""
    out = folder / "first"
    command = [sys.executable, "-m", "predictor", "train", "--items", str(items)]
    command += ["--events", str(events), "--out", str(out), "--embedder", embedder_address]
    done = subprocess.run(
        [*command, "--epochs", "12", "--json"], capture_output=True, text=True, check=True
    )
    return out, json.loads(done.stdout)


def test_the_model_learns_the_rule(trained: tuple[Path, dict[str, Any]]) -> None:
    _, report = trained
    items, types = report["items"], report["types"]
    assert items["foretell"]["hits_at_10"] > items["popular"]["hits_at_10"] + 0.2
    assert items["foretell"]["hits_at_10"] >= items["personal_frequency"]["hits_at_10"]
    assert types["foretell"]["accuracy"] > 0.9 > 0.5 > types["majority"]["accuracy"]
    assert types["foretell"]["log_loss"] < types["repeat_last"]["log_loss"]
    assert report["protocol"]["split"] == "time"
    assert report["protocol"]["catalogue"] == 48


def test_the_directory_is_a_version_that_answers(
    trained: tuple[Path, dict[str, Any]], items: Path, events: Path, embedder_address: str
) -> None:
    path, report = trained
    version = model_dir.load(path)
    version.check_golden()
    assert version.config.version == report["version"] == "first"
    assert sorted(version.config.behavior_types) == sorted(TYPES)
    assert version.config.has_items
    assert not version.config.has_texts
    assert version.reports["metrics.json"]["items"] == report["items"]
    for name in ("training", "confusion_matrix", "roc"):
        assert (path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Model card: first" in (path / "card.md").read_text()
    lineage = json.loads((path / "lineage.json").read_text())
    assert lineage["data"]["events"] == "events.csv"
    assert lineage["seconds"] > 0
    assert lineage["libraries"]["torch"]
    curve = json.loads((path / "history.json").read_text())
    assert [epoch["epoch"] for epoch in curve] == list(range(1, len(curve) + 1))
    # The items that follow come first: from a history in arrays to a search, as serving does it.
    source = sources.read_files(events, items)
    with sources.embedder(embedder_address, Path(), None) as client:
        dataset = sources.with_vectors(source, client)
    space, warm = evaluation.read_space(version, dataset)
    assert warm.sum() == len(version.warm)
    part = training.divide(dataset, Protocol())
    rows = slice(0, len(part.test))
    length = version.config.history_length
    batch = history_of(part.test, rows, length, space.items, space.texts)
    best = (version.predict(batch).queries @ space.items.T).argmax(axis=1)
    last = part.test.events.item[part.test.end - 1]
    kinds = np.array([KINDS.index(i.split("-")[0]) for i in dataset.events.item_ids])
    assert ((kinds[best] - kinds[last]) % len(KINDS) == 1).mean() > 0.8


def test_evaluate_repeats_what_training_measured(
    trained: tuple[Path, dict[str, Any]],
    items: Path,
    events: Path,
    embedder_address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, report = trained
    arguments = ["evaluate", str(path), "--items", str(items), "--events", str(events)]
    arguments += ["--embedder", embedder_address]
    status, out, _ = run([*arguments, "--json"], capsys)
    again = json.loads(out)
    assert status == 0
    assert again["protocol"] == report["protocol"]
    for part in ("items", "types"):
        for method, metrics in report[part].items():
            for name, value in metrics.items():
                if isinstance(value, float):
                    assert again[part][method][name] == pytest.approx(value, abs=1e-7), name
    status, out, _ = run(arguments, capsys)
    assert status == 0
    assert "hits_at_10" in out
    assert "personal_frequency" in out


def test_evaluate_with_targets_takes_all_events_as_history(
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    items: Path,
    events: Path,
    embedder_address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [("u1", "tea-1", "view"), ("stranger", "rice-2", "buy"), ("u2", "no-such-item", "view")]
    targets = write(folder / "targets.csv", ["user_id", "item_id", "behavior_type"], rows)
    arguments = ["evaluate", str(trained[0]), "--items", str(items), "--events", str(events)]
    arguments += ["--targets", str(targets), "--embedder", embedder_address, "--json"]
    status, out, _ = run(arguments, capsys)
    report = json.loads(out)
    assert status == 0
    assert report["items"]["foretell"]["contexts"] == 3
    assert report["items"]["foretell"]["cold_targets"] == 1
    assert report["types"]["foretell"]["lines"] == 3


def test_training_is_reproducible(
    folder: Path, items: Path, events: Path, embedder_address: str
) -> None:
    with sources.embedder(embedder_address, Path(), None) as client:
        dataset = sources.with_vectors(sources.read_files(events, items), client)
    config = FitConfig(epochs=1, dims=16, hidden=16)
    first, second = (
        training.train(dataset, folder / name, config=config) for name in ("same-1", "same-2")
    )
    assert first.report == second.report
    weights = [
        model_dir.read_config(one.path).files["weights.safetensors"] for one in (first, second)
    ]
    assert weights[0] == weights[1]


def test_an_existing_directory_is_told_before_training(
    trained: tuple[Path, dict[str, Any]],
    items: Path,
    events: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", "--items", str(items), "--events", str(events), "--out", str(trained[0])]
    # Where no embedder is: nothing has been asked of it by then.
    status, out, err = run([*arguments, "--embedder", "127.0.0.1:1"], capsys)
    assert (status, out) == (2, "")
    assert "exists already" in err


def test_evaluate_goes_by_ids_and_not_by_the_order_of_the_items(
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    items: Path,
    events: Path,
    embedder_address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _ = trained
    with items.open(newline="") as file:
        columns, *rows = csv.reader(file)
    order = np.random.default_rng(3).permutation(len(rows)).tolist()
    shuffled = write(folder / "shuffled.csv", columns, [tuple(rows[at]) for at in order])
    arguments = ["evaluate", str(path), "--events", str(events), "--embedder", embedder_address]
    # Which items are held out goes by their places.
    arguments += ["--hold-out", "0.2", "--json", "--items"]
    reports = []
    for file_ in (items, shuffled):
        status, out, _ = run([*arguments, str(file_)], capsys)
        assert status == 0
        reports.append(json.loads(out))
    assert reports[0]["items"]["foretell"]["cold_targets"] > 0
    assert reports[1] == reports[0]


def test_the_sequence_model_can_be_trained_alone(
    trained: tuple[Path, dict[str, Any]],
    folder: Path,
    items: Path,
    events: Path,
    embedder_address: str,
) -> None:
    with sources.embedder(embedder_address, Path(), None) as client:
        dataset = sources.with_vectors(sources.read_files(events, items), client)
    config = FitConfig(epochs=1, dims=16, hidden=16)
    alone = training.train(dataset, folder / "alone", config=config, parts=False)
    assert trained[1]["parts"]
    assert alone.report["parts"] == {}
    version = model_dir.load(alone.path)
    assert version.ranker is None
    assert version.type_model is None
    assert version.item_type_model is None
    assert version.config.item_calibration != ItemCalibration()


def test_two_processes_train_one_version(
    folder: Path, items: Path, events: Path, embedder_address: str
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "predictor", "train", "--items", str(items)]
    command += ["--events", str(events), "--out", str(folder / "two"), "--epochs", "1"]
    command += ["--dims", "16", "--embedder", embedder_address, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "two"  # one process tells
    model_dir.load(folder / "two").check_golden()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_training_leaves_nothing(
    folder: Path, items: Path, events: Path, embedder_address: str, sent: signal.Signals
) -> None:
    parent = folder / f"killed-{sent.name}"
    parent.mkdir()
    command = [sys.executable, "-m", "predictor", "train", "--items", str(items)]
    command += ["--events", str(events), "--out", str(parent / "v"), "--embedder", embedder_address]
    process = subprocess.Popen(
        [*command, "--epochs", "1000"], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "validation" in line:  # it is in the middle of training
            break
    process.send_signal(sent)
    assert process.wait(30) == 130
    assert "interrupted" in process.stderr.read()
    process.stderr.close()
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("model", ["gru"])
def test_from_the_event_store(
    model: str,
    tmp_path: Path,
    items: Path,
    events: Path,
    start_embedder: Callable[..., ServiceProcess],
    start_predictor: Callable[..., ServiceProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from foretell import Client
    from foretell.importing import EventReader, ItemReader

    embedder = start_embedder("--data-dir", str(tmp_path / "embedder"))
    predictor = start_predictor(embedder.address)
    with Client(embedder.address, predictor.address) as client:
        client.import_items(ItemReader(items))
        client.import_events(EventReader(events))
    arguments = ["train", "--store", str(tmp_path / "data"), "--embedder", embedder.address]
    arguments += ["--out", str(tmp_path / "v"), "--model", model, "--epochs", "1", "--json"]
    status, out, err = run(arguments, capsys)
    assert status == 0, err
    report = json.loads(out)
    source = sources.read_files(events, items)
    assert report["protocol"]["catalogue"] == len(source.items or ())
    lineage = json.loads((tmp_path / "v" / "lineage.json").read_text())
    assert lineage["data"]["store_events"] == len(source.columns)
    assert lineage["data"]["store_last_event"] >= len(source.columns)
