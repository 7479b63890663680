"""The model's space: where items, texts and queries meet.

vector(item) = affine(text vector) + residual[item]; vector(text) = affine(text vector). An item
that training never saw has no residual: its text alone places it. So that this works, residual
rows are dropped whole at random in training.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretell.projection import AffineLayer, Projection
from foretell.vectors import Vectors
from predictor.models.history import Ints

WHITENING = 0.5
"""Power of 1/sd by which principal axes are scaled: half-way between PCA and full whitening."""


class Whitening:
    """Centres text vectors, turns them to their principal axes, and evens the axes out.

    Sentence vectors lie in a narrow cone, where a few directions carry most of the variance (Su et
    al., 2021, "Whitening sentence representations"); a linear layer learns faster without.
    """

    def __init__(self, vectors: Vectors, dims: int) -> None:
        """Fits on (rows, cols); `dims` axes at most are kept. Rows of zeros do not count."""
        cols = vectors.shape[1]
        present = vectors[np.abs(vectors).max(axis=1, initial=0) > 0].astype(np.float64)
        if not len(present):
            present = np.zeros((1, cols))
        self.mean: NDArray[np.float64] = present.mean(axis=0)
        centred = present - self.mean
        variances, axes = np.linalg.eigh(centred.T @ centred / len(present))
        keep = np.argsort(variances)[::-1][: min(dims, cols)]
        spread = np.sqrt(np.maximum(variances[keep], 1e-12))
        # A direction without variance is not blown up: it carries rounding errors only.
        scale = np.where(spread > 1e-4 * spread[0], spread**-WHITENING, 0.0)
        turned = centred @ (axes[:, keep] * scale)
        rms = float(np.sqrt(np.mean(turned**2))) or 1.0
        self.matrix: NDArray[np.float64] = axes[:, keep] * (scale / rms)
        """(cols, dims)."""

    def apply(self, vectors: Vectors) -> Vectors:
        """(rows, cols) to (rows, dims), with a root mean square of 1 over the fitted rows."""
        return ((vectors - self.mean) @ self.matrix).astype(np.float32)


class ItemSpace(nn.Module):
    """Vectors of items and texts, learned together with the network."""

    def __init__(
        self,
        item_inputs: Vectors,
        text_inputs: Vectors,
        popularity: Ints,
        dims: int,
        row_dropout: float,
    ) -> None:
        """Takes whitened text vectors.

        Args:
            item_inputs: (items, inputs).
            text_inputs: (texts, inputs).
            popularity: (items,) training events of each item; items without any stay without
                a residual.
            dims: dimensions of the space.
            row_dropout: probability of leaving out a residual row in training.
        """
        super().__init__()
        self.item_inputs: Tensor
        self.text_inputs: Tensor
        self.warm: Tensor
        inputs = item_inputs.shape[1]
        self.row_dropout = row_dropout
        self.register_buffer("item_inputs", torch.from_numpy(item_inputs), persistent=False)
        self.register_buffer("text_inputs", torch.from_numpy(text_inputs), persistent=False)
        warm = torch.from_numpy(popularity > 0)
        self.register_buffer("warm", warm.unsqueeze(1).float(), persistent=False)
        self.affine = nn.Linear(inputs, dims)
        nn.init.normal_(self.affine.weight, std=0.5 * inputs**-0.5)
        nn.init.zeros_(self.affine.bias)
        residual = torch.randn(len(popularity), dims) * 0.05
        # The first axis starts as a bias: the query begins with a one there (see `Learner`), so
        # that training starts from popularity instead of finding it first.
        residual[:, 0] = torch.from_numpy(np.log1p(popularity))
        self.residual = nn.Parameter(residual * self.warm)

    def items(self, chosen: Tensor | None = None) -> Tensor:
        """Vectors (chosen, dims) of some items, or of all (items, dims)."""
        inputs, warm = self.item_inputs, self.warm
        residual: Tensor = self.residual
        if chosen is not None:
            inputs, residual, warm = inputs[chosen], residual[chosen], warm[chosen]
        if self.training and self.row_dropout:
            keep = torch.rand(len(warm), 1, device=warm.device) >= self.row_dropout
            warm = warm * keep
        vectors: Tensor = self.affine(inputs) + residual * warm
        return vectors

    def texts(self, chosen: Tensor | None = None) -> Tensor:
        """Vectors (chosen, dims) of some texts, or of all."""
        inputs = self.text_inputs if chosen is None else self.text_inputs[chosen]
        vectors: Tensor = self.affine(inputs)
        return vectors

    def projection(self, whitening: Whitening) -> Projection:
        """The affine layer from plain text vectors, whitening folded in."""
        weight = self.affine.weight.detach().double().cpu().numpy()
        bias = self.affine.bias.detach().double().cpu().numpy()
        folded = weight @ whitening.matrix.T
        layer = AffineLayer(
            np.ascontiguousarray(folded, dtype=np.float32),
            (bias - folded @ whitening.mean).astype(np.float32),
        )
        return Projection((layer,))

    def residuals(self) -> Vectors:
        """(items, dims); zero for items without training events."""
        residuals: Vectors = (self.residual * self.warm).detach().cpu().numpy()
        return residuals
