"""The whole toolbox on public data: how good each model is, and what it costs.

Each model is trained as `python -m predictor train --model NAME` does it, in a process of its own,
one after the other, on files that come in through the import; its quality is what it wrote into
metrics.json. Complete Journey: each household's first basket from 2017-12-01 on, items and types.
MovieLens small: the next type of every event in the last 20 % by time. A model that the budget
leaves no time for has no figures.

Figures, {set} being journey or movielens:

- {set}_{model}_{type_accuracy,type_macro_f1}: of the next behavior type.
  {set}_{model}_{hits_at_10,ndcg_at_10}: of the next items, journey only.
- {set}_{model}_{train_s,peak_memory_mb}: of the process, reading and evaluation included, without
  baselines.
  {set}_{model}_predictions_s: types and items of histories in batches of 256, without the network.
- journey_{user_knn,matrix_factorisation}_{ours,library}_ndcg_at_10: on validation, where histories
  are what was fitted: our code, and scikit-learn's neighbours or implicit's own user factors beside
  it, with the same settings. ..._ratio: ours over theirs.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from implicit.als import AlternatingLeastSquares
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from bench import datasets, harness, quality, stored
from bench.harness import Budget, Figures, say
from bench.trials import ITEM_METRICS, OURS, TYPE_METRICS, methods_of
from predictor.learning import sources, training
from predictor.learning.data import Targets
from predictor.learning.measures.answers import Answers, answer
from predictor.learning.measures.baselines import histories_of
from predictor.learning.measures.metrics import Floats, ItemScorer, item_metrics, users
from predictor.learning.ranking import recommenders
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol
from predictor.models.history import Ints
from predictor.models.ranking.recommender import Recommender
from predictor.models.version import OWN

TYPES = ("linear", "logistic", "mlp", "lightgbm", "bert_finetune", "word2vec_logistic")
ITEMS = ("item_knn", "user_knn", "matrix_factorisation", "content", "hybrid")
MODELS: Mapping[str, Sequence[str]] = {
    "movielens": (*TYPES, "rnn"),
    "journey": (*TYPES, *ITEMS, "rnn"),
}
"""What is trained on which set."""

ALL = tuple(dict.fromkeys(model for models in MODELS.values() for model in models))

TRIAL = replace(OURS["journey"]["whole"], metrics=ITEM_METRICS | TYPE_METRICS, baselines=False)
"""What is read of a report."""

SHOWN = ("type_accuracy", "type_macro_f1", "hits_at_10", "ndcg_at_10")
COSTS = ("train_s", "peak_memory_mb", "predictions_s")

PREDICTED = 1_024
"""Histories that are timed."""

NEIGHBOURS = 100
ALPHA = 1.0
"""Of both sides of the comparison with libraries."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("toolbox", f"{__doc__}{datasets.HELP}", budget_s=3600)
    parser.add_argument("--data", type=Path, metavar="DIR", help="see above")
    parser.add_argument("--set", choices=tuple(MODELS), help="default: both")
    parser.add_argument("--model", choices=ALL, action="append",
                        help="may be given several times; default: all")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/toolbox"), metavar="DIR",
                        help="where versions are written, replacing those of an earlier run "
                        "(default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    names = [options.set] if options.set else list(MODELS)
    if options.data is None and "movielens" in names:
        parser.error("--data is needed for movielens")
    budget = Budget(options.budget_s)
    figures: Figures = {}
    for name in names:
        loaded = quality.dataset(name, options)
        for model in options.model or MODELS[name]:
            if model in MODELS[name] and budget.left:
                found = measured(name, model, loaded, options, budget)
                figures |= {f"{name}_{model}_{metric}": value for metric, value in found.items()}
        if name == "journey":
            figures |= beside_libraries(loaded.data, OURS[name]["whole"].protocol)
        say(table(name, figures))
    figures["seconds"] = round(budget.spent)
    versions = harness.versions("torch", "scikit-learn", "lightgbm", "implicit", "gensim")
    harness.finish("toolbox", versions, figures)
    return 0


def measured(
    name: str, model: str, loaded: quality.Loaded, options: argparse.Namespace, budget: Budget
) -> Figures:
    """Trains in a process of its own, and reads what it wrote."""
    say(f"{name}: {model}")
    protocol = OURS[name]["whole"].protocol
    folder = options.out / f"{name}-{model.replace('_', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    files = str(loaded.files.events), str(loaded.files.items)
    command = [sys.executable, "-c", _TRAIN, name, model, str(folder), *files, str(options.threads)]
    begin = time.monotonic()
    try:
        subprocess.run(command, check=True, timeout=budget.left)
    except subprocess.TimeoutExpired:
        say(f"{name}: {model} took longer than the budget")
        return {}
    figures: Figures = {"train_s": round(time.monotonic() - begin, 1)}
    answers = stored.load(folder, loaded.data, protocol).answers
    reports = answers.version.reports
    metrics = methods_of(reports["metrics.json"], TRIAL)[OWN]
    items = model not in TYPES and name == "journey"
    figures |= {
        key: metrics[key] for key in SHOWN if key in metrics and (items or key in TYPE_METRICS)
    }
    figures["peak_memory_mb"] = round(reports["lineage.json"]["peak_memory_bytes"] / 2**20)
    figures["predictions_s"] = round(predictions_s(answers))
    return figures


_TRAIN = "import sys; from bench.toolbox import train; train(*sys.argv[1:])"


def train(name: str, model: str, folder: str, events: str, items: str, threads: str) -> None:
    """What the process of a model does."""
    source = sources.read_files(Path(events), Path(items))
    with sources.embedder(None, sources.CACHE_DIR, None) as client:
        dataset = sources.with_vectors(source, client, progress=True)
    torch.set_num_threads(int(threads))
    training.train(
        dataset,
        Path(folder),
        protocol=OURS[name]["whole"].protocol,
        config=FitConfig(model_type=model),
        item_baselines=False,
        progress=True,
    )


def predictions_s(answers: Answers) -> float:
    """Histories a second: types and, where there are any, items."""
    some = answers.targets.subset(np.arange(len(answers.targets)) < PREDICTED)
    seconds = []
    for _ in range(2):  # the first time reads the trees
        begin = time.perf_counter()
        again = answer(answers.version, some, answers.space)
        assert len(again.type_probabilities) == len(some)
        if answers.version.config.has_items:
            for begin_row in range(0, len(some), 256):
                again.item_scorer(some, slice(begin_row, min(begin_row + 256, len(some))))
        seconds.append(time.perf_counter() - begin)
    return len(some) / seconds[-1]


def beside_libraries(dataset: Dataset, protocol: Protocol) -> Figures:
    """Two recommenders and the libraries' own answers for the same users."""
    part = training.divide(dataset, protocol)
    had = histories_of(part.train)
    rows = np.full(len(part.train.user_ids), -1)
    with_items = np.unique(part.train.user[part.train.item >= 0])[: had.shape[0]]
    rows[with_items] = np.arange(len(with_items))
    user = users(part.validation)
    targets = part.validation.subset((user >= 0) & (rows[np.maximum(user, 0)] >= 0))
    factors = recommenders.factorise(had, ALPHA, seed=1)
    with threadpool_limits(1, "blas"):
        library = AlternatingLeastSquares(
            recommenders.FACTORS, regularization=recommenders.REGULARISATION, alpha=ALPHA,
            iterations=recommenders.ITERATIONS, random_state=1, num_threads=1, use_gpu=False,
        )  # fmt: skip
        library.fit(had, show_progress=False)
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(had)

    def of_rows(score: Callable[[Ints], Floats]) -> ItemScorer:
        def scorer(some: Targets, chosen: slice) -> Floats:
            return score(rows[users(some, chosen)])

        return scorer

    def neighbours(row: Ints) -> Floats:
        distance, other = near.kneighbors(had[row])
        found = [(1 - d) @ had[o].toarray() for d, o in zip(distance, other, strict=True)]
        return np.stack(found).astype(np.float32)

    ours = {
        "user_knn": Recommender({"user_knn": 1.0}, had, None, True, NEIGHBOURS),
        "matrix_factorisation": Recommender({"matrix_factorisation": 1.0}, had, factors, True),
    }
    theirs = {
        "user_knn": of_rows(neighbours),
        "matrix_factorisation": of_rows(
            lambda row: library.user_factors[row] @ library.item_factors.T
        ),
    }
    figures: Figures = {}
    for name, recommender in ours.items():
        a, b = (
            _ndcg(scorer, targets) for scorer in (recommender_scorer(recommender), theirs[name])
        )
        figures[f"journey_{name}_ours_ndcg_at_10"] = a
        figures[f"journey_{name}_library_ndcg_at_10"] = b
        figures[f"journey_{name}_ratio"] = a / b
    return figures


def recommender_scorer(recommender: Recommender) -> ItemScorer:
    """Its scores of all items."""
    return lambda targets, rows: np.concatenate(
        [scores for _, scores in recommender.blended(targets.histories(rows))]
    )


def _ndcg(scorer: ItemScorer, targets: Targets) -> float:
    warm = np.ones(len(targets.events.item_ids), np.bool_)
    return item_metrics(scorer, targets, warm, exclude_history=False)["ndcg_at_10"]


def table(name: str, figures: Figures) -> str:
    """A line a model."""
    rows: dict[str, dict[str, str]] = {}
    for model in MODELS[name]:
        cells = {
            metric: f"{value:.4g}"
            for metric in (*SHOWN, *COSTS)
            if (value := figures.get(f"{name}_{model}_{metric}")) is not None
        }
        if cells:
            rows[model] = cells
    columns = [metric for metric in (*SHOWN, *COSTS) if any(metric in row for row in rows.values())]
    return f"{name}\n{harness.table(columns, rows)}"


if __name__ == "__main__":
    sys.exit(main())
