"""The version directory: written whole, read back, and refused where anything is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from foretell.errors import InvalidArgumentError
from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows
from predictor.models import model_dir, untrusted
from predictor.models.calibration import ItemCalibration, TypeCalibration, softmax
from predictor.models.history import history_batch
from predictor.models.sequence.network import NetworkConfig, SequenceNetwork
from predictor.models.version import EncoderConfig, Golden, Version, VersionConfig

DIMS, COLS = 4, 6


def trained(name: str, *, has_items: bool = True) -> Version:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    golden = history_batch(
        rng.standard_normal((5, DIMS)).astype(np.float32), np.ones(5, np.bool_),
        rng.integers(0, 3, 5), np.arange(5) * 10**9, np.array([3, 0, 2]),
    )  # fmt: skip
    config = VersionConfig(
        version=name, encoder=EncoderConfig(name="e", pooling="mean", cols=COLS),
        behavior_types=("buy", "view"), history_length=50,
        network=NetworkConfig(behavior_types=2, dims=DIMS, hidden=8), repeats="allowed",
        has_items=has_items, has_texts=True, has_times=True, candidates=200,
        type_calibration=TypeCalibration(temperature=1.5, biases=(0.0, 0.0)),
        item_calibration=ItemCalibration(score=0.7),
    )  # fmt: skip
    layer = AffineLayer(
        rng.standard_normal((DIMS, COLS)).astype(np.float32), np.ones(DIMS, np.float32)
    )
    terms = TermRows(
        ("fine", "fine tea", "tea"),
        np.array([1.0, 3.0, 2.0], np.float32),
        rng.standard_normal((3, DIMS)).astype(np.float32),
    )
    network = SequenceNetwork(config.network).eval()
    outputs = network.predict(golden)
    return Version(
        config,
        network,
        Projection((layer,), terms=terms),
        ("milk", "bread", "new") if has_items else (),
        np.arange(2 if has_items else 0),
        rng.standard_normal((2 if has_items else 0, DIMS)).astype(np.float32),
        Golden(
            golden,
            config.type_calibration.probabilities(outputs.type_logits),
            outputs.queries,
        ),
        reports={
            "metrics.json": {"items": {"foretell": {"hits_at_10": 0.25}}},
            "lineage.json": {"seed": 1},
        },
    )


PLOTS = {"roc.png": b"not really a picture"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model_dir.write(tmp_path / "v1", trained("v1"), "# Card", PLOTS)
    return tmp_path / "v1"


def test_what_is_written_is_read_back(directory: Path) -> None:
    expected = trained("v1")
    version = model_dir.load(directory)
    assert version.config.version == "v1"
    assert version.item_ids == expected.item_ids
    assert np.array_equal(version.residuals, expected.residuals)
    assert version.reports == expected.reports
    assert (directory / "card.md").read_text() == "# Card"
    assert (directory / "plots" / "roc.png").read_bytes() == b"not really a picture"
    text = np.ones((1, COLS), np.float32)
    applied = version.projection.apply(text, texts=["fine tea"])
    assert np.array_equal(applied, expected.projection.apply(text, texts=["fine tea"]))
    version.check_golden()
    outputs = expected.network.predict(expected.golden.histories)
    probabilities, queries, gaps_s = version.predict(expected.golden.histories)
    assert queries == pytest.approx(outputs.queries, abs=1e-6)
    assert gaps_s == pytest.approx(np.exp(outputs.log_gaps))
    assert probabilities == pytest.approx(softmax(outputs.type_logits, 1.5))
    assert probabilities.sum(axis=1) == pytest.approx(1)


def test_a_version_without_items(tmp_path: Path) -> None:
    model_dir.write(tmp_path / "types", trained("types", has_items=False), "# Card", PLOTS)
    version = model_dir.load(tmp_path / "types")
    assert version.item_ids == ()
    assert version.residuals.shape == (0, DIMS)
    assert not (tmp_path / "types" / "items.json").exists()


def test_item_probabilities_are_the_calibrated_scores(directory: Path) -> None:
    scores = np.array([[2.0, 1.0]], np.float32)
    version = model_dir.load(directory)
    right = ItemCalibration(score=0.7).probabilities(scores)
    assert version.item_probabilities(scores, scores) == pytest.approx(right)


def test_nothing_is_left_of_a_writing_that_failed(tmp_path: Path) -> None:
    broken = trained("v1")
    broken.reports["metrics.json"]["value"] = float("nan")  # no JSON
    with pytest.raises(ValueError, match="JSON"):
        model_dir.write(tmp_path / "v1", broken, "# Card", PLOTS)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(directory: Path) -> None:
    before = (directory / "config.json").read_bytes()
    with pytest.raises(InvalidArgumentError, match="exists already"):
        model_dir.write(directory, trained("v1"), "# Card", PLOTS)
    assert (directory / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["V1", "", "a/b", "-a", "a" * 50, "a b", "ä"])
def test_names_that_no_version_may_have(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no version name"):
        model_dir.check_version_name(name)


def test_names_of_collections_fit_the_limit() -> None:
    assert len(model_dir.check_version_name("a" * 49) + ".behaviors") <= 64


FILES = [
    "weights.safetensors", "projection.safetensors", "terms.safetensors", "terms.json",
    "items.safetensors", "items.json",
    "golden.safetensors", "metrics.json", "lineage.json", "plots/roc.png", "card.md",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_is_named(directory: Path, name: str) -> None:
    file = directory / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidArgumentError, match=f"{name}.*sha256"):
        model_dir.load(directory)
    file.unlink()
    with pytest.raises(InvalidArgumentError, match=f"{name}.*not readable"):
        model_dir.load(directory)


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if "network" in changes:
        changes["network"] = {**config["network"], **changes["network"]}
    file.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 1}, "format 1; this program reads format 2"),
        ({"format": None}, "format None"),
        ({"version": "No Name"}, "version"),
        ({"behavior_types": []}, "behavior_types"),
        ({"history_length": 0}, "history_length"),
        ({"surprise": 1}, "surprise"),
        ({"files": {}}, "lacks"),
        ({"network": {"model_type": "parrot"}}, "parrot"),
        ({"network": {"hidden": 9}}, "weights.safetensors.*shape"),
        ({"network": {"dims": 5}}, "projection.safetensors.*shape"),
        ({"behavior_types": ["a", "b", "c"]}, "not of 3 behavior_types"),
        ({"behavior_types": ["a", "a"]}, "occurs twice"),
        ({"type_calibration": {"temperature": 1.0, "biases": [0.0]}}, "not of 2 behavior_types"),
        ({"history_length": 10**30}, "history_length"),
        ({"horizon": 10**30}, "horizon"),
        ({"activations": []}, "activations"),
        ({"network": {"dims": 10**9}}, r"projection\.safetensors.*shape"),
        ({"network": {"hidden": 10**9}}, r"config\.json.*network\.hidden"),
        ({"network": {"hidden": 4_000}}, r"config\.json.*too few"),
        ({"network": {"layers": 10**9}}, r"config\.json.*network\.layers"),
        ({"network": {"layers": -1}}, r"config\.json.*network\.layers"),
        ({"network": {"heads": 0}}, r"config\.json.*network\.heads"),
        ({"network": {"positions": 10**12}}, r"config\.json.*network\.positions"),
        ({"network": {"towers": 0}}, r"config\.json.*network\.towers"),
        ({"network": {"towers": 10**9}}, r"config\.json.*network\.towers"),
        ({"network": {"towers": 3}}, r"config\.json.*3 towers do not divide 4 dims"),
        ({"network": {"towers": 2}}, r"weights\.safetensors.*towers\.0.*shape"),
        ({"history_length": 2}, "golden.safetensors.*lengths"),
        ({"activations": ["identity", "relu"]}, "projection.safetensors"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    directory: Path, changes: dict[str, Any], complaint: str
) -> None:
    edit_config(directory, **changes)
    with pytest.raises(InvalidArgumentError, match=f"(?s){complaint}") as caught:
        model_dir.load(directory)
    assert caught.value.reason == "BAD_MODEL_DIRECTORY"
    assert "\n" not in caught.value.message


def test_no_memory_is_taken_for_types_that_the_weights_lack(directory: Path) -> None:
    types = 3_000  # the head alone would have traces of so many, times so many
    edit_config(
        directory,
        behavior_types=[str(number) for number in range(types)],
        network={"behavior_types": types},
        type_calibration={"temperature": 1.0, "biases": [0.0] * types},
    )
    with pytest.raises(InvalidArgumentError, match=r"config\.json.*too few"):
        model_dir.load(directory)


def test_a_config_cannot_reach_outside(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    config = json.loads((directory / "config.json").read_text())
    edit_config(directory, files={**config["files"], "../secret": "0" * 64})
    with pytest.raises(InvalidArgumentError, match="outside the directory"):
        model_dir.load(directory)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5_000, "plots"])
def test_a_config_that_names_what_is_no_file(directory: Path, name: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit_config(directory, files={**config["files"], name: "0" * 64})
    with pytest.raises(InvalidArgumentError, match=r"outside the directory|not a file|readable"):
        model_dir.load(directory)


def test_a_pipe_is_not_read(directory: Path) -> None:
    (directory / "card.md").unlink()
    os.mkfifo(directory / "card.md")
    with pytest.raises(InvalidArgumentError, match=r"card\.md: not a file"):
        model_dir.load(directory)


def test_terms_without_their_names_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    for name in ("terms.json", "terms.safetensors"):
        rest = {key: value for key, value in config["files"].items() if key != name}
        edit_config(directory, files=rest)
        with pytest.raises(InvalidArgumentError, match=f"lacks {name}"):
            model_dir.load(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_a_config_that_is_no_json_object(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"config\.json"):
        model_dir.load(directory)


def test_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no version directory"):
        model_dir.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_file_of_unreasonable_size_is_refused_before_it_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    suffix = Path(name).suffix
    size = (directory / name).stat().st_size
    monkeypatch.setitem(untrusted.MOST_BYTES, suffix, size - 1)
    with pytest.raises(InvalidArgumentError, match=rf"{name}.*at most are read"):
        model_dir.load(directory)


def resign(directory: Path, name: str) -> None:
    """Makes the config's sha256 fit a changed file, as a stranger could."""
    import hashlib

    config = json.loads((directory / "config.json").read_text())
    digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    edit_config(directory, files={**config["files"], name: digest})


def set_nan(tensors: dict[str, Any]) -> None:
    tensors["towers.0.type_head.bias"][0] = np.nan


def drop_one(tensors: dict[str, Any]) -> None:
    del tensors["towers.0.start"]


def add_one(tensors: dict[str, Any]) -> None:
    tensors["stranger"] = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (set_nan, "not finite"),
        (drop_one, r"towers\.0\.start is missing"),
        (add_one, "stranger belongs to no"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    directory: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    tensors = load_file(directory / "weights.safetensors")
    change(tensors)
    save_file(tensors, directory / "weights.safetensors")
    resign(directory, "weights.safetensors")
    with pytest.raises(InvalidArgumentError, match=complaint):
        model_dir.load(directory)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (["a", "a", "b"], "twice"),
        (["a"], "positions of 1 items"),
        ({"a": 1}, "list of ids"),
        ([1, 2], "list of ids"),
    ],
)
def test_item_ids_that_do_not_fit_are_refused(directory: Path, ids: Any, complaint: str) -> None:
    (directory / "items.json").write_text(json.dumps(ids))
    resign(directory, "items.json")
    with pytest.raises(InvalidArgumentError, match=complaint):
        model_dir.load(directory)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "complaint"),
    [
        ("golden", "vectors", np.zeros((5, DIMS), np.int64), "vectors is int64, not float32"),
        ("golden", "lengths", np.array([3, -1, 3]), "not all integers"),
        ("items", "residuals", np.zeros((2, DIMS), np.float16), "residuals is float16"),
        ("items", "warm", np.array([0, 7]), "positions of 3 items"),
        ("items", "warm", np.array([0.0, 1.0]), "warm is float64"),
        ("terms", "idf", np.ones(3, np.int32), "idf is int32"),
        ("projection", "weight_0", np.zeros((0, 10**12), np.float32), "no numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    directory: Path, name: str, tensor: str, value: Any, complaint: str
) -> None:
    file = directory / f"{name}.safetensors"
    save_file({**load_file(file), tensor: value}, file)
    resign(directory, file.name)
    with pytest.raises(InvalidArgumentError, match=f"{file.name}.*{complaint}"):
        model_dir.load(directory)


def test_numbers_that_numpy_does_not_have(directory: Path) -> None:
    head = json.dumps({"start": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    data = len(head).to_bytes(8, "little") + head + b"\0\0"
    (directory / "weights.safetensors").write_bytes(data)
    resign(directory, "weights.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"weights\.safetensors"):
        model_dir.load(directory)


def test_a_file_of_rubbish_is_refused(directory: Path) -> None:
    (directory / "weights.safetensors").write_bytes(b"rubbish" * 20)
    resign(directory, "weights.safetensors")
    with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
        model_dir.load(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ranker/ranker.txt", b"tree\n"),
        ("ranker/ranker.json", b"[" * 200_000),
        ("type_model/next_type.txt", b"\xff"),
        ("type_model/next_type.safetensors", b""),
    ],
)
def test_a_damaged_part_is_refused(directory: Path, name: str, content: bytes) -> None:
    (directory / name).parent.mkdir()
    (directory / name).write_bytes(content)
    resign(directory, name)
    with pytest.raises(InvalidArgumentError, match=name.split("/")[0]):
        model_dir.load(directory)


@pytest.mark.parametrize("name", ["queries", "type_probabilities"])
def test_other_golden_answers_are_noticed(directory: Path, name: str) -> None:
    tensors = load_file(directory / "golden.safetensors")
    tensors[name][1, 0] += 0.01
    save_file(tensors, directory / "golden.safetensors")
    resign(directory, "golden.safetensors")
    version = model_dir.load(directory)
    with pytest.raises(InvalidArgumentError, match=r"differ by 0\.01"):
        version.check_golden()


def test_a_copy_loads_from_anywhere(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "elsewhere" / "v1")
    model_dir.load(tmp_path / "elsewhere" / "v1").check_golden()
