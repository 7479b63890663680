"""From the features of histories to the next behavior type: scikit-learn's models, and LightGBM.

Each is fitted on training lines, and what there is to choose is chosen by the log loss (of the
linear regression, the squared error) on validation lines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightgbm
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier

from predictor.learning.classic.recipe import FINE_TUNED, ClassicRecipe
from predictor.learning.measures.metrics import Floats
from predictor.learning.types.fitting import LEAF_LINES, PARAMETERS
from predictor.models.history import Ints

ALPHAS = (100_000.0, 10_000.0, 1_000.0, 100.0, 10.0)
"""Of the ridge that linear regression needs where features depend on one another."""

CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strength of the logistic regression's ridge, for standardised features."""

ITERATIONS = 200
"""Of its solver at most, for each of CS; every one starts where that before it ended."""

TOLERANCE = 1e-3
"""Largest gradient at its end."""

LEAST_SPREAD = 1e-5
"""Standard deviation of a feature that is more than rounding."""

PATIENCE = 3
"""Epochs without a better log loss on validation after which mlp stops."""

PENALTIES = (10.0, 0.1)
"""Of the weights of mlp, by scikit-learn's measure: divided by the lines of a step."""

STEPS = 60
"""Of mlp in an epoch, at least, within LINES_A_STEP."""

LINES_A_STEP = (8, 256)

PATIENCE_ROUNDS = 20
MOST_TREES = 6_000
"""Over all types: bounds time where there are hundreds."""

TREES = {**PARAMETERS, "boost_from_average": False}
"""As the type models', but that they start from the types' shares."""

Layers = Sequence[tuple[NDArray[Any], NDArray[Any]]]


class Lines(NamedTuple):
    """What to tell apart."""

    features: Floats
    """(lines, k)."""
    true: Ints
    """(lines,) types."""
    texts: int = 0
    """How many of the features, the first ones, are of texts."""


@dataclass(frozen=True)
class Head:
    """A fitted model as a network's weights."""

    layers: Layers
    """(out, in) and (out,) of each, rectifiers between; the last gives scores of the types."""
    loss: float
    """On the validation lines; 0 where there are none."""
    chosen: dict[str, float]
    """By them."""
    trees: str = ""
    """In LightGBM's text format: they add to these scores."""


Fit = Callable[[Lines, Lines, Floats, ClassicRecipe], Head]
"""From training and validation lines and the log shares (types,) of the types."""


def standardised(fit: Fit) -> Fit:
    """Fits on features with mean 0 and variance 1; the head reads them as they are.

    Those of texts keep their relations, and have variance 1 on average: a word that hardly anybody
    has met is not blown up. A feature that is constant, or moved by rounding alone, counts nothing.
    """

    def fit_(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
        mean = learn.features.mean(axis=0, dtype=np.float64)
        spread = learn.features.std(axis=0, dtype=np.float64)
        moves = spread > LEAST_SPREAD
        of_texts = moves & (np.arange(len(moves)) < learn.texts)
        if of_texts.any():
            spread[of_texts] = np.sqrt(np.mean(spread[of_texts] ** 2))
        shift, scale = mean[moves], 1 / spread[moves]

        def scaled(lines: Lines) -> Lines:
            some = lines.features[:, moves]
            some -= shift.astype(np.float32)
            some *= scale.astype(np.float32)
            return Lines(some, lines.true)  # whose texts are scaled

        head = fit(scaled(learn), scaled(judge), log_shares, recipe)
        (weight, bias), *rest = head.layers
        folded = np.zeros((len(weight), len(mean)))
        folded[:, moves] = weight * scale
        return replace(head, layers=[(folded, bias - folded @ mean), *rest])

    return fit_


def linear(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """Linear regression on the types' one-hot codes."""
    codes = np.eye(len(log_shares), dtype=np.float32)

    def fit(alpha: float) -> Head:
        model = Ridge(alpha).fit(learn.features, codes[learn.true])
        layers = [(np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_))]
        errors = np.square(scores_of(layers, judge.features) - codes[judge.true]).sum(axis=1)
        return Head(layers, float(errors.mean()) if len(errors) else 0.0, {"alpha": alpha})

    return _best(fit, ALPHAS, judge)


def logistic(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """Multinomial logistic regression."""
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True, tol=TOLERANCE)

    def fit(c: float) -> Head:
        model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(learn.features, learn.true)
        plain = [(model.coef_.copy(), model.intercept_.copy())]
        layers = _of_all_types(plain, model.classes_, learn, log_shares)
        return Head(layers, _log_loss(scores_of(layers, judge.features), judge.true), {"C": c})

    return _best(fit, CS, judge)


def _best(fit: Callable[[float], Head], settings: Sequence[float], judge: Lines) -> Head:
    """The best of settings from stiff to free; behind the first that is worse, none is tried.

    Without validation lines the one in the middle.
    """
    if not len(judge.true):
        return fit(settings[len(settings) // 2])
    best = fit(settings[0])
    for setting in settings[1:]:
        head = fit(setting)
        if head.loss >= best.loss:
            break
        best = head
    return best


def mlp(learn: Lines, judge: Lines, log_shares: Floats, recipe: ClassicRecipe) -> Head:
    """A network of one hidden layer, by Adam."""
    classes = np.unique(learn.true)
    size = int(np.clip(len(learn.true) // STEPS, *LINES_A_STEP))

    def fit(penalty: float) -> Head:
        # An object: a number would shuffle every epoch alike.
        drawn = np.random.RandomState(recipe.seed)
        model = MLPClassifier(
            (recipe.hidden,), alpha=penalty, batch_size=min(size, len(learn.true)),
            random_state=drawn,
        )  # fmt: skip
        best: Head | None = None
        for epoch in range(1, recipe.epochs + 1):
            model.partial_fit(learn.features, learn.true, classes=classes)
            plain = [
                (weight.T.copy(), bias.copy())
                for weight, bias in zip(model.coefs_, model.intercepts_, strict=True)
            ]
            layers = _of_all_types(plain, classes, learn, log_shares)
            loss = _log_loss(scores_of(layers, judge.features), judge.true)
            if best is None or loss < best.loss or not len(judge.true):
                best = Head(layers, loss, {"epochs": epoch, "penalty": penalty})
            if epoch - best.chosen["epochs"] >= PATIENCE:
                break
        assert best is not None
        return best

    return _best(fit, PENALTIES, judge)


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
    loss = booster.best_score["valid_0"]["multi_logloss"] if stop else 0.0
    text = booster.model_to_string(num_iteration=rounds)
    return Head([layer], loss, {"rounds": rounds}, text)


HEADS: dict[str, Fit] = {
    "linear": standardised(linear),
    "logistic": standardised(logistic),
    "mlp": standardised(mlp),
    "lightgbm": trees,
    "word2vec_logistic": standardised(logistic),
    FINE_TUNED: standardised(logistic),
}


def _of_all_types(layers: Layers, classes: Ints, learn: Lines, log_shares: Floats) -> Layers:
    """Scores of the classes that scikit-learn met, made to scores of all types.

    One that it did not meet is as likely on average as its share says.
    """
    *hidden, last = layers
    weight, bias = of_both_classes(*last)
    out = np.zeros((len(log_shares), weight.shape[1])), log_shares.astype(np.float64)
    out[0][classes], out[1][classes] = weight, bias
    absent = np.setdiff1d(np.arange(len(log_shares)), classes)
    if len(absent):
        scores = scores_of([*hidden, (weight, bias)], learn.features)
        out[1][absent] += logsumexp(scores, axis=1).mean()
    return [*hidden, out]


def of_both_classes(weight: NDArray[Any], bias: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(classes, k) and (classes,): of two classes scikit-learn has those of the second alone."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([0 * weight, weight]), np.append(0 * bias, bias)


def scores_of(layers: Layers, features: Floats) -> NDArray[np.floating]:
    """(lines, types) what layers say of features (lines, k)."""
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
