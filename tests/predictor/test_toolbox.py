"""Every model of the toolbox from its training to its answers through the client."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from foretell import Client, Event
from predictor.__main__ import main as predictor_main
from predictor.learning.classic.recipe import BY_CONTENT, CLASSIC, FINE_TUNED
from serving.process import ServiceProcess, started

GROUPS = (("coffee", "tea"), ("bread", "cheese"), ("apple", "soap"))
"""Users stay in one: they view something of the first kind, buy of the second, and so on."""

STEPS = 12

MODELS = (*(model for model in CLASSIC if model != FINE_TUNED), "rnn")
"""An encoder that was fine-tuned needs an embedder of its own: see test_finetuning."""

SETTINGS = {
    "rnn": ("--epochs", "4", "--dims", "16", "--clock", "--sentiment"),
    "mlp": ("--features", "keywords", "--dims", "8", "--clock", "--sentiment"),
}
"""Inputs that are off unless asked for, in a model of either kind."""


def walk(user: str, group: int, steps: int) -> list[Event]:
    rng = random.Random(f"{user} {group}")
    begin = datetime.fromtimestamp(1_000_000 + group, UTC)
    events = []
    for step in range(steps):
        item_id = f"{GROUPS[group][step % 2]}-{rng.randrange(5)}"
        behavior_type, timestamp = ("view", "buy")[step % 2], begin + step * timedelta(minutes=10)
        events.append(Event(user, behavior_type, item_id=item_id, timestamp=timestamp))
    return events


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toolbox")


@pytest.fixture(scope="module")
def client(data_dir: Path, catalogue_embedder: ServiceProcess) -> Iterator[Client]:
    """Of both services, whose users have walked."""
    flags = ["--port", "0", "--data-dir", str(data_dir), "--embedder", catalogue_embedder.address]
    with (
        started("predictor", [*flags, "--drain-s", "0"], log=data_dir / "log") as predictor,
        Client(catalogue_embedder.address, predictor.address) as connected,
    ):
        for number in range(60):
            connected.ingest_events(walk(f"user {number}", number % 3, STEPS + 3 * (number % 2)))
        yield connected


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_trained_evaluated_registered_activated_and_asked(
    model: str,
    client: Client,
    data_dir: Path,
    catalogue_embedder: ServiceProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    version = f"toolbox.{model.replace('_', '-')}"
    directory = tmp_path / version
    data = ["--store", str(data_dir), "--embedder", catalogue_embedder.address, "--json"]
    settings = ["--split", "leave-one-out", *SETTINGS.get(model, ())]
    arguments = ["train", "--model", model, "--out", str(directory), *data, *settings]
    assert predictor_main(arguments) == 0, capsys.readouterr().err
    trained = json.loads(capsys.readouterr().out)
    assert predictor_main(["evaluate", str(directory), *data]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    for task, measure in (("items", "ndcg_at_10"), ("types", "log_loss")):
        was = trained[task]["foretell"][measure]
        assert evaluated[task]["foretell"][measure] == pytest.approx(was, abs=1e-6)
    assert predictor_main(["register", str(directory), "--data-dir", str(data_dir)]) == 0
    client.activate_model(version)
    own = types = 0
    for group, kinds in enumerate(GROUPS):
        answer = client.predict(history=walk("", group, 7), k=4)
        assert answer.model_version == version
        assert not answer.fallback_reason
        assert len(answer.items) == 4
        own += sum(item.item_id.split("-")[0] in kinds for item in answer.items)
        types += answer.behavior_types[0].behavior_type == "buy"
        assert sum(one.probability for one in answer.behavior_types) == pytest.approx(1, abs=1e-4)
    assert own >= 9  # of 12; by chance 4
    if model not in BY_CONTENT:
        assert types == 3
