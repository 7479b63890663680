"""Fits the network and the item space on training windows.

Loss: cross-entropy of the next behavior type and of the next item, at every position. The items'
softmax is over the whole catalogue where it is small, else over one shared uniform sample of it,
reweighted; few negatives are the main reason for weak published results (Klenitskiy and Vasilev,
2023, "Turning dross into gold loss"; Petrov and Macdonald, 2023, gSASRec).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from predictor.learning.data import Events
from predictor.learning.item_space import ItemSpace
from predictor.learning.windows import Batch, Windows
from predictor.models.history import Ints
from predictor.models.sequence import NetworkConfig, SequenceNetwork

STEPS = 250
"""Steps of an epoch, about, where the bounds below allow: fewer leave small data unlearned."""

STEP_CONTEXTS = (16, 256)
"""Fewest and most contexts (baskets to be predicted) of a step."""


@dataclass(frozen=True)
class FitConfig:
    """How to fit. Defaults were chosen on validation parts of a year of grocery baskets."""

    epochs: int = 10
    """At most; the learning rate falls to its end over as many."""
    patience: int = 3
    """Epochs without a better validation score before it stops."""
    dims: int = 64
    """Dimensions of the model's space."""
    hidden: int = 128
    """State of the LSTM."""
    history_length: int = 200
    """Events of a history that are read."""
    dropout: float = 0.1
    row_dropout: float = 0.1
    """Probability of an item's residual being left out, so that the text learns to stand alone."""
    learning_rate: float = 0.015
    weight_decay: float = 0.01
    averaging: float = 0.99
    """Decay of the moving average of the weights, which is what is evaluated and kept."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    batch_tokens: int = 16_384
    """Padded events in a step, at most."""
    basket_power: float = 0.5
    """A basket counts as its size to this power: 1 every line alike, 0 every basket alike."""
    full_softmax_items: int = 20_000
    """Largest catalogue whose items are all compared."""
    negatives: int = 4_096
    """Items sampled per step, for larger catalogues."""
    seed: int = 42


@dataclass(frozen=True)
class Epoch:
    """A row of the training curve; losses are means in nats."""

    epoch: int
    item_loss: float
    type_loss: float
    validation: dict[str, float]
    score: float
    """What early stopping looks at."""
    seconds: float


class Learner(nn.Module):
    """Network and item space with their common loss."""

    def __init__(self, network: SequenceNetwork, space: ItemSpace, config: FitConfig) -> None:
        super().__init__()
        self.network = network
        self.space = space
        self.config = config
        # Items that training never meets stay out of the softmax: as targets of nothing they would
        # only learn to be nobody's, and could never be found by their text.
        self.warm_items: Tensor
        self.register_buffer("warm_items", torch.nonzero(space.warm[:, 0]).squeeze(1), False)
        self.place: Tensor
        self.register_buffer("place", torch.cumsum(space.warm[:, 0].long(), 0) - 1, False)
        with torch.no_grad():
            network.query_head.bias.zero_()
            # Popularity, see ItemSpace: from the bias alone, not from the traces as well.
            network.query_head.bias[0] = 1.0
            network.trace_weight[:, 0] = 0.0

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean losses (items, types) of a batch; 0 where it has no targets of the kind."""
        device = self.network.start.device
        item, text = (torch.from_numpy(v).to(device) for v in (batch.item, batch.text))
        full = len(self.space.warm) <= self.config.full_softmax_items
        catalogue = self.space.items() if full else None
        states = self.network.encode(
            self._token_vectors(item, text, catalogue),
            (item >= 0) | (text >= 0),
            torch.from_numpy(batch.type).to(device),
            torch.from_numpy(batch.gap).to(device),
        )
        context = torch.from_numpy(batch.context).to(device)
        states = torch.where(
            (context < 0).unsqueeze(1),
            self.network.start,
            states.flatten(0, 1)[context.clamp(min=0)],
        )
        type_logits, queries = self.network.heads(states)
        row, target, line_type, weight = (
            torch.from_numpy(v).to(device)
            for v in (batch.row, batch.line_item, batch.line_type, batch.weight)
        )
        type_loss = _type_loss(type_logits.float(), row, line_type, weight)
        some = target >= 0
        if not bool(some.any()):
            return torch.zeros((), device=device), type_loss
        row, target, weight = row[some], target[some], weight[some]
        loss = self._full(queries, catalogue, row, target) if catalogue is not None else (
            self._sampled(queries, row, target)
        )  # fmt: skip
        return (loss * weight).sum() / weight.sum(), type_loss

    def _token_vectors(self, item: Tensor, text: Tensor, catalogue: Tensor | None) -> Tensor:
        """(windows, time, dims): the item's vector, else the text's, else zero."""
        by_item, by_text = item >= 0, (item < 0) & (text >= 0)
        vectors = torch.zeros(*item.shape, self.config.dims, device=item.device)
        if bool(by_item.any()):
            chosen = item[by_item]
            found = self.space.items(chosen) if catalogue is None else catalogue[chosen]
            vectors = vectors.masked_scatter(by_item.unsqueeze(-1), found.float())
        if bool(by_text.any()):
            found = self.space.texts(text[by_text])
            vectors = vectors.masked_scatter(by_text.unsqueeze(-1), found.float())
        return vectors

    def _full(self, queries: Tensor, catalogue: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """(lines,) cross-entropy over all warm items."""
        logits = queries @ catalogue[self.warm_items].T
        return logits.float().logsumexp(1)[row] - logits[row, self.place[target]].float()

    def _sampled(self, queries: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """(lines,) cross-entropy over a line's own item and a uniform sample of warm items."""
        size, count = len(self.warm_items), self.config.negatives
        sample = self.warm_items[torch.randint(size, (count,), device=queries.device)]
        # Each sampled item stands for size / count others.
        negatives = (queries @ self.space.items(sample).T).float() + math.log(size / count)
        own = (queries[row] * self.space.items(target)).float().sum(1)
        return torch.logaddexp(own, negatives.logsumexp(1)[row]) - own


def _type_loss(logits: Tensor, row: Tensor, line_type: Tensor, weight: Tensor) -> Tensor:
    some = line_type >= 0
    loss = nn.functional.cross_entropy(logits[row[some]], line_type[some], reduction="none")
    return (loss * weight[some]).sum() / weight[some].sum().clamp(min=1e-9)


def new_learner(
    train: Events,
    item_inputs: NDArray[np.float32],
    text_inputs: NDArray[np.float32],
    popularity: Ints,
    config: FitConfig,
) -> Learner:
    """An untrained learner; arguments as of ItemSpace. Reproducible by config.seed."""
    torch.manual_seed(config.seed)
    network = SequenceNetwork(
        NetworkConfig(
            behavior_types=len(train.behavior_types),
            dims=config.dims,
            hidden=config.hidden,
            dropout=config.dropout,
        )
    )
    space = ItemSpace(item_inputs, text_inputs, popularity, config.dims, config.row_dropout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Learner(network, space, config).to(device)


Validate = Callable[[Learner], tuple[float, dict[str, float]]]
"""Measures a learner: the score (more is better) and what to show beside it."""


def fit(learner: Learner, train: Events, validate: Validate, *, progress: bool) -> list[Epoch]:
    """Trains in place and leaves the weights of the best epoch; returns the training curve."""
    config = learner.config
    rng = np.random.default_rng(config.seed)
    windows = Windows(train, config.history_length, config.basket_power)
    size = int(np.clip(windows.contexts.sum() // STEPS, *STEP_CONTEXTS))
    steps = config.epochs * windows.steps(size, config.batch_tokens)
    optimizer = torch.optim.AdamW(
        learner.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,  # one pass over memory: a tenth of the time for 92,000 items
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine(steps))
    average = Average(learner, config.averaging)
    curve: list[Epoch] = []
    best: dict[str, Tensor] = {}
    for number in range(1, config.epochs + 1):
        bar: tqdm[Any] = tqdm(
            total=len(windows), desc=f"epoch {number}/{config.epochs}", unit="histories",
            disable=not progress, leave=False,
        )  # fmt: skip
        with bar:
            batches = windows.epoch(size, config.batch_tokens, rng)
            losses = [_step(learner, batch, optimizer, schedule, average, bar) for batch in batches]
        seconds = bar.format_dict["elapsed"]
        with average.in_place():
            score, shown = validate(learner.eval())
            if not curve or score > max(epoch.score for epoch in curve):
                best = {name: value.clone() for name, value in learner.state_dict().items()}
        item_loss, type_loss = (float(values) for values in np.mean(losses, axis=0))
        curve.append(Epoch(number, item_loss, type_loss, shown, score, seconds))
        if progress:
            tqdm.write(_line(curve[-1]), file=bar.fp)
        best_epoch = max(curve, key=lambda epoch: epoch.score).epoch
        if number - best_epoch >= config.patience:
            break
    learner.load_state_dict(best)
    learner.eval()
    return curve


def _line(epoch: Epoch) -> str:
    shown = "  ".join(f"{name} {value:.4f}" for name, value in epoch.validation.items())
    losses = f"loss: items {epoch.item_loss:.4f} types {epoch.type_loss:.4f}"
    return f"epoch {epoch.epoch:2d}  {losses}  validation: {shown}  {epoch.seconds:.1f} s"


def _step(
    learner: Learner,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    average: Average,
    bar: tqdm[Any],
) -> tuple[float, float]:
    learner.train()
    with _autocast(learner.network.start.device):
        item_loss, type_loss = learner(batch)
    optimizer.zero_grad()
    (item_loss + type_loss).backward()
    nn.utils.clip_grad_norm_(learner.parameters(), learner.config.clip)
    optimizer.step()
    schedule.step()
    average.update()
    bar.update(len(batch.item))
    return float(item_loss.detach()), float(type_loss.detach())


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products where the hardware has them: 2.3 times faster steps on such a CPU.

    Elsewhere they would be emulated, and slower than float32.
    """
    if device.type == "cpu":
        enabled = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    else:
        enabled = torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


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
