"""Fits a learner on training windows.

On several processes started by torchrun, each takes its share of every epoch's batches, gradients
are averaged (DistributedDataParallel), and all end with the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from foretell.errors import InvalidArgumentError
from predictor.learning.data import Events
from predictor.learning.sequence.learner import Learner
from predictor.learning.sequence.losses import has_bfloat16
from predictor.learning.sequence.parallel import from_first, place
from predictor.learning.sequence.recipe import FitConfig as FitConfig
from predictor.learning.sequence.windows import Batch, Windows


@dataclass(frozen=True)
class Epoch:
    """A row of the training curve; losses are means, of items and types in nats."""

    epoch: int
    item_loss: float
    type_loss: float
    gap_loss: float
    validation: dict[str, float]
    score: float
    """What early stopping looks at."""
    seconds: float
    """Of training, without validation."""


Validate = Callable[[Learner], tuple[float, dict[str, float]]]
"""Measures a learner: the score (more is better) and what to show beside it."""


def fit(
    learner: Learner,
    train: Events,
    validate: Validate,
    *,
    progress: bool,
    stop: Callable[[Epoch], bool] | None = None,
) -> list[Epoch]:
    """Trains in place and leaves the weights of the best epoch; returns the training curve.

    Args:
        stop: asked after each epoch whether it is enough.
    """
    recipe = learner.recipe
    rank, world = place()
    rng = np.random.default_rng(recipe.seed)  # the same batches in all processes
    torch.manual_seed(recipe.seed + rank)  # but each with its own dropout
    windows = Windows(train, recipe.history_length, recipe.basket_power, recipe.late_weight)
    steps = windows.steps(recipe.batch_contexts, recipe.batch_tokens) // world
    optimizer = torch.optim.AdamW(
        [value for value in learner.parameters() if value.requires_grad],
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
        fused=True,  # one pass over memory: a tenth of the time for 92,000 items
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _warm_up_and_cosine(recipe.epochs * steps)
    )
    module = DistributedDataParallel(learner, find_unused_parameters=True) if world > 1 else learner
    step = _Step(learner, module, optimizer, schedule, Average(learner, recipe.averaging))
    curve: list[Epoch] = []
    best: dict[str, Tensor] = {}
    for number in range(1, recipe.epochs + 1):
        begin = time.monotonic()
        batches = windows.epoch(recipe.batch_contexts, recipe.batch_tokens, rng)
        bar: tqdm[Any] = tqdm(
            total=len(windows), desc=f"epoch {number}/{recipe.epochs}", unit="histories",
            disable=not progress or rank > 0, leave=False,
        )  # fmt: skip
        with bar:
            losses = [step(batch, bar) for batch in _share(batches, rank, world)]
        if not losses:
            raise InvalidArgumentError(
                f"{world} processes share fewer batches than that: start fewer", field="events"
            )
        seconds = time.monotonic() - begin
        with step.average.in_place():
            score, shown = from_first(lambda: validate(learner.eval()))
            if not curve or score > max(epoch.score for epoch in curve):
                best = {name: value.clone() for name, value in learner.state_dict().items()}
        items, types, gaps = np.mean(losses, axis=0).tolist()
        curve.append(Epoch(number, items, types, gaps, shown, score, seconds))
        if progress and rank == 0:
            tqdm.write(_line(curve[-1]), file=bar.fp)
        best_epoch = max(curve, key=lambda epoch: epoch.score).epoch
        if number - best_epoch >= recipe.patience or (stop is not None and stop(curve[-1])):
            break
    learner.load_state_dict(best)
    learner.eval()
    return curve


def _share(batches: Iterator[Batch], rank: int, world: int) -> Iterator[Batch]:
    """Every `world`-th batch; what is left over at the end, none of the processes takes."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == world:
            yield waiting[rank]
            waiting.clear()


def _line(epoch: Epoch) -> str:
    shown = "  ".join(f"{name} {value:.4f}" for name, value in epoch.validation.items())
    losses = f"loss: items {epoch.item_loss:.4f} types {epoch.type_loss:.4f}"
    return f"epoch {epoch.epoch:2d}  {losses}  validation: {shown}  {epoch.seconds:.1f} s"


@dataclass(frozen=True)
class _Step:
    learner: Learner
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: Average

    def __call__(self, batch: Batch, bar: tqdm[Any]) -> tuple[float, ...]:
        self.learner.train()
        with _autocast(self.learner.network.start.device):
            losses = self.module(batch)
        self.optimizer.zero_grad()
        self.learner.total(losses).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.learner.parameters(), self.learner.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        self.average.update()
        bar.update(len(batch.item))
        return tuple(float(loss.detach()) for loss in losses)


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products where the hardware has them: 2.3 times faster steps on such a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device.type))


def _warm_up_and_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up over 5 % of the steps, then down to 5 % of its height."""
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        done = min(1.0, step / max(1, steps))
        return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))

    return factor


class Average:
    """Exponential moving average of a module's weights (Polyak and Juditsky, 1992)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters: list[Tensor] = list(module.parameters())
        self._average = [value.detach().clone() for value in self._parameters]
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights in; early on with more weight, to forget the start."""
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 9))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average in the module's place for a while."""
        with torch.no_grad():
            kept = [value.clone() for value in self._parameters]
            torch._foreach_copy_(self._parameters, self._average)
            try:
                yield
            finally:
                torch._foreach_copy_(self._parameters, kept)
