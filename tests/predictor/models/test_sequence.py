"""The sequence network, the history encoding and the item space."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predictor.learning.fitting import FitConfig, Learner
from predictor.learning.item_space import ItemSpace, Whitening
from predictor.learning.windows import Batch
from predictor.models.history import GAPS, HistoryBatch, gap_buckets, history_batch
from predictor.models.sequence import NetworkConfig, SequenceNetwork

CONFIG = NetworkConfig(behavior_types=3, dims=8, hidden=16)
SECOND = 1_000_000


@pytest.fixture
def network() -> SequenceNetwork:
    torch.manual_seed(0)
    network = SequenceNetwork(CONFIG)
    with torch.no_grad():
        network.start.normal_()
        network.unknown.normal_()
    return network.eval()


def histories(lengths: list[int], seed: int = 0) -> HistoryBatch:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    times = np.concatenate([np.sort(rng.integers(0, 10**12, size)) for size in lengths])
    return history_batch(
        rng.standard_normal((tokens, CONFIG.dims)).astype(np.float32),
        rng.random(tokens) < 0.8,
        rng.integers(0, CONFIG.behavior_types + 1, tokens),
        times,
        np.array(lengths),
    )


def part(batch: HistoryBatch, begin: int, end: int) -> HistoryBatch:
    """One history from the tokens begin..end."""
    tokens = slice(begin, end)
    return HistoryBatch(
        batch.vectors[tokens], batch.known[tokens], batch.types[tokens], batch.gaps[tokens],
        np.array([end - begin]),
    )  # fmt: skip


def test_gap_buckets() -> None:
    seconds = [0, 0, 1, 2, 5, 5, 5 + 86_400, 2**40]
    lengths = np.array([5, 0, 3])
    buckets = gap_buckets(np.array(seconds) * SECOND, lengths)
    # first | same instant | [1, 2) s | [1, 2) s | [2, 4) s || first | a day: 2**16 s | 2**39 s
    assert buckets.tolist() == [0, 1, 2, 2, 3, 0, 18, GAPS - 1]
    assert gap_buckets(np.array([7, 7 + SECOND // 2]), np.array([2])).tolist() == [0, 2]
    assert gap_buckets(np.zeros(0, np.int64), np.array([0])).tolist() == []


def test_without_times_all_gaps_are_alike() -> None:
    batch = history_batch(
        np.zeros((2, 4), np.float32), np.ones(2, np.bool_), np.zeros(2, np.int64),
        np.array([1, 10**9]), np.array([2]), has_times=False,
    )  # fmt: skip
    assert batch.gaps.tolist() == [0, 0]


def test_history_batch_refuses_arrays_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 tokens"):
        history_batch(
            np.zeros((2, 4), np.float32), np.ones(2, np.bool_), np.zeros(2, np.int64),
            np.zeros(2, np.int64), np.array([3]),
        )  # fmt: skip


def test_a_batch_gives_what_single_histories_give(network: SequenceNetwork) -> None:
    lengths = [5, 0, 70, 1, 12, 0]
    batch = histories(lengths)
    together = network.predict(batch)
    begin = 0
    for row, length in enumerate(lengths):
        alone = network.predict(part(batch, begin, begin + length))
        assert together.type_logits[row] == pytest.approx(alone.type_logits[0], abs=1e-5)
        assert together.queries[row] == pytest.approx(alone.queries[0], abs=1e-5)
        begin += length
    assert together.queries[1] == pytest.approx(together.queries[5])
    assert np.ptp(together.queries, axis=0).min() > 0


def test_more_tokens_than_one_forward_pass_takes(
    network: SequenceNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = histories([5, 0, 70, 1, 12, 0])
    whole = network.predict(batch)
    monkeypatch.setattr("predictor.models.sequence._BATCH_TOKENS", 20)
    divided = network.predict(batch)
    assert divided.queries == pytest.approx(whole.queries, abs=1e-5)


def test_states_depend_on_the_past_alone(network: SequenceNetwork) -> None:
    batch = histories([9])
    longer = network.encode(*tensors(batch))
    shorter = network.encode(*tensors(part(batch, 0, 6)))
    assert torch.allclose(longer[:, :6], shorter, atol=1e-5)
    assert not torch.allclose(longer[:, 5], longer[:, 6], atol=1e-3)


def tensors(batch: HistoryBatch) -> list[torch.Tensor]:
    return [
        torch.from_numpy(values)[None]
        for values in (batch.vectors, batch.known, batch.types, batch.gaps)
    ]


def test_every_part_of_a_token_counts(network: SequenceNetwork) -> None:
    batch = histories([6])
    before = network.predict(batch).queries
    for name, other in (
        ("vectors", batch.vectors + 1),
        ("known", ~batch.known),
        ("types", (batch.types + 1) % 4),
        ("gaps", batch.gaps + 1),
    ):
        changed = HistoryBatch(**{**vars(batch), name: other})
        assert np.abs(network.predict(changed).queries - before).max() > 1e-4, name


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="parrot"):
        SequenceNetwork(NetworkConfig(behavior_types=2, model_type="parrot"))


def space(items: int = 6, row_dropout: float = 0.0) -> ItemSpace:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    return ItemSpace(
        rng.standard_normal((items, 5)).astype(np.float32),
        rng.standard_normal((3, 5)).astype(np.float32),
        np.array([4, 0, 1, 2, 0, 9])[:items],
        CONFIG.dims,
        row_dropout,
    )


def test_the_projection_gives_what_training_saw() -> None:
    rng = np.random.default_rng(0)
    texts = (rng.standard_normal((40, 7)) * [9, 3, 1, 1, 0.1, 0.1, 0] + 2).astype(np.float32)
    texts[3] = 0  # an item without a text
    whitening = Whitening(texts, 5)
    learned = ItemSpace(whitening.apply(texts), np.zeros((0, 5), np.float32), np.arange(40), 8, 0.0)
    with torch.no_grad():
        expected = learned.eval().items().numpy()
    found = learned.projection(whitening).apply(texts, residuals=learned.residuals())
    assert found == pytest.approx(expected, abs=1e-4)


def test_whitening_evens_axes_out_and_ignores_empty_texts() -> None:
    rng = np.random.default_rng(0)
    texts = (rng.standard_normal((500, 4)) * [8, 4, 2, 1]).astype(np.float32)
    with_empty = np.concatenate([texts, np.zeros((100, 4), np.float32)])
    white = Whitening(with_empty, 3).apply(texts)
    assert white.shape == (500, 3)
    assert np.sqrt((white**2).mean()) == pytest.approx(1, rel=1e-3)
    spread = white.std(axis=0)
    assert spread[0] / spread[2] == pytest.approx(2, rel=0.1)  # was 4: half-way to 1
    assert Whitening(np.zeros((2, 4), np.float32), 3).apply(texts).shape == (500, 3)


def test_items_without_training_events_stand_on_their_text_alone() -> None:
    learned = space().eval()
    with torch.no_grad():
        learned.residual.add_(1)
        items = learned.items()
        by_text = learned.affine(learned.item_inputs)
    cold = [1, 4]
    assert torch.allclose(items[cold], by_text[cold])
    assert not torch.allclose(items[0], by_text[0])
    assert np.abs(learned.residuals()[cold]).max() == 0
    chosen = torch.tensor([5, 1])
    assert torch.allclose(learned.items(chosen), items[chosen])


def test_residual_rows_are_dropped_whole_and_only_in_training() -> None:
    learned = space(row_dropout=0.5)
    with torch.no_grad():
        by_text = learned.affine(learned.item_inputs)
        rows = torch.stack([(learned.items() != by_text).all(1) for _ in range(200)])
        some = torch.stack([(learned.items() != by_text).any(1) for _ in range(200)])
        assert torch.equal(learned.eval().items(), learned.items())
    assert 0.35 < rows[:, 0].float().mean() < 0.65
    assert 0.35 < some[:, 5].float().mean() < 0.65


def batch_of(item: list[int], targets: list[int]) -> Batch:
    """One history, whose items are read, and one basket after its last event."""
    size = len(targets)
    return Batch(
        item=np.array([item]),
        text=np.full((1, len(item)), -1),
        type=np.zeros((1, len(item)), np.int64),
        gap=np.zeros((1, len(item)), np.int64),
        context=np.array([len(item) - 1]),
        row=np.zeros(size, np.int64),
        line_item=np.array(targets),
        line_type=np.ones(size, np.int64),
        weight=np.ones(size, np.float32),
    )


def test_the_loss_is_the_cross_entropy_of_what_predict_says(network: SequenceNetwork) -> None:
    learner = Learner(network, space(), FitConfig(dims=8, hidden=16)).eval()
    batch = batch_of([2, 0, 5], [3, 5, -2])
    with torch.no_grad():
        item_loss, type_loss = learner(batch)
        items = learner.space.items()
    history = history_batch(
        items[[2, 0, 5]].numpy(), np.ones(3, np.bool_), np.zeros(3, np.int64),
        np.zeros(3, np.int64), np.array([3]), has_times=False,
    )  # fmt: skip
    outputs = network.predict(history)
    warm = [0, 2, 3, 5]
    scores = torch.from_numpy(outputs.queries[0]) @ items[warm].T
    expected = -torch.log_softmax(scores, 0)[[2, 3]].mean()
    assert float(item_loss) == pytest.approx(float(expected), abs=1e-4)
    logits = torch.from_numpy(outputs.type_logits[0])
    assert float(type_loss) == pytest.approx(float(-torch.log_softmax(logits, 0)[1]), abs=1e-4)


def test_sampled_softmax_estimates_the_full_one(network: SequenceNetwork) -> None:
    batch = batch_of([2, 0, 5], [3, 0])
    full = Learner(network, space(), FitConfig(dims=8, hidden=16)).eval()
    config = FitConfig(dims=8, hidden=16, full_softmax_items=1, negatives=50_000)
    sampled = Learner(network, space(), config).eval()
    with torch.no_grad():
        # The sample holds the target too, which counts it twice: a little more than the truth.
        assert 0 < float(sampled(batch)[0] - full(batch)[0]) < 0.5
        other = Learner(network, space(), FitConfig(dims=8, hidden=16, full_softmax_items=1))
        assert float(other.eval()(batch)[0]) == pytest.approx(float(sampled(batch)[0]), abs=0.1)
