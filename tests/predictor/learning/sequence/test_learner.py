"""The common loss of network and item space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from foretell.importing import EventColumns
from predictor.learning.data import to_events
from predictor.learning.sequence.item_space import ItemSpace, TextReader
from predictor.learning.sequence.learner import Learner
from predictor.learning.sequence.losses import full_cross_entropy
from predictor.learning.sequence.recipe import FitConfig, Recipe, resolve
from predictor.learning.sequence.windows import Batch
from predictor.models.history import history_batch
from predictor.models.sequence.network import NetworkConfig, SequenceNetwork

POPULARITY = np.array([4, 0, 1, 2, 0, 9])
WARM = [0, 2, 3, 5]


def recipe(**changes: Any) -> Recipe:
    none = np.full(3, -1)
    columns = EventColumns(["u"], ["x"], [], [], none + 1, none + 1, none, none, np.arange(3))
    config = FitConfig(
        dims=8, hidden=16, traces=True, type_weight=0.5, gap_weight=0.25, popularity_discount=0.0
    )
    return replace(resolve(config, to_events(columns)), **changes)


@pytest.fixture
def network() -> SequenceNetwork:
    torch.manual_seed(0)
    return SequenceNetwork(NetworkConfig(behavior_types=3, dims=8, hidden=16)).eval()


def learner(network: SequenceNetwork, **changes: Any) -> Learner:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((6, 5)).astype(np.float32)
    reader = TextReader(vectors, (), 5, most_terms=0)
    space = ItemSpace(
        reader.read(vectors, [""] * 6), reader.read(vectors[:3], [""] * 3), POPULARITY, 8
    )
    return Learner(network, space, recipe(**changes)).eval()


def batch_of(item: list[int], targets: list[int], text: int = -1) -> Batch:
    """One history, whose items are read, and one basket after its last event."""
    size = len(targets)
    return Batch(
        item=np.array([item]),
        text=np.full((1, len(item)), text),
        type=np.zeros((1, len(item)), np.int64),
        gap=np.zeros((1, len(item)), np.int64),
        hour=np.zeros((1, len(item)), np.int64),
        context=np.array([len(item) - 1]),
        log_gap=np.array([3.0], np.float32),
        row=np.zeros(size, np.int64),
        line_item=np.array(targets),
        line_type=np.ones(size, np.int64),
        weight=np.ones(size, np.float32),
    )


def test_the_loss_is_the_cross_entropy_of_what_predict_says(network: SequenceNetwork) -> None:
    learned = learner(network)
    with torch.no_grad():
        losses = learned(batch_of([2, 0, 5], [3, 5, -2]))
        items = learned.space.items()
    history = history_batch(
        items[[2, 0, 5]].numpy(), np.ones(3, np.bool_), np.zeros(3, np.int64),
        np.zeros(3, np.int64), np.array([3]), has_times=False,
    )  # fmt: skip
    outputs = network.predict(history)
    scores = torch.from_numpy(outputs.queries[0]) @ items[WARM].T
    expected = -torch.log_softmax(scores, 0)[[2, 3]].mean()
    assert float(losses.items) == pytest.approx(float(expected), abs=0.02)  # may be bfloat16
    logits = torch.from_numpy(outputs.type_logits[0])
    assert float(losses.types) == pytest.approx(float(-torch.log_softmax(logits, 0)[1]), abs=1e-4)
    assert float(losses.gaps) == pytest.approx(abs(3.0 - outputs.log_gaps[0]), abs=1e-4)
    expected = losses.items + 0.5 * losses.types + 0.25 * losses.gaps
    assert float(learned.total(losses)) == pytest.approx(float(expected))


@pytest.mark.parametrize("negatives", [0, 50_000])
def test_a_discount_of_popularity_is_learned_beside_the_score(
    network: SequenceNetwork, negatives: int
) -> None:
    batch = batch_of([2, 0, 5], [3])
    learned = learner(network, popularity_discount=0.5, negatives=negatives)
    with torch.no_grad():
        found = learned(batch).items
        items = learned.space.items()
    history = history_batch(
        items[[2, 0, 5]].numpy(), np.ones(3, np.bool_), np.zeros(3, np.int64),
        np.zeros(3, np.int64), np.array([3]), has_times=False,
    )  # fmt: skip
    scores = torch.from_numpy(network.predict(history).queries[0]) @ items[WARM].T
    beside = scores + 0.5 * torch.from_numpy(np.log1p(POPULARITY[WARM]))
    expected = -torch.log_softmax(beside, 0)[2]
    assert float(found) == pytest.approx(float(expected), abs=0.02 if negatives == 0 else 0.5)


@pytest.mark.parametrize("negatives", [0, 50_000])
def test_each_tower_learns_by_its_own_scores(negatives: int) -> None:
    torch.manual_seed(0)
    both = SequenceNetwork(NetworkConfig(behavior_types=3, dims=8, hidden=16, towers=2)).eval()
    learned = learner(both, towers=2, negatives=negatives)
    with torch.no_grad():
        found = learned(batch_of([2, 0, 5], [3])).items
        items = learned.space.items()
    history = history_batch(
        items[[2, 0, 5]].numpy(), np.ones(3, np.bool_), np.zeros(3, np.int64),
        np.zeros(3, np.int64), np.array([3]), has_times=False,
    )  # fmt: skip
    query = 2 * torch.from_numpy(both.predict(history).queries[0])  # scores are their mean
    expected = [
        -torch.log_softmax(query[share] @ items[WARM][:, share].T, 0)[2]
        for share in (slice(0, 4), slice(4, 8))
    ]
    within = 0.02 if negatives == 0 else 0.5
    assert float(found) == pytest.approx(float(sum(expected)) / 2, abs=within)


def test_with_traces_each_tower_starts_from_popularity() -> None:
    torch.manual_seed(0)
    both = SequenceNetwork(NetworkConfig(behavior_types=3, dims=8, hidden=16, towers=2)).eval()
    reader = TextReader(np.zeros((6, 5), np.float32), (), 5, most_terms=0)
    texts = reader.read(np.zeros((6, 5), np.float32), [""] * 6)
    space = ItemSpace(texts, texts, POPULARITY, 8, use_text=False, traces=True, towers=2)
    learned = Learner(both, space, recipe(towers=2)).eval()
    empty = history_batch(
        np.zeros((0, 8), np.float32), np.zeros(0, np.bool_), np.zeros(0, np.int64),
        np.zeros(0, np.int64), np.array([0]), has_times=False,
    )  # fmt: skip
    query = 2 * both.predict(empty).queries[0]  # scores are the towers' mean
    items = learned.space.items().detach().numpy()
    for share in (slice(0, 4), slice(4, 8)):
        assert items[:, share] @ query[share] == pytest.approx(np.log1p(POPULARITY), abs=1e-6)


def test_texts_stand_where_there_is_no_item(network: SequenceNetwork) -> None:
    learned = learner(network)
    with torch.no_grad():
        by_item, by_text = (learned(batch_of([first, 0], [3], 1)) for first in (1, -1))
        other = learned(batch_of([-1, 0], [3], 2))
    # Text 1 has the vector of item 1, which is cold and so stands on its text alone.
    assert float(by_text.items) == pytest.approx(float(by_item.items), abs=1e-5)
    assert float(other.items) != pytest.approx(float(by_item.items), abs=1e-5)


def test_a_batch_without_targets_has_no_loss(network: SequenceNetwork) -> None:
    batch = replace(
        batch_of([2], [-1]), log_gap=np.full(1, np.nan, np.float32), line_type=np.array([-1])
    )
    with torch.no_grad():
        assert [float(loss) for loss in learner(network)(batch)] == [0, 0, 0]


def test_sampled_softmax_estimates_the_full_one(network: SequenceNetwork) -> None:
    batch = batch_of([2, 0, 5], [3, 0])
    with torch.no_grad():
        full = learner(network)(batch).items
        sampled = learner(network, negatives=50_000)(batch).items
        again = learner(network, negatives=50_000)(batch).items
    # The sample holds the target too, which counts it twice: a little more than the truth.
    assert 0 < float(sampled - full) < 0.5
    assert float(again) == pytest.approx(float(sampled), abs=0.1)


@pytest.mark.parametrize("low", [True, False])
def test_the_fast_cross_entropy_has_the_gradients_of_the_plain_one(
    low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("predictor.learning.sequence.losses.has_bfloat16", lambda device: low)
    monkeypatch.setattr("predictor.learning.sequence.losses.CHUNK", 4)
    rng = torch.Generator().manual_seed(0)
    queries, items = torch.randn(11, 8, generator=rng), torch.randn(30, 8, generator=rng)
    row = torch.tensor([0, 0, 0, 1, 3, 3, 4, 7, 8, 9, 10])  # 2, 5 and 6 have no line
    target = torch.tensor([4, 4, 29, 0, 1, 2, 3, 4, 5, 6, 7])
    weight = torch.rand(11, generator=rng) + 0.1
    bias = torch.randn(30, generator=rng)
    found, plain = ([queries.clone().requires_grad_(), items.clone().requires_grad_()]
                    for _ in range(2))  # fmt: skip
    loss = full_cross_entropy(found[0], found[1], bias, row, target, weight)
    log_softmax = torch.log_softmax(plain[0] @ plain[1].T + bias, 1)
    expected = -(log_softmax[row, target] * weight).sum() / weight.sum()
    (2 * loss).backward()  # type: ignore[no-untyped-call]
    (2 * expected).backward()  # type: ignore[no-untyped-call]
    tolerance = 0.02 if low else 1e-6
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=tolerance)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=tolerance)
