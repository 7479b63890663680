"""RecTools' SASRecModel on Amazon Beauty: the peer of bench.train and bench.quality.

They train it in the time that ours leaves. `python -m bench.rectools` trains it alone, as far as
the budget allows, for an epoch takes minutes on two cores; the result stays in the cache, where the
two find it. rectools_epoch_s is the median; recall and NDCG are those of the test at the best epoch
of validation; rectools_complete is 1 if three epochs after it were no better.

"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import datasets, harness
from bench.harness import Figures, say

MOST_EPOCHS = 60
"""The peer stops three epochs after its best."""

DISTRIBUTIONS = ("rectools", "pytorch-lightning", "torch")

Epoch = dict[str, Any]
"""epoch, seconds, peak_memory_mb, validation and, where that was the best so far, test; these two
with recall_at_10 and ndcg_at_10."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("rectools", f"{__doc__}{datasets.HELP}", budget_s=7200)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="see above")
    options: argparse.Namespace = parser.parse_args(arguments)
    load = harness.load()
    files = datasets.files("beauty", options.data, options.cache_dir)
    result, cached = epochs(
        files.events, options.cache_dir, options.budget_s, options.threads, load,
        timed=True, fresh=options.fresh,
    )  # fmt: skip
    figures: Figures = {
        "rectools_epoch_s": median(epoch["seconds"] for epoch in result["epochs"]),
        "rectools_epochs": len(result["epochs"]),
        "rectools_complete": int(result["complete"]),
        **{f"rectools_{name}": value for name, value in best(result["epochs"])["test"].items()},
        "rectools_from_cache": int(cached),
        "load_before": result["load"],
    }
    harness.finish("rectools", harness.versions() | result["versions"], figures)
    return 0


def epochs(
    events: Path,
    cache: Path,
    seconds: float,
    threads: int,
    load: float,
    *,
    timed: bool,
    fresh: bool,
) -> tuple[dict[str, Any], bool]:
    """Its epochs as far as the seconds allow, one at least.

    An earlier run's are taken where it came to its end, or trained about as long as this one may.

    Args:
        events: events.csv of the data set.
        cache: see harness.
        seconds: how long it may run.
        threads: of torch.
        load: of the machine before the benchmark.
        timed: whether times matter: an earlier run on a busier machine will not do then.
        fresh: whether no earlier run will do.

    Returns:
        {"versions" (names begin with `rectools/`), "load", "epochs": [Epoch], "complete": whether
        it came to its end}, and whether that is an earlier run's.
    """
    peer = harness.peer("rectools", cache)
    key = {
        "versions": {f"{peer.name}/{n}": v for n, v in peer.versions(*DISTRIBUTIONS).items()},
        "hardware": harness.hardware(),
        "script": _sha256(harness.PEERS / "rectools_train.py"),
        "events": _sha256(events),
        "threads": threads,
    }
    arguments = [str(events), "--epochs", str(MOST_EPOCHS), "--seconds", str(seconds),
                 "--threads", str(threads)]  # fmt: skip

    def measure() -> Iterator[dict[str, Any]]:
        say(f"RecTools: for at most {seconds:.0f} s, or one epoch")
        done: list[Epoch] = []
        for line in peer.run("rectools_train.py", arguments, threads=threads):
            if "epoch" in line:
                done.append(line)
                recall = line["validation"]["recall_at_10"]
                say(f"epoch {line['epoch']:2d}  recall@10 {recall:.4f}  {line['seconds']:.1f} s")
            complete = line.get("complete", False)
            yield {
                "versions": key["versions"],
                "load": load,
                "epochs": done,
                "complete": complete,
            }

    def enough(result: dict[str, Any]) -> bool:
        if timed and result["load"] > max(load, harness.QUIET):
            return False
        trained: float = sum(epoch["seconds"] for epoch in result["epochs"])
        return result["complete"] or trained >= 0.7 * seconds

    return harness.kept(cache, "rectools-sasrec", key, measure, enough=enough, fresh=fresh)


def best(done: Sequence[Epoch]) -> Epoch:
    """The epoch with the best NDCG@10 on validation; it has a test."""
    return max(done, key=lambda epoch: float(epoch["validation"]["ndcg_at_10"]))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
