"""Checks of requests, the same for the services and for the fake in `foretell.testing`.

Written by hand from the table of limits: runtime protovalidate is slow on repeated fields.
Each raises InvalidArgumentError that names the field and changes nothing.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.errors import (
    FailedPreconditionError,
    ForetellError,
    InvalidArgumentError,
    NotFoundError,
)
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.texts import text_id
from foretell.vectors import Vectors, from_block

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def split(
    elements: Iterable[T], check: Callable[[T, int], None]
) -> tuple[list[int], list[common_pb2.ElementFailure]]:
    """Checks each element of a batch: positions of the good ones, failures of the others."""
    good: list[int] = []
    failures: list[common_pb2.ElementFailure] = []
    for index, element in enumerate(elements):
        try:
            check(element, index)
        except ForetellError as error:
            failures.append(failure(index, error))
        else:
            good.append(index)
    return good, failures


def failure(index: int, error: ForetellError) -> common_pb2.ElementFailure:
    """One element's error in a response."""
    return common_pb2.ElementFailure(index=index, status=error.to_status())


def count(number: int, field: str, maximum: int, minimum: int = 1) -> None:
    """The number of elements of a list."""
    if number < minimum:
        raise InvalidArgumentError(f"{field} is empty", reason="EMPTY", field=field)
    if number > maximum:
        raise InvalidArgumentError(
            f"{field} has {number:,} elements; at most {maximum:,} are allowed",
            reason="TOO_MANY",
            field=field,
            metadata={"limit": str(maximum)},
        )


def identifier(value: str, field: str, max_chars: int = limits.ID_CHARS) -> None:
    """An id or a behavior type: 1 to `max_chars` characters, no control characters."""
    if not value:
        raise InvalidArgumentError(f"{field} is empty", reason="EMPTY_ID", field=field)
    if len(value) > max_chars:
        raise InvalidArgumentError(
            f"{field} has {len(value):,} characters; at most {max_chars} are allowed",
            reason="TOO_LONG",
            field=field,
            metadata={"limit": str(max_chars)},
        )
    if _CONTROL.search(value):
        raise InvalidArgumentError(
            f"{field} has control characters", reason="CONTROL_CHARACTERS", field=field
        )


def optional_identifier(value: str, field: str) -> None:
    """An id that may be left out."""
    if value:
        identifier(value, field)


def request_id(value: str) -> None:
    """A request_id, which may be left out."""
    optional_identifier(value, "request_id")


def request_id_reused(value: str) -> InvalidArgumentError:
    """The error of a request_id that came with another request before."""
    return InvalidArgumentError(
        f"request_id {value!r} came with another request before",
        reason="REQUEST_ID_REUSED",
        field="request_id",
    )


def ids(values: Collection[str], field: str, maximum: int = limits.BATCH, minimum: int = 1) -> None:
    """A list of ids; one bad id is a fault of the call."""
    count(len(values), field, maximum, minimum)
    for index, value in enumerate(values):
        identifier(value, f"{field}[{index}]")


def text(value: str, field: str, *, may_be_empty: bool = False) -> None:
    """A text."""
    if not value.strip() and not may_be_empty:
        raise InvalidArgumentError(f"{field} is empty", reason="EMPTY_TEXT", field=field)
    if len(value) > limits.TEXT_CHARS:
        raise InvalidArgumentError(
            f"{field} has {len(value):,} characters; at most {limits.TEXT_CHARS:,} are allowed",
            reason="TOO_LONG",
            field=field,
            metadata={"limit": str(limits.TEXT_CHARS)},
        )


def attributes(values: Mapping[str, str], field: str) -> None:
    """An item's or event's attributes."""
    if not values:
        return
    count(len(values), field, limits.ATTRIBUTES)
    for key, value in values.items():
        identifier(key, f"{field}[{key[: limits.ATTRIBUTE_KEY_CHARS]}]", limits.ATTRIBUTE_KEY_CHARS)
        _attribute_value(value, f"{field}[{key}]")


def _attribute_value(value: str, field: str) -> None:
    """Refuses an attribute's value that is too long."""
    if len(value) > limits.ATTRIBUTE_VALUE_CHARS:
        raise InvalidArgumentError(
            f"{field} has {len(value):,} characters; "
            f"at most {limits.ATTRIBUTE_VALUE_CHARS:,} are allowed",
            reason="TOO_LONG",
            field=field,
            metadata={"limit": str(limits.ATTRIBUTE_VALUE_CHARS)},
        )


def k(value: int | None, default: int = limits.K_DEFAULT, field: str = "k") -> int:
    """How many hits; None where unset."""
    if value is None:
        return default
    if not 1 <= value <= limits.K:
        raise InvalidArgumentError(
            f"{field} is {value:,}; 1 to {limits.K:,} are allowed",
            reason="BAD_K",
            field=field,
            metadata={"limit": str(limits.K)},
        )
    return value


def hits(request: embedder_pb.SearchRequest) -> tuple[int, int]:
    """How many hits a query gets, and how many scores: at least as many."""
    wanted = k(request.k if request.HasField("k") else None)
    scores = k(request.scores_k if request.HasField("scores_k") else None, wanted, "scores_k")
    if scores > wanted and request.include_vectors:
        raise InvalidArgumentError(
            "scores_k is more than k, which include_vectors does not go with",
            reason="BAD_K",
            field="scores_k",
        )
    return wanted, max(wanted, scores)


def page_size(value: int) -> int:
    """The page size that stands (AIP-158): 0 means the default, too large is coerced."""
    if value < 0:
        raise InvalidArgumentError(
            f"page_size is {value}; it may not be negative", reason="BAD_PAGE", field="page_size"
        )
    return min(value, limits.PAGE) or limits.PAGE_DEFAULT


def bad_page_token() -> InvalidArgumentError:
    """The error of a page token that no list of this kind gave."""
    return InvalidArgumentError(
        "page_token is not from an answer of this method",
        reason="BAD_PAGE_TOKEN",
        field="page_token",
    )


def name(value: str, field: str) -> None:
    """A collection's or version's name."""
    if not _NAME.fullmatch(value) or len(value) > limits.COLLECTION_CHARS:
        raise InvalidArgumentError(
            f"{field} must be 1 to {limits.COLLECTION_CHARS} of a-z, 0-9, '.', '_', '-', "
            "the first a letter or digit",
            reason="BAD_NAME",
            field=field,
        )


def no_collection(value: str, field: str = "collection") -> NotFoundError:
    """The error of a name that no collection has."""
    return NotFoundError(
        f"there is no collection {value!r}",
        reason="NO_COLLECTION",
        field=field,
        metadata={"collection": value},
    )


def no_item(value: str, field: str) -> NotFoundError:
    """The error of an id, one of a batch's, that the collection lacks."""
    return NotFoundError(
        f"{field} {value!r} does not exist", reason="NO_ITEM", field=field, metadata={"id": value}
    )


def wrong_kind(value: str, needed: str, field: str = "collection") -> InvalidArgumentError:
    """The error of a collection of a kind that the method does not take."""
    return InvalidArgumentError(
        f"collection {value!r} is not {needed}", reason="WRONG_KIND", field=field
    )


def vector_cols(value: int) -> None:
    """The dimensions of a new vector collection."""
    if not 1 <= value <= limits.COLS:
        raise InvalidArgumentError(
            f"vector.cols is {value:,}; 1 to {limits.COLS:,} are allowed",
            reason="BAD_COLS",
            field="vector.cols",
            metadata={"limit": str(limits.COLS)},
        )


def item(value: embedder_pb.Item, index: int) -> None:
    """An item of UpsertItems."""
    identifier(value.id, f"items[{index}].id")
    text(value.text, f"items[{index}].text", may_be_empty=True)
    attributes(value.attributes, f"items[{index}].attributes")


def behavior_item(value: embedder_pb.Item, index: int) -> None:
    """An item of the collection `behaviors`: its id, if given, is the hash of its text."""
    text(value.text, f"items[{index}].text")
    if value.id and value.id != text_id(value.text):
        raise InvalidArgumentError(
            f"items[{index}].id is not the hash of its text; leave it empty",
            reason="BAD_BEHAVIOR_ID",
            field=f"items[{index}].id",
        )
    attributes(value.attributes, f"items[{index}].attributes")


def event(value: event_pb.Event, field: str, *, inline: bool = False) -> None:
    """An event to store, or (`inline`) of a request's history."""
    if inline:
        if value.user_id:
            raise InvalidArgumentError(
                f"{field}.user_id must be empty in an inline history",
                reason="USER_ID_IN_HISTORY",
                field=f"{field}.user_id",
            )
    else:
        identifier(value.user_id, f"{field}.user_id")
    identifier(value.behavior_type, f"{field}.behavior_type", limits.TYPE_CHARS)
    optional_identifier(value.item_id, f"{field}.item_id")
    optional_identifier(value.event_id, f"{field}.event_id")
    if value.text or not value.item_id:
        text(value.text, f"{field}.text")
    attributes(value.attributes, f"{field}.attributes")
    if value.HasField("timestamp"):
        _timestamp(value, f"{field}.timestamp")


def too_many_types() -> FailedPreconditionError:
    """The error of an event whose behavior type is new and one too many."""
    return FailedPreconditionError(
        f"there are {limits.BEHAVIOR_TYPES:,} behavior types already",
        reason="TOO_MANY_BEHAVIOR_TYPES",
        metadata={"limit": str(limits.BEHAVIOR_TYPES)},
    )


def _timestamp(value: event_pb.Event, field: str) -> None:
    seconds, nanos = value.timestamp.seconds, value.timestamp.nanos
    if seconds < 0 or not 0 <= nanos < 1_000_000_000:
        raise InvalidArgumentError(
            f"{field} is before 1970 or no valid time", reason="BAD_TIMESTAMP", field=field
        )
    if seconds > time.time() + limits.FUTURE_SECONDS:
        raise InvalidArgumentError(
            f"{field} is more than a day in the future", reason="BAD_TIMESTAMP", field=field
        )


def element_type(value: int) -> common_pb2.ElementType.ValueType:
    """The format of an answer's vectors; unspecified means float32."""
    match value:
        case common_pb2.ELEMENT_TYPE_UNSPECIFIED | common_pb2.ELEMENT_TYPE_FLOAT32:
            return common_pb2.ELEMENT_TYPE_FLOAT32
        case common_pb2.ELEMENT_TYPE_FLOAT16:
            return common_pb2.ELEMENT_TYPE_FLOAT16
    raise InvalidArgumentError(
        f"element_type {value} is none of FLOAT32, FLOAT16",
        reason="BAD_ELEMENT_TYPE",
        field="element_type",
    )


def block(value: common_pb2.VectorBlock, cols: int, field: str = "vectors") -> Vectors:
    """The rows of a block, which must have `cols` dimensions."""
    vectors = from_block(value, field)
    if vectors.shape[1] != cols:
        raise InvalidArgumentError(
            f"{field}.cols is {vectors.shape[1]}; the collection has {cols} dimensions",
            reason="WRONG_COLS",
            field=f"{field}.cols",
            metadata={"cols": str(cols)},
        )
    return vectors


def one_row_each(rows: int, number: int) -> None:
    """The rows of PutVectors: one per id."""
    if rows != number:
        raise InvalidArgumentError(
            f"vectors.rows is {rows}; there are {number} ids",
            reason="WRONG_ROWS",
            field="vectors.rows",
        )


def finite_row(vectors: Vectors, field: str) -> Callable[[object, int], None]:
    """A check for `split` over the rows of a matrix: finite numbers, none too large to multiply."""
    good = np.asarray((np.abs(vectors) <= limits.VALUE).all(axis=1))  # false for NaN

    def check(_: object, index: int) -> None:
        if not good[index]:
            raise InvalidArgumentError(
                f"{field}[{index}] has numbers that are not finite or beyond {limits.VALUE:g}",
                reason="NOT_FINITE",
                field=f"{field}[{index}]",
                metadata={"limit": f"{limits.VALUE:g}"},
            )

    return check


def queries(value: embedder_pb.SearchRequest) -> int:
    """How many queries a Search has."""
    match value.WhichOneof("queries"):
        case "vectors":
            number = value.vectors.rows
        case "texts":
            number = len(value.texts.texts)
        case "ids":
            number = len(value.ids.ids)
        case _:
            raise InvalidArgumentError("there are no queries", reason="EMPTY", field="queries")
    count(number, "queries", limits.QUERIES)
    return number


def filters(values: Sequence[embedder_pb.QueryFilter], queries: int) -> None:
    """The filters of a Search: none, one, or one per query."""
    if len(values) not in (0, 1, queries):
        raise InvalidArgumentError(
            f"filters has {len(values)} elements; none, one or {queries} (one per query) may be",
            reason="BAD_FILTERS",
            field="filters",
        )
    for index, value in enumerate(values):
        ids(value.allow_ids, f"filters[{index}].allow_ids", limits.FILTER_IDS, 0)
        ids(value.deny_ids, f"filters[{index}].deny_ids", limits.FILTER_IDS, 0)
        if value.HasField("condition"):
            _Condition().check(value.condition, f"filters[{index}].condition")
    different = {
        value.condition.SerializeToString(deterministic=True)
        for value in values
        if value.HasField("condition")
    }
    if len(different) > limits.CONDITIONS:
        raise InvalidArgumentError(
            f"filters has {len(different)} different conditions; "
            f"at most {limits.CONDITIONS} are allowed",
            reason="TOO_MANY",
            field="filters",
            metadata={"limit": str(limits.CONDITIONS)},
        )


class _Condition:
    """The check of one condition, which counts its leaves and values on the way."""

    def __init__(self) -> None:
        self._leaves = 0
        self._values = 0

    def check(self, value: embedder_pb.Condition, field: str, depth: int = 1) -> None:
        """Checks a part of the condition at some depth."""
        if depth > limits.CONDITION_DEPTH:
            raise condition_too_deep(field)
        kind = value.WhichOneof("kind")
        match kind:
            case "all_of" | "any_of" | "none_of":
                parts: embedder_pb.Conditions = getattr(value, kind)
                if not parts.conditions:
                    raise InvalidArgumentError(
                        f"{field}.{kind} has no conditions",
                        reason="EMPTY",
                        field=f"{field}.{kind}.conditions",
                    )
                for index, part in enumerate(parts.conditions):
                    self.check(part, f"{field}.{kind}.conditions[{index}]", depth + 1)
                return
            case "one_of":
                identifier(value.one_of.key, f"{field}.one_of.key", limits.ATTRIBUTE_KEY_CHARS)
                self._check_values(value.one_of.values, f"{field}.one_of.values")
            case "range":
                identifier(value.range.key, f"{field}.range.key", limits.ATTRIBUTE_KEY_CHARS)
                _range(value.range, f"{field}.range")
            case "exists":
                identifier(value.exists, f"{field}.exists", limits.ATTRIBUTE_KEY_CHARS)
            case _:
                raise InvalidArgumentError(
                    f"{field}.kind is not set", reason="NO_KIND", field=field
                )
        self._leaves += 1
        if self._leaves > limits.CONDITION_LEAVES:
            raise InvalidArgumentError(
                f"{field} is one leaf more than the {limits.CONDITION_LEAVES} that a condition "
                "may have",
                reason="TOO_MANY",
                field=field,
                metadata={"limit": str(limits.CONDITION_LEAVES)},
            )

    def _check_values(self, values: Sequence[str], field: str) -> None:
        self._values += len(values)
        # What the leaves before it have counts too.
        count(len(values) and self._values, field, limits.CONDITION_VALUES)
        for index, value in enumerate(values):
            _attribute_value(value, f"{field}[{index}]")


def condition_too_deep(field: str) -> InvalidArgumentError:
    """The error of a condition that is nested too deep."""
    return InvalidArgumentError(
        f"{field} is nested more than {limits.CONDITION_DEPTH} deep",
        reason="TOO_DEEP",
        field=field,
        metadata={"limit": str(limits.CONDITION_DEPTH)},
    )


def _range(value: embedder_pb.AttributeRange, field: str) -> None:
    bounds = [kind for kind in ("lower", "upper") if value.WhichOneof(kind)]
    if not bounds:
        raise InvalidArgumentError(f"{field} has no bound", reason="EMPTY", field=field)
    for name in ("gte", "gt", "lte", "lt"):
        if value.HasField(name) and not math.isfinite(getattr(value, name)):
            raise InvalidArgumentError(
                f"{field}.{name} is not finite", reason="NOT_FINITE", field=f"{field}.{name}"
            )
    if len(bounds) < 2:
        return
    lower = value.gte if value.HasField("gte") else value.gt
    upper = value.lte if value.HasField("lte") else value.lt
    closed = value.HasField("gte") and value.HasField("lte")
    if lower > upper or (lower == upper and not closed):
        raise InvalidArgumentError(
            f"{field} from {lower:g} to {upper:g} has no numbers", reason="BAD_RANGE", field=field
        )


def no_conditions(
    values: Sequence[embedder_pb.QueryFilter], collection: str
) -> InvalidArgumentError:
    """The error of conditions in a vector collection, whose items have no attributes."""
    first = next(index for index, value in enumerate(values) if value.HasField("condition"))
    return wrong_kind(collection, "searched by attributes", f"filters[{first}].condition")


_REPEATS = frozenset(prediction_pb.Repeats.values())


def prediction_query(value: prediction_pb.PredictionQuery, field: str = "query") -> None:
    """Whose next behavior, and which items may be answered."""
    optional_identifier(value.user_id, f"{field}.user_id")
    count(len(value.history), f"{field}.history", limits.INLINE_EVENTS, 0)
    for index, one in enumerate(value.history):
        event(one, f"{field}.history[{index}]", inline=True)
    if value.HasField("k"):
        k(value.k, field=f"{field}.k")
    ids(value.allow_item_ids, f"{field}.allow_item_ids", limits.FILTER_IDS, 0)
    ids(value.deny_item_ids, f"{field}.deny_item_ids", limits.FILTER_IDS, 0)
    if value.repeats not in _REPEATS:
        raise InvalidArgumentError(
            f"{field}.repeats {value.repeats} is unknown",
            reason="BAD_REPEATS",
            field=f"{field}.repeats",
        )
