"""What the callers write: few ids, texts and vectors, so that they meet, and each has a name.

A vector's name is what the model compares; its numbers follow from the name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from bench.crashing.model import Value
from foretell.projection import Activation, AffineLayer, Projection
from foretell.terms import TermRows
from foretell.types import Item
from foretell.vectors import Vectors

ITEM_IDS = tuple(f"item {number:03}" for number in range(240))
"""Few, so that writes meet."""
VECTOR_IDS = tuple(f"vector {number:04}" for number in range(3_000))
"""Enough for an approximate index, which is built anew and extended again and again."""

ITEMS = "items"
VECTORS = "crash.vectors"
"""A vector collection."""
STEADY = "crash.steady"
"""A derived collection that stays, with terms."""
PASSING = "crash.passing"
"""A derived collection that is deleted and created anew now and then."""

TEXT_COLS = 384
COLS = 32
DERIVED_COLS = 8

_FLAVOURS = ("vanilla", "smoked", "organic", "frozen", "", "salted", "whole", "lemon")
_GOODS = ("cheese", "yogurt", "salmon", "bread", "coffee beans", "paper towels", "dog food", "soap")

TEXTS = tuple(f"{flavour} {goods}".strip() for goods in _GOODS for flavour in _FLAVOURS)
SHADES = ("", "red", "green", "blue")
"""Values of the items' one attribute; empty: it has none."""
NO_RESIDUAL = "0"
RESIDUALS = tuple(str(number) for number in range(1, 10))
ROWS = tuple(str(number) for number in range(2_000))
"""Names of the rows in the vector collection."""


def item(id: str, value: str) -> Item:
    """The item that a value of `item_value` stands for."""
    text, shade = value.split("|")
    return Item(id, text, {"shade": shade} if shade else {})


def item_value(item: Item) -> str:
    """An item's text and attributes as one value."""
    return f"{item.text}|{item.attributes.get('shade', '')}"


def _unit(rows: Vectors) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def _named(names: Sequence[str], rows: Vectors) -> Mapping[str, Vectors]:
    return MappingProxyType(dict(zip(names, rows, strict=True)))


def _normal(seed: int, *shape: int) -> Vectors:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


ROW_OF = _named(ROWS, _unit(_normal(1, len(ROWS), COLS)))
"""Vectors of the vector collection by name; of length 1, so that each is nearest to itself."""

NAME_OF_ROW = MappingProxyType({row.tobytes(): name for name, row in ROW_OF.items()})

RESIDUAL_OF = _named(
    (NO_RESIDUAL, *RESIDUALS),
    np.concatenate([np.zeros((1, DERIVED_COLS), np.float32), _normal(2, 9, DERIVED_COLS)]),
)
"""Residuals by name."""


def _steady() -> Projection:
    terms = tuple(sorted({word for text in TEXTS for word in text.split()}))
    rows = TermRows(terms, np.ones(len(terms), np.float32), _normal(3, len(terms), DERIVED_COLS))
    layer = AffineLayer(_normal(4, DERIVED_COLS, TEXT_COLS), np.ones(DERIVED_COLS, np.float32))
    return Projection((layer,), normalize=True, terms=rows)


def _passing() -> Projection:
    hidden = AffineLayer(_normal(5, 32, TEXT_COLS), np.zeros(32, np.float32), Activation.TANH)
    last = AffineLayer(_normal(6, DERIVED_COLS, 32), np.ones(DERIVED_COLS, np.float32))
    return Projection((hidden, last), normalize=True)


PROJECTIONS = MappingProxyType({STEADY: _steady(), PASSING: _passing()})
"""Of the derived collections, by name."""


def name_of(vector: Vectors, named: Mapping[str, Vectors], tolerance: float) -> Value:
    """Which of the named vectors it is; None: none of them."""
    for name, row in named.items():
        if np.abs(row - vector).max() <= tolerance:
            return name
    return None
