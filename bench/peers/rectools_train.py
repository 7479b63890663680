"""Trains RecTools' SASRecModel epoch by epoch and measures it: runs in the peer's environment.

Reads a CSV file `user_id,item_id` in order of time. Leave-one-out: a user's last item is the
test, the one before it validation, the rest training; test histories hold the validation item.
All items of training are ranked less the user's own; ties count against the target, and an item
that training never met is missed.

Prints one JSON object a line: first what it runs with, then each epoch with its training seconds
(loading of batches included, preparation of the data and measuring excluded).
"""

import argparse
import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

K = 10
LISTED = 20
"""Items that are asked for: those that tie with the K-th are seen this far."""


class Seconds(Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._begin = 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: object) -> None:
        """Starts the clock."""
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: object) -> None:
        """Stops it."""
        self.epochs.append(time.perf_counter() - self._begin)


def trainer() -> Trainer:
    """A trainer that only trains."""
    return Trainer(
        max_epochs=1,
        min_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Seconds()],
    )


def dataset(events: pd.DataFrame) -> Dataset:
    """In RecTools' form; the order of the rows stands for the time."""
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: events["user_id"],
                Columns.Item: events["item_id"],
                Columns.Weight: 1.0,
                Columns.Datetime: pd.Timestamp(0) + pd.to_timedelta(np.arange(len(events)), "s"),
            }
        )
    )


def measure(model: SASRecModel, histories: Dataset, targets: pd.DataFrame) -> dict[str, float]:
    """recall@K and NDCG@K over all users of `targets`, one target each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lists = model.recommend(
            users=targets["user_id"].to_numpy(),
            dataset=histories,
            k=LISTED,
            filter_viewed=True,
            on_unsupported_targets="ignore",
        )
    joined = lists.merge(targets, left_on=Columns.User, right_on="user_id")
    hit = joined[joined[Columns.Item] == joined["target"]][[Columns.User, Columns.Score]]
    joined = joined.merge(hit, on=Columns.User, suffixes=("", "_of_target"))
    as_high = joined[joined[Columns.Score] >= joined[Columns.Score + "_of_target"]]
    rank = as_high.groupby(Columns.User).size().to_numpy()
    rank = rank[rank <= K]
    return {
        "recall_at_10": len(rank) / len(targets),
        "ndcg_at_10": float((1 / np.log2(1 + rank)).sum() / len(targets)),
    }


def peak_memory_mb() -> float:
    """The most memory that this process has had.

    Linux says so in /proc; its getrusage counts what the process had that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def say(result: dict[str, object]) -> None:
    """One line for the process that waits."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Trains until the target or the best epoch is passed, or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("events")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of the whole run, about")
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begin = time.monotonic()
    torch.set_num_threads(options.threads)
    pytorch_lightning.seed_everything(options.seed, verbose=False)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    events = pd.read_csv(options.events, dtype=str)
    from_end = events.groupby("user_id").cumcount(ascending=False)
    train, with_validation = dataset(events[from_end >= 2]), dataset(events[from_end >= 1])
    targets = events.rename(columns={"item_id": "target"})
    validation, test = targets[from_end == 1], targets[from_end == 0]
    model = SASRecModel(
        n_factors=64,
        n_blocks=1,
        session_max_len=50,
        loss="sampled_softmax",
        n_negatives=256,
        batch_size=128,
        get_trainer_func=trainer,
    )
    best, best_epoch, longest = -1.0, 0, 0.0
    for epoch in range(1, options.epochs + 1):
        before = time.monotonic()
        model.fit_partial(train, min_epochs=1, max_epochs=1)
        measured = measure(model, train, validation)
        result = {"epoch": epoch, "validation": measured}
        if measured["ndcg_at_10"] > best:
            best, best_epoch = measured["ndcg_at_10"], epoch
            result["test"] = measure(model, with_validation, test)
        (seconds,) = (each for each in model.fit_trainer.callbacks if isinstance(each, Seconds))
        say({**result, "seconds": seconds.epochs[-1], "peak_memory_mb": peak_memory_mb()})
        longest = max(longest, time.monotonic() - before)
        if epoch - best_epoch >= options.patience:
            break
        if time.monotonic() - begin + longest > options.seconds:
            return
    say({"complete": True})


if __name__ == "__main__":
    main()
