"""BERT's forward pass over packed tokens: what is not attention never sees padding.

The tokens of all texts lie one after another, so that each matrix product has as many rows as
there are tokens. On a CPU the weights are laid out once as oneDNN wants them; products run through
it in bfloat16 or float32, everything between them (sums, norms) in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PADDING = 1.25
"""On a CPU, texts share an attention as long as the longest has at most this much of the shortest's
tokens (and 4 more); a padded attention is cheaper than many small ones."""

PLAIN_TOKENS = 128
"""On a CPU, bfloat16 attention over up to so many tokens is quicker as plain products, twice as
quick at 9, than as the fused kernel, which wins above (measured)."""

Linear = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, Tensor, float]
"""Weight, bias, epsilon."""


@dataclass(frozen=True)
class _Layer:
    queries_keys_values: Linear
    attended: Linear
    attended_norm: Norm
    widened: Linear
    narrowed: Linear
    narrowed_norm: Norm


@dataclass(frozen=True)
class _Group:
    """Neighbouring texts of about the same length, which share an attention on a CPU."""

    start: int
    end: int
    """Tokens [start, end) of the pack."""
    texts: int
    longest: int
    spread: Tensor | None
    """The token at each place of the padded grid, shape (texts * longest,); None: no padding."""
    packed: Tensor | None
    """The place of each token in the grid, shape (end - start,)."""
    mask: Tensor | None
    """0 at tokens and -inf at padding, shape (texts, 1, 1, longest)."""


class PackedBert:
    """A `transformers.BertModel` without its pooler. Implements `backend.Network`.

    Args:
        model: where the weights come from; it is not kept.
        dtype: of the matrix products, float32 or bfloat16.
        device: cpu or cuda.
    """

    pads = False

    def __init__(self, model: Any, dtype: torch.dtype, device: str) -> None:
        config = model.config
        self._dtype = dtype
        self._device = device
        self._heads: int = config.num_attention_heads
        self._cols: int = config.hidden_size
        embeddings = model.embeddings
        place = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self._words = embeddings.word_embeddings.weight.detach().to(device)
        self._places = place.detach().to(device)
        self._embedded_norm = self._norm(embeddings.LayerNorm)
        self._layers = [self._layer(layer) for layer in model.encoder.layer]

    @staticmethod
    def takes(model: Any) -> bool:
        """Whether a model is what this class computes."""
        config = model.config
        return (
            type(model).__name__ == "BertModel"
            and config.hidden_act == "gelu"
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and not config.is_decoder
        )

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Hidden states, float32, shape (tokens, cols).

        Args:
            ids: of all tokens, shape (tokens,).
            lengths: of the texts in growing order, shape (texts,).
        """
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        attend = self._attention(offsets, lengths)
        hidden = F.embedding(self._move(ids), self._words)
        hidden = _norm(hidden + F.embedding(self._move(places), self._places), self._embedded_norm)
        for layer in self._layers:
            mixed = attend(layer.queries_keys_values(hidden.to(self._dtype)))
            hidden = _norm(layer.attended(mixed).float() + hidden, layer.attended_norm)
            wide = layer.widened(hidden.to(self._dtype))
            hidden = _norm(layer.narrowed(wide).float() + hidden, layer.narrowed_norm)
        return hidden

    # --- attention -------------------------------------------------------------------------------

    def _attention(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Linear:
        """From queries, keys and values of packed tokens, (tokens, 3 * cols), to (tokens, cols)."""
        if self._device == "cuda" and self._dtype is torch.bfloat16:
            ends = self._move(offsets.astype(np.int32))
            longest = int(lengths[-1])
            return lambda mixed: self._unpadded(mixed, ends, longest)
        groups = _groups(lengths, offsets, self._device)
        return lambda mixed: self._grouped(mixed, groups)

    def _unpadded(self, mixed: Tensor, ends: Tensor, longest: int) -> Tensor:
        """FlashAttention over texts of any lengths; on a GPU."""
        from torch.nn.attention.varlen import varlen_attn  # a module of newer PyTorch versions

        queries, keys, values = mixed.view(len(mixed), 3, self._heads, -1).unbind(1)
        found = varlen_attn(queries, keys, values, ends, ends, longest, longest, scale=1.0)
        assert isinstance(found, Tensor)
        return found.reshape(len(mixed), self._cols)

    def _grouped(self, mixed: Tensor, groups: list[_Group]) -> Tensor:
        out = mixed.new_empty(len(mixed), self._cols)
        for group in groups:
            some = mixed[group.start : group.end]
            if group.spread is not None:
                some = some[group.spread]
            shape = (group.texts, group.longest, 3, self._heads, -1)
            queries, keys, values = some.view(shape).permute(2, 0, 3, 1, 4)
            if self._dtype is torch.bfloat16 and group.longest <= PLAIN_TOKENS:
                scores = queries @ keys.transpose(-1, -2)
                if group.mask is not None:
                    scores += group.mask
                found = torch.softmax(scores, dim=-1) @ values
            else:
                mask = None if group.mask is None else group.mask.to(self._dtype)
                found = F.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0)
            flat = found.transpose(1, 2).reshape(-1, self._cols)
            out[group.start : group.end] = flat if group.packed is None else flat[group.packed]
        return out

    # --- weights ---------------------------------------------------------------------------------

    def _layer(self, layer: Any) -> _Layer:
        attention, output = layer.attention.self, layer.attention.output
        # The scores' scale becomes part of the queries.
        scale = (self._cols // self._heads) ** -0.5
        parts = [(attention.query, scale), (attention.key, 1.0), (attention.value, 1.0)]
        return _Layer(
            self._linear(
                torch.cat([part.weight * by for part, by in parts]),
                torch.cat([part.bias * by for part, by in parts]),
            ),
            self._linear(output.dense.weight, output.dense.bias),
            self._norm(output.LayerNorm),
            self._linear(layer.intermediate.dense.weight, layer.intermediate.dense.bias, gelu=True),
            self._linear(layer.output.dense.weight, layer.output.dense.bias),
            self._norm(layer.output.LayerNorm),
        )

    def _linear(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Linear:
        """x -> x @ weight^T + bias, then GELU."""
        weight = weight.detach().to(self._device, self._dtype).contiguous()
        bias = bias.detach().to(self._device, self._dtype)
        packed = _onednn(weight) if self._device == "cpu" else None
        if packed is not None:
            kind, method = ("gelu", "none") if gelu else ("none", "")
            run = torch.ops.mkldnn._linear_pointwise
            return lambda x: run(x, packed, bias, kind, [], method)
        if gelu:
            return lambda x: F.gelu(F.linear(x, weight, bias))
        return lambda x: F.linear(x, weight, bias)

    def _norm(self, norm: Any) -> Norm:
        weight, bias = norm.weight.detach(), norm.bias.detach()
        return weight.to(self._device), bias.to(self._device), norm.eps

    def _move(self, array: NDArray[Any]) -> Tensor:
        """To the device; to a GPU through pinned memory, without waiting."""
        tensor = torch.from_numpy(array)
        if self._device == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    weight, bias, epsilon = norm
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def _onednn(weight: Tensor) -> Tensor | None:
    """A weight in oneDNN's layout; None where this PyTorch or processor has no such thing.

    Even in float32 its products take half the time of the default ones, MKL's, on an AMD CPU.
    """
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        torch.ops.mkldnn._linear_pointwise(weight[:1], packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return packed


def _groups(lengths: NDArray[np.int64], offsets: NDArray[np.int64], device: str) -> list[_Group]:
    """Groups of texts, whose lengths grow, of similar length."""
    bounds = [0]
    while bounds[-1] < len(lengths):
        most = int(lengths[bounds[-1]] * PADDING) + 4
        bounds.append(int(np.searchsorted(lengths, most, side="right")))
    return [_group(lengths[a:b], int(offsets[a]), device) for a, b in pairwise(bounds)]


def _group(lengths: NDArray[np.int64], start: int, device: str) -> _Group:
    texts, longest, tokens = len(lengths), int(lengths[-1]), int(lengths.sum())
    if texts * longest == tokens:
        return _Group(start, start + tokens, texts, longest, None, None, None)
    real = np.arange(longest) < lengths[:, None]  # (texts, longest)
    spread = np.zeros(real.shape, np.int64)
    spread[real] = np.arange(tokens)
    mask = np.where(real, np.float32(0), np.float32(-np.inf))[:, None, None, :]
    return _Group(
        start,
        start + tokens,
        texts,
        longest,
        torch.from_numpy(spread.ravel()).to(device),
        torch.from_numpy(np.flatnonzero(real)).to(device),
        torch.from_numpy(mask).to(device),
    )
