"""The sequence network and the history encoding."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from predictor.models.history import (
    DAY_HOURS,
    GAPS,
    HOURS,
    HistoryBatch,
    gap_buckets,
    history_batch,
    hours_of_week,
)
from predictor.models.sequence import encoders
from predictor.models.sequence.network import MODEL_TYPES, NetworkConfig, SequenceNetwork

CONFIG = NetworkConfig(behavior_types=3, dims=8, hidden=16, positions=80, clock=True)
SECOND = 1_000_000

KINDS = {
    **{name: replace(CONFIG, model_type=name) for name in MODEL_TYPES},
    "two layers of gru": replace(CONFIG, model_type="gru", layers=2),
    "without traces": replace(
        CONFIG, model_type="transformer", hidden=8, layers=2, heads=4, traces=False
    ),
    "two towers": replace(CONFIG, model_type="transformer", hidden=8, towers=2, traces=False),
    "two towers with traces": replace(CONFIG, towers=2),
}


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> SequenceNetwork:
    torch.manual_seed(0)
    network = SequenceNetwork(KINDS[request.param])
    with torch.no_grad():
        for tower in network.towers:
            tower.start.normal_()
            tower.unknown.normal_()
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
        batch.hours[tokens], np.array([end - begin]),
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
        assert together.log_gaps[row] == pytest.approx(alone.log_gaps[0], abs=1e-5)
        begin += length
    assert together.queries[1] == pytest.approx(together.queries[5])
    assert np.ptp(together.queries, axis=0).min() > 0


def test_more_tokens_than_one_forward_pass_takes(
    network: SequenceNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = histories([5, 0, 70, 1, 12, 0])
    whole = network.predict(batch)
    monkeypatch.setattr("predictor.models.sequence.network._BATCH_TOKENS", 20)
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
        for values in (batch.vectors, batch.known, batch.types, batch.gaps, batch.hours)
    ]


def test_every_part_of_a_token_counts(network: SequenceNetwork) -> None:
    batch = histories([6])
    before = network.predict(batch).queries
    for name, other in (
        ("vectors", batch.vectors[:, ::-1].copy()),
        ("known", ~batch.known),
        ("types", (batch.types + 1) % 4),
        ("gaps", batch.gaps + 1),
        ("hours", (batch.hours + 1) % HOURS),
        ("hours", (batch.hours + DAY_HOURS) % HOURS),
    ):
        changed = HistoryBatch(**{**vars(batch), name: other})
        assert np.abs(network.predict(changed).queries - before).max() > 1e-4, name


def test_without_a_clock_hours_do_not_count() -> None:
    torch.manual_seed(0)
    network = SequenceNetwork(replace(CONFIG, clock=False)).eval()
    batch = histories([6, 3])
    before = network.predict(batch).queries
    other = replace(batch, hours=(batch.hours + 5) % HOURS)
    assert (network.predict(other).queries == before).all()


def test_hours_of_the_week_are_counted_from_monday() -> None:
    moments = ["1970-01-01T00:00", "2024-02-26T00:59:59", "2024-03-03T23:00", "1969-12-29T01:00"]
    micros = [int(np.datetime64(moment, "us").astype(np.int64)) for moment in moments]
    # A Thursday; a Monday; a Sunday's last hour; a Monday before 1970.
    assert hours_of_week(np.array(micros)).tolist() == [3 * DAY_HOURS, 0, HOURS - 1, 1]


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="parrot"):
        SequenceNetwork(NetworkConfig(behavior_types=2, model_type="parrot"))


def test_heads_that_do_not_divide_the_states_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        SequenceNetwork(replace(CONFIG, model_type="transformer", heads=3))


def test_events_behind_the_last_position_share_its_embedding() -> None:
    config = replace(CONFIG, model_type="transformer", positions=4)
    torch.manual_seed(0)
    assert np.isfinite(SequenceNetwork(config).eval().predict(histories([9])).queries).all()


class Shift(nn.Module):
    """An encoder of somebody's own: twice the token."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.wide = nn.Linear(config.dims, config.hidden, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.wide(2 * tokens)
        return states


def test_an_encoder_of_ones_own_comes_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    own = EntryPoint("shift", f"{__name__}:Shift", encoders.GROUP)
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Shift=Shift))
    monkeypatch.setattr(
        encoders,
        "entry_points",
        lambda **asked: [own] if asked.get("name", "shift") == "shift" else [],
    )
    assert encoders.model_types() == ("rnn", "gru", "lstm", "transformer", "shift")
    network = SequenceNetwork(replace(CONFIG, model_type="shift"))
    assert isinstance(network.towers[0].encoder, Shift)
    assert np.ptp(network.eval().predict(histories([3, 5])).queries, axis=0).min() > 0
    with pytest.raises(ValueError, match=r"parrot.*shift"):
        SequenceNetwork(replace(CONFIG, model_type="parrot"))


def test_towers_know_nothing_of_one_another_and_their_scores_are_averaged() -> None:
    torch.manual_seed(1)
    both = SequenceNetwork(replace(CONFIG, towers=2)).eval()
    batch = histories([5, 0, 9])
    found = both.predict(batch)
    halves = []
    for number, tower in enumerate(both.towers):
        one = SequenceNetwork(replace(CONFIG, dims=4, hidden=8)).eval()
        one.towers[0].load_state_dict(tower.state_dict())
        share = slice(4 * number, 4 * number + 4)
        halves.append(one.predict(replace(batch, vectors=batch.vectors[:, share])))
    queries = np.concatenate([half.queries for half in halves], axis=1) / 2
    assert found.queries == pytest.approx(queries, abs=1e-6)
    for name in ("type_logits", "log_gaps"):
        mean = np.mean([getattr(half, name) for half in halves], axis=0)
        assert getattr(found, name) == pytest.approx(mean, abs=1e-6)
    with pytest.raises(ValueError, match="3 towers do not divide 8 dims"):
        SequenceNetwork(replace(CONFIG, towers=3))


LENGTHS = [[5, 0, 1, 30, 90], [0, 0], [7], [3] * 40]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "empty", "one", "many"])
def test_the_last_states_are_those_of_the_whole_history(
    network: SequenceNetwork, lengths: list[int]
) -> None:
    batch = histories(lengths, seed=len(lengths))
    found = network.predict(batch)
    ends = np.cumsum(lengths)
    for row, length in enumerate(lengths):
        some = slice(ends[row] - length, ends[row])
        with torch.inference_mode():
            state = network.start
            if length:
                tokens = (batch.vectors, batch.known, batch.types, batch.gaps, batch.hours)
                state = network.encode(*(torch.from_numpy(v[some])[None] for v in tokens))[0, -1]
            logits, query, gap = network.heads(state[None])
        np.testing.assert_allclose(found.type_logits[row], logits[0], atol=2e-5)
        np.testing.assert_allclose(found.queries[row], query[0], atol=2e-5)
        np.testing.assert_allclose(found.log_gaps[row], gap[0], atol=2e-5)


def test_a_frozen_network_says_the_same(network: SequenceNetwork) -> None:
    batches = [histories(lengths, seed=len(lengths)) for lengths in LENGTHS]
    before = [network.predict(batch) for batch in batches]
    names = set(network.state_dict())
    network.freeze()
    for batch, expected in zip(batches, before, strict=True):
        found = network.predict(batch)
        np.testing.assert_allclose(found.queries, expected.queries, atol=1e-5)
        np.testing.assert_allclose(found.type_logits, expected.type_logits, atol=1e-5)
        np.testing.assert_allclose(found.log_gaps, expected.log_gaps, atol=1e-5)
    assert set(network.state_dict()) == names
