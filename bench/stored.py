"""What a training's report does not say: measured on the stored version, by the same code."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from bench.harness import Figures
from foretell.vectors import Vectors
from predictor.learning import training
from predictor.learning.measures import evaluation
from predictor.learning.measures.answers import Answers, answer
from predictor.learning.measures.baselines import item_baselines, popularity
from predictor.learning.measures.bootstrap import Measure, macro_f1, mean, resample
from predictor.learning.measures.metrics import ItemHits, ItemScorer, item_hits, users
from predictor.learning.measures.type_baselines import type_baselines
from predictor.learning.parts import fit_second_stage
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, Split
from predictor.models import model_dir
from predictor.models.history import NONE, Ints
from predictor.models.ranking.pairs import Pairs

TIMED_USERS = 200

CANDIDATES = (150, 480)
"""Whose ranking is timed: what Search finds, and with a household's own items."""

RANKER_FIGURES = tuple(f"ranker_{count}_p50_ms" for count in CANDIDATES)

SEED = 1
"""Of all draws: the first training's."""

ITEM_FIGURES = ("recall_at_10", "ndcg_at_10", "coverage_at_10", "hits_at_10")


@dataclass(frozen=True)
class Stored:
    """A version, and what it answers for the test part that it was not trained on."""

    part: Split
    answers: Answers
    text_vectors: Vectors
    """(items, cols) of the items' texts."""

    def hits(self, scorer: ItemScorer) -> ItemHits:
        """What a scorer's ten best items hit in the test."""
        return item_hits(scorer, self.part.test, exclude_history=self.answers.exclude_history)


def load(path: Path, dataset: Dataset, protocol: Protocol) -> Stored:
    """Reads a version directory and lets it answer.

    Args:
        path: the directory.
        dataset: what it was trained on, its items in any order.
        protocol: by which.
    """
    version = model_dir.load(path)
    dataset = dataset.in_order(version.item_ids)
    part = training.divide(dataset, protocol).with_types(version.config.behavior_types)
    space, _ = evaluation.read_space(version, dataset)
    return Stored(part, answer(version, part.test, space), dataset.item_vectors)


def items_over(stored: Stored, baseline: str) -> Figures:
    """Hits and NDCG of the version over those of a baseline on the same targets."""
    ours = stored.hits(stored.answers.item_scorer)
    theirs = stored.hits(item_baselines(stored.part.train)[baseline])
    figures: Figures = {}
    for name, a, b in (
        ("hits_at_10", ours.share_of_best, theirs.share_of_best),
        ("ndcg_at_10", ours.ndcg, theirs.ndcg),
    ):
        figures |= difference(f"{name}_over_{baseline}", mean(a), mean(b), ours.user)
    return figures


def without_popularity(stored: Stored) -> Figures:
    """Measures with a ranker for the version's sequence model that knows no item's popularity."""
    part, answers = stored.part, stored.answers
    version = answers.version
    validation = answer(version, part.validation, answers.space)
    fitted = fit_second_stage(validation, stored.text_vectors, part, SEED, popularity=False)
    if fitted is None:
        return {}
    changed = replace(answers, version=replace(version, ranker=fitted.ranker))
    measured = stored.hits(changed.item_scorer).metrics(popularity(part.train) > 0)
    return {f"without_popularity_{name}_mean": measured[name] for name in ITEM_FIGURES}


def types_over(stored: Stored, baseline: str) -> Figures:
    """Accuracy and macro F1 of the types that the version names over a baseline's likeliest."""
    test = stored.part.test
    some = np.flatnonzero(test.type != NONE)
    true, row = test.type[some], test.row[some]

    shares = type_baselines(stored.part.train)[baseline](test, slice(0, len(test)))
    ours, theirs = stored.answers.chosen_types[row], shares.argmax(axis=1)[row]
    user = users(test)[row]
    accuracy = mean(ours == true), mean(theirs == true)
    types = shares.shape[1]
    f1 = macro_f1(ours, true, types), macro_f1(theirs, true, types)
    return difference(f"type_accuracy_over_{baseline}", *accuracy, user) | difference(
        f"type_macro_f1_over_{baseline}", *f1, user
    )


def difference(name: str, ours: Measure, theirs: Measure, user: Ints) -> Figures:
    """Ours less theirs on the same cases, with the interval of a paired bootstrap over users."""
    found = resample({"ours": ours, "theirs": theirs}, user, SEED)
    value, low, high, _ = found["ours"].minus(found["theirs"])
    return {f"{name}_mean": value, f"{name}_low": low, f"{name}_high": high}


def ranker_times(stored: Stored) -> Figures:
    """Figures of `ranker_ms`."""
    return {
        figure: ranker_ms(stored, count)
        for figure, count in zip(RANKER_FIGURES, CANDIDATES, strict=True)
    }


def ranker_ms(stored: Stored, candidates: int) -> float | None:
    """Median milliseconds of the ranker's features and trees for one user; None: it has none.

    The users are spread over the test. Each one's candidates are those of the ranker, cut to the
    number or filled up with the items that the sequence model finds next.
    """
    version, test, space = stored.answers.version, stored.part.test, stored.answers.space
    ranker = version.ranker
    if ranker is None or candidates > len(space.items):
        return None
    seconds = []
    for row in np.linspace(0, len(test) - 1, min(TIMED_USERS, len(test))).astype(int):
        histories = test.histories(slice(row, row + 1))
        scores = space.items @ stored.answers.found.queries[row]
        by_score = np.argsort(-scores, kind="stable")
        searched = by_score[: ranker.searched]
        own = ranker.candidates(histories, Pairs.of(np.zeros_like(searched), searched)).item
        wanted = np.append(own, by_score[~np.isin(by_score, own)])[:candidates]
        pairs = Pairs.of(np.zeros_like(wanted), wanted)
        begin = time.perf_counter()
        ranker.score(
            histories, pairs, scores[pairs.item], lambda item: space.items[np.maximum(item, 0)]
        )
        seconds.append(time.perf_counter() - begin)
    return 1000 * median(seconds)
