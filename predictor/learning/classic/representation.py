"""What is kept of a text: the projection from an encoder's vector, or of words, to the features.

All choices are one affine layer, or a row per term, so that the embedder makes the features of
every new text by itself. A further axis, last, is left for popularity: see `bag`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectKBest, f_classif

from foretell.errors import InvalidArgumentError
from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows, fit_vocabulary, most_terms, split_terms
from foretell.vectors import Vectors
from predictor.learning.classic.recipe import ClassicRecipe
from predictor.learning.data import Events, token_vectors
from predictor.learning.sources import Dataset
from predictor.models.history import Ints

Doubles = NDArray[np.float64]

SELECTION_EVENTS = 50_000
"""Training events by which dimensions are selected, at most, drawn at random."""

LEAST_TEXTS = 2
"""That a word occurs in."""

WINDOW = 5
WORD_EPOCHS = 20
"""Of word2vec: over some thousand short texts, the five that are usual learn next to nothing."""


def representation(dataset: Dataset, train: Events, recipe: ClassicRecipe) -> Projection:
    """The projection of the recipe's features, fitted on what training meets.

    Raises:
        InvalidArgumentError: too few words occur twice.
    """
    items = np.unique(train.item[train.item >= 0])
    texts = np.unique(train.text[(train.item < 0) & (train.text >= 0)])
    if recipe.features == "word2vec":
        item_texts = dataset.item_texts or [""] * len(train.item_ids)
        met = [*(item_texts[int(i)] for i in items), *(train.texts[int(t)] for t in texts)]
        return _words(met, dataset.encoder.cols, recipe)
    weight: Doubles = np.eye(dataset.encoder.cols)[: recipe.dims]
    mean: Doubles = np.zeros(dataset.encoder.cols)
    if recipe.features == "pca":
        vectors = np.concatenate([dataset.item_vectors[items], dataset.text_vectors[texts]])
        weight, mean = _principal(vectors[vectors.any(axis=1)], weight)
    elif recipe.features == "select":
        weight = np.eye(dataset.encoder.cols)[_telling(dataset, train, recipe)]
    return Projection((_layer(weight, mean),))


def _layer(weight: Doubles, mean: Doubles) -> AffineLayer:
    """weight @ (x - mean), and zero in the axis for popularity."""
    bias = np.append(-weight @ mean, 0.0)
    padded = np.concatenate([weight, np.zeros((1, weight.shape[1]))])
    return AffineLayer(padded.astype(np.float32), bias.astype(np.float32))


def _principal(vectors: Vectors, usual: Doubles) -> tuple[Doubles, Doubles]:
    """Components (dims, cols) and mean (cols,); zero components where the texts are too few."""
    weight, mean = np.zeros_like(usual), np.zeros(usual.shape[1])
    if len(vectors) > 1:
        most = min(len(weight), len(vectors))
        fitted = PCA(most, svd_solver="full" if len(vectors) < most * 2 else "covariance_eigh")
        fitted.fit(vectors.astype(np.float64))
        weight[:most], mean = fitted.components_, fitted.mean_
    return weight, mean


def _telling(dataset: Dataset, train: Events, recipe: ClassicRecipe) -> Ints:
    """The dimensions by which events' own texts tell their types best (analysis of variance)."""
    drawn = np.random.default_rng(recipe.seed).permutation(len(train))[:SELECTION_EVENTS]
    vectors, known = token_vectors(
        train.item[drawn], train.text[drawn], dataset.item_vectors, dataset.text_vectors
    )
    vectors, types = vectors[known], train.type[drawn][known]
    if len(np.unique(types)) < 2:
        return np.arange(recipe.dims)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of constant dimensions, which are not chosen
        scores = SelectKBest(f_classif, k="all").fit(vectors, types).scores_
    order = np.argsort(-np.nan_to_num(scores, posinf=0.0), kind="stable")
    return np.sort(order[: recipe.dims])


def _words(texts: Sequence[str], cols: int, recipe: ClassicRecipe) -> Projection:
    """Vectors of words as gensim's word2vec learns them (Mikolov et al., 2013), skip-gram, summed
    by tf-idf; the encoder's vectors count nothing."""
    # Of the extra `toolbox`, which the other models do without.
    from gensim.models import Word2Vec

    rows_dims = recipe.dims + 1
    sentences = [[term for term in split_terms(text) if " " not in term] for text in texts]
    terms, idf = fit_vocabulary(texts, LEAST_TEXTS, most_terms(rows_dims))
    words = [number for number, term in enumerate(terms) if " " not in term]
    terms, idf = tuple(terms[number] for number in words), idf[words]
    if len(terms) < 2:
        raise InvalidArgumentError(
            f"{len(terms)} words occur in two of the {len(texts)} texts of the training part: "
            "word2vec has nothing to learn",
            reason="TOO_FEW_WORDS",
            field="behavior_text",
        )
    model = Word2Vec(
        sentences, vector_size=recipe.dims, window=WINDOW, min_count=1, sg=1, workers=1,
        seed=recipe.seed, epochs=WORD_EPOCHS,
    )  # fmt: skip
    found = np.stack([model.wv[term] for term in terms])
    # On average of length one, as the encoder's vectors are.
    found /= max(float(np.linalg.norm(found, axis=1).mean()), 1e-12)
    rows = np.zeros((len(terms), rows_dims), np.float32)
    rows[:, :-1] = found
    zero = AffineLayer(np.zeros((rows_dims, cols), np.float32), np.zeros(rows_dims, np.float32))
    return Projection((zero,), terms=TermRows(terms, idf, rows))
