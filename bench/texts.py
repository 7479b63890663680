"""Texts to encode: Complete Journey's products, whole, in part and joined.

- short: the first two words of a product's type and a package size, about 9 tokens with the two
  special ones.
- long: a product's type and the whole texts of four, about 77 tokens.
- mixed: a third short, a third a product's whole text and another's type (about 23 tokens), a third
  long.
"""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from bench import datasets

SETS = ("short", "long", "mixed")

_LONG = 4
"""Products in a long text."""


class Texts:
    """An endless supply of texts, none of which comes twice; the same for the same seed.

    Args:
        cache: where the converted data set is kept, see `datasets.files`.
        seed: of the choice of products.
    """

    def __init__(self, cache: Path, seed: int = 0) -> None:
        with datasets.files("journey", Path(), cache).items.open(encoding="utf-8") as file:
            self._wholes = list(dict.fromkeys(row["text"] for row in csv.DictReader(file)))
        parts = [whole.split(", ") for whole in self._wholes]
        self._types = list(dict.fromkeys(each[0] for each in parts))
        self._sizes = list(
            dict.fromkeys(part for each in parts for part in each[1:] if part[0].isdigit())
        )
        self._random = random.Random(seed)
        self._given: set[str] = set()

    def take(self, name: str, count: int) -> list[str]:
        """New texts of a set."""
        return list(itertools.islice(self._new(name), count))

    def joined(self, products: int, count: int) -> list[str]:
        """New texts, each the whole texts of some products."""
        made = (", ".join(self._random.sample(self._wholes, products)) for _ in itertools.count())
        return list(itertools.islice(self._unseen(made), count))

    def _new(self, name: str) -> Iterator[str]:
        kinds = {"short": [self._short], "long": [self._long]}.get(
            name, [self._short, self._whole, self._long]
        )
        return self._unseen(kind() for kind in itertools.cycle(kinds))

    def _unseen(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            if text not in self._given:
                self._given.add(text)
                yield text

    def _short(self) -> str:
        words = self._random.choice(self._types).split()[:2]
        return f"{' '.join(words)}, {self._random.choice(self._sizes)}"

    def _whole(self) -> str:
        # Without the type a benchmark would use up the 20,768 texts.
        return f"{self._random.choice(self._wholes)}, {self._random.choice(self._types)}"

    def _long(self) -> str:
        wholes = self._random.sample(self._wholes, _LONG)
        return ", ".join([self._random.choice(self._types), *wholes])
