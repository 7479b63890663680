"""The projection of a derived collection: used by trainer, embedder and fake alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import InvalidArgumentError
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
    """A short stack of affine layers and an optional scaling to length 1."""

    layers: tuple[AffineLayer, ...]
    normalize: bool = False

    @property
    def cols_in(self) -> int:
        """Dimensions that it takes."""
        return int(self.layers[0].weight.shape[1])

    @property
    def cols(self) -> int:
        """Dimensions that it gives."""
        return int(self.layers[-1].weight.shape[0])

    def apply(self, vectors: Vectors, residuals: Vectors | None = None) -> Vectors:
        """Projects text vectors of shape (rows, cols_in) to (rows, cols).

        `residuals`, of shape (rows, cols), are added before the scaling.
        """
        out = vectors
        for layer in self.layers:
            out = _activate(out @ layer.weight.T + layer.bias, layer.activation)
        if residuals is not None:
            out = out + residuals
        if self.normalize:
            # The epsilon leaves a zero vector zero instead of NaN.
            out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(out, dtype=np.float32)

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
        InvalidArgumentError: no or too many layers, shapes that do not fit one another or the
            source, an unknown activation, numbers that are not finite or so large that a vector
        could overflow.
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
    return Projection(tuple(layers), message.normalize)


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
