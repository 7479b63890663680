"""What a version answers for targets: the very steps of serving, on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Targets
from predictor.learning.measures.evaluation import Space, item_scorer, outputs
from predictor.learning.measures.metrics import Floats, ItemScorer, batches, ranked_candidates
from predictor.learning.measures.type_metrics import TypeScorer
from predictor.learning.ranking.examples import ModelOutputs, searched
from predictor.models.history import NONE, Histories, Ints
from predictor.models.ranking.pairs import Pairs
from predictor.models.sequence.network import Outputs
from predictor.models.version import SecondStage, Version


@dataclass(frozen=True)
class Answers:
    """A version, some targets, and what its network says of them."""

    version: Version
    targets: Targets
    space: Space
    """The data set's vectors in the version's space."""
    found: Outputs
    numbers: Ints
    """(items,) of the data set's items, by which the version's parts know them: see `number`."""

    @property
    def exclude_history(self) -> bool:
        """Whether items of the history are left out."""
        return self.version.config.repeats == "excluded"

    def subset(self, chosen: NDArray[np.bool_]) -> Answers:
        """Those of the chosen contexts."""
        found = self.found
        some = Outputs(found.type_logits[chosen], found.queries[chosen], found.log_gaps[chosen])
        return replace(self, targets=self.targets.subset(chosen), found=some)

    @property
    def item_scorer(self) -> ItemScorer:
        """Scores of all items; those that are no candidates of the ranker are never hit."""
        if self.version.ranker is None:
            return self.search_scorer
        pairs, scores = self.ranked
        return ranked_candidates(pairs.row, pairs.item, scores, len(self.space.items))

    @property
    def search_scorer(self) -> ItemScorer:
        """Scores of the sequence model alone."""
        return item_scorer(self.found, self.space)

    @cached_property
    def ranked(self) -> tuple[Pairs, Floats]:
        """Candidates (context, item) of the ranker with their scores."""
        ranker = self.version.ranker
        assert ranker is not None
        parts = [self._rank(ranker, rows) for rows in batches(len(self.targets))]
        row = np.concatenate([pairs.row for pairs, _ in parts])
        item = np.concatenate([pairs.item for pairs, _ in parts])
        return Pairs(row, item), np.concatenate([scores for _, scores in parts])

    @cached_property
    def numbered(self) -> Targets:
        """The targets with items by their numbers."""
        targets = self.targets
        events = replace(targets.events, item=_look_up(self.numbers, targets.events.item))
        return replace(targets, events=events, item=_look_up(self.numbers, targets.item))

    @cached_property
    def places(self) -> Ints:
        """(numbers,) of each number, the place in the data set; NONE of items that it lacks."""
        size = max(len(self.version.item_ids), int(self.numbers.max(initial=-1)) + 1)
        places = np.full(size, NONE)
        places[self.numbers] = np.arange(len(self.numbers))
        return places

    def _rank(self, ranker: SecondStage, rows: slice) -> tuple[Pairs, Floats]:
        histories, pairs, model_scores = self.candidates(ranker, rows)
        scores = ranker.score(histories, pairs, model_scores, self.vectors)
        return Pairs(pairs.row + rows.start, self.places[pairs.item]), scores

    def candidates(self, ranker: SecondStage, rows: slice) -> tuple[Histories, Pairs, Floats]:
        """Some of the histories, the pairs that a second stage would score, by the version's
        numbers and counted from the first row, and the model's scores of these."""
        histories = self.numbered.histories(rows)
        model = ModelOutputs(self.found.queries, self.space.items)
        repeats = not self.exclude_history
        hits = searched(model, ranker.searched, rows, self.targets.histories(rows), repeats=repeats)
        hits = Pairs.of(hits.row, self.numbers[hits.item])
        pairs = ranker.candidates(histories, hits, repeats=repeats)
        pairs = pairs.chosen(self.places[pairs.item] != NONE)
        queries = self.found.queries[rows][pairs.row]
        items = self.vectors(pairs.item)
        return histories, pairs, np.einsum("nd,nd->n", queries, items)

    def vectors(self, numbers: Ints) -> Vectors:
        """(n, dims) in the model's space; of no item, any."""
        return self.space.items[np.maximum(self.places[np.maximum(numbers, 0)], 0)]

    @cached_property
    def type_probabilities(self) -> NDArray[np.float32]:
        """(contexts, types)."""
        model = self.version.type_model
        if model is not None:
            return model.predict(whole(self.numbered))
        return self.version.config.type_calibration.probabilities(self.found.type_logits)

    @property
    def chosen_types(self) -> Ints:
        """(contexts,) the one type to name, by the version's decision rule."""
        model = self.version.type_model
        if model is not None:
            return model.choose(self.type_probabilities)
        chosen: Ints = self.type_probabilities.argmax(axis=1)
        return chosen

    def line_types(self) -> tuple[Floats, Ints, Ints]:
        """Of the lines that have a type and an item: the item known, (lines, types) probabilities,
        the type to name and the true one.

        Raises:
            ValueError: the version has no model of types given items.
        """
        model = self.version.item_type_model
        if model is None:
            raise ValueError("the version has no model of types given items")
        targets = self.numbered
        some = (targets.type != NONE) & (targets.item != NONE)
        probabilities = model.predict(whole(targets), targets.row[some], targets.item[some])
        return probabilities, model.choose(probabilities), targets.type[some]

    @property
    def type_scorer(self) -> TypeScorer:
        """The probabilities of some contexts."""
        return lambda targets, rows: self.type_probabilities[rows]


def answer(version: Version, targets: Targets, space: Space) -> Answers:
    """Reads every history of the targets."""
    found = outputs(version.network, targets, space, version.config.history_length)
    return Answers(version, targets, space, found, number(version, targets.events.item_ids))


def number(version: Version, item_ids: Sequence[str]) -> Ints:
    """(items,) the place of each item among the version's; newer ones follow, as in serving."""
    known = {item_id: number for number, item_id in enumerate(version.item_ids)}
    places = np.array([known.get(item_id, NONE) for item_id in item_ids], np.int64)
    new = places == NONE
    places[new] = len(known) + np.arange(new.sum())
    return places


def _look_up(numbers: Ints, item: Ints) -> Ints:
    """Of items, or what stands for none."""
    found = item.copy()
    found[item >= 0] = numbers[item[item >= 0]]
    return found


def whole(targets: Targets) -> Histories:
    """The histories of all contexts."""
    return targets.histories(slice(0, len(targets)))
