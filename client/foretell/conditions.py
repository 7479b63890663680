"""Conditions over items' attributes, for searches:

    foretell.attribute("department") == "GROCERY"
    (foretell.attribute("price") < 5) & ~foretell.attribute("brand").is_in(["Private", "none"])

A comparison matches no item that lacks the attribute; `~` and `!=` match what the comparison does
not, items without the attribute too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from foretell.errors import InvalidArgumentError


class Condition:
    """What an item's attributes must be. `attribute` makes them; `&`, `|` and `~` combine them."""

    __slots__ = ()

    def __and__(self, other: Condition) -> Condition:
        """Both hold."""
        return AllOf((*_parts(self, AllOf), *_parts(other, AllOf)))

    def __or__(self, other: Condition) -> Condition:
        """One holds, or both."""
        return AnyOf((*_parts(self, AnyOf), *_parts(other, AnyOf)))

    def __invert__(self) -> Condition:
        """It does not hold."""
        return NoneOf(_parts(self, AnyOf))

    def __bool__(self) -> NoReturn:
        """Refuses `and`, `or`, `not` and `1 < attribute("price") < 5`, which would drop a part."""
        raise TypeError(
            "a condition is neither true nor false: combine conditions with &, | and ~ "
            "in parentheses, and use between() for two bounds"
        )


@dataclass(frozen=True, slots=True)
class OneOf(Condition):
    """The attribute is one of the values."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Range(Condition):
    """The attribute is a number within the bounds that are not None."""

    key: str
    gte: float | None = None
    gt: float | None = None
    lte: float | None = None
    lt: float | None = None


@dataclass(frozen=True, slots=True)
class Exists(Condition):
    """The item has the attribute."""

    key: str


@dataclass(frozen=True, slots=True)
class AllOf(Condition):
    """All of the conditions hold."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AnyOf(Condition):
    """At least one of the conditions holds."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class NoneOf(Condition):
    """None of the conditions holds."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """An attribute of the items; compare it to get a condition.

    `==`, `!=` and `is_in` compare texts; `<`, `<=`, `>`, `>=` and `between` compare with what
    reads as a number (`12`, `-0.5`, `1e3`, but not `12 OZ`).
    """

    key: str

    __hash__ = None  # type: ignore[assignment]  # `==` is no equality, so sets cannot work

    def __eq__(self, value: str) -> Condition:  # type: ignore[override]
        return OneOf(self.key, (value,))

    def __ne__(self, value: str) -> Condition:  # type: ignore[override]
        return NoneOf((OneOf(self.key, (value,)),))

    def __lt__(self, number: float) -> Condition:
        return Range(self.key, lt=number)

    def __le__(self, number: float) -> Condition:
        return Range(self.key, lte=number)

    def __gt__(self, number: float) -> Condition:
        return Range(self.key, gt=number)

    def __ge__(self, number: float) -> Condition:
        return Range(self.key, gte=number)

    def between(self, smallest: float, largest: float) -> Condition:
        """It is a number from `smallest` to `largest`, these included."""
        return Range(self.key, gte=smallest, lte=largest)

    def is_in(self, values: Iterable[str]) -> Condition:
        """It is one of the values.

        Raises:
            InvalidArgumentError: they are one string, which Python would take for its letters.
        """
        if isinstance(values, str):
            raise InvalidArgumentError(
                "values is one string; give a list of them", reason="NO_LIST", field="values"
            )
        return OneOf(self.key, tuple(values))

    def exists(self) -> Condition:
        """The item has it, whatever its value is."""
        return Exists(self.key)


def attribute(key: str) -> Attribute:
    """The attribute `key` of the items, to be compared."""
    return Attribute(key)


def _parts(condition: Condition, kind: type[AllOf] | type[AnyOf]) -> tuple[Condition, ...]:
    """What a condition of a kind combines, so that long chains do not become deep."""
    return condition.conditions if isinstance(condition, kind) else (condition,)
