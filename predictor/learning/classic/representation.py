"""What is kept of a text: the projection from an encoder's vector, or of words, to the features.

All choices are one affine layer and a row per term, either of which may be zero, so that the
embedder makes the features of every new text by itself. Sentiment is an axis behind them. A further
axis, last, is left for popularity: see `bag`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectKBest, chi2, f_classif

from foretell import limits
from foretell.errors import InvalidArgumentError
from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows, fit_vocabulary, most_terms, split_terms, term_weights
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
    weight: Doubles = np.eye(dataset.encoder.cols)[: recipe.dims]
    mean: Doubles = np.zeros(dataset.encoder.cols)
    words: _Words | None = None
    if recipe.features in ("word2vec", "keywords"):
        item_texts = dataset.item_texts or [""] * len(train.item_ids)
        read = _word2vec if recipe.features == "word2vec" else _keywords
        met = [*(item_texts[int(i)] for i in items), *(train.texts[int(t)] for t in texts)]
        words = read(met, dataset, train, recipe)
        weight = np.zeros((recipe.dims, dataset.encoder.cols))
    elif recipe.features == "pca":
        vectors = np.concatenate([dataset.item_vectors[items], dataset.text_vectors[texts]])
        weight, mean = _principal(vectors[vectors.any(axis=1)], weight)
    elif recipe.features == "select":
        weight = np.eye(dataset.encoder.cols)[_telling(dataset, train, recipe)]
    if recipe.sentiment:
        weight = np.concatenate([weight, dataset.sentiment[None].astype(np.float64)])
    layer = _layer(weight, mean)
    if words is None:
        return Projection((layer,))
    rows = np.zeros((len(words.terms), len(layer.bias)), np.float32)
    rows[:, : recipe.dims] = words.rows
    return Projection((layer,), terms=TermRows(words.terms, words.idf, rows))


def _layer(weight: Doubles, mean: Doubles) -> AffineLayer:
    """weight @ (x - mean), and zero in the axis for popularity."""
    bias = np.append(-weight @ mean, 0.0)
    padded = np.concatenate([weight, np.zeros((1, weight.shape[1]))])
    return AffineLayer(padded.astype(np.float32), bias.astype(np.float32))


class _Words(NamedTuple):
    """Terms and what each adds to a text."""

    terms: tuple[str, ...]
    idf: Vectors
    """(terms,)."""
    rows: Vectors
    """(terms, recipe.dims)."""


def _principal(vectors: Vectors, usual: Doubles) -> tuple[Doubles, Doubles]:
    """Components (dims, cols) and mean (cols,); zero components where the texts are too few, or all
    the same."""
    weight, mean = np.zeros_like(usual), np.zeros(usual.shape[1])
    if len(vectors) > 1 and np.ptp(vectors, axis=0).any():
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


def _word2vec(
    texts: Sequence[str], dataset: Dataset, train: Events, recipe: ClassicRecipe
) -> _Words:
    """Vectors of words as gensim's word2vec learns them (Mikolov et al., 2013), skip-gram."""
    # Of the extra `toolbox`, which the other models do without.
    from gensim.models import Word2Vec

    sentences = [[term for term in split_terms(text) if " " not in term] for text in texts]
    terms, idf = fit_vocabulary(texts, LEAST_TEXTS, most_terms(recipe.dims + 2))
    words = [number for number, term in enumerate(terms) if " " not in term]
    terms, idf = tuple(terms[number] for number in words), idf[words]
    _check_words(terms, texts)
    model = Word2Vec(
        sentences, vector_size=recipe.dims, window=WINDOW, min_count=1, sg=1, workers=1,
        seed=recipe.seed, epochs=WORD_EPOCHS,
    )  # fmt: skip
    found = np.stack([model.wv[term] for term in terms])
    # On average of length one, as the encoder's vectors are.
    found /= max(float(np.linalg.norm(found, axis=1).mean()), 1e-12)
    return _Words(terms, idf, found)


def _keywords(
    texts: Sequence[str], dataset: Dataset, train: Events, recipe: ClassicRecipe
) -> _Words:
    """An axis for each of the words and phrases by which events' own texts tell their types best
    (chi-squared; Yang and Pedersen, 1997); of events of one type, the commonest."""
    terms, idf = fit_vocabulary(texts, LEAST_TEXTS, limits.TERMS)
    _check_words(terms, texts)
    drawn = np.random.default_rng(recipe.seed).permutation(len(train))[:SELECTION_EVENTS]
    own, every = dataset.own_texts(train)
    drawn = drawn[own[drawn] >= 0]
    read, place = np.unique(own[drawn], return_inverse=True)
    names = [every[number] for number in read.tolist()]
    found = term_weights(names, {term: number for number, term in enumerate(terms)}, idf)
    shape = (len(names), len(terms))
    counted = sparse.csr_matrix((found.weight, (found.text, found.term)), shape)[place]
    types = train.type[drawn]
    telling = len(np.unique(types)) > 1
    scores = chi2(counted, types)[0] if telling else np.asarray(counted.sum(axis=0)).ravel()
    best = np.argsort(-np.nan_to_num(scores), kind="stable")[: recipe.dims]
    best = best[: most_terms(recipe.dims + 2)]
    chosen = np.sort(best)
    rows = np.eye(recipe.dims, dtype=np.float32)[: len(chosen)]
    return _Words(tuple(terms[number] for number in chosen), idf[chosen], rows)


def _check_words(terms: Sequence[str], texts: Sequence[str]) -> None:
    if len(terms) < 2:
        raise InvalidArgumentError(
            f"{len(terms)} words occur in two of the {len(texts)} texts of the training part: "
            "there is nothing to read",
            reason="TOO_FEW_WORDS",
            field="behavior_text",
        )
