"""A map of the items: their vectors in two dimensions, coloured by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from foretell.terms import split_terms
from foretell.vectors import Vectors
from predictor.models.history import Ints

MOST_ITEMS = 1_000
"""On the map, the most frequent ones: more hide each other, and take longer than they are worth."""

CATEGORIES = 7
"""That have a colour and a marker of their own; what is not in the largest is `other`."""

OTHER = "other"

TYPICAL_TERMS = 3
"""In the name of a group of items without categories."""

COMMON = 0.02
"""Share of the items that a term must be in to name a group."""

SEED = 0


@dataclass(frozen=True)
class ItemMap:
    """Items as points."""

    points: NDArray[np.float32]
    """(items, 2) without unit: near means similar, distances between groups mean nothing."""
    group: Ints
    """(items,) index in names."""
    names: tuple[str, ...]
    """Of the groups, the largest first, OTHER last where there is one."""
    title: str
    """What the groups are."""


def item_map(
    vectors: Vectors,
    popularity: Ints,
    texts: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
) -> ItemMap | None:
    """Places items by t-SNE (van der Maaten and Hinton, 2008) of their directions.

    Args:
        vectors: (items, dims) in the model's space; items with a zero vector are left out.
        popularity: (items,) events of each: the most frequent are shown.
        texts: of the items; they name groups found by k-means where there are no categories.
        categories: of the items, "" where one has none.

    Returns:
        None where there are too few items for a map.
    """
    norms = np.linalg.norm(vectors, axis=1)
    shown = np.argsort(-np.where(norms > 0, popularity, -1), kind="stable")[:MOST_ITEMS]
    shown = shown[norms[shown] > 0]
    if len(shown) <= 2 * CATEGORIES:
        return None
    unit = vectors[shown] / norms[shown, None]
    points = _places(unit)
    if categories is not None and any(categories[item] for item in shown):
        group, names = _largest([categories[item] or OTHER for item in shown])
        return ItemMap(points, group, names, "coloured by category")
    group = KMeans(CATEGORIES, n_init=1, random_state=SEED).fit_predict(unit).astype(np.int64)
    own = None if texts is None else [texts[item] for item in shown]
    return ItemMap(points, group, _group_names(group, own), "coloured by k-means groups")


def _places(unit: Vectors) -> NDArray[np.float32]:
    kept = PCA(min(50, *unit.shape), random_state=SEED).fit_transform(unit)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=SEED, n_jobs=1, max_iter=500)
    places: NDArray[np.float32] = tsne.fit_transform(kept)
    return places


def _largest(labels: Sequence[str]) -> tuple[Ints, tuple[str, ...]]:
    """Index of each label among the CATEGORIES most frequent ones and OTHER, and their names."""
    names, counts = np.unique([label for label in labels if label != OTHER], return_counts=True)
    kept = [str(name) for name in names[np.argsort(-counts, kind="stable")[:CATEGORIES]]]
    index = {name: at for at, name in enumerate(kept)}
    group = np.array([index.get(label, len(kept)) for label in labels], np.int64)
    return group, (*kept, OTHER) if (group == len(kept)).any() else tuple(kept)


def _group_names(group: Ints, texts: Sequence[str] | None) -> tuple[str, ...]:
    """A group's most typical terms: those most over-represented in it."""
    if texts is None:
        return tuple(f"group {code + 1}" for code in range(CATEGORIES))
    terms = [{term for term in split_terms(text) if term.isalpha()} for text in texts]
    vocabulary = sorted(set().union(*terms))
    index = {term: at for at, term in enumerate(vocabulary)}
    row = np.repeat(np.arange(len(terms)), [len(own) for own in terms])
    column = np.array([index[term] for own in terms for term in sorted(own)], np.int64)
    inside = np.zeros((CATEGORIES, len(vocabulary)))
    np.add.at(inside, (group[row], column), 1)
    enough = inside.sum(axis=0) >= COMMON * len(texts)
    sizes = np.bincount(group, minlength=CATEGORIES)[:, None]
    share, everywhere = inside / np.maximum(1, sizes), inside.sum(axis=0) / len(texts)
    # Its part of the Kullback-Leibler divergence: frequent in the group and particular to it.
    score = np.where(
        enough, share * np.log(np.maximum(share, 1e-9) / np.maximum(everywhere, 1e-9)), 0
    )
    best = np.argsort(-score, axis=1, kind="stable")[:, :TYPICAL_TERMS]
    return tuple(
        ", ".join(vocabulary[at] for at in row_ if score[code, at] > 0) or f"group {code + 1}"
        for code, row_ in enumerate(best)
    )
