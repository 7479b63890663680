"""From the features of histories to the next behavior type: scikit-learn's models, and LightGBM.

Each is fitted on training lines, and what there is to choose is chosen by the log loss (of the
linear regression, the squared error) on validation lines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightgbm
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier

from predictor.learning.classic.recipe import ClassicRecipe
from predictor.learning.measures.metrics import Floats
from predictor.models.history import Ints

ALPHAS = (10.0, 100.0, 1_000.0, 10_000.0)
"""Of the ridge that linear regression needs where features depend on one another."""

CS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse strength of the logistic regression's ridge, for standardised features."""

ITERATIONS = 200
"""Of its solver at most, for each of CS; every one starts where that before it ended."""

PATIENCE = 3
"""Epochs without a better log loss on validation after which mlp stops."""

MLP = {"alpha": 1e-3, "learning_rate_init": 1e-3, "batch_size": 256}

PATIENCE_ROUNDS = 20
MOST_TREES = 6_000
"""Over all types: bounds time where there are hundreds."""

TREES = {
    "objective": "multiclass",
    "num_leaves": 15,
    "learning_rate": 0.05,
    "feature_fraction": 0.2,
    "boost_from_average": False,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}
"""As the type models', see types.fitting."""

LEAF_LINES = 200
"""Of a leaf, and at most a twentieth of all lines."""

Layers = Sequence[tuple[NDArray[Any], NDArray[Any]]]


class Lines(NamedTuple):
    """What to tell apart."""

    features: Floats
    """(lines, k)."""
    true: Ints
    """(lines,) types."""


@dataclass(frozen=True)
class Head:
    """A fitted model as a network's weights."""

    layers: Layers
    """(out, in) and (out,) of each, rectifiers between; the last gives scores of the types."""
    chosen: dict[str, float]
    trees: str = ""
    """In LightGBM's text format: they add to these scores."""


Fit = Callable[[Lines, Lines, Floats, ClassicRecipe], Head]
"""From training and validation lines and the log shares (types,) of the types."""


def linear(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """Linear regression on the types' one-hot codes."""
    codes = np.eye(len(log_shares), dtype=np.float32)
    found = {}
    for alpha in ALPHAS:
        model = Ridge(alpha).fit(learn.features, codes[learn.true])
        layers = [(np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_))]
        error = np.square(_scores(layers, judge.features) - codes[judge.true]).sum(axis=1)
        found[alpha] = layers, error.mean() if len(error) else 0.0
    alpha = min(found, key=lambda alpha: found[alpha][1])
    return Head(found[alpha][0], {"alpha": alpha})


def logistic(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """Multinomial logistic regression."""
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True, tol=1e-3)
    found = {}
    for c in CS:
        model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(learn.features, learn.true)
        layers = _of_all_types(
            [(model.coef_.copy(), model.intercept_.copy())], model.classes_, learn, log_shares
        )
        found[c] = layers, _log_loss(_scores(layers, judge.features), judge.true)
    c = min(found, key=lambda c: found[c][1])
    return Head(found[c][0], {"C": c})


def mlp(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """A network of one hidden layer, by Adam."""
    # An object: a number would shuffle every epoch alike.
    drawn = np.random.RandomState(recipe.seed)
    size = min(MLP["batch_size"], len(learn.true))
    model = MLPClassifier(
        (recipe.hidden,), alpha=MLP["alpha"], learning_rate_init=MLP["learning_rate_init"],
        batch_size=int(size), random_state=drawn,
    )  # fmt: skip
    classes = np.unique(learn.true)
    best: tuple[float, int, Layers] = (np.inf, 0, [])
    for epoch in range(1, recipe.epochs + 1):
        model.partial_fit(learn.features, learn.true, classes=classes)
        plain = [
            (weight.T.copy(), bias.copy())
            for weight, bias in zip(model.coefs_, model.intercepts_, strict=True)
        ]
        layers = _of_all_types(plain, classes, learn, log_shares)
        loss = _log_loss(_scores(layers, judge.features), judge.true)
        if not best[1] or loss < best[0] or not len(judge.true):
            best = loss, epoch, layers
        if epoch - best[1] >= PATIENCE:
            break
    return Head(best[2], {"epochs": best[1]})


def trees(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """Boosted trees (Ke et al., 2017, "LightGBM"), which start from the types' shares."""
    types = len(log_shares)
    parameters: dict[str, Any] = {
        **TREES,
        "num_class": types,
        "min_data_in_leaf": max(1, min(LEAF_LINES, len(learn.true) // 20)),
        "seed": recipe.seed,
    }

    def data(lines: Lines, reference: lightgbm.Dataset | None = None) -> lightgbm.Dataset:
        start = np.tile(log_shares.astype(np.float64), (len(lines.true), 1))
        return lightgbm.Dataset(
            lines.features, lines.true, init_score=start, reference=reference, params=parameters
        )

    learned = data(learn)
    stop: list[Callable[..., Any]] = (
        [lightgbm.early_stopping(PATIENCE_ROUNDS, verbose=False)] if len(judge.true) else []
    )
    booster = lightgbm.train(
        parameters,
        learned,
        max(1, min(recipe.epochs, MOST_TREES // types)),
        valid_sets=[data(judge, learned)] if stop else None,
        callbacks=stop,
    )
    rounds = booster.best_iteration if stop else booster.current_iteration()
    layer = np.zeros((types, learn.features.shape[1])), log_shares
    return Head([layer], {"rounds": rounds}, booster.model_to_string(num_iteration=rounds))


HEADS: dict[str, Fit] = {
    "linear": linear,
    "logistic": logistic,
    "mlp": mlp,
    "lightgbm": trees,
    "word2vec_logistic": logistic,
}


def _of_all_types(layers: Layers, classes: Ints, learn: Lines, log_shares: Floats) -> Layers:
    """Scores of the classes that scikit-learn met, made to scores of all types.

    One that it did not meet is as likely on average as its share says.
    """
    *hidden, (weight, bias) = layers
    if len(weight) < len(classes):  # of two, scikit-learn scores the second
        weight, bias = np.concatenate([0 * weight, weight]), np.append(0 * bias, bias)
    out = np.zeros((len(log_shares), weight.shape[1])), log_shares.astype(np.float64)
    out[0][classes], out[1][classes] = weight, bias
    absent = np.setdiff1d(np.arange(len(log_shares)), classes)
    if len(absent):
        scores = _scores([*hidden, (weight, bias)], learn.features)
        out[1][absent] += logsumexp(scores, axis=1).mean()
    return [*hidden, out]


def _scores(layers: Layers, features: Floats) -> NDArray[np.floating]:
    *hidden, (weight, bias) = layers
    inputs: NDArray[np.floating] = features
    for inner, shift in hidden:
        inputs = np.maximum(inputs @ inner.T.astype(np.float32) + shift, 0)
    return np.asarray(inputs @ weight.T.astype(np.float32) + bias)


def _log_loss(scores: NDArray[np.floating], true: Ints) -> float:
    if not len(true):
        return 0.0
    own = scores[np.arange(len(true)), true]
    return float((logsumexp(scores, axis=1) - own).mean())
