"""The projection of a derived collection: used by trainer, embedder and fake alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import InvalidArgumentError
from foretell.terms import TermRows
from foretell.vectors import Vectors, from_block, to_block


class Activation(Enum):
    """How a layer ends; the values are the contract's."""

    IDENTITY = pb.ACTIVATION_IDENTITY
    RELU = pb.ACTIVATION_RELU
    GELU = pb.ACTIVATION_GELU
    TANH = pb.ACTIVATION_TANH


@dataclass(frozen=True)
class AffineLayer:
    """y = activation(x @ weight.T + bias)."""

    weight: Vectors
    """Shape (out, in)."""
    bias: NDArray[np.float32]
    """Shape (out,)."""
    activation: Activation = Activation.IDENTITY


@dataclass(frozen=True)
class Projection:
    """A short stack of affine layers, optional rows of terms, an optional scaling to length 1."""

    layers: tuple[AffineLayer, ...]
    normalize: bool = False
    terms: TermRows | None = None

    @property
    def cols_in(self) -> int:
        """Dimensions that it takes."""
        return int(self.layers[0].weight.shape[1])

    @property
    def cols(self) -> int:
        """Dimensions that it gives."""
        return int(self.layers[-1].weight.shape[0])

    def apply(
        self,
        vectors: Vectors,
        texts: Sequence[str] | None = None,
        residuals: Vectors | None = None,
    ) -> Vectors:
        """Projects text vectors of shape (rows, cols_in) to (rows, cols).

        Args:
            texts: (rows,) what the vectors are of; needed where the projection has terms.
            residuals: (rows, cols) added before the scaling.

        Raises:
            ValueError: the projection has terms, and there is not one text per vector.
        """
        if self.terms is None:
            return self.apply_added(vectors, residuals)
        if texts is None or len(texts) != len(vectors):
            given = "none" if texts is None else len(texts)
            raise ValueError(f"a projection with terms needs {len(vectors)} texts, not {given}")
        sums = self.terms.sum(texts)
        return self.apply_added(vectors, sums if residuals is None else sums + residuals)

    def apply_added(self, vectors: Vectors, added: Vectors | None) -> Vectors:
        """`apply` for who has the terms' sums already: (rows, cols), the residuals in them."""
        out = vectors
        for layer in self.layers:
            out = _activate(out @ layer.weight.T + layer.bias, layer.activation)
        if added is not None:
            out = out + added
        if self.normalize:
            # The epsilon leaves a zero vector zero instead of NaN.
            out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(out, dtype=np.float32)

    def to_derived(self, source: str) -> pb.DerivedCollection:
        """The definition of a collection derived from `source`; `from_derived` reads it."""
        message = pb.DerivedCollection(
            source=source, layers=self.to_layers(), normalize=self.normalize
        )
        if self.terms is not None and self.terms.terms:
            message.terms.terms.extend(self.terms.terms)
            message.terms.idf.CopyFrom(to_block(self.terms.idf[:, None]))
            message.terms.rows.CopyFrom(to_block(self.terms.rows))
        return message

    def to_layers(self) -> list[pb.AffineLayer]:
        """The layers as messages of the contract."""
        return [
            pb.AffineLayer(
                weight=to_block(layer.weight),
                bias=to_block(layer.bias[None, :]),
                activation=layer.activation.value,
            )
            for layer in self.layers
        ]


def from_derived(message: pb.DerivedCollection, cols_in: int) -> Projection:
    """Reads and checks the projection of a derived collection over vectors of `cols_in` dims.

    Raises:
        InvalidArgumentError: no or too many layers or terms, shapes that do not fit one another
            or the source, an unknown activation, a term that occurs twice, numbers that are not
            finite or so large that a vector could overflow.
    """
    if not 1 <= len(message.layers) <= limits.LAYERS:
        raise InvalidArgumentError(
            f"derived.layers has {len(message.layers)} layers; 1 to {limits.LAYERS} are allowed",
            reason="BAD_PROJECTION",
            field="derived.layers",
        )
    layers = []
    largest = 1.0  # of a number in a text vector, whose length is at most 1
    for position, layer in enumerate(message.layers):
        field = f"derived.layers[{position}]"
        layers.append(_read_layer(layer, field, cols_in))
        cols_in = len(layers[-1].bias)
        largest = _largest_output(layers[-1], largest)
        if largest > limits.VALUE:
            raise InvalidArgumentError(
                f"{field} can give numbers of {largest:.1e}; up to {limits.VALUE:g} are allowed",
                reason="BAD_PROJECTION",
                field=f"{field}.weight",
            )
    terms = _read_terms(message.terms, cols_in) if message.HasField("terms") else None
    return Projection(tuple(layers), message.normalize, terms)


def _read_layer(layer: pb.AffineLayer, field: str, cols_in: int) -> AffineLayer:
    def fault(message: str, where: str) -> InvalidArgumentError:
        return InvalidArgumentError(message, reason="BAD_PROJECTION", field=f"{field}.{where}")

    weight = from_block(layer.weight, f"{field}.weight")
    if weight.shape[0] == 0 or weight.shape[0] > limits.COLS or weight.shape[1] != cols_in:
        raise fault(f"{field}.weight is {weight.shape}; (out, {cols_in}) is needed", "weight")
    bias = np.zeros((1, weight.shape[0]), np.float32)
    if layer.HasField("bias"):
        bias = from_block(layer.bias, f"{field}.bias")
    if bias.shape != (1, weight.shape[0]):
        raise fault(f"{field}.bias is {bias.shape}; (1, {weight.shape[0]}) is needed", "bias")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise fault(f"{field} has numbers that are not finite", "weight")
    try:
        activation = Activation(layer.activation)
    except ValueError:
        raise fault(f"{field}.activation {layer.activation} is unknown", "activation") from None
    return AffineLayer(weight, bias[0], activation)


def _read_terms(message: pb.TermRows, cols: int) -> TermRows:
    def fault(message: str, where: str) -> InvalidArgumentError:
        field = f"derived.terms.{where}"
        return InvalidArgumentError(f"{field} {message}", reason="BAD_PROJECTION", field=field)

    terms = tuple(message.terms)
    if not 1 <= len(terms) <= limits.TERMS:
        raise fault(f"has {len(terms):,} terms; 1 to {limits.TERMS:,} are allowed", "terms")
    for position, term in enumerate(terms):
        if not 1 <= len(term) <= limits.TERM_CHARS:
            allowed = f"1 to {limits.TERM_CHARS} are allowed"
            raise fault(f"has {len(term):,} characters; {allowed}", f"terms[{position}]")
    if len(set(terms)) < len(terms):
        twice = next(term for term, count in Counter(terms).items() if count > 1)
        raise fault(f"has {twice!r} more than once", "terms")
    idf = from_block(message.idf, "derived.terms.idf")
    if idf.shape != (len(terms), 1):
        raise fault(f"is {idf.shape}; ({len(terms)}, 1) is needed", "idf")
    if not (np.isfinite(idf).all() and (idf > 0).all()):
        raise fault("has numbers that are not finite and positive", "idf")
    rows = from_block(message.rows, "derived.terms.rows")
    if rows.shape != (len(terms), cols):
        raise fault(f"is {rows.shape}; ({len(terms)}, {cols}) is needed", "rows")
    # A text's weights have length 1: its sum is no longer than the column (Cauchy-Schwarz).
    largest = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=0).max())
    if not largest <= limits.VALUE:  # NaN and infinity too
        raise fault(
            f"can give numbers of {largest:.1e}; up to {limits.VALUE:g} are allowed", "rows"
        )
    return TermRows(terms, idf[:, 0], rows)


def _largest_output(layer: AffineLayer, largest_input: float) -> float:
    """A bound of a layer's output: no activation makes a number larger."""
    weight, bias = np.abs(layer.weight, dtype=np.float64), np.abs(layer.bias, dtype=np.float64)
    return float((weight.sum(axis=1) * largest_input + bias).max())


def _activate(x: Vectors, activation: Activation) -> Vectors:
    match activation:
        case Activation.IDENTITY:
            return x
        case Activation.RELU:
            return np.maximum(x, 0)
        case Activation.TANH:
            return np.tanh(x)
        case Activation.GELU:
            return np.asarray(x * (1 + _erf(x / math.sqrt(2))) / 2, dtype=np.float32)


_erf = np.vectorize(math.erf, otypes=[np.float32])
