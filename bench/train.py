"""How fast training is: RecTools' SASRecModel and ours on Amazon Beauty, in one run.

Both train a transformer over item ids alone with 64 dimensions, one block, histories of 50 events,
on all but every user's last two items; the item before the last is validation: all items ranked
less the user's own, ties against the target. Seconds are those of the training epochs; preparing
the data and measuring are left out on both sides. Both have the same threads.

- rectools_epoch_s: RecTools, sampled softmax, 256 negatives a position, batches of 128 users.
- ours_sampled_epoch_s: ours, 256 negatives shared by a step. ours_full_epoch_s: all items.
- ratio_epoch_sampled, ratio_epoch_full: RecTools' seconds over ours. All are medians over epochs.
- ours_to_target_s: ours with all items until recall@10 on validation is 0.085;
  ours_defaults_to_target_s, ours_defaults_epoch_s: the same with what `predictor train` does by
  default, texts included.
- rectools_to_target_s, or rectools_recall_when_stopped where the budget ended before. A figure of
  RecTools that the cache has for these versions, this hardware and these data is not measured
  again: rectools_from_cache is then 1.
- peak_memory_mb: of our process; rectools_peak_memory_mb.
- load_before: running processes at the start; above about 0.5 all seconds are upper bounds.

"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch

from bench import datasets, harness, rectools
from bench.harness import Budget, Figures, say
from bench.trials import IDS_ALONE
from predictor.learning import sources, training
from predictor.learning.sequence.fitting import Epoch
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sequence.training import fit_sequence
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol

TARGET = 0.085
"""recall@10 on validation: what the peer reaches when it has converged."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options = _parser().parse_args(arguments)
    budget = Budget(options.budget_s)
    load = harness.load()
    files = datasets.files("beauty", options.data, options.cache_dir)
    source = sources.read_files(files.events, files.items)
    with sources.embedder(None, sources.CACHE_DIR, None) as client:
        dataset = sources.with_vectors(source, client, progress=True)
    torch.set_num_threads(options.threads)
    ours = _ours(dataset)
    result, cached = rectools.epochs(
        files.events, options.cache_dir, budget.left, options.threads, load,
        timed=True, fresh=options.fresh,
    )  # fmt: skip
    versions = harness.versions("torch", "numpy") | result["versions"]
    figures = {
        **ours,
        **peer_figures(result["epochs"]),
        "rectools_from_cache": int(cached),
        "load_before": load,
    }
    for name in ("sampled", "full"):
        figures[f"ratio_epoch_{name}"] = ratio(
            figures.get("rectools_epoch_s"), figures[f"ours_{name}_epoch_s"]
        )
    rows = {name: {"": f"{value:.4g}"} for name, value in figures.items() if value is not None}
    say(harness.table([""], rows))
    harness.finish("train", versions, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("train", f"{__doc__}{datasets.HELP}", budget_s=1800)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="see above")
    return parser


def _ours(dataset: Dataset) -> Figures:
    """Our figures: all of them, whatever the budget, for they take minutes."""
    runs = {
        "sampled": replace(IDS_ALONE, negatives=256),
        "full": IDS_ALONE,
        "defaults": FitConfig(),
    }
    part = training.divide(dataset, Protocol("leave-one-out"))
    figures: Figures = {}
    for name, config in runs.items():
        say(f"ours, {name}")
        curve = fit_sequence(dataset, part, config, exclude_history=True, progress=True).curve
        figures[f"ours_{name}_epoch_s"] = median(epoch.seconds for epoch in curve)
        figures[f"ours_{name}_to_target_s"] = seconds_to(TARGET, *columns(curve))
        figures[f"ours_{name}_recall_at_10"] = max(columns(curve)[1])
    figures["ours_to_target_s"] = figures.pop("ours_full_to_target_s")
    figures["peak_memory_mb"] = training.peak_memory_bytes() / 2**20
    return figures


def columns(curve: Sequence[Epoch]) -> tuple[list[float], list[float]]:
    """Seconds and recall@10 of each epoch."""
    return [e.seconds for e in curve], [e.validation["recall_at_10"] for e in curve]


def seconds_to(target: float, seconds: Sequence[float], recalls: Sequence[float]) -> float | None:
    """Seconds of training up to the first epoch with this recall; None: it was not reached."""
    for total, recall in zip(accumulate(seconds), recalls, strict=True):
        if recall >= target:
            return total
    return None


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below, None where one is missing."""
    return above / below if above is not None and below else None


def peer_figures(epochs: Sequence[rectools.Epoch]) -> Figures:
    """RecTools' figures from its epochs."""
    seconds = [epoch["seconds"] for epoch in epochs]
    recalls = [epoch["validation"]["recall_at_10"] for epoch in epochs]
    reached = seconds_to(TARGET, seconds, recalls)
    return {
        "rectools_epoch_s": median(seconds),
        "rectools_epochs": len(seconds),
        "rectools_to_target_s": reached,
        "rectools_recall_when_stopped": None if reached else max(recalls),
        "rectools_peak_memory_mb": max(epoch["peak_memory_mb"] for epoch in epochs),
    }


if __name__ == "__main__":
    sys.exit(main())
