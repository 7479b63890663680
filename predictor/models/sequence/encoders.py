"""Encoders: tokens (batch, time, dims) in, states (batch, time, hidden) out, from left to right.

`rnn` is the plain recurrence of Elman (1990) with tanh; `lstm` is the classic of Hochreiter and
Schmidhuber (1997) with the forget gate of Gers et al. (2000), whose bias starts at one (Jozefowicz
et al., 2015); `gru` is Cho et al. (2014); `transformer` is causal self-attention in the shape of
SASRec (Kang and McAuley, 2018) with the norm before each part (Xiong et al., 2020).

An encoder of one's own is an entry point of the group `foretell.encoders`: its name is the model
type, and it is called with the NetworkConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import cast

import torch
from torch import Tensor, nn

GROUP = "foretell.encoders"

ATTENTION_DROPOUT = 0.1
"""In training, of attention weights, where states are dropped at all."""


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a sequence network."""

    behavior_types: int
    """Types that it tells apart."""
    dims: int = 64
    """Dimensions of item, text and query vectors."""
    hidden: int = 128
    """Width of the encoder's states."""
    model_type: str = "lstm"
    """One of `model_types()`."""
    layers: int = 1
    """Blocks of a transformer, or layers of a recurrent encoder."""
    heads: int = 2
    """Attention heads of each block of a tower's transformer; they divide its `hidden`."""
    positions: int = 200
    """Events of the longest history; those behind share the last position's embedding."""
    traces: bool = True
    """Whether fading sums of what was read lead to the heads, see SequenceNetwork."""
    dropout: float = 0.2
    """In training, of numbers in states, and of whole events in the traces."""
    input_dropout: float = 0.2
    """In training, of numbers in tokens."""
    towers: int = 1
    """Networks side by side that share dims and hidden evenly, see SequenceNetwork."""
    clock: bool = False
    """Whether hour of the day and day of the week (UTC) of events are read."""

    def of_tower(self) -> NetworkConfig:
        """The shape of one tower.

        Raises:
            ValueError: they cannot share evenly.
        """
        for name in ("dims", "hidden"):
            if getattr(self, name) % self.towers:
                raise ValueError(f"{self.towers} towers do not divide {getattr(self, name)} {name}")
        return replace(
            self, dims=self.dims // self.towers, hidden=self.hidden // self.towers, towers=1
        )


class Recurrent(nn.Module):
    """An LSTM, a GRU or a plain recurrence."""

    def __init__(self, config: NetworkConfig, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
        super().__init__()
        # torch drops between layers only, and warns where there is but one.
        between = config.dropout if config.layers > 1 else 0.0
        self.cells = kind(
            config.dims, config.hidden, config.layers, batch_first=True, dropout=between
        )
        if kind is nn.LSTM:
            with torch.no_grad():
                for layer in range(config.layers):
                    bias = self.cells.get_parameter(f"bias_ih_l{layer}")
                    # Gates lie as input, forget, cell, output.
                    bias[config.hidden : 2 * config.hidden].fill_(1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """States (batch, time, hidden)."""
        states: Tensor = self.cells(tokens)[0]
        return states


class Block(nn.Module):
    """Causal self-attention, then two affine layers, each added to what came in."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attended = nn.Linear(hidden, hidden)
        self.feed_norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def last(self, states: Tensor, ends: Tensor) -> Tensor:
        """(batch, hidden): what `forward` gives at the position `ends` (batch,) of each row.

        With one query a row, the key matrix is applied to the query and the value matrix to the
        mixed states, rather than both to the state of each position: q.(K x) = (K'q).x, and the
        keys' bias is the same for all positions.
        """
        batch, time, hidden = states.shape
        rows = torch.arange(batch, device=states.device)
        weight, bias = self.query_key_value.weight, self.query_key_value.bias
        _, to_key, to_value = weight.view(3, self.heads, -1, hidden)  # (heads, size, hidden) each
        normed = self.attention_norm(states)
        query = nn.functional.linear(normed[rows, ends], weight[:hidden], bias[:hidden])
        query = query.view(batch, self.heads, -1).transpose(0, 1) @ to_key  # (heads, batch, hidden)
        likeness = query.transpose(0, 1) @ normed.transpose(1, 2) / to_key.shape[1] ** 0.5
        later = torch.arange(time, device=states.device) > ends[:, None]
        likeness = likeness.masked_fill(later[:, None], float("-inf"))  # (batch, heads, time)
        mixed = likeness.softmax(-1) @ normed  # (batch, heads, hidden)
        found = mixed.transpose(0, 1) @ to_value.transpose(1, 2)  # (heads, batch, size)
        found = found.transpose(0, 1).reshape(batch, hidden) + bias[2 * hidden :]
        return self._fed(states[rows, ends], found)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, time, hidden) to the same."""
        batch, time, hidden = states.shape
        parts = self.query_key_value(self.attention_norm(states))
        query, key, value = parts.view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        drop = ATTENTION_DROPOUT if self.training and self.dropout.p else 0.0
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=drop
        )
        return self._fed(states, found.transpose(1, 2).reshape(batch, time, hidden))

    def _fed(self, states: Tensor, found: Tensor) -> Tensor:
        """Adds what attention has found, then what the affine layers make of it."""
        states = states + self.dropout(self.attended(found))
        fed = self.down(nn.functional.gelu(self.up(self.feed_norm(states))))
        out: Tensor = states + self.dropout(fed)
        return out


class Transformer(nn.Module):
    """Blocks over tokens with a learned embedding of each position."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.hidden % config.heads:
            raise ValueError(f"{config.heads} heads do not divide {config.hidden} hidden")
        same = config.hidden == config.dims
        self.enter = nn.Identity() if same else nn.Linear(config.dims, config.hidden)
        self.positions = nn.Embedding(config.positions, config.hidden)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.dropout = nn.Dropout(config.input_dropout)
        self.blocks = nn.Sequential(
            *(Block(config.hidden, config.heads, config.dropout) for _ in range(config.layers))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """States (batch, time, hidden)."""
        states: Tensor = self.blocks(self._entered(tokens))
        return states

    def last(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """(batch, hidden): the states at `ends` (batch,), for a fifth of the work: the last block
        answers for one position of each row."""
        states = self._entered(tokens)
        *before, last = self.blocks
        for block in before:
            states = block(states)
        return cast(Block, last).last(states, ends)

    def _entered(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        at = at.clamp(max=self.positions.num_embeddings - 1)
        entered: Tensor = self.enter(tokens) + self.dropout(self.positions(at))
        return entered


def last_states(encoder: nn.Module, tokens: Tensor, ends: Tensor) -> Tensor:
    """(batch, hidden): an encoder's states at the positions `ends` (batch,)."""
    if isinstance(encoder, Transformer):
        return encoder.last(tokens, ends)
    states: Tensor = encoder(tokens)
    return states[torch.arange(ends.shape[0], device=states.device), ends]


Factory = Callable[[NetworkConfig], nn.Module]

ENCODERS: dict[str, Factory] = {
    "rnn": lambda config: Recurrent(config, nn.RNN),
    "gru": lambda config: Recurrent(config, nn.GRU),
    "lstm": lambda config: Recurrent(config, nn.LSTM),
    "transformer": Transformer,
}


def model_types() -> tuple[str, ...]:
    """Names of the encoders at hand, those of installed entry points included."""
    others = {point.name for point in entry_points(group=GROUP)} - set(ENCODERS)
    return (*ENCODERS, *sorted(others))


def make_encoder(config: NetworkConfig) -> nn.Module:
    """An untrained encoder.

    Raises:
        ValueError: there is none of this name.
    """
    if config.model_type in ENCODERS:
        return ENCODERS[config.model_type](config)
    for point in entry_points(group=GROUP, name=config.model_type):
        made: nn.Module = point.load()(config)
        return made
    raise ValueError(f"model_type {config.model_type!r} is none of {', '.join(model_types())}")
