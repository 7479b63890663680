"""Conditions over attributes, as the contract says, one item at a time."""

from __future__ import annotations

from collections.abc import Mapping

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.texts import number_of


def matches(condition: pb.Condition, attributes: Mapping[str, str]) -> bool:
    """Whether an item with these attributes matches a valid condition."""
    match condition.WhichOneof("kind"):
        case "one_of":
            return attributes.get(condition.one_of.key) in condition.one_of.values
        case "range":
            number = number_of(attributes.get(condition.range.key, ""))
            return number is not None and _within(number, condition.range)
        case "exists":
            return condition.exists in attributes
        case "all_of":
            return all(matches(part, attributes) for part in condition.all_of.conditions)
        case "any_of":
            return any(matches(part, attributes) for part in condition.any_of.conditions)
        case _:
            return not any(matches(part, attributes) for part in condition.none_of.conditions)


def _within(number: float, bounds: pb.AttributeRange) -> bool:
    return (
        not (bounds.HasField("gte") and number < bounds.gte)
        and not (bounds.HasField("gt") and number <= bounds.gt)
        and not (bounds.HasField("lte") and number > bounds.lte)
        and not (bounds.HasField("lt") and number >= bounds.lt)
    )
