"""A version's parts know items by numbers of their own, whatever the files' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from foretell.importing import EventColumns
from foretell.vectors import Vectors
from predictor.learning.data import to_events
from predictor.learning.measures.answers import Answers, number
from predictor.learning.measures.evaluation import Space
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, split
from predictor.models.history import Histories, Ints
from predictor.models.ranking.pairs import Pairs
from predictor.models.sequence.network import Outputs
from predictor.models.version import EncoderConfig

ITEMS = 12
IDS = [f"i{number}" for number in range(ITEMS)]
GONE = 5
SEARCHED = 4


class Ranker:
    """Orders by a table; the first items are candidates of all."""

    searched = SEARCHED

    def candidates(self, histories: Histories, searched: Pairs, *, repeats: bool) -> Pairs:
        rows = len(histories)
        first = Pairs.of(np.repeat(np.arange(rows), 7), np.tile(np.arange(7), rows))
        return searched | first | Pairs.of(histories.row, histories.item)

    def score(
        self, histories: Histories, pairs: Pairs, scores: Vectors, vectors: Callable[[Ints], Any]
    ) -> Vectors:
        table = np.append(np.arange(ITEMS) ** 2, np.zeros(9))
        own = np.bincount(histories.row, table[histories.item], len(histories))
        found = table[pairs.item] + own[pairs.row] + scores + vectors(pairs.item).sum(axis=1)
        return np.asarray(found, np.float32)


class TypeModel:
    """Tells where a history's items stand in its table."""

    def predict(self, histories: Histories) -> Vectors:
        at = np.bincount(histories.row, histories.item, len(histories))
        return np.stack([at, -at], axis=1).astype(np.float32)


def vectors(ids: Sequence[str]) -> Vectors:
    """Of each item the same, wherever it stands."""
    own = [np.random.default_rng(int(item_id[1:])).normal(size=3) for item_id in ids]
    return np.array(own, np.float32)


def dataset(ids: Sequence[str]) -> Dataset:
    """Twenty users with four events each, and a catalogue."""
    rng = np.random.default_rng(0)
    item = np.concatenate([rng.permutation(ITEMS)[:4] for _ in range(20)])
    columns = EventColumns(
        [f"u{n}" for n in range(20)], ["view", "buy"], IDS, [], np.repeat(np.arange(20), 4),
        item % 2, item, np.full(80, -1), np.tile(np.arange(4), 20),
    )  # fmt: skip
    return Dataset(
        to_events(columns, ids), vectors(ids), np.zeros((0, 3), np.float32),
        EncoderConfig(name="e", pooling="mean", cols=3), None, {}, [f"text of {i}" for i in ids],
        np.zeros(3, np.float32),        [f"kind of {i}" for i in ids],
    )  # fmt: skip


def answers(ids: Sequence[str]) -> Answers:
    """What a version of IDS answers for files with these items."""
    version: Any = SimpleNamespace(
        item_ids=tuple(IDS), ranker=Ranker(), type_model=TypeModel(),
        config=SimpleNamespace(repeats="allowed"),
    )  # fmt: skip
    data = dataset(ids).in_order(version.item_ids)
    targets = split(data.events, Protocol("leave-one-out")).test
    queries = np.random.default_rng(1).normal(size=(len(targets), 3)).astype(np.float32)
    nothing = np.zeros((len(targets), 0), np.float32)
    space = Space(data.item_vectors, data.text_vectors)
    found = Outputs(nothing, queries, nothing)
    return Answers(version, targets, space, found, number(version, data.events.item_ids))


def scores(found: Answers) -> Vectors:
    return found.item_scorer(found.targets, slice(0, len(found.targets)))


def shuffled(ids: Sequence[str]) -> list[str]:
    return [ids[at] for at in np.random.default_rng(2).permutation(len(ids))]


def test_a_data_set_in_another_order_stays_the_same() -> None:
    ids = shuffled([*IDS, "i90", "i91"])
    before, after = dataset(ids), dataset(ids).in_order(IDS)
    assert after.events.item_ids[:ITEMS] == tuple(IDS)
    assert after.events.item_ids[ITEMS:] == tuple(i for i in ids if i not in IDS)
    for data in (before, after):
        names = np.array(data.events.item_ids)[data.events.item]
        assert names.tolist() == np.array(ids)[before.events.item].tolist()
        assert data.item_vectors.tolist() == vectors(data.events.item_ids).tolist()
        assert list(data.item_texts) == [f"text of {i}" for i in data.events.item_ids]
        assert data.categories == [f"kind of {i}" for i in data.events.item_ids]


def test_the_order_of_the_files_does_not_matter() -> None:
    whole, other = answers(IDS), answers(shuffled(IDS))
    assert scores(other).tolist() == scores(whole).tolist()
    assert other.type_probabilities.tolist() == whole.type_probabilities.tolist()


def test_newer_items_leave_the_others_their_scores() -> None:
    whole, more = answers(IDS), answers(shuffled([*IDS, "i90", "i91"]))
    before, after = scores(whole), scores(more)
    assert after.shape == (20, ITEMS + 2)
    assert np.isfinite(after[:, ITEMS:]).any()
    both = np.isfinite(after[:, :ITEMS])  # a newer item may take the place of one that was found
    assert after[:, :ITEMS][both] == pytest.approx(before[both])
    assert more.type_probabilities.tolist() == whole.type_probabilities.tolist()


def test_items_that_the_files_lack_are_not_answered_and_change_no_others() -> None:
    fewer_ids = shuffled([item_id for item_id in IDS if item_id != IDS[GONE]])
    whole, fewer = answers(IDS), answers(fewer_ids)
    assert GONE not in fewer.numbers
    before, after = np.delete(scores(whole), GONE, axis=1), scores(fewer)
    assert after.shape == before.shape == (20, ITEMS - 1)
    # Who had the item has a history without it now.
    had = [GONE in whole.targets.events.item[begin:end]
           for begin, end in zip(whole.targets.begin, whole.targets.end, strict=True)]  # fmt: skip
    others = ~np.array(had)
    assert 5 < others.sum() < 20
    both = np.isfinite(before) & others[:, None]
    assert after[both] == pytest.approx(before[both])
    types = whole.type_probabilities[others]
    assert fewer.type_probabilities[others].tolist() == types.tolist()
