"""Which classic models there are, and how one is fitted: what is not said is derived from the data.

Free of the libraries that fit them, so that their names can be told without these.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from foretell import limits
from foretell.errors import InvalidArgumentError
from foretell.projection import Projection
from foretell.vectors import Vectors
from predictor.learning.data import Events
from predictor.learning.measures.evaluation import Space
from predictor.learning.sequence.fitting import Epoch
from predictor.learning.sequence.recipe import FitConfig, check_clock, usual_history_length
from predictor.learning.sources import Dataset
from predictor.models.ranking.recommender import RECOMMENDERS
from predictor.models.sequence.bag import BagNetwork

BY_CONTENT = ("content", *RECOMMENDERS)
"""Those that are about items, and take behavior types as users' shares of them."""

FINE_TUNED = "bert_finetune"
"""The logistic regression on the vectors of an encoder that is fine-tuned before."""

CLASSIC = (
    "linear", "logistic", "mlp", "lightgbm", "word2vec_logistic", FINE_TUNED, *BY_CONTENT,
)  # fmt: skip
"""Models of `python -m predictor train --model`, beside the encoders of sequence models."""

Features = Literal["all", "first", "pca", "select", "keywords"]
FEATURES: tuple[Features, ...] = get_args(Features)
"""What is kept of a text: all of its vector, the vector's first dimensions, its principal
components, the dimensions that tell the behavior types of their own events apart best; or instead
of the vector, the words and phrases that do."""

FIRST_DIMS = 10
"""Of `first`: what tutorials take."""

DIMS = 32
"""Of the other choices, where nobody says otherwise."""

HIDDEN = 64
"""Width of the one hidden layer of `mlp`."""

EPOCHS = {"mlp": 20, "lightgbm": 300, FINE_TUNED: 3}
"""Of the network or the encoder, or rounds of trees; at most."""

_SETTINGS = {"model_type", "features", "dims", "history_length", "seed"}
_OWN_SETTINGS = {"mlp": {"hidden", "epochs"}, "lightgbm": {"epochs"}, FINE_TUNED: {"epochs"}}


@dataclass(frozen=True)
class ClassicRecipe:
    """How to fit, complete. `resolve_classic` makes one."""

    model_type: str
    """One of CLASSIC."""
    features: str
    """One of FEATURES, or word2vec."""
    dims: int
    """Numbers kept of a text; the model's space has one more, see `bag`, and one for sentiment."""
    hidden: int
    """Width of the hidden layer, where there is one."""
    epochs: int
    """At most, see EPOCHS; 0 where there are none."""
    history_length: int
    """Events of a history that are read."""
    clock: bool
    """Whether the hour of the day and the day of the week of the last event are read."""
    sentiment: bool
    """Whether the texts' sentiment is kept beside, see Dataset."""
    seed: int
    texts: bool | None
    """Whether the types are read off texts too. None: where validation says that it helps."""
    chosen: dict[str, float] = field(default_factory=dict)
    """What validation chose: C, alpha, epochs or rounds, and whether texts are read."""


@dataclass(frozen=True)
class FittedBag:
    """A fitted model and all that follows from it, as FittedSequence."""

    recipe: ClassicRecipe
    network: BagNetwork
    projection: Projection
    residuals: Vectors
    """(items, dims): their popularity, in the last axis."""
    warm: NDArray[np.bool_]
    """(items,) whether training saw the item."""
    space: Space
    curve: tuple[Epoch, ...] = ()
    """None is drawn."""


def resolve_classic(config: FitConfig, dataset: Dataset, train: Events) -> ClassicRecipe:
    """Fills in what is None.

    Raises:
        InvalidArgumentError: the model has no such setting, or cannot be fitted on these data.
    """
    model, cols = config.model_type or "", dataset.encoder.cols
    _check_settings(model, config)
    check_clock(config, train)
    _check_data(model, dataset, train)
    reads_search = "content" in (model, *RECOMMENDERS.get(model, ()))
    usual: Features = "all" if reads_search else "pca"
    features = config.features or ("word2vec" if model == "word2vec_logistic" else usual)
    most = limits.COLS - 2 if features in ("word2vec", "keywords") else cols
    if features == "all":
        dims = config.dims or cols
        if dims != cols:
            raise InvalidArgumentError(
                f"--features all keeps the {cols} dimensions of the text vectors, not {dims}: "
                f"choose another of {', '.join(FEATURES)}",
                field="dims",
            )
    else:
        dims = config.dims or min(FIRST_DIMS if features == "first" else DIMS, most)
    if not 1 <= dims <= most:
        raise InvalidArgumentError(f"dims is {dims}; 1 to {most} are possible", field="dims")
    hidden = config.hidden or HIDDEN
    length = config.history_length or usual_history_length(train)
    # Who asks for features, for word2vec or for a fine-tuned encoder, wants to see them read.
    asked = bool(config.features or config.sentiment) or model in ("word2vec_logistic", FINE_TUNED)
    texts = True if asked else None
    epochs = config.epochs or EPOCHS.get(model, 0)
    clock, sentiment = bool(config.clock), bool(config.sentiment)
    return ClassicRecipe(
        model, features, dims, hidden, epochs, length, clock, sentiment, config.seed, texts
    )


def _check_settings(model: str, config: FitConfig) -> None:
    own = _SETTINGS | _OWN_SETTINGS.get(model, set())
    if model not in BY_CONTENT:
        own = own | {"clock", "sentiment"}  # which are about types
    if model == "word2vec_logistic":
        own = own - {"features"}  # its words are its features
    for name, value in asdict(config).items():
        if value is not None and name not in own:
            raise InvalidArgumentError(f"the model {model} has no setting {name}", field=name)
    if config.features is not None and config.features not in FEATURES:
        raise InvalidArgumentError(
            f"features {config.features!r} is none of {', '.join(FEATURES)}", field="features"
        )


def _check_data(model: str, dataset: Dataset, train: Events) -> None:
    if model == "content":
        if not train.has_items or not dataset.item_vectors.any():
            raise InvalidArgumentError(
                "the model content finds items by their texts, and no item has one", field="items"
            )
    elif model in RECOMMENDERS:
        if not train.has_items:
            raise InvalidArgumentError(
                f"the model {model} finds items, and no event to train on has one", field="item_id"
            )
    elif len(train.behavior_types) < 2:
        raise InvalidArgumentError(
            f"all events to train on have the behavior type {train.behavior_types[0]!r}: the model "
            f"{model} has nothing to tell apart; content and the sequence models find items",
            reason="ONE_BEHAVIOR_TYPE",
            field="behavior_type",
        )
