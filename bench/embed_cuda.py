"""The encoder on a CUDA device: a network of BERT's shape with random weights, texts of 50 tokens.

- bert_base_tokens_s: batches of tokens, in process, through the whole forward pass and back.
- bert_base_model_flops_utilization: the matrix products of that per second over the device's peak
  for dense bfloat16; null for a device whose peak is not in the table below.
- bert_base_ours_grpc_batch_texts_s: through gRPC, calls of 256 texts, 32 in flight.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers

from bench import harness
from bench.harness import Figures, say
from bench.texts import Texts
from embedder.encoding import choice, encoder
from embedder.encoding.encoder import TokenBatch, Tokenizer
from embedder.settings import Device, Precision
from foretell import AsyncClient
from serving import process

SHAPES = {
    "minilm": transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1_536
    ),
    "bert-base": transformers.BertConfig(),
}
"""Networks by name."""

PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second by the maker's data sheets; the first name that is part of
the device's counts."""

TOKENS = 50
"""Of each text."""

PRODUCTS = 8
"""Joined in a text: more than 50 tokens, of which the service reads the first 50."""

REPETITIONS = 50

CALL, IN_FLIGHT, CALLS = 256, 32, 400
"""Texts in a call through gRPC, calls at a time, calls in all."""


def run(shape: str, cache: Path, threads: int) -> int:
    """Measures and prints; exit status 2 where there is no CUDA device.

    Args:
        shape: of `SHAPES`.
        cache: of the converted data set, see `datasets.files`.
        threads: of torch on the CPU's side.
    """
    if not torch.cuda.is_available():
        say("bench.embed: --device cuda, but there is no CUDA device; nothing was measured")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        model = save(shape, Path(folder) / "model")
        figures = measure(shape, model, Device.CUDA, cache, threads)
    harness.finish("embed", harness.versions("torch", "transformers", "grpcio"), figures)
    return 0


def save(shape: str, folder: Path) -> str:
    """A network with random weights and the default encoder's tokenizer; the folder."""
    torch.manual_seed(0)
    transformers.BertModel(SHAPES[shape]).save_pretrained(folder)
    default = encoder.locate("", None).location
    transformers.AutoTokenizer.from_pretrained(default).save_pretrained(folder)
    return str(folder)


def measure(shape: str, model: str, device: Device, cache: Path, threads: int) -> Figures:
    """The figures of a saved network."""
    name = shape.replace("-", "_")
    tokens_s = _tokens_s(model, device, threads)
    flops = tokens_s * flops_per_token(SHAPES[shape], TOKENS)
    peak = peak_flops(torch.cuda.get_device_name()) if device is Device.CUDA else None
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", "0", "--data-dir", f"{folder}/data", "--encoder", model,
                     "--device", device.value, "--max-tokens", str(TOKENS),
                     "--precision", Precision.BFLOAT16.value]  # fmt: skip
        with process.started("embedder", arguments, log=Path(folder) / "log") as service:
            texts_s = asyncio.run(_grpc_texts_s(service.address, Texts(cache)))
    return {
        f"{name}_tokens_s": tokens_s,
        f"{name}_model_flops_utilization": flops / peak if peak else None,
        f"{name}_ours_grpc_batch_texts_s": texts_s,
    }


def _tokens_s(model: str, device: Device, threads: int) -> float:
    files = encoder.locate(model, None)
    backend = choice.load(
        files,
        Tokenizer(files, TOKENS),
        device=device,
        precision=Precision.BFLOAT16,
        threads=threads,
    ).backend
    texts = max(1, backend.batch_tokens // TOKENS)
    ids = np.random.default_rng(0).integers(1_000, 30_000, texts * TOKENS)
    batch = TokenBatch(ids, np.arange(texts + 1) * TOKENS)
    for _ in range(3):
        backend.encode(batch)  # warm; its answer is there on return
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        backend.encode(batch)
        seconds.append(time.perf_counter() - started)
    return len(ids) / median(seconds)


async def _grpc_texts_s(address: str, texts: Texts) -> float:
    async with AsyncClient(embedder=address) as client:
        await harness.rate(client.embed, texts.joined(PRODUCTS, 8 * CALL), CALL, IN_FLIGHT)
        some = texts.joined(PRODUCTS, CALLS * CALL)
        return await harness.rate(client.embed, some, CALL, IN_FLIGHT)


def flops_per_token(config: transformers.BertConfig, tokens: int) -> float:
    """Operations of the matrix products for one token of a text, a multiply-add being two."""
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    weights = 4 * hidden * hidden + 2 * hidden * inner
    attention = 2 * tokens * hidden  # scores, and the sum of values
    return 2.0 * int(config.num_hidden_layers) * (weights + attention)


def peak_flops(device: str) -> float | None:
    """Of the device with this name; None where it is in no row of `PEAK_FLOPS`."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
