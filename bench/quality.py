"""How good predictions are: ours beside baselines and peers on public data, over several seeds.

For each set, ours is trained with `predictor.learning.training.train`, as `predictor train` does
it, on files that come in through the same import as a user's, and the version is measured as it
is served. Everything is chosen on validation; nothing is fitted again on it. Protocols:

- beauty: leave-one-out. All items are ranked less the user's own. A second training holds 10 % of
  the items out of training entirely: beauty_cold_recall_at_10 is the recall over users whose
  target is one of them, beauty_warm_recall_at_10 that over the others. A third training is the same
  without residual dropout (beauty_without_row_dropout_...): what cold items cost warm ones. Targets
  that training has not met by nature are few: beauty_natural_cold_recall_at_10.
- movielens: the next behavior type of every event in the last 20 % by time, the user's true
  earlier events being the history; known_item_*: the same where the item is known.
- journey: each household's first basket from 2017-12-01 on, everything fitted before that day and
  chosen on first baskets from 2017-11-01 on.

Figures:

- {set}_{metric}_{mean,spread}: ours; the spread is the sample standard deviation over seeds.
  {set}_model_...: the sequence model alone. {set}_{baseline}_...: the baselines.
- beauty_without_popularity_{metric}_mean: with a ranker that does not read how popular an item is,
  fitted to the sequence model of the first seed.
- beauty_id_transformer_...: the peer on this very file, a transformer over item ids alone with full
  softmax; beauty_rectools_sasrec_...: RecTools' SASRecModel, as far as the budget allows.
- {set}_{metric}_over_{baseline}_{mean,low,high}: mean difference and 95 % interval of a bootstrap
  over users, paired, on the first seed.
- ranker_{150,480}_p50_ms: features and trees of one user with so many candidates, on the set where
  that is slowest. {set}_seconds: a training and its evaluation.

Ours is measured whatever the budget, which bounds the peers.

"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import datasets, harness, rectools, stored
from bench.harness import Budget, Figures, say
from bench.stored import RANKER_FIGURES
from bench.trials import OURS, PEERS, Trial, methods_of, split_name, summary
from predictor.learning import sources, training
from predictor.learning.sources import Dataset
from predictor.models.version import OWN


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("quality", f"{__doc__}{datasets.HELP}", budget_s=3600)
    parser.add_argument("--data", type=Path, metavar="DIR", help="see above")
    parser.add_argument("--set", choices=tuple(OURS), help="default: all three")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), metavar="DIR",
                        help="where versions are written, replacing those of an earlier run "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="take trainings that an earlier run finished in --out as they are, "
                        "whatever has changed since")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.data is None and options.set != "journey":
        parser.error("--data is needed for beauty and movielens")
    budget = Budget(options.budget_s)
    names = [options.set] if options.set else list(OURS)
    loaded = {name: dataset(name, options) for name in names}
    torch.set_num_threads(options.threads)
    figures: Figures = {}
    for name in names:
        for key, trial in OURS[name].items():
            figures |= run(name, key, trial, loaded[name].data, options)
    for name in names:
        for key, trial in PEERS.get(name, {}).items():
            if budget.left:
                figures |= run(name, key, trial, loaded[name].data, options)
    figures |= slowest(figures)
    versions = harness.versions("torch", "numpy", "lightgbm")
    if "beauty" in names and budget.left:
        found, peer_versions = rectools_figures(loaded["beauty"].files, budget, options)
        figures |= found
        versions |= peer_versions
    figures["seconds"] = round(budget.spent)
    say(tables(names, figures))
    harness.finish("quality", versions, figures)
    return 0


@dataclass(frozen=True)
class Loaded:
    """A data set, and the files that it was read from."""

    files: datasets.Files
    data: Dataset


def dataset(name: str, options: argparse.Namespace) -> Loaded:
    """Converts, imports and encodes; vectors are kept between runs."""
    files = datasets.files(name, options.data or Path(), options.cache_dir)
    source = sources.read_files(files.events, files.items)
    with sources.embedder(None, sources.CACHE_DIR, None) as client:
        return Loaded(files, sources.with_vectors(source, client, progress=True))


def run(name: str, key: str, trial: Trial, data: Dataset, options: argparse.Namespace) -> Figures:
    """Trains once per seed; the figures of the trial."""
    figures: Figures = {}
    seeds = []
    for seed in range(1, options.seeds + 1):
        label = f"{name}-{key}-{seed}"
        notes = options.out / f"{label}.json"
        if options.resume and notes.exists():
            say(f"{label}: from an earlier run")
            noted = json.loads(notes.read_text())
        else:
            say(f"{label}, of {options.seeds} seeds")
            noted = train_and_measure(options.out / label, trial, data, seed)
            notes.write_text(json.dumps(noted, indent=1))
        seeds.append(noted["methods"])
        figures |= {f"{name}_{figure}": value for figure, value in noted["figures"].items()}
        shown = (f"{metric} {value:.4f}" for metric, value in noted["methods"][OWN].items())
        say(f"{label}: {'  '.join(shown)}")
    return summary(name, trial, seeds) | figures


def train_and_measure(folder: Path, trial: Trial, data: Dataset, seed: int) -> dict[str, Any]:
    """One training: {"methods": see methods_of, "figures": what is measured once}."""
    protocol = replace(trial.protocol, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.monotonic()
    trained = training.train(
        data, folder, protocol=protocol, config=trial.config, parts=trial.parts, progress=True
    )
    methods = methods_of(trained.report, trial)
    if trial.baselines:
        methods[OWN]["seconds"] = time.monotonic() - begin
    figures: Figures = {}
    if trial.once and seed == 1:
        version = stored.load(folder, data, protocol)
        for measure in trial.once:
            figures |= measure(version)
    return {"methods": methods, "figures": figures}


def slowest(figures: Figures) -> Figures:
    """The ranker's times over all sets."""
    found: Figures = {}
    for figure in RANKER_FIGURES:
        values = [value for name, value in figures.items() if name.endswith(figure)]
        found[figure] = max((value for value in values if value is not None), default=None)
    return found


def rectools_figures(
    files: datasets.Files, budget: Budget, options: argparse.Namespace
) -> tuple[Figures, dict[str, str]]:
    """RecTools' SASRec on the test of beauty, at its best epoch on validation; and versions."""
    result, cached = rectools.epochs(
        files.events, options.cache_dir, budget.left, options.threads, harness.load(),
        timed=False, fresh=options.fresh,
    )  # fmt: skip
    best = rectools.best(result["epochs"])
    figures: Figures = {
        f"beauty_rectools_sasrec_{name}_mean": value for name, value in best["test"].items()
    }
    figures["beauty_rectools_sasrec_epochs"] = len(result["epochs"])
    figures["beauty_rectools_sasrec_complete"] = int(result["complete"])
    figures["beauty_rectools_sasrec_from_cache"] = int(cached)
    return figures, result["versions"]


def tables(names: Iterable[str], figures: Figures) -> str:
    """A line a method for each set, metrics with mean and spread; then paired differences."""
    parts = []
    for name in names:
        rows: dict[str, dict[str, str]] = {}
        paired = []
        for figure, value in figures.items():
            if not figure.startswith(f"{name}_") or not figure.endswith("_mean"):
                continue
            full = figure.removesuffix("_mean")
            if f"{full}_low" in figures:
                low, high = (cell(figures[f"{full}_{end}"]) for end in ("low", "high"))
                paired.append(f"{full.removeprefix(f'{name}_')}: {cell(value)} [{low}, {high}]")
                continue
            method, metric = split_name(full.removeprefix(f"{name}_"))
            shown = cell(value, figures.get(f"{full}_spread"))
            rows.setdefault(method or "ours", {})[metric] = shown
        columns = list(dict.fromkeys(metric for cells in rows.values() for metric in cells))
        parts.append("\n".join([name, harness.table(columns, rows), *paired]))
    return "\n\n".join(parts)


def cell(mean: float | None, spread: float | None = None) -> str:
    """For people: four digits, and the spread where there is one."""
    if mean is None:
        return "-"
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ±{spread:.4f}"


if __name__ == "__main__":
    sys.exit(main())
