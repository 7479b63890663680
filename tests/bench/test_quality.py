import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import quality, stored, trials
from bench.trials import Trial
from predictor.learning import sources
from predictor.learning.measures.comparison import SEQUENCE
from predictor.learning.sequence.recipe import FitConfig
from predictor.models.version import OWN

TRIAL = Trial(
    trials.LEAVE_ONE_OUT,
    {"recall_at_10": ("items", "recall_at_10"), "type_macro_f1": ("types", "f1")},
    baselines=True,
)

REPORT = {
    "items": {OWN: {"recall_at_10": 0.3, "other": 1}, SEQUENCE: {"recall_at_10": 0.2}},
    "types": {OWN: {"f1": 0.7}, "majority": {"f1": 0.4, "accuracy": 0.5}},
}


def test_metrics_are_read_from_the_parts_of_a_report() -> None:
    assert trials.methods_of(REPORT, TRIAL) == {
        OWN: {"recall_at_10": 0.3, "type_macro_f1": 0.7},
        SEQUENCE: {"recall_at_10": 0.2},
        "majority": {"type_macro_f1": 0.4},
    }


def test_what_a_report_lacks_is_left_out() -> None:
    report = {"items": {OWN: {"recall_at_10": None}}}
    assert trials.methods_of(report, TRIAL) == {OWN: {}, SEQUENCE: {}}


def test_without_a_second_stage_the_model_is_the_system() -> None:
    report = {"items": {OWN: {"recall_at_10": 0.3}}, "types": {OWN: {"f1": 0.7}}}
    assert trials.methods_of(report, TRIAL)[SEQUENCE] == {"recall_at_10": 0.3}


def test_figures_have_mean_and_sample_deviation() -> None:
    seeds = [
        {OWN: {"recall_at_10": value}, SEQUENCE: {"recall_at_10": 0.2}} for value in (0.1, 0.2, 0.3)
    ]
    assert trials.summary("beauty", TRIAL, seeds) == {
        "beauty_recall_at_10_mean": pytest.approx(0.2),
        "beauty_recall_at_10_spread": pytest.approx(0.1),
        "beauty_model_recall_at_10_mean": pytest.approx(0.2),
        "beauty_model_recall_at_10_spread": pytest.approx(0.0),
    }


def test_one_seed_has_no_spread() -> None:
    figures = trials.summary("beauty", TRIAL, [{OWN: {"recall_at_10": 0.1}}])
    assert figures == {"beauty_recall_at_10_mean": 0.1, "beauty_recall_at_10_spread": None}


def test_a_trial_shows_only_the_methods_that_it_is_for() -> None:
    peer = Trial(trials.LEAVE_ONE_OUT, TRIAL.metrics, methods={SEQUENCE: "peer"})
    figures = trials.summary("beauty", peer, [trials.methods_of(REPORT, TRIAL)])
    assert figures == {
        "beauty_peer_recall_at_10_mean": 0.2,
        "beauty_peer_recall_at_10_spread": None,
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("recall_at_10", ("", "recall_at_10")),
        ("cold_recall_at_10", ("", "cold_recall_at_10")),
        ("item_knn_natural_cold_recall_at_10", ("item_knn", "natural_cold_recall_at_10")),
        ("markov_known_item_type_accuracy", ("markov", "known_item_type_accuracy")),
        ("decayed_shares_type_accuracy", ("decayed_shares", "type_accuracy")),
        ("model_hits_at_10", ("model", "hits_at_10")),
    ],
)
def test_names_of_figures_are_taken_apart(name: str, parts: tuple[str, str]) -> None:
    assert trials.split_name(name) == parts


def test_tables_have_a_line_a_method_and_differences_below() -> None:
    text = quality.tables(
        ["journey"],
        {
            "journey_hits_at_10_mean": 0.25,
            "journey_hits_at_10_spread": 0.001,
            "journey_popular_hits_at_10_mean": 0.1,
            "journey_popular_hits_at_10_spread": None,
            "journey_popular_ndcg_at_10_mean": 0.09,
            "journey_hits_at_10_over_popular_mean": 0.15,
            "journey_hits_at_10_over_popular_low": 0.14,
            "journey_hits_at_10_over_popular_high": 0.16,
            "journey_ranker_150_p50_ms": 3.0,
        },
    )
    assert text.splitlines() == [
        "journey",
        "             hits_at_10  ndcg_at_10",
        "ours     0.2500 ±0.0010           -",
        "popular          0.1000      0.0900",
        "hits_at_10_over_popular: 0.1500 [0.1400, 0.1600]",
    ]


def test_times_of_the_ranker_are_those_of_the_slowest_set() -> None:
    figures = {
        "beauty_ranker_150_p50_ms": 2.0,
        "journey_ranker_150_p50_ms": 4.0,
        "journey_ranker_480_p50_ms": None,
    }
    assert quality.slowest(figures) == {"ranker_150_p50_ms": 4.0, "ranker_480_p50_ms": None}


def test_instants_are_midnights_in_utc() -> None:
    protocol = trials.OURS["journey"]["whole"].protocol
    assert protocol.test_from == 1_512_086_400_000_000
    assert protocol.validation_from == 1_509_494_400_000_000


@pytest.mark.parametrize(
    ("trial", "parts"),
    [
        (trials.PEERS["beauty"]["id-transformer"], False),
        (trials.OURS["beauty"]["held-out"], True),
    ],
)
def test_peers_are_sequence_models_alone(
    trial: Trial, parts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def train(*_: Any, **options: Any) -> Any:
        asked.append(options["parts"])
        return SimpleNamespace(report=REPORT)

    monkeypatch.setattr("predictor.learning.training.train", train)
    data: Any = None
    quality.train_and_measure(tmp_path / "version", trial, data, 2)
    assert asked == [parts]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Users go round a circle of items."""
    folder = tmp_path / "beauty"
    folder.mkdir()
    lines = [
        " ".join(str(each) for each in (user, *((user + step) % 30 + 1 for step in range(9))))
        for user in range(60)
    ]
    (folder / "sequences.txt").write_text("\n".join(lines))
    titles = "".join(f"{item}\tsoap number {item}\n" for item in range(1, 31))
    (folder / "titles.tsv").write_text(titles)
    return tmp_path


def test_a_whole_run(
    data: Path,
    embedder_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = FitConfig(epochs=2, dims=16, hidden=16)
    ours = trials.OURS["beauty"]
    items_over = partial(stored.items_over, baseline="markov")
    whole = replace(ours["whole"], config=small, once=[items_over, stored.ranker_times])
    held_out = replace(ours["held-out"], config=small)
    monkeypatch.setattr(quality, "OURS", {"beauty": {"whole": whole, "held-out": held_out}})
    monkeypatch.setattr(quality, "PEERS", {})
    embedder = sources.embedder
    monkeypatch.setattr(sources, "embedder", lambda *_: embedder(embedder_address, data, None))
    epoch = {"validation": {"ndcg_at_10": 0.5}, "test": {"recall_at_10": 0.25, "ndcg_at_10": 0.125}}
    result = {"versions": {"rectools/rectools": "1"}, "epochs": [epoch], "complete": False}
    monkeypatch.setattr("bench.rectools.epochs", lambda *_, **__: (result, True))

    arguments = ["--set", "beauty", "--data", str(data), "--seeds", "2", "--threads", "1"]
    folders = ["--out", str(data / "out"), "--cache-dir", str(data / "cache")]
    assert quality.main([*arguments, *folders]) == 0

    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["bench"] == "quality"
    assert said["versions"]["rectools/rectools"] == "1"
    figures = said["figures"]
    for name in (
        "beauty_recall_at_10", "beauty_model_ndcg_at_10", "beauty_markov_recall_at_10",
        "beauty_cold_recall_at_10", "beauty_warm_recall_at_10",
    ):  # fmt: skip
        assert 0 <= figures[f"{name}_mean"] <= 1, name
        assert figures[f"{name}_spread"] >= 0, name
    assert figures["beauty_markov_recall_at_10_mean"] == 1.0
    assert figures["beauty_rectools_sasrec_recall_at_10_mean"] == 0.25
    assert figures["beauty_rectools_sasrec_from_cache"] == 1
    over = [figures[f"beauty_hits_at_10_over_markov_{end}"] for end in ("low", "mean", "high")]
    assert over == sorted(over)
    assert over[1] <= 0
    names = [f"beauty-{key}-{seed}" for key in ("whole", "held-out") for seed in (1, 2)]
    assert all((data / "out" / name / "metrics.json").exists() for name in names)

    monkeypatch.setattr("predictor.learning.training.train", None)
    assert quality.main([*arguments, *folders, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
