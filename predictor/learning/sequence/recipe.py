"""How a sequence model is fitted: what is not said is derived from the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from foretell.errors import InvalidArgumentError
from predictor.learning.data import Events, repeat_share
from predictor.learning.measures.evaluation import REPEATS

FULL_SOFTMAX_ITEMS = 50_000
"""Largest catalogue whose items are all compared by default."""

TWO_TOWERS = 256
"""Dimensions from which on two networks share them: two of half the size are better than one."""

NEGATIVES = 4_096
"""Items sampled per step by default, for larger catalogues."""


@dataclass(frozen=True)
class FitConfig:
    """What the caller says about how to fit; fields as in Recipe, None: derived from the data."""

    model_type: str | None = None
    features: str | None = None
    """Of the classic models alone, see ClassicRecipe."""
    epochs: int | None = None
    patience: int | None = None
    dims: int | None = None
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    towers: int | None = None
    history_length: int | None = None
    traces: bool | None = None
    clock: bool | None = None
    sentiment: bool | None = None
    dropout: float | None = None
    input_dropout: float | None = None
    row_dropout: float | None = None
    term_dropout: float | None = None
    text_dims: int | None = None
    terms: bool | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    averaging: float | None = None
    clip: float | None = None
    batch_contexts: int | None = None
    batch_tokens: int | None = None
    basket_power: float | None = None
    late_weight: float | None = None
    negatives: int | None = None
    popularity_discount: float | None = None
    type_weight: float | None = None
    gap_weight: float | None = None
    seed: int = 42


@dataclass(frozen=True)
class Recipe:
    """How to fit, complete. `resolve` makes one."""

    model_type: str
    """One of `encoders.model_types()`."""
    epochs: int
    """At most; the learning rate falls to its end over as many."""
    patience: int
    """Epochs without a better validation score before it stops."""
    dims: int
    """Dimensions of the model's space."""
    hidden: int
    """Width of the encoder's states."""
    layers: int
    heads: int
    towers: int
    """Networks side by side, each with its share of dims and hidden."""
    history_length: int
    """Events of a history that are read."""
    traces: bool
    """Whether fading sums of what was read lead to the heads."""
    clock: bool
    """Whether hours of the day and days of the week are read."""
    sentiment: bool
    """Whether the projection reads the texts' sentiment by itself, see Dataset."""
    dropout: float
    """Of states in the encoder."""
    input_dropout: float
    """Of tokens."""
    row_dropout: float
    """Probability of an item's residual being left out, so that the text learns to stand alone."""
    term_dropout: float
    """Probability of a term of a text being left out."""
    text_dims: int
    """Principal axes of the text vectors that the projection reads; 0 leaves text vectors out."""
    terms: bool
    """Whether terms of the texts have learned rows."""
    learning_rate: float
    weight_decay: float
    averaging: float
    """Decay of the moving average of the weights, which is what is evaluated and kept."""
    clip: float
    """Largest norm of the gradient."""
    batch_contexts: int
    """Contexts (baskets to be predicted) in a step, about."""
    batch_tokens: int
    """Events in a step, at most, about."""
    basket_power: float
    """A basket counts as its size to this power: 1 every line alike, 0 every basket alike."""
    late_weight: float
    """By so much more a user's last basket counts than a first; see Windows."""
    negatives: int
    """Items sampled per step for the softmax; 0: all."""
    popularity_discount: float
    """This power of its popularity an item's score is learned beside, and lacks in answers."""
    type_weight: float
    """Of the behavior types' loss; the items' has 1."""
    gap_weight: float
    """Of the time gaps' loss."""
    seed: int


def resolve(config: FitConfig, events: Events) -> Recipe:
    """Fills in what is None from the training events.

    - Users who repeat items (baskets of a shop): traces carry what they buy again, beside an LSTM;
      else transformers, learned rows for the terms of the texts, and more weight for what users
      did last.
    - Histories: 50 events where nine in ten users have no more, else 200.
    - Softmax: over all items up to FULL_SOFTMAX_ITEMS, above over a sample.
    - Steps: some hundred an epoch, within bounds; fewer leave small data unlearned.
    - Time gaps are learned where there are times.
    - Towers: two where there are many dimensions that two can share evenly.

    Raises:
        InvalidArgumentError: `features` is given, there is no clock to read, the towers cannot
            share dims and hidden evenly, or the heads not the hidden of a tower.
    """
    if config.features is not None:
        raise InvalidArgumentError(
            "a sequence model has no setting features: classic models have", field="features"
        )
    check_clock(config, events)
    usual: dict[str, Any] = {
        **_COMMON,
        **(_REPEATED if repeat_share(events) >= REPEATS else _NEW),
        "history_length": usual_history_length(events),
        "negatives": 0 if len(events.item_ids) <= FULL_SOFTMAX_ITEMS else NEGATIVES,
        "gap_weight": 0.1 if events.has_times else 0.0,
    }
    contexts = len(events.first_of_basket) - 1
    usual["batch_contexts"] = int(np.clip(contexts // usual.pop("steps"), 16, usual.pop("most")))
    made = usual | {name: value for name, value in asdict(config).items() if value is not None}
    made.setdefault("hidden", made["dims"])
    dims, hidden = made["dims"], made["hidden"]
    made.setdefault("towers", 2 if dims >= TWO_TOWERS and dims % 2 == hidden % 2 == 0 else 1)
    towers = made["towers"]
    if towers < 1 or dims % towers or hidden % towers:
        raise InvalidArgumentError(
            f"{towers} towers cannot share {dims} dims and {hidden} hidden evenly", field="towers"
        )
    made.setdefault("heads", 1 if hidden // towers % 2 else 2)
    if made["model_type"] == "transformer" and hidden // towers % made["heads"]:
        raise InvalidArgumentError(
            f"{made['heads']} heads cannot share {hidden // towers} hidden evenly", field="heads"
        )
    # A recurrent encoder over repeats was learned best in large steps, a transformer in small.
    recurrent = made["traces"] and made["model_type"] in ("gru", "lstm")
    made.setdefault("learning_rate", 0.015 if recurrent else 0.0025)
    return Recipe(**made)


def check_clock(config: FitConfig, events: Events) -> None:
    """Raises an InvalidArgumentError where the clock is asked for and events have no times."""
    if config.clock and not events.has_times:
        raise InvalidArgumentError(
            "clock is asked for, and the events have no timestamps", field="clock"
        )


def usual_history_length(events: Events) -> int:
    """50 where nine in ten users have no more events, else 200."""
    lengths = np.diff(events.first_of_user)
    return 50 if np.percentile(lengths[lengths > 0], 90) <= 50 else 200


_COMMON = {
    "patience": 3, "clip": 5.0, "batch_tokens": 16_384, "basket_power": 0.5, "type_weight": 1.0,
    "clock": False, "sentiment": False,
}  # fmt: skip

_REPEATED = {
    "model_type": "lstm", "epochs": 10, "dims": 64, "hidden": 128, "layers": 1, "traces": True,
    "dropout": 0.1, "input_dropout": 0.1, "row_dropout": 0.1, "term_dropout": 0.3,
    "text_dims": 128, "terms": False, "weight_decay": 0.01, "averaging": 0.99,
    "popularity_discount": 0.0, "late_weight": 0.0,
    "steps": 250, "most": 256,
}  # fmt: skip

_NEW = {
    "model_type": "transformer", "epochs": 13, "dims": 256, "layers": 2, "traces": False,
    "dropout": 0.4, "input_dropout": 0.3, "row_dropout": 0.2, "term_dropout": 0.3,
    "text_dims": 384, "terms": True, "weight_decay": 0.0, "averaging": 0.995,
    "popularity_discount": 0.25, "late_weight": 2.0,
    "steps": 128, "most": 1024,
}  # fmt: skip
