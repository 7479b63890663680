"""Vectors on the wire: one block of bytes, never `repeated float`.

In Python a repeated field costs more than the model that makes the numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.errors import InvalidArgumentError

Vectors = NDArray[np.float32]
"""Row-major float32 matrix, shape (rows, cols)."""

Row = NDArray[np.float32]
"""One vector, shape (cols,)."""

_DTYPES: dict[common_pb2.ElementType.ValueType, np.dtype[np.float32] | np.dtype[np.float16]] = {
    common_pb2.ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.ELEMENT_TYPE_FLOAT16: np.dtype("<f2"),
}


def to_block(
    vectors: ArrayLike,
    element_type: common_pb2.ElementType.ValueType = common_pb2.ELEMENT_TYPE_FLOAT32,
) -> common_pb2.VectorBlock:
    """Packs a matrix of shape (rows, cols).

    Raises:
        InvalidArgumentError: not two-dimensional, or an unknown element type.
    """
    if element_type not in _DTYPES:
        raise InvalidArgumentError(
            f"element_type {element_type} is none of FLOAT32, FLOAT16", field="element_type"
        )
    with np.errstate(over="ignore"):  # beyond float16: infinite, which the service refuses
        matrix = np.ascontiguousarray(vectors, dtype=_DTYPES[element_type])
    if matrix.ndim != 2:
        raise InvalidArgumentError(
            f"vectors must have shape (rows, cols), not {matrix.shape}", field="vectors"
        )
    rows, cols = matrix.shape
    return common_pb2.VectorBlock(
        data=matrix.tobytes(), element_type=element_type, rows=rows, cols=cols
    )


def from_block(block: common_pb2.VectorBlock, field: str = "vectors") -> Vectors:
    """Unpacks a block to float32 of shape (rows, cols); read-only where it need not convert.

    Values are not looked at: whether a NaN is a fault is the reader's question.

    Raises:
        InvalidArgumentError: unknown element type, too many columns, or a byte length that is
            not rows * cols * bytes per number.
    """
    dtype = _DTYPES.get(block.element_type)
    if dtype is None:
        raise InvalidArgumentError(
            f"{field}.element_type {block.element_type} is none of FLOAT32, FLOAT16",
            reason="BAD_VECTOR_BLOCK",
            field=f"{field}.element_type",
        )
    if block.cols > limits.COLS:
        raise InvalidArgumentError(
            f"{field}.cols is {block.cols}; at most {limits.COLS} are allowed",
            reason="BAD_VECTOR_BLOCK",
            field=f"{field}.cols",
        )
    expected = block.rows * block.cols * dtype.itemsize
    if len(block.data) != expected:
        raise InvalidArgumentError(
            f"{field}.data has {len(block.data)} bytes; {block.rows} x {block.cols} numbers "
            f"of {dtype.itemsize} bytes make {expected}",
            reason="BAD_VECTOR_BLOCK",
            field=f"{field}.data",
        )
    matrix = np.frombuffer(block.data, dtype=dtype).reshape(block.rows, block.cols)
    return matrix.astype(np.float32, copy=False)
