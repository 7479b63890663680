"""The model's space: where items, texts and queries meet.

vector(text) = affine(text vector) + weighted sum of the learned rows of the text's terms;
vector(item) = vector(its text) + residual[item]. An item that training never saw has no residual:
its text alone places it. So that this works, residual rows are dropped whole at random in training,
and terms one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows, fit_vocabulary, term_weights
from foretell.vectors import Vectors
from predictor.models.history import Ints

WHITENING = 0.5
"""Power of 1/sd by which principal axes are scaled: half-way between PCA and full whitening."""


TEXT_SCALE = 0.15
"""Standard deviation, at the start, of the numbers that a text gives a vector."""

ROW_SCALE = 0.01
"""The same of a residual or a term's row."""

TRACE_ROW_SCALE = 0.05
"""The same where there are traces: in a sum over a history, items must be told apart."""


class Whitening:
    """Centres text vectors, turns them to their principal axes, and evens the axes out.

    Sentence vectors lie in a narrow cone, where a few directions carry most of the variance (Su et
    al., 2021, "Whitening sentence representations"); a linear layer learns faster without.
    """

    def __init__(self, vectors: Vectors, dims: int, beside: Vectors | None = None) -> None:
        """Fits on (rows, cols); `dims` axes at most are kept, and `beside` (cols,) as one more.
        Rows of zeros do not count."""
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
        """(cols, dims), or one more."""
        if beside is not None:
            along = float(np.std(centred @ beside))
            axis = beside[:, None] / along if along > 1e-6 else np.zeros((cols, 1))
            self.matrix = np.concatenate([self.matrix, axis], axis=1)

    def apply(self, vectors: Vectors) -> Vectors:
        """(rows, cols) to (rows, axes), with a root mean square of 1 over the fitted rows."""
        return ((vectors - self.mean) @ self.matrix).astype(np.float32)


@dataclass(frozen=True)
class TextInputs:
    """Texts as the space reads them: whitened vectors, and weighted terms one text behind another.

    Text t has the terms term[first[t]:first[t + 1]].
    """

    vectors: Vectors
    """(texts, inputs)."""
    first: Ints
    """(texts + 1,)."""
    term: Ints
    """(terms of all texts,) index in the vocabulary."""
    weight: NDArray[np.float32]
    """(terms of all texts,)."""


class TextReader:
    """Makes inputs of texts, by what the texts of training are like."""

    def __init__(
        self,
        vectors: Vectors,
        texts: Sequence[str],
        dims: int,
        *,
        most_terms: int,
        beside: Vectors | None = None,
    ) -> None:
        """Fits on the vectors (texts, cols) and texts that training meets.

        Args:
            dims: see Whitening, which takes `beside` too.
            most_terms: size of the vocabulary, at most; 0 without terms.
        """
        self.whitening = Whitening(vectors, dims, beside)
        self.terms, self.idf = fit_vocabulary(texts if most_terms else (), most=most_terms)
        self._index = {term: number for number, term in enumerate(self.terms)}

    def read(self, vectors: Vectors, texts: Sequence[str]) -> TextInputs:
        """The inputs of any texts; vectors (texts, cols)."""
        text, term, weight = term_weights(texts, self._index, self.idf)
        first = np.searchsorted(text, np.arange(len(texts) + 1)).astype(np.int64)
        return TextInputs(self.whitening.apply(vectors), first, term, weight)


class _Bags(NamedTuple):
    """Weighted terms of texts, and the same the other way round: the texts of each term."""

    term: Tensor
    """(n,) by text."""
    weight: Tensor
    """(n,)."""
    first: Tensor
    """(texts + 1,) where the terms of a text begin."""
    by_term: Tensor
    """(n,) the order by term."""
    text: Tensor
    """(n,) the text of each, in that order."""
    first_of_term: Tensor
    """(terms + 1,) where the texts of a term begin."""


def _bags(term: Tensor, weight: Tensor, first: Tensor, terms: int) -> _Bags:
    by_term = torch.argsort(term, stable=True)
    numbers = torch.arange(len(first) - 1, device=first.device)
    text = torch.repeat_interleave(numbers, first.diff())[by_term]
    bounds = torch.arange(terms + 1, device=first.device)
    return _Bags(term, weight, first, by_term, text, torch.searchsorted(term[by_term], bounds))


class _Texts(nn.Module):
    """Inputs as buffers that follow the space to its device."""

    vectors: Tensor

    def __init__(self, inputs: TextInputs, terms: int) -> None:
        super().__init__()
        self._terms = terms
        term, weight, first = (
            torch.from_numpy(values) for values in (inputs.term, inputs.weight, inputs.first)
        )
        self.register_buffer("vectors", torch.from_numpy(inputs.vectors), persistent=False)
        for name, values in _bags(term, weight, first, terms)._asdict().items():
            self.register_buffer(f"bags_{name}", values, persistent=False)

    def bags(self, chosen: Tensor | None = None) -> _Bags:
        """The terms of all texts, or of some."""
        whole = _Bags(*(self.get_buffer(f"bags_{name}") for name in _Bags._fields))
        if chosen is None:
            return whole
        sizes = whole.first[chosen + 1] - whole.first[chosen]
        first = nn.functional.pad(torch.cumsum(sizes, 0), (1, 0))
        at = torch.arange(int(first[-1]), device=sizes.device)
        at = at + torch.repeat_interleave(whole.first[chosen] - first[:-1], sizes)
        return _bags(whole.term[at], whole.weight[at], first, self._terms)


class _WeightedSum(torch.autograd.Function):
    """Sums of a text's weighted term rows; its gradient is the like sum over a term's texts.

    torch's own gradient of embedding_bag sorts and scatters: ten times as slow on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bags: _Bags, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight[bags.by_term], bags.text, bags.first_of_term)
        return _bag(rows, bags.term, weight, bags.first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, text, first_of_term = ctx.saved_tensors
        return _bag(grads[0].contiguous(), text, weight, first_of_term), None, None


def _bag(rows: Tensor, index: Tensor, weight: Tensor, first: Tensor) -> Tensor:
    return nn.functional.embedding_bag(
        index, rows, first, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


class ItemSpace(nn.Module):
    """Vectors of items and texts, learned together with the network."""

    def __init__(
        self,
        items: TextInputs,
        texts: TextInputs,
        popularity: Ints,
        dims: int,
        *,
        terms: int = 0,
        row_dropout: float = 0.0,
        term_dropout: float = 0.0,
        use_text: bool = True,
        traces: bool = False,
        towers: int = 1,
    ) -> None:
        """Takes inputs of one TextReader.

        Args:
            items: of the items' texts.
            texts: of the events' texts.
            popularity: (items,) training events of each item; items without any stay without
                a residual.
            dims: dimensions of the space.
            terms: size of the vocabulary.
            row_dropout: probability of leaving out a residual row in training.
            term_dropout: probability of leaving out a term of a text in training.
            traces: whether the network has traces. Then the residual's first axis starts as a bias:
                the query begins with a one there (see `Learner`), so that training starts from
                popularity.
            towers: of the network; each has its first axis.
            use_text: False leaves text vectors out: residuals and terms alone.
        """
        super().__init__()
        self.warm: Tensor
        inputs = items.vectors.shape[1]
        self.row_dropout, self.term_dropout, self.use_text = row_dropout, term_dropout, use_text
        self.item_inputs, self.text_inputs = _Texts(items, terms), _Texts(texts, terms)
        self.popularity = torch.from_numpy(popularity)
        warm = torch.from_numpy(popularity > 0)
        self.register_buffer("warm", warm.unsqueeze(1).float(), persistent=False)
        self.affine = nn.Linear(inputs, dims)
        nn.init.normal_(self.affine.weight, std=TEXT_SCALE * inputs**-0.5)
        nn.init.zeros_(self.affine.bias)
        if not use_text:
            nn.init.zeros_(self.affine.weight)
            self.affine.requires_grad_(False)
        self.term_rows = nn.Parameter(torch.randn(terms, dims) * ROW_SCALE)
        scale = TRACE_ROW_SCALE if traces else ROW_SCALE
        residual = torch.randn(len(popularity), dims) * scale
        if traces:
            residual[:, :: dims // towers] = torch.from_numpy(np.log1p(popularity)).unsqueeze(1)
        self.residual = nn.Parameter(residual * self.warm)

    def items(self, chosen: Tensor | None = None) -> Tensor:
        """Vectors (chosen, dims) of some items, or of all (items, dims)."""
        residual: Tensor = self.residual
        warm = self.warm
        if chosen is not None:
            residual, warm = residual[chosen], warm[chosen]
        if self.training and self.row_dropout:
            keep = torch.rand(len(warm), 1, device=warm.device) >= self.row_dropout
            warm = warm * keep
        return self._of_texts(self.item_inputs, chosen) + residual * warm

    def texts(self, chosen: Tensor | None = None) -> Tensor:
        """Vectors (chosen, dims) of some texts, or of all."""
        return self._of_texts(self.text_inputs, chosen)

    def _of_texts(self, inputs: _Texts, chosen: Tensor | None) -> Tensor:
        vectors = inputs.vectors if chosen is None else inputs.vectors[chosen]
        if self.use_text:
            found: Tensor = self.affine(vectors).float()
        else:
            found = vectors.new_zeros(len(vectors), self.affine.out_features)
        if not len(self.term_rows):
            return found
        bags = inputs.bags(chosen)
        weight = bags.weight
        if self.training and self.term_dropout:
            weight = nn.functional.dropout(weight, self.term_dropout)
        apply: Callable[..., Tensor] = _WeightedSum.apply
        return found + apply(self.term_rows, bags, weight)

    def projection(self, reader: TextReader) -> Projection:
        """From plain text vectors, whitening folded in, and texts."""
        weight = self.affine.weight.detach().double().cpu().numpy()
        bias = self.affine.bias.detach().double().cpu().numpy()
        folded = weight @ reader.whitening.matrix.T
        layer = AffineLayer(
            np.ascontiguousarray(folded, dtype=np.float32),
            (bias - folded @ reader.whitening.mean).astype(np.float32),
        )
        if not reader.terms:
            return Projection((layer,))
        rows = self.term_rows.detach().cpu().numpy().copy()
        return Projection((layer,), terms=TermRows(reader.terms, reader.idf, rows))

    def residuals(self) -> Vectors:
        """(items, dims); zero for items without training events."""
        residuals: Vectors = (self.residual * self.warm).detach().cpu().numpy()
        return residuals
