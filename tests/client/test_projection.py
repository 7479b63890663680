"""The projection of derived collections."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import InvalidArgumentError
from foretell.projection import Activation, AffineLayer, Projection, from_derived
from foretell.terms import TermRows
from foretell.vectors import to_block

NUMBERS = st.floats(-100, 100, width=32)


def layer(rows: int, cols: int, activation: Activation = Activation.IDENTITY) -> AffineLayer:
    random = np.random.default_rng(rows * 31 + cols)
    return AffineLayer(
        random.normal(size=(rows, cols)).astype(np.float32),
        random.normal(size=rows).astype(np.float32),
        activation,
    )


def derived(projection: Projection) -> pb.DerivedCollection:
    return projection.to_derived("items")


def terms_of(cols: int, *terms: str) -> TermRows:
    random = np.random.default_rng(cols)
    idf = random.uniform(1, 3, len(terms)).astype(np.float32)
    return TermRows(terms, idf, random.normal(size=(len(terms), cols)).astype(np.float32))


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=limits.LAYERS + 1),
    st.sampled_from(Activation),
    st.booleans(),
    st.sampled_from([(), ("tea",), ("green", "green tea", "tea")]),
)
def test_a_projection_goes_and_comes_unchanged(
    widths: list[int], activation: Activation, normalize: bool, terms: tuple[str, ...]
) -> None:
    layers = tuple(layer(after, before, activation) for before, after in itertools.pairwise(widths))
    rows = terms_of(widths[-1], *terms) if terms else None
    projection = Projection(layers, normalize, rows)
    assert (projection.cols_in, projection.cols) == (widths[0], widths[-1])
    back = from_derived(derived(projection), widths[0])
    assert back.normalize == normalize
    assert (back.terms.terms if back.terms else ()) == terms
    vectors = np.random.default_rng(0).normal(size=(3, widths[0])).astype(np.float32)
    texts = ["green tea", "", "tea"]
    np.testing.assert_array_equal(back.apply(vectors, texts), projection.apply(vectors, texts))


def test_layers_are_applied_in_order() -> None:
    first = AffineLayer(np.array([[1, 2], [0, 1]], np.float32), np.array([1, -9], np.float32))
    second = AffineLayer(np.array([[1, 1]], np.float32), np.zeros(1, np.float32))
    relu = Projection((AffineLayer(first.weight, first.bias, Activation.RELU), second))
    vectors = np.array([[3, 4]], np.float32)
    assert relu.apply(vectors).tolist() == [[12]]
    assert Projection((first, second)).apply(vectors).tolist() == [[7]]


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (Activation.IDENTITY, lambda x: x),
        (Activation.RELU, lambda x: max(x, 0.0)),
        (Activation.TANH, math.tanh),
        (Activation.GELU, lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    ],
)
@given(st_numpy.arrays(np.float32, (2, 3), elements=NUMBERS))
def test_activations_are_those_of_the_contract(
    activation: Activation,
    function: Callable[[float], float],
    vectors: NDArray[np.float32],
) -> None:
    identity = AffineLayer(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), activation)
    found = Projection((identity,)).apply(vectors)
    expected = np.vectorize(function, otypes=[np.float64])(vectors.astype(np.float64))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(
    st_numpy.arrays(np.float32, (4, 3), elements=NUMBERS),
    st_numpy.arrays(np.float32, (4, 2), elements=NUMBERS),
)
def test_residuals_are_added_before_the_scaling(
    vectors: NDArray[np.float32], residuals: NDArray[np.float32]
) -> None:
    one = layer(2, 3)
    plain = Projection((one,)).apply(vectors, residuals=residuals)
    np.testing.assert_allclose(plain, Projection((one,)).apply(vectors) + residuals, rtol=1e-6)
    scaled = Projection((one,), normalize=True).apply(vectors, residuals=residuals)
    lengths = np.linalg.norm(plain.astype(np.float64), axis=1)
    expected = plain / np.maximum(lengths, 1e-12)[:, None]
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


def test_rows_of_terms_are_added_before_the_scaling() -> None:
    texts, vectors = ["green tea", "a car", ""], np.ones((3, 3), np.float32)
    terms = terms_of(2, "tea", "green tea")
    residuals = np.arange(6, dtype=np.float32).reshape(3, 2)
    plain = Projection((layer(2, 3),)).apply(vectors, residuals=residuals)
    expected = plain + terms.sum(texts)
    found = Projection((layer(2, 3),), terms=terms).apply(vectors, texts, residuals)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    scaled = Projection((layer(2, 3),), True, terms)
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        scaled.apply(vectors, texts, residuals), expected / lengths, rtol=1e-5
    )
    added = terms.sum(texts) + residuals
    np.testing.assert_array_equal(
        scaled.apply_added(vectors, added), scaled.apply(vectors, texts, residuals)
    )


@pytest.mark.parametrize("texts", [None, [], ["one"], ["one", "two", "three"]])
def test_terms_need_one_text_per_vector(texts: list[str] | None) -> None:
    projection = Projection((layer(2, 3),), terms=terms_of(2, "tea"))
    with pytest.raises(ValueError, match="needs 2 texts"):
        projection.apply(np.ones((2, 3), np.float32), texts)


def test_no_terms_are_as_none() -> None:
    message = derived(Projection((layer(2, 3),), terms=terms_of(2)))
    assert not message.HasField("terms")


def test_zero_stays_zero_when_scaled() -> None:
    nothing = AffineLayer(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    assert not Projection((nothing,), normalize=True).apply(np.ones((2, 3), np.float32)).any()


def test_no_rows_are_projected_to_no_rows() -> None:
    assert Projection((layer(2, 3),)).apply(np.zeros((0, 3), np.float32)).shape == (0, 2)


def test_an_absent_bias_is_zero() -> None:
    message = derived(Projection((layer(2, 3),)))
    message.layers[0].ClearField("bias")
    assert not from_derived(message, 3).layers[0].bias.any()


def spoilt(what: str) -> pb.DerivedCollection:
    terms = terms_of(4, "green", "tea")
    message = derived(Projection((layer(2, 3), layer(4, 2)), terms=terms))
    match what:
        case "no terms":
            del message.terms.terms[:]
        case "too many terms":
            message.terms.terms.extend(f"{number}" for number in range(limits.TERMS - 1))
        case "an empty term":
            message.terms.terms[1] = ""
        case "a long term":
            message.terms.terms[0] = "x" * (limits.TERM_CHARS + 1)
        case "a term twice":
            message.terms.terms[1] = "green"
        case "too few weights":
            message.terms.idf.CopyFrom(to_block(np.ones((1, 1))))
        case "a weight of zero":
            message.terms.idf.CopyFrom(to_block(np.array([[1], [0]])))
        case "an infinite weight":
            message.terms.idf.CopyFrom(to_block(np.array([[1], [np.inf]])))
        case "no weights":
            message.terms.ClearField("idf")
        case "too few rows":
            message.terms.rows.CopyFrom(to_block(np.ones((1, 4))))
        case "rows of other dimensions":
            message.terms.rows.CopyFrom(to_block(np.ones((2, 2))))
        case "NaN in a row":
            message.terms.rows.CopyFrom(to_block(np.full((2, 4), np.nan)))
        case "rows that overflow":
            message.terms.rows.CopyFrom(to_block(np.full((2, 4), 8e8)))
        case "bytes of rows":
            message.terms.rows.data += b"x"
        case "no layers":
            del message.layers[:]
        case "too many layers":
            message.layers.extend(derived(Projection((layer(4, 4),) * 7)).layers)
        case "first weight":
            message.layers[0].weight.CopyFrom(to_block(np.ones((2, 4))))
        case "no output":
            message.layers[0].weight.CopyFrom(to_block(np.ones((0, 3))))
        case "too wide":
            message.layers[1].weight.CopyFrom(to_block(np.ones((limits.COLS + 1, 2))))
        case "second weight":
            message.layers[1].weight.CopyFrom(to_block(np.ones((4, 3))))
        case "long bias":
            message.layers[1].bias.CopyFrom(to_block(np.ones((1, 5))))
        case "standing bias":
            message.layers[1].bias.CopyFrom(to_block(np.ones((4, 1))))
        case "NaN in a weight":
            message.layers[1].weight.CopyFrom(to_block(np.full((4, 2), np.nan)))
        case "infinity in a bias":
            message.layers[1].bias.CopyFrom(to_block(np.full((1, 4), np.inf)))
        case "activation":
            message.layers[1].activation = 99  # type: ignore[assignment]
        case "bytes":
            message.layers[1].weight.data += b"x"
    return message


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ("no terms", "derived.terms.terms"),
        ("too many terms", "derived.terms.terms"),
        ("an empty term", "derived.terms.terms[1]"),
        ("a long term", "derived.terms.terms[0]"),
        ("a term twice", "derived.terms.terms"),
        ("too few weights", "derived.terms.idf"),
        ("a weight of zero", "derived.terms.idf"),
        ("an infinite weight", "derived.terms.idf"),
        ("no weights", "derived.terms.idf.element_type"),
        ("too few rows", "derived.terms.rows"),
        ("rows of other dimensions", "derived.terms.rows"),
        ("NaN in a row", "derived.terms.rows"),
        ("rows that overflow", "derived.terms.rows"),
        ("bytes of rows", "derived.terms.rows.data"),
        ("no layers", "derived.layers"),
        ("too many layers", "derived.layers"),
        ("first weight", "derived.layers[0].weight"),
        ("no output", "derived.layers[0].weight"),
        ("too wide", "derived.layers[1].weight"),
        ("second weight", "derived.layers[1].weight"),
        ("long bias", "derived.layers[1].bias"),
        ("standing bias", "derived.layers[1].bias"),
        ("NaN in a weight", "derived.layers[1].weight"),
        ("infinity in a bias", "derived.layers[1].weight"),
        ("activation", "derived.layers[1].activation"),
        ("bytes", "derived.layers[1].weight.data"),
    ],
)
def test_faults_are_named(what: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        from_derived(spoilt(what), 3)
    assert caught.value.field == field


def test_layers_that_could_overflow_together_are_refused() -> None:
    grow = AffineLayer(np.full((2, 2), 500, np.float32), np.zeros(2, np.float32))
    assert from_derived(derived(Projection((grow,) * 3)), 2).cols == 2  # 1,000 ** 3
    with pytest.raises(InvalidArgumentError, match=r"1\.0e\+12") as caught:
        from_derived(derived(Projection((grow,) * 4)), 2)
    assert caught.value.field == "derived.layers[3].weight"


def test_as_many_and_as_long_terms_as_the_limits_say() -> None:
    names = [f"{number:0{limits.TERM_CHARS}}" for number in range(limits.TERMS)]
    most = Projection((layer(2, 3),), terms=terms_of(2, *names))
    terms = from_derived(derived(most), 3).terms
    assert terms is not None
    assert terms.terms == tuple(names)


def test_eight_layers_are_the_most() -> None:
    deepest = Projection((layer(2, 2),) * limits.LAYERS)
    assert len(from_derived(derived(deepest), 2).layers) == limits.LAYERS
