"""Sequence models: histories in, logits of the next behavior type and a query vector out.

A token is (item or text vector) + behavior type + time gap, layer-normed; an encoder reads the
tokens from left to right; two linear heads follow. The score of an item as the next one is the
inner product of query and item vector, so that retrieval is a search in the item index.

The encoder `lstm` is the classic of Hochreiter and Schmidhuber (1997) with the forget gate of
Gers et al. (2000), whose bias starts at one (Jozefowicz et al., 2015). Beside it, traces of the
vectors and types read so far, which fade with fixed half-lives, lead straight to the heads: a
recurrent state of this size does not hold which of ten thousand products a household buys again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretell.vectors import Vectors
from predictor.models.history import GAPS, HistoryBatch, Ints, starts

MODEL_TYPES = ("lstm",)

HALF_LIVES = (10.0, 40.0, 160.0)
"""Of the traces, in events: about the last shopping basket, the last month, the last year."""

_BATCH_TOKENS = 16_384
"""Padded tokens of one forward pass in `predict`: bounds memory, not speed."""


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a sequence network."""

    behavior_types: int
    """Types that it tells apart."""
    dims: int = 64
    """Dimensions of item, text and query vectors."""
    hidden: int = 128
    """State of the recurrent encoder."""
    dropout: float = 0.2
    """In training, of numbers in tokens and states, and of whole events in the traces."""
    model_type: str = "lstm"
    """One of MODEL_TYPES."""


@dataclass(frozen=True)
class Outputs:
    """What a sequence model says about what comes after each history."""

    type_logits: NDArray[np.float32]
    """(histories, behavior_types), before the version's `type_temperature`."""
    queries: Vectors
    """(histories, dims): score of an item = query . item vector."""


class SequenceModel(Protocol):
    """What serving and evaluation see of a sequence model; safe to call from several threads."""

    config: NetworkConfig

    def predict(self, batch: HistoryBatch) -> Outputs:
        """Reads each history to its end. An empty history is answered from a learned start."""
        ...


class SequenceNetwork(nn.Module):
    """The network without item vectors: those come in with the tokens."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {config.model_type!r} is none of {MODEL_TYPES}")
        self.config = config
        dims, hidden = config.dims, config.hidden
        self.type_embedding = nn.Embedding(config.behavior_types + 1, dims)
        self.gap_embedding = nn.Embedding(GAPS, dims)
        self.unknown = nn.Parameter(torch.zeros(dims))
        self.token_norm = nn.LayerNorm(dims)
        self.encoder = nn.LSTM(dims, hidden, batch_first=True)
        types = config.behavior_types + 1
        self.width = hidden + len(HALF_LIVES) * (dims + types)
        self.start = nn.Parameter(torch.zeros(self.width))
        self.output_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.type_head = nn.Linear(hidden + len(HALF_LIVES) * types, config.behavior_types)
        self.query_head = nn.Linear(hidden, dims)
        self.trace_weight = nn.Parameter(torch.full((len(HALF_LIVES), dims), 0.2))
        self._initialise()

    def _initialise(self) -> None:
        for embedding in (self.type_embedding, self.gap_embedding):
            nn.init.normal_(embedding.weight, std=0.1)
        with torch.no_grad():
            # A type that training never saw counts as no type.
            self.type_embedding.weight[-1].zero_()
            bias = self.encoder.get_parameter("bias_ih_l0")
            hidden = self.config.hidden
            bias[hidden : 2 * hidden].fill_(1.0)  # gates lie as input, forget, cell, output

    def encode(self, vectors: Tensor, known: Tensor, types: Tensor, gaps: Tensor) -> Tensor:
        """States after each token.

        Args:
            vectors: (batch, time, dims).
            known: (batch, time) bool.
            types: (batch, time) int64.
            gaps: (batch, time) int64.

        Returns:
            (batch, time, width): the encoder's output, then the traces. Padding on the right
            changes nothing before it.
        """
        tokens = torch.where(known.unsqueeze(-1), vectors, self.unknown)
        tokens = tokens + self.type_embedding(types) + self.gap_embedding(gaps)
        states, _ = self.encoder(self.dropout(self.token_norm(tokens)))
        one_hot = nn.functional.one_hot(types, self.config.behavior_types + 1)
        return torch.cat([states, self._traces(torch.cat([vectors, one_hot], -1))], -1)

    def _traces(self, events: Tensor) -> Tensor:
        """Fading sums of (batch, time, size) up to each time: (batch, time, half-lives * size).

        They are divided by the root of the sum of weights, which keeps short and long histories
        at about the same scale, but, other than a mean, lets an item count more that came often.
        """
        if self.training and self.config.dropout:
            keep = torch.rand(*events.shape[:2], 1, device=events.device) >= self.config.dropout
            events = events * keep / (1 - self.config.dropout)
        time = torch.arange(events.shape[1], device=events.device)
        age = time[:, None] - time[None, :]
        traces = []
        for half_life in HALF_LIVES:
            weight = torch.where(age >= 0, 0.5 ** (age / half_life), 0.0)
            traces.append((weight / weight.sum(1, keepdim=True).sqrt()) @ events)
        return torch.cat(traces, -1)

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Type logits (rows, behavior_types) and queries (rows, dims) of states (rows, width)."""
        hidden, dims = self.config.hidden, self.config.dims
        encoded = self.dropout(self.output_norm(states[:, :hidden]))
        traces = states[:, hidden:].reshape(len(states), len(HALF_LIVES), -1)
        of_types = traces[:, :, dims:].flatten(1)
        query = self.query_head(encoded) + (traces[:, :, :dims] * self.trace_weight).sum(1)
        return self.type_head(torch.cat([encoded, of_types], -1)), query

    @torch.inference_mode()
    def predict(self, batch: HistoryBatch) -> Outputs:
        """Reads each history to its end (see SequenceModel)."""
        rows = len(batch)
        logits = np.zeros((rows, self.config.behavior_types), np.float32)
        queries = np.zeros((rows, self.config.dims), np.float32)
        for chosen in _by_length(batch.lengths):
            states = self._last_states(batch, chosen)
            type_logits, query = self.heads(states)
            logits[chosen] = type_logits.float().cpu().numpy()
            queries[chosen] = query.float().cpu().numpy()
        return Outputs(logits, queries)

    def _last_states(self, batch: HistoryBatch, chosen: Ints) -> Tensor:
        """(len(chosen), width): the state at the end of each history, `start` for empty ones."""
        lengths = batch.lengths[chosen]
        longest = int(lengths.max())
        device = self.start.device
        if longest == 0:
            return self.start.expand(len(chosen), -1)
        offsets = np.arange(longest)
        real = offsets < lengths[:, None]
        at = np.where(real, starts(batch.lengths)[chosen][:, None] + offsets, 0)

        def padded(values: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values[at]).to(device)

        states = self.encode(
            padded(batch.vectors), padded(batch.known), padded(batch.types), padded(batch.gaps)
        )
        ends = torch.from_numpy(np.maximum(lengths - 1, 0)).to(device)
        last = states[torch.arange(len(chosen), device=device), ends]
        empty = torch.from_numpy(lengths == 0).to(device)
        return torch.where(empty.unsqueeze(-1), self.start, last)

    def shape(self) -> dict[str, int | float | str]:
        """The configuration as plain values, for a file."""
        return asdict(self.config)


def _by_length(lengths: Ints) -> list[Ints]:
    """Groups histories of like length, so that little padding is computed."""
    order = np.argsort(lengths, kind="stable")
    groups: list[Ints] = []
    begin = 0
    while begin < len(order):
        # Sorted ascending: the last one of a group sets its padded length.
        padded = np.maximum(lengths[order[begin:]], 1) * np.arange(1, len(order) - begin + 1)
        end = begin + max(1, int(np.searchsorted(padded, _BATCH_TOKENS, side="right")))
        groups.append(order[begin:end])
        begin = end
    return groups
