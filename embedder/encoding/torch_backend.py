"""The text encoder on PyTorch: CPU or one CUDA device."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from embedder.encoding.encoder import FAITHFUL, EncoderFiles, TokenBatch, unreadable
from embedder.settings import Device, Pooling, Precision
from foretell.errors import FailedPreconditionError
from foretell.vectors import Vectors

CPU_BATCH_TOKENS = 2_048
"""From 512 to 4,096 tokens make no difference on 2 cores (MiniLM, measured); 8,192 are slower."""

CUDA_BATCH_TOKENS = 32_768
"""Enough to fill a large GPU with short texts."""

PADDING = 1.25
"""Texts share a forward pass as long as the longest has at most this much of the shortest's
tokens (and 4 more): padding costs as much as text."""

_CPUINFO = Path("/proc/cpuinfo")

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of /proc/cpuinfo (x86; ARM's `bf16`) with fast bfloat16 products."""


class TorchBackend:
    """`transformers.AutoModel`, pooled and scaled to length 1. Implements `encoder.Backend`.

    Raises:
        FailedPreconditionError: no such encoder, or no CUDA device where one is asked for.
    """

    def __init__(
        self, files: EncoderFiles, device: Device, precision: Precision, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self._pooling = files.pooling
        if device is Device.CUDA and not torch.cuda.is_available():
            raise FailedPreconditionError("device is cuda, but there is no CUDA device")
        on_gpu = device is not Device.CPU and torch.cuda.is_available()
        self.device = "cuda" if on_gpu else "cpu"
        self.batch_tokens = CUDA_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS
        self._model = _load(files).to(self.device)
        self.cols = int(self._model.config.hidden_size)
        self._dtype = torch.float32
        if precision is Precision.BFLOAT16 or (
            precision is Precision.AUTO and _has_bfloat16(self.device) and self._faithful()
        ):
            self._dtype = torch.bfloat16

    @property
    def precision(self) -> str:
        """Number format of the matrix products."""
        return str(self._dtype).removeprefix("torch.")

    def encode(self, batch: TokenBatch) -> Vectors:
        """Vectors of length 1, shape (texts, cols)."""
        if torch.get_num_threads() != self._threads:  # a setting of each thread
            torch.set_num_threads(self._threads)
        out = np.empty((len(batch), self.cols), np.float32)
        order = np.argsort(batch.lengths, kind="stable")
        sizes = batch.lengths[order]
        start = 0
        while start < len(order):
            longest = int(sizes[start] * PADDING) + 4
            end = int(np.searchsorted(sizes, longest, side="right"))
            end = min(end, start + max(1, self.batch_tokens // int(sizes[end - 1])))
            rows = order[start:end]
            out[rows] = self._forward(batch, rows)
            start = end
        return out

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch, rows: np.ndarray[Any, Any]) -> Vectors:
        """One padded forward pass; pooled and scaled, shape (rows, cols)."""
        lengths = batch.lengths[rows]
        ids = np.zeros((len(rows), int(lengths.max())), np.int64)
        mask = np.arange(ids.shape[1]) < lengths[:, None]  # (rows, longest)
        ids[mask] = np.concatenate(
            [batch.ids[batch.offsets[r] : batch.offsets[r + 1]] for r in rows]
        )
        attended = torch.from_numpy(mask).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self._dtype is torch.bfloat16):
            hidden = self._model(
                input_ids=torch.from_numpy(ids).to(self.device), attention_mask=attended.long()
            ).last_hidden_state  # (rows, longest, cols)
        pooled = _pool(hidden.float(), attended, self._pooling)
        # The epsilon leaves a zero vector zero instead of NaN.
        scaled = torch.nn.functional.normalize(pooled, dim=1, eps=1e-12)
        return np.asarray(scaled.cpu().numpy(), np.float32)

    def _faithful(self) -> bool:
        """Whether bfloat16 gives the vectors that float32 does, tried on a few sequences."""
        random = np.random.default_rng(0)
        vocabulary = int(self._model.config.vocab_size)
        sequences = [random.integers(0, vocabulary, n).tolist() for n in (3, 8, 8, 16, 32, 64)]
        batch = TokenBatch.of(sequences)
        exact = self.encode(batch)
        self._dtype = torch.bfloat16
        rounded = self.encode(batch)
        self._dtype = torch.float32
        return bool(((exact * rounded).sum(axis=1) >= FAITHFUL).all())

    def fingerprint(self) -> str:
        """A hash of the first 64 numbers of each weight: any training changes all of them."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.named_parameters()):
            digest.update(name.encode() + str(tuple(weight.shape)).encode())
            digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()


def _load(files: EncoderFiles) -> Any:
    # A pooler that the checkpoint lacks is no news.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = transformers.AutoModel.from_pretrained(files.location, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise unreadable(files.name, error) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model.eval()


def _pool(hidden: torch.Tensor, attended: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """(rows, tokens, cols) -> (rows, cols); `attended` is False at padding."""
    match pooling:
        case Pooling.CLS:
            return hidden[:, 0]
        case Pooling.LAST_TOKEN:
            last = attended.sum(dim=1) - 1
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        case Pooling.MEAN:
            weights = attended[..., None].float()
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _has_bfloat16(device: str) -> bool:
    """Whether the hardware has instructions for bfloat16 products."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not _CPUINFO.is_file():
        return False
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not _BF16_FLAGS.isdisjoint(value.split())
    return False
