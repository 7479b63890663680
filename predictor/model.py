"""Sequence models: histories in, logits of the next behavior type and a query vector out.

A token is (item or text vector) + behavior type + time gap, layer-normed; an encoder reads the
tokens from left to right; two linear heads follow. The score of an item as the next one is the
inner product of query and item vector, so that retrieval is a search in the item index.

The encoder `lstm` is the classic of Hochreiter and Schmidhuber (1997) with the forget gate of
Gers et al. (2000), whose bias starts at one (Jozefowicz et al., 2015).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretell.vectors import Vectors
from predictor.history import GAPS, HistoryBatch, Ints, starts

MODEL_TYPES = ("lstm",)

_BATCH_TOKENS = 65_536
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
    """Of tokens and of the encoder's output, in training."""
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
        self.start = nn.Parameter(torch.zeros(hidden))
        self.output_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.type_head = nn.Linear(hidden, config.behavior_types)
        self.query_head = nn.Linear(hidden, dims)
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
            (batch, time, hidden). Padding on the right changes nothing before it.
        """
        tokens = torch.where(known.unsqueeze(-1), vectors, self.unknown)
        tokens = tokens + self.type_embedding(types) + self.gap_embedding(gaps)
        states, _ = self.encoder(self.dropout(self.token_norm(tokens)))
        return states  # type: ignore[no-any-return]  # nn.LSTM is not typed

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Type logits (rows, behavior_types) and queries (rows, dims) of states (rows, hidden)."""
        states = self.dropout(self.output_norm(states))
        return self.type_head(states), self.query_head(states)

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
        """(len(chosen), hidden): the state at the end of each history, `start` for empty ones."""
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
