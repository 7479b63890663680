"""From token ids to vectors: a network's hidden states, pooled and scaled to length 1."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedder.encoding.bert import PADDING
from embedder.encoding.encoder import TokenBatch
from embedder.settings import Pooling
from foretell.vectors import Vectors

CPU_BATCH_TOKENS = 512
"""From 300 tokens on, more make a pass of one thread no faster for each (MiniLM, measured)."""

CPU_WORKERS = 4
"""At most so many passes at a time on a CPU. As long as there are no more threads than that, each
pass has one: on 2 cores, 2 passes of one thread encode a fifth to a third more texts than passes of
2 threads, which wait for one another (measured). Many more would wait for Python's lock."""

CUDA_BATCH_TOKENS = 32_768
"""Enough to fill a large GPU with short texts."""


def workers(threads: int) -> int:
    """Passes at a time on a CPU that share so many threads."""
    return min(threads, CPU_WORKERS)


class Network(Protocol):
    """What differs between runtimes, number formats and kinds of models."""

    pads: bool
    """Whether it pads texts to the longest, so that only similar lengths should go together."""

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Hidden states, float32, shape (tokens, cols).

        Args:
            ids: of all texts' tokens, one text after another, shape (tokens,).
            lengths: of the texts in growing order, shape (texts,).
        """


class NetworkBackend:
    """Sorts by length, runs the network, pools. Implements `encoder.Backend`.

    Args:
        network: runs on `device`.
        cols: of its hidden states.
        fingerprint: see `encoder.Backend`.
        threads: of all passes together, on a CPU.
        batch_tokens: in a pass; None: as many as the hardware likes.
    """

    def __init__(
        self,
        network: Network,
        *,
        cols: int,
        pooling: Pooling,
        device: str,
        fingerprint: str,
        threads: int,
        batch_tokens: int | None = None,
    ) -> None:
        self.cols = cols
        self.device = device
        usual = CUDA_BATCH_TOKENS if device == "cuda" else CPU_BATCH_TOKENS
        self.batch_tokens = batch_tokens or usual
        # A GPU has the next batch at once when it is done with the last.
        self.workers = 2 if device == "cuda" else workers(threads)
        self._network = network
        self._pooling = pooling
        self._fingerprint = fingerprint
        self._threads = max(1, threads // self.workers)

    def fingerprint(self) -> str:
        """A hash that differs where the weights do."""
        return self._fingerprint

    def encode(self, batch: TokenBatch) -> Vectors:
        """Vectors of length 1, shape (texts, cols)."""
        if torch.get_num_threads() != self._threads:  # a setting of each thread
            torch.set_num_threads(self._threads)
        out = np.empty((len(batch), self.cols), np.float32)
        order = np.argsort(batch.lengths, kind="stable")
        lengths = batch.lengths[order]
        start = 0
        while start < len(order):
            end = self._end(lengths, start)
            rows = order[start:end]
            out[rows] = self._forward(batch.of_rows(rows))
            start = end
        return out

    def _end(self, lengths: NDArray[np.int64], start: int) -> int:
        """Where the pass that begins at text `start` ends: it has one text at least."""
        costs = lengths[start:]
        if self._network.pads:
            most = int(costs[0] * PADDING) + 4
            costs = costs[: np.searchsorted(costs, most, side="right")]
            cost = costs * np.arange(1, len(costs) + 1)
        else:
            cost = np.cumsum(costs)
        return start + max(1, int(np.searchsorted(cost, self.batch_tokens, side="right")))

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch) -> Vectors:
        """One pass over texts of growing length, shape (texts, cols)."""
        lengths = batch.lengths
        hidden = self._network(batch.ids, lengths)
        pooled = _pool(hidden, lengths, batch.offsets, self._pooling)
        # The epsilon leaves a zero vector zero instead of NaN.
        scaled = torch.nn.functional.normalize(pooled, dim=1, eps=1e-12)
        return np.asarray(scaled.cpu().numpy(), np.float32)


def _pool(
    hidden: Tensor, lengths: NDArray[np.int64], offsets: NDArray[np.int64], pooling: Pooling
) -> Tensor:
    """(tokens, cols) -> (texts, cols)."""
    match pooling:
        case Pooling.CLS:
            return hidden[torch.from_numpy(offsets[:-1]).to(hidden.device)]
        case Pooling.LAST_TOKEN:
            return hidden[torch.from_numpy(offsets[1:] - 1).to(hidden.device)]
        case Pooling.MEAN:
            counts = torch.from_numpy(lengths).to(hidden.device)
            return torch.segment_reduce(hidden, "mean", lengths=counts, axis=0)
