"""What the client gives and takes: frozen dataclasses, numpy arrays where there are vectors.

They mirror the contract under `protos/`, where every limit is written; what differs is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from foretell.conditions import Condition
from foretell.errors import ForetellError
from foretell.vectors import Vectors

T = TypeVar("T")


# --- What both services share ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """One element of a batch that was not served; the others were."""

    index: int
    """Position in what the caller gave, from 0."""
    error: ForetellError
    """Why; it is not raised."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the call's time in the service went, in microseconds; 0: the stage did not run."""

    total_us: int = 0
    queue_us: int = 0
    tokenize_us: int = 0
    forward_us: int = 0
    search_us: int = 0


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list."""

    elements: tuple[T, ...]
    """What is on it, in the order of the list."""
    next_page_token: str
    """Gives the next page; empty on the last one."""


@dataclass(frozen=True, slots=True)
class ImportResult:
    """The outcome of sending many items or events in several calls."""

    sent: int
    """Items or events that the caller gave; written + duplicates + failed."""
    written: int
    duplicates: int
    """Events ignored because their event_id was known."""
    failed: int
    """Those that the service refused."""
    failures: tuple[Failure, ...]
    """The first 1,000 of them."""


# --- Embedder -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A thing with a text."""

    id: str
    """In `behaviors` it may be left empty: it is the hash of the text."""
    text: str = ""
    """May be empty: the item's text vector is then zero."""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """Vectors of texts."""

    vectors: Vectors
    """Shape (texts, cols), float32; rows of failed texts are zero."""
    failures: tuple[Failure, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class UpsertResult:
    """The outcome of writing items."""

    upserted: int
    """Items written."""
    encoded: int
    """Texts that had to be encoded; the others were known."""
    failures: tuple[Failure, ...]
    """Items not written."""
    seq: int
    """The write's position in the store's order."""
    timings: Timings


@dataclass(frozen=True, slots=True)
class PutResult:
    """The outcome of writing vectors."""

    written: int
    """Rows written."""
    failures: tuple[Failure, ...]
    """Rows not written."""
    seq: int
    """The write's position in the store's order."""


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """The outcome of deleting items."""

    deleted: int
    missing_ids: tuple[str, ...]
    """Ids that did not exist."""
    seq: int
    """The write's position in the store's order."""


@dataclass(frozen=True, slots=True, eq=False)
class ItemsResult:
    """Items by id."""

    items: tuple[Item, ...]
    """Those found, in the order of the request."""
    vectors: Vectors | None
    """Shape (items, cols), one row per item of `items`; None if not asked for."""
    missing_ids: tuple[str, ...]
    """Ids that do not exist."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What a query may answer: what passes all three."""

    allow_ids: Sequence[str] = ()
    """Only these, if not empty."""
    deny_ids: Sequence[str] = ()
    """None of these."""
    where: Condition | None = None
    """Only items with such attributes."""


@dataclass(frozen=True, slots=True, eq=False)
class SearchHits:
    """The nearest items of one query, best first."""

    ids: tuple[str, ...]
    """Fewer than k only where fewer items pass the filter."""
    scores: NDArray[np.float32]
    """Inner products, shape (hits,)."""
    vectors: Vectors | None
    """Shape (hits, cols); None if not asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """Hits of every query."""

    hits: tuple[SearchHits, ...]
    """One per query, in their order; without ids where the query is in `failures`."""
    failures: tuple[Failure, ...]
    missing_ids: tuple[str, ...]
    """Ids of allow lists and id queries that the collection lacks."""
    timings: Timings


class CollectionKind(StrEnum):
    """What a collection is."""

    TEXT = "text"
    """Vectors by the server's encoder."""
    VECTOR = "vector"
    """Vectors by the caller."""
    DERIVED = "derived"
    """Vectors by a projection of another collection's."""
    UNKNOWN = "unknown"
    """A kind newer than this client."""


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection as it stands."""

    name: str
    kind: CollectionKind
    source: str
    """What it is derived from; empty unless it is derived."""
    cols: int
    """Dimensions of its vectors."""
    items: int
    """Items in it."""
    seq: int
    """Position of its last change in the store's order."""
    index: str
    """Kind of its index, as faiss names it."""


@dataclass(frozen=True, slots=True, eq=False)
class ItemChanges:
    """Changes of a collection, in the order of the store."""

    ids: tuple[str, ...]
    """Items new or changed."""
    vectors: Vectors
    """Shape (ids, cols)."""
    deleted_ids: tuple[str, ...]
    """Items that are gone."""
    seq: int
    """The caller knows the collection up to here: `after_seq` of the next watch."""
    caught_up: bool
    """Whether this is all that was committed when the message was made."""


@dataclass(frozen=True, slots=True)
class EmbedderInfo:
    """What runs as the embedder."""

    version: str
    encoder: str
    pooling: str
    """How token vectors become one: mean, cls or last_token."""
    cols: int
    """Dimensions of a text vector."""
    max_tokens: int
    """Tokens of a text that the encoder reads."""
    device: str
    """cpu or cuda."""
    libraries: Mapping[str, str]
    """Library name to version."""
    has_store: bool
    """Whether it has a data directory; without one only `embed` and `embedder_info` work."""
    texts_encoded: int
    """Since the start."""
    texts_cached: int
    """Texts answered from memory or store since the start."""
    path: str
    """What runs the encoder: library, number format, packed or padded."""
    agreement_cosine: float
    """Of its vectors with those of float32, mean over 1,000 item texts..."""
    agreement_recall_at_10: float
    """... and the mean share of a text's 10 nearest neighbours that stay so."""


# --- Predictor ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a user did, with an item, a text, or both."""

    user_id: str
    """Empty in the inline history of a request."""
    behavior_type: str
    timestamp: datetime | None = None
    """With a time zone; kept in UTC and microseconds. None: the server's clock. Events of one
    user with the same time are one basket."""
    item_id: str = ""
    text: str = ""
    event_id: str = ""
    """A second event with the same id is ignored."""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IngestResult:
    """The outcome of storing events."""

    accepted: int
    """Events stored."""
    duplicates: int
    """Events ignored because their event_id was known."""
    failures: tuple[Failure, ...]
    """Events not stored."""


@dataclass(frozen=True, slots=True)
class DeletedUser:
    """The outcome of deleting a user."""

    deletion_id: str
    """Names this deletion in the service's logs."""
    deleted_events: int
    """0 for an unknown user."""


class Repeats(StrEnum):
    """Whether items that the user had before may be answered."""

    ALLOWED = "allowed"
    EXCLUDED = "excluded"


class Method(StrEnum):
    """What made an answer."""

    MODEL = "model"
    """The active model."""
    CONTENT = "content"
    """Text similarity to the user's latest items or texts."""
    PERSONAL_FREQUENCY = "personal_frequency"
    """What the user had before."""
    POPULAR = "popular"
    """What all users have lately."""
    UNKNOWN = "unknown"
    """A method newer than this client, or none."""


class FallbackReason(StrEnum):
    """Why the active model did not make the items."""

    NO_MODEL = "no_model"
    NO_HISTORY = "no_history"
    NO_ITEM_HEAD = "no_item_head"
    EMBEDDER_UNAVAILABLE = "embedder_unavailable"
    UNKNOWN = "unknown"
    """A reason newer than this client."""


class ShortfallReason(StrEnum):
    """Why there are fewer items than k."""

    CATALOGUE_EXHAUSTED = "catalogue_exhausted"
    FILTERED = "filtered"
    UNKNOWN = "unknown"
    """A reason newer than this client."""


@dataclass(frozen=True, slots=True)
class PredictionQuery:
    """Whose next behavior, and which items may be answered."""

    user_id: str = ""
    """A stored user; empty: the inline history is all there is."""
    history: Sequence[Event] = ()
    """Events that follow the stored ones, in the order of time, without a user_id."""
    k: int | None = None
    """Items to answer; None: 10 (in `rank`: all)."""
    allow_item_ids: Sequence[str] = ()
    """Only these, if not empty."""
    deny_item_ids: Sequence[str] = ()
    """None of these."""
    repeats: Repeats | None = None
    """None: as the model was trained."""


@dataclass(frozen=True, slots=True)
class BehaviorTypeProbability:
    """How likely a behavior type is next."""

    behavior_type: str
    probability: float
    """Calibrated; all types sum to 1."""


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """An item with what it may mean to the user."""

    item_id: str
    interest_score: float
    """For ranking: higher is better; comparable within one response only."""
    probability: float
    """That the item is in the user's next basket (without timestamps: that it is the next one),
    calibrated; with an allow list and in a ranking as if no other items existed; 0 where the method
    gives none."""
    method: Method
    behavior_types: tuple[BehaviorTypeProbability, ...] = ()
    """In a Rank, of a model that has learned it: what the user would do with this item, most
    probable first."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a user is likely to do next."""

    behavior_types: tuple[BehaviorTypeProbability, ...]
    """Most probable first."""
    items: tuple[ScoredItem, ...]
    """Best first."""
    model_version: str
    """Empty without an active model."""
    fallback_reason: FallbackReason | None
    """Why the model did not make the items; None: it did."""
    shortfall_reason: ShortfallReason | None
    """Why there are fewer items than k; None: there are k."""
    candidates: int
    """Items that the model compared for this answer."""
    missing_ids: tuple[str, ...]
    """Items that the request names and that do not exist."""
    pending_texts: int
    """Events of the history whose text has no vector yet."""
    history_events: int
    """Events of the history that the answer rests on."""
    predicted_behavior_type: str
    """The type to name where only one can be named: by the model's decision rule, which gives rare
    types their due, so it need not be the most probable one. Empty where nothing is known."""
    expected_gap_s: float | None
    """The model's estimate of the seconds from the last event to the next; None: it has none."""
    timings: Timings
    """Of the call that answered."""


@dataclass(frozen=True, slots=True)
class PredictManyResult:
    """Predictions for many queries."""

    predictions: tuple[Prediction, ...]
    """One per query, in their order; empty where the query is in `failures`."""
    failures: tuple[Failure, ...]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Model:
    """A trained version."""

    version: str
    model_type: str
    """The encoder of its sequence model."""
    active: bool
    """Whether it answers now."""
    registered_at: datetime
    """UTC."""
    behavior_types: tuple[str, ...]
    """Those it knows."""
    items: int
    """Items of the catalogue at training; 0: it predicts types only."""
    repeats: Repeats | None
    """What `PredictionQuery.repeats` of None means with it."""
    metrics: Mapping[str, float]
    """Its evaluation when it was trained."""
    parts: tuple[str, ...] = ()
    """What it has beside the sequence model: ranker, type_model, item_type_model."""


@dataclass(frozen=True, slots=True)
class ActivatedModel:
    """The outcome of an activation."""

    model: Model
    """The version that answers now."""
    previous_version: str
    """The one before; empty when there was none."""


@dataclass(frozen=True, slots=True)
class PredictorInfo:
    """What runs as the predictor."""

    version: str
    model_version: str
    """Empty without an active model."""
    events: int
    users: int
    """Users with at least one event."""
    pending_texts: int
    """Behavior texts that have no vector yet."""
    embedder_address: str
    embedder_available: bool
    """Whether it answered lately."""
    items: int
    """Items in memory of the active model."""
    libraries: Mapping[str, str]
    """Library name to version."""
