"""BERT's forward pass over packed tokens: what is not attention never sees padding.

The tokens of all texts lie one after another, so that each matrix product has as many rows as
there are tokens. On a CPU the weights are laid out once as oneDNN wants them; products run through
it in bfloat16 or float32, everything between them (sums, norms) in float32. There the layers run as
TorchScript: operation by operation from Python, each would have to wait for Python's lock, which
the event loop wants too; so 16 callers with a text each get a sixth more (measured).
"""

# Without postponed annotations: TorchScript reads those of the named tuples.
import functools
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PADDING = 1.25
"""On a CPU, texts share an attention as long as the longest has at most this much of the shortest's
tokens (and 4 more); a padded attention is cheaper than many small ones."""


class _Layer(NamedTuple):
    """The weights of a layer."""

    qkv_weight: Tensor
    """Of queries, keys and values; the scores' scale is part of the queries."""
    qkv_bias: Tensor
    attended_weight: Tensor
    attended_bias: Tensor
    attended_norm_weight: Tensor
    attended_norm_bias: Tensor
    wide_weight: Tensor
    wide_bias: Tensor
    narrow_weight: Tensor
    narrow_bias: Tensor
    narrow_norm_weight: Tensor
    narrow_norm_bias: Tensor


class _Group(NamedTuple):
    """Neighbouring texts of about the same length, which share an attention on a CPU."""

    start: int
    end: int
    """Tokens [start, end) of the pack."""
    texts: int
    longest: int
    spread: Tensor
    """The token at each place of the padded grid, shape (texts * longest,); empty: no padding."""
    packed: Tensor
    """The place of each token in the grid, shape (end - start,)."""
    mask: Tensor
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
        self._epsilon: float = config.layer_norm_eps
        self._onednn = device == "cpu" and _has_onednn(dtype)
        embeddings = model.embeddings
        place = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self._words = self._float(embeddings.word_embeddings.weight)
        self._places = self._float(place)
        self._norm = (
            self._float(embeddings.LayerNorm.weight),
            self._float(embeddings.LayerNorm.bias),
        )
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
        hidden = F.embedding(self._move(ids), self._words)
        hidden += F.embedding(self._move(places), self._places)
        hidden = F.layer_norm(hidden, (self._cols,), *self._norm, self._epsilon)
        if self._device == "cuda" and self._dtype is torch.bfloat16:
            return self._unpadded(hidden, self._move(offsets.astype(np.int32)), int(lengths[-1]))
        groups = _groups(lengths, offsets, self._device)
        run = _scripted() if self._onednn else _all_layers
        return run(
            hidden, self._layers, groups, self._heads, self._epsilon, self._half, self._onednn
        )

    def _unpadded(self, hidden: Tensor, ends: Tensor, longest: int) -> Tensor:
        """All layers, with FlashAttention over texts of any lengths; on a GPU."""
        from torch.nn.attention.varlen import varlen_attn  # a module of newer PyTorch versions

        for layer in self._layers:
            mixed = _mixed(hidden, layer, self._half, False)
            queries, keys, values = mixed.view(len(mixed), 3, self._heads, -1).unbind(1)
            found = varlen_attn(queries, keys, values, ends, ends, longest, longest, scale=1.0)
            assert isinstance(found, Tensor)
            attended = found.reshape(len(mixed), self._cols)
            hidden = _finished(attended, hidden, layer, self._epsilon, self._half, False)
        return hidden

    # --- weights ---------------------------------------------------------------------------------

    @property
    def _half(self) -> bool:
        return self._dtype is torch.bfloat16

    def _layer(self, layer: Any) -> _Layer:
        attention, output = layer.attention.self, layer.attention.output
        scale = (self._cols // self._heads) ** -0.5
        parts = [(attention.query, scale), (attention.key, 1.0), (attention.value, 1.0)]
        return _Layer(
            self._weight(torch.cat([part.weight * by for part, by in parts])),
            self._bias(torch.cat([part.bias * by for part, by in parts])),
            self._weight(output.dense.weight),
            self._bias(output.dense.bias),
            self._float(output.LayerNorm.weight),
            self._float(output.LayerNorm.bias),
            self._weight(layer.intermediate.dense.weight),
            self._bias(layer.intermediate.dense.bias),
            self._weight(layer.output.dense.weight),
            self._bias(layer.output.dense.bias),
            self._float(layer.output.LayerNorm.weight),
            self._float(layer.output.LayerNorm.bias),
        )

    def _weight(self, weight: Tensor) -> Tensor:
        weight = weight.detach().to(self._device, self._dtype).contiguous()
        if not self._onednn:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed

    def _bias(self, bias: Tensor) -> Tensor:
        return bias.detach().to(self._device, self._dtype)

    def _float(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self._device)

    def _move(self, array: NDArray[Any]) -> Tensor:
        """To the device; to a GPU through pinned memory, without waiting."""
        tensor = torch.from_numpy(array)
        if self._device == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


# --- what runs as TorchScript as well: so these have plain types and no keywords ------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, onednn: bool) -> Tensor:
    """x @ weight^T + bias, then GELU."""
    y = x
    if onednn and gelu:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    elif onednn:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = F.linear(x, weight, bias)
        if gelu:
            y = F.gelu(y)
    return y


def _mixed(hidden: Tensor, layer: _Layer, half: bool, onednn: bool) -> Tensor:
    """Queries, keys and values, shape (tokens, 3 * cols)."""
    x = hidden.to(torch.bfloat16) if half else hidden
    return _linear(x, layer.qkv_weight, layer.qkv_bias, False, onednn)


def _attended(mixed: Tensor, groups: list[_Group], heads: int, half: bool) -> Tensor:
    """From queries, keys and values to what they find, shape (tokens, cols)."""
    cols = mixed.size(1) // 3
    out = mixed.new_empty([mixed.size(0), cols])
    for group in groups:
        some = mixed[group.start : group.end]
        padded = group.spread.numel() > 0
        if padded:
            some = some[group.spread]
        grid = some.view(group.texts, group.longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = grid[0], grid[1], grid[2]
        mask = group.mask.to(mixed.dtype) if padded else None
        # Plain products are quicker than the fused kernel up to here, at 9 tokens twice as.
        if half and group.longest <= 128:
            scores = torch.matmul(queries, keys.transpose(-1, -2))
            if mask is not None:
                scores = scores + mask
            found = torch.matmul(torch.softmax(scores, -1), values)
        else:
            found = F.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0)
        flat = found.transpose(1, 2).reshape(-1, cols)
        out[group.start : group.end] = flat[group.packed] if padded else flat
    return out


def _finished(
    attended: Tensor, hidden: Tensor, layer: _Layer, epsilon: float, half: bool, onednn: bool
) -> Tensor:
    """The rest of a layer after its attention."""
    cols = [hidden.size(1)]
    y = _linear(attended, layer.attended_weight, layer.attended_bias, False, onednn)
    y = y.float() + hidden
    hidden = F.layer_norm(y, cols, layer.attended_norm_weight, layer.attended_norm_bias, epsilon)
    x = hidden.to(torch.bfloat16) if half else hidden
    wide = _linear(x, layer.wide_weight, layer.wide_bias, True, onednn)
    y = _linear(wide, layer.narrow_weight, layer.narrow_bias, False, onednn).float() + hidden
    return F.layer_norm(y, cols, layer.narrow_norm_weight, layer.narrow_norm_bias, epsilon)


def _all_layers(
    hidden: Tensor,
    layers: list[_Layer],
    groups: list[_Group],
    heads: int,
    epsilon: float,
    half: bool,
    onednn: bool,
) -> Tensor:
    for layer in layers:
        attended = _attended(_mixed(hidden, layer, half, onednn), groups, heads, half)
        hidden = _finished(attended, hidden, layer, epsilon, half, onednn)
    return hidden


@functools.cache
def _scripted() -> Callable[..., Tensor]:
    """`_all_layers` as TorchScript: deprecated, but `torch.compile` needs a C++ compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: Callable[..., Tensor] = torch.jit.script(_all_layers)
    return script


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and processor have oneDNN's products of prepared weights.

    Even in float32 they take half the time of the default ones, MKL's, on an AMD CPU.
    """
    weight = torch.ones(8, 8, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


# --- groups --------------------------------------------------------------------------------------


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
        none = torch.empty(0)
        return _Group(start, start + tokens, texts, longest, none, none, none)
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
