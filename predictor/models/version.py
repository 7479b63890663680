"""A trained version: all that training makes and serving answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from foretell.errors import InvalidArgumentError
from foretell.projection import Projection
from foretell.vectors import Vectors
from predictor.models.calibration import ItemCalibration, TypeCalibration
from predictor.models.history import HISTORY_EVENTS, HistoryBatch, Ints
from predictor.models.ranking.ranker import Ranker
from predictor.models.ranking.recommender import Recommender
from predictor.models.sequence.bag import Network
from predictor.models.sequence.encoders import NetworkConfig
from predictor.models.types.models import ItemTypeModel, TypeModel

VERSION_NAME = r"[a-z0-9][a-z0-9._-]{0,48}"
"""Names that, with `.behaviors` behind them, are names of collections."""

OWN = "foretell"
"""Name of the version itself among the methods of its reports; the others are baselines."""

LONGEST_HORIZON = 10**16
"""Microseconds: three hundred years."""

LONGEST_LOG_GAP = 22.0
"""Of a gap in log seconds: a hundred years."""

GOLDEN_TOLERANCE = 1e-3
"""Largest difference to the golden answers: covers other CPUs and libraries, not other weights."""


SecondStage = Ranker | Recommender
"""What finds and orders items, beside or instead of Search."""


class EncoderConfig(BaseModel):
    """The text encoder whose vectors the version was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    pooling: str
    cols: int = Field(gt=0)


class VersionConfig(BaseModel):
    """config.json of a version directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    version: str = Field(pattern=rf"^{VERSION_NAME}$")
    encoder: EncoderConfig
    network: NetworkConfig
    """Shape of the network."""
    behavior_types: tuple[str, ...] = Field(min_length=1)
    """In the order of the network's type logits."""
    history_length: int = Field(gt=0, le=HISTORY_EVENTS)
    """Events of a history that the sequence network reads: the last ones."""
    repeats: Literal["allowed", "excluded"]
    """What REPEATS_UNSPECIFIED means: `excluded` where users hardly ever repeat an item."""
    has_items: bool
    """Whether there is an item head: publish `VERSION.items`."""
    has_texts: bool
    """Whether events carry texts: publish `VERSION.behaviors`."""
    has_times: bool
    """Whether time gaps were seen in training; see history_batch."""
    horizon: int = Field(default=0, ge=0, le=LONGEST_HORIZON)
    """Microseconds: see history.asked_at."""
    type_calibration: TypeCalibration
    """Of the network's type logits."""
    item_calibration: ItemCalibration
    """Of the scores that order the items."""
    candidates: int = Field(gt=0)
    """Items that Search is asked for, where there is no ranker to say it."""
    activations: tuple[Literal["identity", "relu", "gelu", "tanh"], ...] = Field(
        default=("identity",), min_length=1, max_length=64
    )
    """Of the projection's layers."""
    files: dict[str, str] = {}
    """sha256 of every other file, by its path within the directory."""

    @property
    def dims(self) -> int:
        """Dimensions of the model's space."""
        return self.network.dims


@dataclass(frozen=True)
class Golden:
    """Histories and the answers that the version gave when it was made."""

    histories: HistoryBatch
    type_probabilities: NDArray[np.float32]
    """(histories, behavior_types)."""
    queries: Vectors
    """(histories, dims)."""


class Read(NamedTuple):
    """What the sequence network says of some histories."""

    type_probabilities: NDArray[np.float32]
    """(histories, behavior_types), calibrated."""
    queries: Vectors
    """(histories, dims): the score of an item is query . item vector."""
    gaps_s: NDArray[np.float32]
    """(histories,) seconds until the next event; 0 without times."""


@dataclass(frozen=True)
class Version:
    """What answers: made by training, written and read by model_dir."""

    config: VersionConfig
    network: Network
    """In evaluation mode, on the CPU."""
    projection: Projection
    """From text vectors (encoder.cols) to the model's space (dims); never normalised."""
    item_ids: tuple[str, ...]
    """The catalogue at training; empty without an item head."""
    warm: Ints
    """(rows,) ascending positions in item_ids of the items that have a residual."""
    residuals: Vectors
    """(rows, dims)."""
    golden: Golden
    ranker: SecondStage | None = None
    """Finds and orders items, of what Search gives too; None: the order of Search stands."""
    type_model: TypeModel | None = None
    """Its type probabilities stand instead of the network's."""
    item_type_model: ItemTypeModel | None = None
    """What a user would do with an item."""
    reports: Mapping[str, Any] = field(default_factory=dict)
    """File name to content of what there is to tell: metrics.json, lineage.json, history.json."""

    @property
    def name(self) -> str:
        """Of the version."""
        return self.config.version

    def predict(self, batch: HistoryBatch) -> Read:
        """What the network says."""
        outputs = self.network.predict(batch)
        gaps = np.exp(np.minimum(outputs.log_gaps, LONGEST_LOG_GAP))
        if not self.config.has_times:
            gaps = np.zeros(len(batch), np.float32)
        probabilities = self.config.type_calibration.probabilities(outputs.type_logits)
        return Read(probabilities, outputs.queries, gaps)

    @property
    def reads_whole_histories(self) -> bool:
        """Whether a part looks beyond the `history_length` latest events."""
        return any((self.ranker, self.type_model, self.item_type_model))

    def item_probabilities(
        self, scores: NDArray[np.float32], candidates: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Probabilities (..., n) of scores (..., n) among those of all candidates (..., m)."""
        return self.config.item_calibration.probabilities(scores, candidates)

    def check_golden(self) -> None:
        """Recomputes the golden histories.

        Raises:
            InvalidArgumentError: an answer differs by more than GOLDEN_TOLERANCE.
        """
        probabilities, queries, _ = self.predict(self.golden.histories)
        for name, ours, theirs in (
            ("type probabilities", probabilities, self.golden.type_probabilities),
            ("query vectors", queries, self.golden.queries),
        ):
            worst = float(np.abs(ours - theirs).max(initial=0.0))
            if not worst <= GOLDEN_TOLERANCE:  # catches NaN too
                raise InvalidArgumentError(
                    f"version {self.name}: {name} of golden.safetensors differ by {worst:.2g}; "
                    f"at most {GOLDEN_TOLERANCE} is allowed",
                    reason="BAD_MODEL_DIRECTORY",
                )
