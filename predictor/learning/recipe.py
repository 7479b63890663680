"""How a sequence model is fitted: what is not said is derived from the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from predictor.learning.data import Events, repeat_share
from predictor.learning.evaluation import REPEATS

FULL_SOFTMAX_ITEMS = 50_000
"""Largest catalogue whose items are all compared by default."""

NEGATIVES = 4_096
"""Items sampled per step by default, for larger catalogues."""


@dataclass(frozen=True)
class FitConfig:
    """What the caller says about how to fit; fields as in Recipe, None: derived from the data."""

    model_type: str | None = None
    epochs: int | None = None
    patience: int | None = None
    dims: int | None = None
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    history_length: int | None = None
    traces: bool | None = None
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
    negatives: int | None = None
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
    history_length: int
    """Events of a history that are read."""
    traces: bool
    """Whether fading sums of what was read lead to the heads."""
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
    negatives: int
    """Items sampled per step for the softmax; 0: all."""
    type_weight: float
    """Of the behavior types' loss; the items' has 1."""
    gap_weight: float
    """Of the time gaps' loss."""
    seed: int


def resolve(config: FitConfig, events: Events) -> Recipe:
    """Fills in what is None from the training events."""
    repeats = repeat_share(events) >= REPEATS
    contexts = len(events.first_of_basket) - 1
    usual: dict[str, Any] = {**(_SHOP if repeats else _BROAD)}
    lengths = np.diff(events.first_of_user)
    usual["history_length"] = 50 if np.percentile(lengths[lengths > 0], 90) <= 50 else 200
    usual["batch_contexts"] = int(np.clip(contexts // usual.pop("steps"), 16, usual.pop("most")))
    usual["negatives"] = 0 if len(events.item_ids) <= FULL_SOFTMAX_ITEMS else NEGATIVES
    usual["gap_weight"] = 0.1 if events.has_times else 0.0
    given = {name: value for name, value in asdict(config).items() if value is not None}
    merged = {**usual, **given}
    merged.setdefault("hidden", merged["dims"])
    merged.setdefault("heads", 1 if merged["hidden"] % 2 else 2)
    return Recipe(**{field.name: merged[field.name] for field in fields(Recipe)})


_COMMON = {
    "patience": 3, "clip": 5.0, "batch_tokens": 16_384, "basket_power": 0.5, "type_weight": 1.0,
    "layers": 1,
}  # fmt: skip

_SHOP = {
    **_COMMON, "model_type": "lstm", "epochs": 10, "dims": 64, "hidden": 128, "traces": True,
    "dropout": 0.1, "input_dropout": 0.1, "row_dropout": 0.1, "term_dropout": 0.3,
    "text_dims": 128, "terms": False, "learning_rate": 0.015, "weight_decay": 0.01,
    "averaging": 0.99, "steps": 250, "most": 256,
}  # fmt: skip

_BROAD = {
    **_COMMON, "model_type": "transformer", "epochs": 13, "dims": 128, "traces": False,
    "dropout": 0.4, "input_dropout": 0.3, "row_dropout": 0.2, "term_dropout": 0.3,
    "text_dims": 384, "terms": True, "learning_rate": 0.0025, "weight_decay": 0.0,
    "averaging": 0.995, "steps": 128, "most": 1024,
}  # fmt: skip
