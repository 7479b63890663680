"""`compare` end to end, on two small versions and a real embedder."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predictor.__main__ import main
from predictor.learning import sources, training
from predictor.learning.reports.model_card import TYPE_COLUMNS
from predictor.learning.sequence.fitting import FitConfig
from predictor.models import model_dir
from predictor.models.version import VersionConfig

KINDS = ("coffee", "tea", "bread", "cheese", "soap")
TYPES = ("view", "cart", "buy")
BEGIN, DAY = 1_700_000_000, 86_400
VOID = {"meta", "img", "link", "br"}

Row = tuple[str | int, ...]


def write(path: Path, columns: list[str], rows: Sequence[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


class World:
    """Files in which kinds follow one another in a circle, and so do types."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        rows = [(f"{kind}-{n}", f"{kind} number {n}") for kind in KINDS for n in range(5)]
        self.items = write(folder / "items.csv", ["item_id", "text"], rows)
        rng = np.random.default_rng(0)
        self.rows: list[Row] = []
        for user in range(150):
            kind = int(rng.integers(len(KINDS)))
            for step in range(int(rng.integers(6, 14))):
                at = BEGIN + user * 50 + step * DAY
                kind = (kind + 1) % len(KINDS)
                type_ = TYPES[(user + step) % 3]
                self.rows.append((f"u{user}", type_, f"{KINDS[kind]}-{rng.integers(5)}", at))
        self.events = self.write_events("events", self.rows)

    def write_events(self, name: str, rows: Sequence[Row]) -> Path:
        columns = ["user_id", "behavior_type", "item_id", "timestamp"]
        return write(self.folder / f"{name}.csv", columns, rows)

    def changed(self, path: Path, name: str, protocol: dict[str, Any], **changes: Any) -> Path:
        """Another version made of one, as if it were trained by another protocol."""
        version = model_dir.load(path)
        metrics = version.reports["metrics.json"]
        told = {**metrics, "protocol": metrics["protocol"] | protocol}
        config = {key: changes.pop(key) for key in changes.keys() & VersionConfig.model_fields}
        other = replace(
            version,
            config=version.config.model_copy(update={"version": name, **config}),
            reports={**version.reports, "metrics.json": told},
            **changes,
        )
        model_dir.write(self.folder / name, other, "", {})
        return self.folder / name

    def compare(self, *arguments: Path | str, events: Path | None = None) -> int:
        files = ["--items", self.items, "--events", events or self.events]
        given = ["compare", *arguments, *files, "--embedder", self.address]
        return main([str(argument) for argument in given])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, embedder_address: str) -> World:
    return World(tmp_path_factory.mktemp("comparing"), embedder_address)


@pytest.fixture(scope="module")
def learned(world: World) -> Path:
    with sources.embedder(world.address, Path(), None) as client:
        dataset = sources.with_vectors(sources.read_files(world.events, world.items), client)
    config = FitConfig(epochs=6, dims=16, hidden=16)
    return training.train(dataset, world.folder / "learned", config=config).path


@pytest.fixture(scope="module")
def spoiled(world: World, learned: Path) -> Path:
    """The same with items that stand anywhere, and without two parts."""
    shape = model_dir.load(learned).residuals.shape
    anywhere = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    # Another seed makes no difference to a split by time.
    return world.changed(
        learned, "spoiled", {"seed": 7}, residuals=anywhere, ranker=None, type_model=None
    )


@pytest.fixture(scope="module")
def longer(world: World, learned: Path) -> Path:
    """It has learned from what the others are tested on, and to it nobody buys."""
    seen = {"test_share": 0.1, "last_validation_event": "2023-11-25T11:00:00+00:00"}
    names = {"buy": "purchase"}
    known = model_dir.load(learned).config.behavior_types
    types = tuple(names.get(name, name) for name in known)
    return world.changed(learned, "longer", seen, behavior_types=types)


@pytest.fixture(scope="module")
def output(world: World, learned: Path, spoiled: Path) -> Path:
    """What --out has written."""
    out = world.folder / "out"
    assert world.compare(spoiled, learned, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    return found


def test_a_version_has_the_figures_that_training_measured(
    report: dict[str, Any], learned: Path
) -> None:
    told = model_dir.load(learned).reports["metrics.json"]
    for task in ("items", "types", "known_item_types"):
        # Not of the sequence model alone.
        for name in told[task].keys() - {"model"}:
            found = report[task]["methods"]["learned" if name == "foretell" else f"baseline:{name}"]
            for metric, value in told[task][name].items():
                if isinstance(value, float):
                    assert found[metric] == pytest.approx(value, abs=1e-6), metric
    assert report["protocol"] == told["protocol"] | {"seed": 7}  # of the first


def test_the_best_come_first_with_intervals_and_differences(report: dict[str, Any]) -> None:
    for task, metric in (("items", "ndcg_at_10"), ("types", "f1")):
        found = report[task]
        values = [line[metric] for line in found["methods"].values()]
        assert found["sorted_by"] == metric
        assert values == sorted(values, reverse=True)
        best = next(name for name in found["methods"] if not name.startswith("baseline:"))
        assert found["against"] == best
        assert found["differences"].keys() == found["methods"].keys() - {best}
        for name, line in found["methods"].items():
            for measure, (low, high) in line["intervals"].items():
                assert low <= line[measure] + 1e-9, (name, measure)
                assert high >= line[measure] - 1e-9, (name, measure)
        for name, by_metric in found["differences"].items():
            for measure, told in by_metric.items():
                gain = found["methods"][name][measure] - found["methods"][best][measure]
                assert told["value"] == pytest.approx(gain)
                assert told["p_holm"] >= told["p"]
        assert set(found["draws"].values()) == {2_000}
    measured = {name for name, _ in TYPE_COLUMNS} - {"precision", "recall"}
    for line in report["types"]["methods"].values():
        assert line["intervals"].keys() == measured
    assert report["items"]["differences"]["spoiled"]["ndcg_at_10"]["p_holm"] < 0.05
    assert report["items"]["differences"]["baseline:popular"]["ndcg_at_10"]["p_holm"] < 0.05
    assert report["types"]["differences"]["baseline:majority"]["f1"]["p_holm"] < 0.05


class Page(HTMLParser):
    """Refuses tags that do not fit together; keeps cells and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.captions = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert not any(value and "://" in value for value in named.values())
        if tag == "img":
            self.images.append(named)
        if tag == "th":
            assert named["scope"] in ("row", "col")
        self.captions += tag == "caption"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.add(data.strip())


def test_the_page_holds_all_figures_and_is_whole_in_itself(
    output: Path, report: dict[str, Any]
) -> None:
    text = (output / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.captions == text.count("<table>") > 6
    for task in ("items", "types"):
        for name, line in report[task]["methods"].items():
            assert name in page.cells
            for metric in line["intervals"]:
                assert f"{line[metric]:.4f}" in page.cells
                assert " to ".join(f"{end:.4f}" for end in line["intervals"][metric]) in page.cells
        for by_metric in report[task]["differences"].values():
            for told in by_metric.values():
                assert f"{told['value']:+.4f}" in page.cells
    assert "the same for all lines, 2,000 times. Bold" in text
    for rows in report["types"]["methods"]["learned"]["confusion_matrix"]:
        assert {f"{count:,}" for count in rows} <= page.cells
    files = {path.name for path in output.glob("*.png")}
    assert len(page.images) == len(files) > 8
    assert {"types_roc.png", "types_precision_recall.png", "items_by_popularity.png"} <= files
    for image in page.images:
        assert str(image["src"]).startswith("data:image/png;base64,iVBORw0KGgo")
        assert image["alt"]


def test_sorted_and_tested_as_asked(
    world: World, learned: Path, spoiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        world.compare(spoiled, learned, "--sort", "log_loss", "--against", spoiled, "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    losses = [line["log_loss"] for line in found["types"]["methods"].values()]
    assert losses == sorted(losses)
    assert found["items"]["sorted_by"] == "ndcg_at_10"
    assert found["types"]["against"] == found["items"]["against"] == "spoiled"
    assert world.compare(learned, "--against", "baseline:popular") == 0
    text = capsys.readouterr().out
    assert "ndcg_at_10 less that of baseline:popular" in text
    assert "f1 less that of learned" in text  # there is no such line among the types


def test_copies_are_told_apart_and_found_equal(
    world: World, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = world.folder / "elsewhere" / "learned"
    shutil.copytree(learned, copy)
    assert world.compare(learned, copy, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    own = f"{world.folder.name}/learned"
    assert list(found["versions"]) == [own, "elsewhere/learned"]
    for told in found["items"]["differences"]["elsewhere/learned"].values():
        assert told == {"value": 0, "low": 0, "high": 0, "p": 1, "p_holm": 1}


def test_the_first_version_says_whether_repeats_count(
    world: World, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeats = {"allowed": "excluded", "excluded": "allowed"}[model_dir.load(learned).config.repeats]
    other = world.changed(learned, "other", {}, repeats=repeats)
    measured = []
    for pair in ((learned, other), (other, learned)):
        assert world.compare(*pair, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        methods = report["items"]["methods"]
        assert methods["learned"] == methods["other"]
        measured.append((report["protocol"]["history_filtered"], methods["learned"]))
    assert measured[0][0] is not measured[1][0]
    assert measured[0][1] != measured[1][1]


def test_a_version_that_knows_the_test_part_is_refused(
    world: World, learned: Path, longer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.compare(learned, longer) == 2
    error = capsys.readouterr().err
    assert "longer was trained with split time (test_share 0.1)" in error
    assert "learned with split time (test_share 0.2)" in error
    # The division is given, but is that of one only.
    assert world.compare(learned, longer, "--test-share", "0.2") == 2
    assert "longer has learned from events up to 2023-11-2" in capsys.readouterr().err
    cut = "2023-11-25T12:00"
    assert world.compare(learned, longer, "--test-from", cut, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all("before the test part" in about["checked"] for about in found["versions"].values())
    assert found["protocol"]["test_contexts"] > 5


def test_a_type_that_a_version_does_not_know_counts_against_it(
    world: World, learned: Path, longer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.compare(longer, learned, "--json", "--test-from", "2023-11-25T12:00") == 0
    types = json.loads(capsys.readouterr().out)["types"]["methods"]
    assert {line["lines"] for line in types.values()} == {types["learned"]["lines"]}
    missed, found = (types[name]["per_type"]["buy"] for name in ("longer", "learned"))
    assert missed["support"] == found["support"] > 0 == missed["predicted"]
    assert missed["recall"] == 0 < found["recall"]
    assert types["longer"]["log_loss"] > types["baseline:majority"]["log_loss"]


def test_what_cannot_be_compared_is_told(
    world: World, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ((learned, learned), "is given twice"),
        ((learned, "--against", "nobody"), "--against nobody: there are learned, and baselines"),
        (
            (learned, "--against", "baseline:no"),
            "no such line; there are learned, baseline:popular",
        ),
        ((learned, "--out", world.items), "items.csv: File exists"),
        ((learned, world.folder), "no version directory"),
    ):
        assert world.compare(*arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        world.compare(learned, "--sort", "nothing")


def test_one_target_without_an_item(
    world: World, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = write(world.folder / "targets.csv", ["user_id", "behavior_type"], [("u1", "buy")])
    given = (learned, "--targets", targets)
    assert world.compare(*given, "--sort", "ndcg_at_10") == 2
    assert "--sort ndcg_at_10: these targets have no such measure" in capsys.readouterr().err
    assert world.compare(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "items" not in found
    assert found["types"]["users"] == 1
    assert found["types"]["differences"] == {}  # one user has no spread


def test_what_users_named_is_no_markup(world: World, learned: Path) -> None:
    name = "<b>&buy"
    rows = [(user, name if kind == "buy" else kind, *rest) for user, kind, *rest in world.rows]
    targets = write(world.folder / "odd.csv", ["user_id", "behavior_type"], [("u1", name)])
    known = model_dir.load(learned).config.behavior_types
    types = tuple(name if kind == "buy" else kind for kind in known)
    path, out = world.changed(learned, "markup", {}, behavior_types=types), world.folder / "page"
    events = world.write_events("markup", rows)
    assert world.compare(path, "--targets", targets, "--out", out, events=events) == 0
    text = (out / "report.html").read_text()
    assert "&lt;b&gt;&amp;buy" in text
    assert "<b>" not in text


def test_a_command_that_is_none_lists_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["comprae"])
    assert "compare" in capsys.readouterr().err


@pytest.fixture(scope="module")
def by_cls(world: World, learned: Path) -> Path:
    """A version that reads texts in another way."""
    encoder = model_dir.load(learned).config.encoder.model_copy(update={"pooling": "cls"})
    return world.changed(learned, "cls", {}, encoder=encoder)


def test_a_version_of_another_encoder_than_that_of_the_embedder_is_refused(
    world: World, learned: Path, by_cls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.compare(learned, by_cls) == 2
    assert "version cls was trained on" in capsys.readouterr().err


def test_every_version_reads_the_vectors_of_its_own_encoder(
    world: World, learned: Path, by_cls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", learned, by_cls, "--items", world.items, "--events", world.events]
    given += ["--cache-dir", world.folder / "cache", "--json"]
    assert main([str(argument) for argument in given]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "cls" in report["versions"]["cls"]["encoder"]
    own, other = (report["items"]["methods"][name] for name in ("learned", "cls"))
    told = model_dir.load(learned).reports["metrics.json"]["items"]["foretell"]
    assert own["ndcg_at_10"] == pytest.approx(told["ndcg_at_10"], abs=1e-6)
    assert other["ndcg_at_10"] != own["ndcg_at_10"]  # it was not trained on such vectors
