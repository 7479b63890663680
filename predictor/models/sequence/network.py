"""Sequence models: histories in; logits of the next behavior type, a query vector, and time out.

A token is (item or text vector) + behavior type + time gap + clock where it is asked for, layer-
normed; an encoder (see `encoders`) reads the tokens from left to right; linear heads follow. The
score of an item as the next one is the inner product of query and item vector, so that retrieval is
a search in the item index.

Where users repeat what they did, traces of the vectors and types read so far, which fade with fixed
half-lives, lead straight to the heads beside the encoder: a state of this size does not hold which
of ten thousand products a household buys again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretell.vectors import Vectors
from predictor.models.history import DAY_HOURS, GAPS, HOURS, HistoryBatch, Ints, starts
from predictor.models.sequence.encoders import ENCODERS, NetworkConfig, last_states, make_encoder

__all__ = ["HALF_LIVES", "MODEL_TYPES", "NetworkConfig", "Outputs", "SequenceModel",
           "SequenceNetwork", "Tower"]  # fmt: skip

MODEL_TYPES = tuple(ENCODERS)
"""The encoders that come with the package; `encoders.model_types` adds those of others."""

HALF_LIVES = (10.0, 40.0, 160.0)
"""Of the traces, in events: about the last shopping basket, the last month, the last year."""

_CLOCK = DAY_HOURS + HOURS // DAY_HOURS
"""Rows of the clock: one for each hour of the day, then one for each day of the week."""

_BATCH_TOKENS = 16_384
"""Padded tokens of one forward pass in `predict`: bounds memory, not speed."""


@dataclass(frozen=True)
class Outputs:
    """What a sequence model says about what comes after each history."""

    type_logits: NDArray[np.float32]
    """(histories, behavior_types), before the version's `type_calibration`."""
    queries: Vectors
    """(histories, dims): score of an item = query . item vector."""
    log_gaps: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """(histories,) log of the seconds from the last event to the next basket; of no meaning where
    the version saw no times."""


class SequenceModel(Protocol):
    """What serving and evaluation see of a sequence model; safe to call from several threads."""

    config: NetworkConfig

    def predict(self, batch: HistoryBatch) -> Outputs:
        """Reads each history to its end. An empty history is answered from a learned start."""
        ...


class Tower(nn.Module):
    """A network of one tower, see SequenceNetwork."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        dims, hidden = config.dims, config.hidden
        self.type_embedding = nn.Embedding(config.behavior_types + 1, dims)
        self.gap_embedding = nn.Embedding(GAPS, dims)
        self.clock_embedding = nn.Embedding(_CLOCK, dims) if config.clock else None
        self.unknown = nn.Parameter(torch.zeros(dims))
        self.token_norm = nn.LayerNorm(dims)
        self.token_dropout = nn.Dropout(config.input_dropout)
        self.encoder = make_encoder(config)
        types = config.behavior_types + 1
        traces = len(HALF_LIVES) if config.traces else 0
        self.start = nn.Parameter(torch.zeros(hidden + traces * (dims + types)))
        self.output_norm = nn.LayerNorm(hidden)
        self.type_head = nn.Linear(hidden + traces * types, config.behavior_types)
        # What a transformer passes on from its tokens lies in the items' space already.
        straight = hidden == dims and not traces
        self.query_head = nn.Identity() if straight else nn.Linear(hidden, dims)
        self.gap_head = nn.Linear(hidden, 1)
        self.trace_weight = nn.Parameter(torch.full((traces, dims), 0.2))
        self._initialise()

    def _initialise(self) -> None:
        for embedding in (self.type_embedding, self.gap_embedding, self.clock_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        with torch.no_grad():
            # A type that training never saw counts as no type.
            self.type_embedding.weight[-1].zero_()

    def encode(
        self, vectors: Tensor, known: Tensor, types: Tensor, gaps: Tensor, hours: Tensor
    ) -> Tensor:
        """See SequenceNetwork. A state is the encoder's output, then the traces."""
        states: Tensor = self.encoder(self._tokens(vectors, known, types, gaps, hours))
        if not self.config.traces:
            return states
        return torch.cat([states, self._traces(self._events(vectors, types))], -1)

    def last(
        self,
        vectors: Tensor,
        known: Tensor,
        types: Tensor,
        gaps: Tensor,
        hours: Tensor,
        ends: Tensor,
    ) -> Tensor:
        """(batch, width): the states of `encode` at the positions `ends` (batch,)."""
        states = last_states(self.encoder, self._tokens(vectors, known, types, gaps, hours), ends)
        if not self.config.traces:
            return states
        events = self._events(vectors, types)
        age = (ends[:, None] - torch.arange(events.shape[1], device=events.device)).unsqueeze(1)
        half_lives = torch.tensor(HALF_LIVES, device=events.device).view(1, -1, 1)
        weight = torch.where(age >= 0, torch.exp2(-age / half_lives), 0.0)
        weight = weight / weight.sum(-1, keepdim=True).sqrt()
        return torch.cat([states, (weight @ events).flatten(1)], -1)

    def _tokens(
        self, vectors: Tensor, known: Tensor, types: Tensor, gaps: Tensor, hours: Tensor
    ) -> Tensor:
        """What the encoder reads: (batch, time, dims)."""
        tokens = torch.where(known.unsqueeze(-1), vectors, self.unknown)
        tokens = tokens + self.type_embedding(types) + self.gap_embedding(gaps)
        if self.clock_embedding is not None:
            tokens = tokens + self.clock_embedding(hours % DAY_HOURS)
            tokens = tokens + self.clock_embedding(DAY_HOURS + hours // DAY_HOURS)
        read: Tensor = self.token_dropout(self.token_norm(tokens))
        return read

    def _events(self, vectors: Tensor, types: Tensor) -> Tensor:
        """What the traces sum: (batch, time, dims + types)."""
        one_hot = nn.functional.one_hot(types, self.config.behavior_types + 1)
        return torch.cat([vectors, one_hot], -1)

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

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See SequenceNetwork."""
        hidden, dims = self.config.hidden, self.config.dims
        encoded = self.output_norm(states[:, :hidden])
        if self.config.model_type != "transformer":  # whose blocks have dropped already
            encoded = nn.functional.dropout(encoded, self.config.dropout, self.training)
        query, log_gap = self.query_head(encoded), self.gap_head(encoded).squeeze(1)
        if not self.config.traces:
            return self.type_head(encoded), query, log_gap
        traces = states[:, hidden:].reshape(states.shape[0], len(HALF_LIVES), -1)
        of_types = traces[:, :, dims:].flatten(1)
        query = query + (traces[:, :, :dims] * self.trace_weight).sum(1)
        return self.type_head(torch.cat([encoded, of_types], -1)), query, log_gap


class SequenceNetwork(nn.Module):
    """The network without item vectors: those come in with the tokens.

    It is one tower or several side by side, each of which reads and asks for its own share of the
    space's dimensions, and knows nothing of the others. An item's score is the mean of theirs, as
    in an ensemble (Dietterich, 2000, "Ensemble methods in machine learning"), by one inner product.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        one = config.of_tower()
        self.towers = cast(Sequence[Tower], nn.ModuleList(Tower(one) for _ in range(config.towers)))
        # In a tuple: no part of the module's own weights.
        self._frozen: tuple[Callable[..., tuple[Tensor, Tensor, Tensor]]] | None = None

    @property
    def start(self) -> Tensor:
        """(width,) the state where nothing came before."""
        return torch.cat([tower.start for tower in self.towers])

    def encode(
        self, vectors: Tensor, known: Tensor, types: Tensor, gaps: Tensor, hours: Tensor
    ) -> Tensor:
        """States after each token.

        Args:
            vectors: (batch, time, dims).
            known: (batch, time) bool.
            types: (batch, time) int64.
            gaps: (batch, time) int64.
            hours: (batch, time) int64.

        Returns:
            (batch, time, width): the towers' states side by side. Padding on the right changes
            nothing before it.
        """
        parts = vectors.chunk(self.config.towers, -1)
        return torch.cat(
            [
                tower.encode(part, known, types, gaps, hours)
                for tower, part in zip(self.towers, parts, strict=True)
            ],
            -1,
        )

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What states (rows, width) say of the next event.

        Returns:
            type logits (rows, behavior_types), queries (rows, dims), log time gaps (rows,).
        """
        parts = states.chunk(self.config.towers, -1)
        found = [tower.heads(part) for tower, part in zip(self.towers, parts, strict=True)]
        types, queries, gaps = zip(*found, strict=True)
        query = torch.cat(queries, -1) / len(found)
        return torch.stack(types).mean(0), query, torch.stack(gaps).mean(0)

    @torch.inference_mode()
    def predict(self, batch: HistoryBatch) -> Outputs:
        """Reads each history to its end (see SequenceModel)."""
        rows = len(batch)
        logits = np.zeros((rows, self.config.behavior_types), np.float32)
        queries = np.zeros((rows, self.config.dims), np.float32)
        log_gaps = np.zeros(rows, np.float32)
        for chosen in _by_length(batch.lengths):
            found = self._ends(batch, chosen)
            for into, values in zip((logits, queries, log_gaps), found, strict=True):
                into[chosen] = values.float().cpu().numpy()
        return Outputs(logits, queries, log_gaps)

    def forward(
        self,
        vectors: Tensor,
        known: Tensor,
        types: Tensor,
        gaps: Tensor,
        hours: Tensor,
        lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes after each history: `heads` of the state at its end.

        Args:
            vectors: (batch, time, dims), and the others as in `encode`.
            lengths: (batch,) int64; after an empty history comes what `start` says.
        """
        ends = (lengths - 1).clamp(min=0)
        parts = vectors.chunk(self.config.towers, -1)
        last = torch.cat(
            [
                tower.last(part, known, types, gaps, hours, ends)
                for tower, part in zip(self.towers, parts, strict=True)
            ],
            -1,
        )
        return self.heads(torch.where((lengths == 0).unsqueeze(-1), self.start, last))

    @torch.inference_mode()
    def freeze(self) -> None:
        """Makes `predict` a graph without Python, for good: half the time of a single history.

        The weights must not change any more. An encoder of an entry point stays as it is: nobody
        knows whether it can be traced.
        """
        if self.config.model_type not in ENCODERS:
            return
        shape = (3, 7)  # any: no size is part of the graph
        example = (
            torch.zeros(*shape, self.config.dims),
            torch.ones(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape[:1], shape[1]),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; of sizes, see `shape`
            traced = torch.jit.trace(self.eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
            self._frozen = (torch.jit.freeze(traced),)

    def _ends(self, batch: HistoryBatch, chosen: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` of some histories, padded on the right."""
        lengths = batch.lengths[chosen]
        longest = int(lengths.max())
        device = self.start.device
        if longest == 0:
            return self.heads(self.start.expand(len(chosen), -1))
        offsets = np.arange(longest)
        real = offsets < lengths[:, None]
        at = np.where(real, starts(batch.lengths)[chosen][:, None] + offsets, 0)

        def padded(values: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values[at]).to(device)

        (read,) = self._frozen or (self,)
        found: tuple[Tensor, Tensor, Tensor] = read(
            padded(batch.vectors),
            padded(batch.known),
            padded(batch.types),
            padded(batch.gaps),
            padded(batch.hours),
            torch.from_numpy(lengths).to(device),
        )
        return found

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
