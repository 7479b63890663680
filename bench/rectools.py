"""RecTools' SASRecModel on leave-one-out data: the peer of bench.train and bench.quality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import say

MOST_EPOCHS = 60
"""The peer stops three epochs after its best."""

DISTRIBUTIONS = ("rectools", "pytorch-lightning", "torch")

Epoch = dict[str, Any]
"""epoch, seconds, peak_memory_mb, validation and, where that was the best so far, test; these two
with recall_at_10 and ndcg_at_10."""


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
