"""Terms of a text and their learned rows: used by trainer, embedder and fake alike.

A text is a bag of terms: its words, and the bigrams of its first three words, which in a title
are often the brand and the line of products. The weighted sum of the terms' learned rows is added
to an item's projected vector, so that a new item has it from its text alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretell import limits
from foretell.vectors import Vectors

BIGRAM_WORDS = 3
"""The bigrams are those of this many first words."""

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_CHUNK = 1_024  # texts summed at once: bounds the memory of their terms' rows


def split_terms(text: str) -> list[str]:
    """The terms of a text in their order: every word, then the bigrams of the first three words.

    A word is a run of letters, digits and the marks on them, in compatibility form and without
    case, so that "CAFÉ" and "café" are one word however they are encoded. Digits are words. A
    bigram is its two words with a space between. A term that occurs twice is given twice.
    """
    words = _words(text)
    head = words[:BIGRAM_WORDS]
    return [*words, *(f"{first} {second}" for first, second in pairwise(head))]


def _words(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    # Folding the case can undo the normal form: it is made twice.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c if _in_word(c) else " " for c in folded).split()


def _in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] == "M"


class TermWeights(NamedTuple):
    """The terms of some texts, sorted by text and then by term; each pair occurs once."""

    text: NDArray[np.int64]
    """Which text."""
    term: NDArray[np.int64]
    """Which term of the vocabulary."""
    weight: NDArray[np.float32]
    """What the term weighs in the text."""


def term_weights(
    texts: Sequence[str], index: Mapping[str, int], idf: NDArray[np.float32]
) -> TermWeights:
    """What each known term weighs in each text: (1 + ln count) * idf, scaled to length 1 a text.

    That is the tf-idf of Manning et al., "Introduction to Information Retrieval", section 6.4,
    with sublinear counts and cosine scaling over the known terms. `index` numbers the vocabulary's
    terms and `idf` has shape (terms,). A text without a known term has no entry.
    """
    found: list[int] = []  # text * terms + term
    for position, text in enumerate(texts):
        base = position * len(idf)
        found.extend(base + index[each] for each in split_terms(text) if each in index)
    if not found:
        none = np.zeros(0, np.int64)
        return TermWeights(none, none, np.zeros(0, np.float32))
    keys, counts = np.unique(np.array(found, dtype=np.int64), return_counts=True)
    row, term = keys // len(idf), keys % len(idf)
    weight = (1 + np.log(counts)) * idf[term]
    starts = _starts(row)
    length = np.sqrt(np.add.reduceat(weight * weight, starts))
    weight /= np.repeat(np.maximum(length, 1e-12), np.diff(starts, append=len(row)))
    return TermWeights(row, term, weight.astype(np.float32))


def fit_vocabulary(
    texts: Iterable[str], min_texts: int = 3, most: int = limits.TERMS
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """The terms that occur in at least `min_texts` of the texts, sorted, and their idf (terms,).

    idf = 1 + ln((1 + texts) / (1 + texts with the term)). Of more than `most` terms the commonest
    are kept; terms of more than `limits.TERM_CHARS` characters are left out.
    """
    seen: Counter[str] = Counter()
    total = 0
    for text in texts:
        seen.update(set(split_terms(text)))
        total += 1
    kept = [t for t, n in seen.items() if n >= min_texts and len(t) <= limits.TERM_CHARS]
    if len(kept) > most:
        kept = sorted(kept, key=lambda term: (-seen[term], term))[:most]
    terms = tuple(sorted(kept))
    found = np.array([seen[term] for term in terms], dtype=np.float64)
    return terms, (1 + np.log((1 + total) / (1 + found))).astype(np.float32)


def most_terms(cols: int) -> int:
    """How many terms with rows of `cols` numbers one message can hold beside the layers."""
    each = 4 * (cols + 1) + 4 * limits.TERM_CHARS  # row, idf and term: 4 bytes a character at most
    return min(limits.TERMS, limits.MESSAGE_BYTES * 3 // 4 // each)


@dataclass(frozen=True, eq=False)
class TermRows:
    """A vocabulary with a learned row for each term.

    Raises:
        ValueError: the parts do not fit one another, or a term occurs twice.
    """

    terms: tuple[str, ...]
    idf: NDArray[np.float32]
    """Shape (terms,)."""
    rows: Vectors
    """Shape (terms, cols)."""
    index: Mapping[str, int] = field(init=False, repr=False)
    """The number of each term."""

    def __post_init__(self) -> None:
        index = {term: number for number, term in enumerate(self.terms)}
        if len(index) != len(self.terms):
            raise ValueError("a term occurs twice")
        shapes = (self.idf.shape, self.rows.shape[:1], self.rows.ndim)
        if shapes != ((len(index),), (len(index),), 2):
            raise ValueError(
                f"{len(index)} terms do not fit idf {self.idf.shape} and rows {self.rows.shape}"
            )
        object.__setattr__(self, "index", index)

    @property
    def cols(self) -> int:
        """Dimensions of a row."""
        return int(self.rows.shape[1])

    def sum(self, texts: Sequence[str]) -> Vectors:
        """The weighted sum of the rows of each text's terms, shape (texts, cols).

        The weights are those of `term_weights`. A text's sum is the same whichever others come
        with it, and zero where it has no known term.
        """
        out = np.zeros((len(texts), self.cols), np.float32)
        for start in range(0, len(texts), _CHUNK):
            found = term_weights(texts[start : start + _CHUNK], self.index, self.idf)
            if len(found.text):
                starts = _starts(found.text)
                weighted = self.rows[found.term] * found.weight[:, None]
                out[start + found.text[starts]] = np.add.reduceat(weighted, starts, axis=0)
        return out


def _starts(sorted_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.diff(sorted_rows, prepend=-1))
