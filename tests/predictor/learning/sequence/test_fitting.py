"""Training: it learns, repeats itself, stops when asked, and runs on several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning.data import to_events
from predictor.learning.sequence.fitting import Epoch
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sequence.training import FittedSequence, fit_sequence
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, split
from predictor.models.sequence.network import MODEL_TYPES
from predictor.models.version import EncoderConfig

ITEMS = 12
PLAIN = FitConfig(
    dims=16, hidden=16, epochs=4, dropout=0.0, input_dropout=0.0, learning_rate=0.02,
    averaging=0.9, history_length=10, batch_contexts=32,
)  # fmt: skip


def cycles() -> Dataset:
    """Users go round the items, each from an item of their own; the type tells odd items."""
    rng = np.random.default_rng(0)
    users, length = 60, 9
    item = (rng.integers(ITEMS, size=users)[:, None] + np.arange(length)) % ITEMS
    user = np.repeat(np.arange(users), length)
    columns = EventColumns(
        [f"u{n}" for n in range(users)], ["even", "odd"], [f"i{n}" for n in range(ITEMS)], [],
        user, item.ravel() % 2, item.ravel(), np.full(users * length, -1),
        np.tile(np.arange(length) * 3_600_000_000, users),
    )  # fmt: skip
    return Dataset(
        events=to_events(columns),
        item_texts=[f"item {n} of kind {n % 3}" for n in range(ITEMS)],
        item_vectors=rng.standard_normal((ITEMS, 6)).astype(np.float32),
        text_vectors=np.zeros((0, 6), np.float32),
        encoder=EncoderConfig(name="e", pooling="mean", cols=6),
        targets=None,
        lineage={},
        sentiment=np.eye(6, dtype=np.float32)[2],
    )


def fitted(config: FitConfig, stop: int = 99) -> FittedSequence:
    dataset = cycles()
    part = split(dataset.events, Protocol(split="leave-one-out"))

    def enough(epoch: Epoch) -> bool:
        return epoch.epoch >= stop

    return fit_sequence(dataset, part, config, exclude_history=False, progress=False, stop=enough)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("negatives", [0, 64])
def test_it_learns_what_comes_next(model_type: str, negatives: int) -> None:
    found = fitted(FitConfig(**{**vars(PLAIN), "model_type": model_type, "negatives": negatives}))
    assert found.recipe.model_type == model_type
    best = max(epoch.validation["ndcg_at_10"] for epoch in found.curve)
    assert best > 0.9  # by chance 0.38
    assert max(epoch.validation["type_accuracy"] for epoch in found.curve) > 0.9
    assert found.curve[-1].item_loss < found.curve[0].item_loss


def test_types_that_follow_from_the_hour_are_learned_with_the_clock() -> None:
    data = cycles()
    rng = np.random.default_rng(3)
    hours = np.cumsum(rng.integers(1, 48, (60, 9)), axis=1)
    events = replace(
        data.events,
        timestamp=hours.ravel() * 3_600_000_000,
        type=(np.roll(hours, 1, axis=1) % 24 < 12).ravel() * 1,
    )
    part = split(events, Protocol(split="leave-one-out"))
    accuracies = {}
    for clock in (True, False):
        config = replace(PLAIN, model_type="gru", clock=clock, epochs=8, type_weight=5.0)
        found = fit_sequence(
            replace(data, events=events), part, config, exclude_history=False, progress=False
        )
        accuracies[clock] = max(epoch.validation["type_accuracy"] for epoch in found.curve)
    assert accuracies[True] > 0.9
    assert accuracies[False] < 0.75


def test_sentiment_is_read_beside_the_principal_axes() -> None:
    config = replace(PLAIN, text_dims=2, sentiment=True)
    for some, rank in ((config, 3), (replace(config, sentiment=False), 2)):
        (layer,) = fitted(some, stop=1).projection.layers
        assert np.linalg.matrix_rank(layer.weight) == rank


def test_one_seed_gives_one_model() -> None:
    first, second = (fitted(PLAIN, stop=1) for _ in range(2))
    assert np.array_equal(first.space.items, second.space.items)
    other = fitted(FitConfig(**{**vars(PLAIN), "seed": 7}), stop=1)
    assert not np.array_equal(first.space.items, other.space.items)


def test_it_stops_when_asked() -> None:
    assert [epoch.epoch for epoch in fitted(PLAIN, stop=2).curve] == [1, 2]


def test_what_is_published_is_what_was_measured() -> None:
    found = fitted(PLAIN, stop=2)
    dataset = cycles()
    items = found.projection.apply(
        dataset.item_vectors, texts=dataset.item_texts, residuals=found.residuals
    )
    assert items == pytest.approx(found.space.items, abs=1e-4)
    assert found.warm.all()


def test_no_more_terms_are_learned_than_can_be_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(dims: int) -> int:
        assert dims == PLAIN.dims
        return 2

    monkeypatch.setattr("predictor.learning.sequence.training.most_terms", two)
    found = fitted(FitConfig(**{**vars(PLAIN), "terms": True}), stop=1)
    assert found.projection.terms is not None
    assert len(found.projection.terms.terms) == 2


WORKER = """
import importlib.util, sys
from pathlib import Path
import torch
import torch.distributed as dist
from predictor.learning.sequence.parallel import place, together
spec = importlib.util.spec_from_file_location("tests_of_fitting", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
torch.set_num_threads(1)
def gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
with together() as (rank, world):
    assert gloo_threads() > 0
    found = tests.fitted(tests.PLAIN)
    mine = torch.cat([value.flatten() for value in found.network.state_dict().values()])
    theirs = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(theirs, mine)
    assert len(theirs) == 2 and torch.equal(*theirs)
    best = max(epoch.validation["ndcg_at_10"] for epoch in found.curve)
    print(f"rank {rank} ndcg {best:.3f}")
    assert best > 0.8
assert place() == (0, 1)
assert gloo_threads() == 0  # one that outlives the interpreter may abort the process
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), __file__],
        capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # The lines of two processes may run into one another.
    assert set(re.findall(r"rank (\d) ndcg", done.stdout)) == {"0", "1"}
