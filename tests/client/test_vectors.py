"""Vectors on the wire."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.errors import InvalidArgumentError
from foretell.vectors import from_block, to_block

FLOAT32 = common_pb2.ELEMENT_TYPE_FLOAT32
FLOAT16 = common_pb2.ELEMENT_TYPE_FLOAT16
SHAPES = st_numpy.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)


@given(st_numpy.arrays(np.float32, SHAPES))
def test_float32_goes_and_comes_bit_by_bit(matrix: NDArray[np.float32]) -> None:
    block = to_block(matrix)
    assert (block.rows, block.cols) == matrix.shape
    assert len(block.data) == matrix.size * 4
    back = from_block(block)
    assert back.dtype == np.float32
    assert back.shape == matrix.shape
    assert back.tobytes() == matrix.tobytes()  # NaN, infinities and -0.0 too


@given(st_numpy.arrays(np.float16, SHAPES))
def test_float16_goes_and_comes_with_the_same_values(matrix: NDArray[np.float16]) -> None:
    block = to_block(matrix, FLOAT16)
    assert len(block.data) == matrix.size * 2
    back = from_block(block)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, matrix.astype(np.float32))


@given(st_numpy.arrays(np.float64, SHAPES, elements=st.floats(-60_000, 60_000)))
def test_half_precision_rounds_as_ieee_754_does(matrix: NDArray[np.float64]) -> None:
    back = from_block(to_block(matrix, FLOAT16))
    np.testing.assert_array_equal(back, matrix.astype(np.float16).astype(np.float32))


def test_bytes_are_little_endian_and_row_major() -> None:
    matrix = np.array([[1, 2], [3, 4]], ">f8").T  # neither, by itself
    assert to_block(matrix).data == np.array([1, 3, 2, 4], "<f4").tobytes()
    assert to_block(matrix, FLOAT16).data == np.array([1, 3, 2, 4], "<f2").tobytes()


@given(
    st.sampled_from([(FLOAT32, 4), (FLOAT16, 2)]),
    st.integers(0, 2**32 - 1),
    st.integers(0, limits.COLS),
    st.binary(max_size=64),
)
def test_any_other_number_of_bytes_is_refused(
    kind: tuple[common_pb2.ElementType.ValueType, int], rows: int, cols: int, data: bytes
) -> None:
    element_type, size = kind
    block = common_pb2.VectorBlock(data=data, element_type=element_type, rows=rows, cols=cols)
    if len(data) == rows * cols * size:
        assert from_block(block).shape == (rows, cols)
        return
    with pytest.raises(InvalidArgumentError) as caught:
        from_block(block, "layers[1].weight")
    assert caught.value.reason == "BAD_VECTOR_BLOCK"
    assert caught.value.field == "layers[1].weight.data"


@pytest.mark.parametrize("element_type", [common_pb2.ELEMENT_TYPE_UNSPECIFIED, 3, -1])
def test_unknown_element_types_are_refused(
    element_type: common_pb2.ElementType.ValueType,
) -> None:
    block = common_pb2.VectorBlock(data=b"1234", element_type=element_type, rows=1, cols=1)
    with pytest.raises(InvalidArgumentError) as caught:
        from_block(block)
    assert caught.value.field == "vectors.element_type"
    with pytest.raises(InvalidArgumentError):
        to_block([[1.0]], element_type)


def test_4096_dimensions_are_the_most() -> None:
    widest = np.zeros((1, limits.COLS), np.float32)
    assert from_block(to_block(widest)).shape == (1, limits.COLS)
    with pytest.raises(InvalidArgumentError) as caught:
        from_block(to_block(np.zeros((1, limits.COLS + 1), np.float32)))
    assert caught.value.field == "vectors.cols"


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_only_matrices_are_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        to_block(np.zeros(shape))
