"""How fast texts become vectors: ours in process and through gRPC, sentence-transformers, and ONNX
Runtime by hand, all with MiniLM on the CPU, in one run.

Rounds go through all of them one after another, each with texts that it has not met (see
bench/texts.py: short, long, mixed); a figure is the median of the rounds, a ratio the median of the
rounds' ratios. S is short, long or mixed:

- S_ours_in_process_texts_s: the batcher and the network, calls of 256 texts, 4 in flight.
- S_ours_grpc_batch_texts_s: `python -m embedder` and the asyncio client, the same calls.
- S_ours_grpc_single_texts_s: the same with 16 callers, one text a call.
- S_onnxruntime_texts_s: float32, length-sorted batches of at most 2,048 tokens.
- S_sentence_transformers_texts_s: `SentenceTransformer.encode` with its defaults.
- S_ratio_batch_onnxruntime, S_ratio_single_onnxruntime, S_ratio_batch_sentence_transformers: ours
  over the peer's.
- outside_model_share: of the time of calls of 256 mixed texts through gRPC, one after another, what
  is not spent in the network's forward pass.
- cached_texts_s: texts that the server has met, calls of 256, 4 in flight.
- agreement_cosine, agreement_recall_at_10: of the server's vectors with those of float32, as it
  measured at its start.
- cpu_has_bf16: whether the CPU has instructions for bfloat16 products.
- rounds; load_before: running processes at the start, above about 0.5 figures are lower bounds;
  peers_from_cache: 1 where the budget left no time for the peers and their figures are those of an
  earlier run.

With --device cuda: see bench/embed_cuda.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from bench import embed_cuda, harness
from bench.harness import Budget, Figures, Peer, say
from bench.texts import SETS, Texts
from embedder.encoding import choice, encoder
from embedder.encoding.batcher import Batcher
from embedder.encoding.encoder import Tokenizer
from embedder.settings import Device
from foretell import AsyncClient
from serving import process

COUNTS = {"short": 4_096, "long": 1_024, "mixed": 2_048}
"""Texts of a set that are encoded in each measurement."""

CALL = 256
"""Texts in a large call."""

IN_FLIGHT = 4
"""Large calls at a time."""

CALLERS = 16
"""Of one text a call."""

MOST_ROUNDS = 5

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "tokenizers"),
    "sentence_transformers": ("sentence-transformers", "transformers", "torch"),
}
"""Versions that a peer's figures depend on."""

RATIOS = (
    ("batch", "onnxruntime"),
    ("single", "onnxruntime"),
    ("batch", "sentence_transformers"),
)
"""Ways of calling ours, and the peer each is compared with."""

PEERS_S = 120.0
"""Both peers take less than this in a round (sentence-transformers 40 s on two busy cores)."""

Rates = dict[str, float]
"""Texts per second by figure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda":
        return embed_cuda.run(options.model_shape, options.cache_dir, options.threads)
    budget = Budget(options.budget_s)
    load = harness.load()
    texts = Texts(options.cache_dir)
    peers = Peers(options.cache_dir, options.threads, fresh=options.fresh)
    files = encoder.locate("", None)
    tokenizer = Tokenizer(files, None)
    loaded = choice.load(files, tokenizer, device=Device.CPU, threads=options.threads)
    batcher = Batcher(loaded.backend, tokenizer)
    rounds = _rounds(budget, options.threads, texts, peers, batcher)
    figures = summary(rounds)
    figures |= {
        "agreement_cosine": loaded.agreement.cosine,
        "agreement_recall_at_10": loaded.agreement.recall_at_10,
        "cpu_has_bf16": int(choice.bfloat16_flag() is not None),
        "rounds": len(rounds),
        "peers_from_cache": int(peers.from_cache),
        "load_before": load,
    }
    say(table(figures))
    versions = harness.versions("torch", "transformers", "tokenizers", "grpcio", "numpy")
    harness.finish("embed", versions | peers.versions, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("embed", __doc__ or "", budget_s=1200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where the network runs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--model-shape", choices=embed_cuda.SHAPES, default="bert-base",
                        help="with --device cuda: of a network with random weights "
                        "(default: %(default)s)")  # fmt: skip
    return parser


def _rounds(
    budget: Budget, threads: int, texts: Texts, peers: Peers, batcher: Batcher
) -> list[Rates]:
    rounds: list[Rates] = []
    with contextlib.ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        arguments = ["--port", "0", "--data-dir", str(folder / "data"), "--threads", str(threads)]
        service = running.enter_context(process.started("embedder", arguments, log=folder / "log"))
        in_process = running.enter_context(contextlib.closing(batcher))
        while len(rounds) < MOST_ROUNDS and _next(budget, len(rounds)):
            say(f"round {len(rounds) + 1}")
            ours = asyncio.run(_ours(service.address, in_process, texts))
            rounds.append(ours | peers.rates(texts, budget.left))
    return rounds


def _next(budget: Budget, done: int) -> bool:
    """Whether there is time for another round; the first one always runs."""
    return done == 0 or budget.left > 1.2 * budget.spent / done


# --- Ours --------------------------------------------------------------------------------------


async def _ours(address: str, in_process: Batcher, texts: Texts) -> Rates:
    rates: Rates = {}
    async with AsyncClient(embedder=address) as client:
        for embed in (in_process.encode, client.embed):
            await embed(texts.take("mixed", CALL))  # warm
        for name in SETS:
            for figure, embed, size, callers in (
                ("ours_in_process", in_process.encode, CALL, IN_FLIGHT),
                ("ours_grpc_batch", client.embed, CALL, IN_FLIGHT),
                ("ours_grpc_single", client.embed, 1, CALLERS),
            ):
                some = texts.take(name, COUNTS[name])
                rates[f"{name}_{figure}_texts_s"] = await harness.rate(embed, some, size, callers)
        rates["outside_model_share"] = await _outside_share(client, texts)
        known = texts.take("short", 4 * CALL)
        await harness.rate(client.embed, known, CALL, IN_FLIGHT)
        rates["cached_texts_s"] = await harness.rate(client.embed, known * 8, CALL, IN_FLIGHT)
    return rates


async def _outside_share(client: AsyncClient, texts: Texts) -> float:
    some = texts.take("mixed", COUNTS["mixed"])
    forward_s = 0.0
    started = time.perf_counter()
    for start in range(0, len(some), CALL):
        result = await client.embed(some[start : start + CALL])
        forward_s += result.timings.forward_us / 1e6
    return 1 - forward_s / (time.perf_counter() - started)


# --- Peers -------------------------------------------------------------------------------------


class Peers:
    """Both peers' rates.

    Args:
        cache: of environments and results.
        threads: of each peer.
        fresh: whether no earlier run's rates will do.
    """

    def __init__(self, cache: Path, threads: int, *, fresh: bool) -> None:
        self.from_cache = False
        self.versions: dict[str, str] = {}
        self._cache = cache
        self._threads = threads
        self._fresh = fresh
        self._model = encoder.locate("", None).location
        self._peers = {name: harness.peer(name, cache) for name in DISTRIBUTIONS}
        for name, peer in self._peers.items():
            found = peer.versions(*DISTRIBUTIONS[name])
            self.versions |= {f"{name}/{each}": version for each, version in found.items()}

    def rates(self, texts: Texts, left_s: float) -> Rates:
        """Texts per second by figure; from an earlier run where less than `PEERS_S` is left."""
        rates: Rates = {}
        sets = {name: texts.take(name, COUNTS[name]) for name in SETS}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(sets, file)
            file.flush()
            for name, peer in self._peers.items():
                found, cached = harness.kept(
                    self._cache, f"embed-{name}", self._key(name),
                    partial(self._measure, name, peer, file.name),
                    fresh=self._fresh or left_s > PEERS_S,
                )  # fmt: skip
                rates |= found
                self.from_cache |= cached
        return rates

    def _key(self, name: str) -> dict[str, object]:
        return {
            "versions": {k: v for k, v in self.versions.items() if k.startswith(f"{name}/")},
            "hardware": harness.hardware(),
            "script": _sha256(harness.PEERS / f"{name}_encode.py"),
            "threads": self._threads,
            "texts": COUNTS,
        }

    def _measure(self, name: str, peer: Peer, texts: str) -> Iterator[Rates]:
        say(f"{name}")
        arguments = [self._model, texts, "--threads", str(self._threads)]
        if name == "onnxruntime":
            arguments = ["encode", self._model, str(self._graph(peer)), *arguments[1:]]
        rates: Rates = {}
        for line in peer.run(f"{name}_encode.py", arguments, self._threads):
            rates[f"{line['set']}_{name}_texts_s"] = line["texts"] / line["seconds"]
        yield rates

    def _graph(self, peer: Peer) -> Path:
        """The network as ONNX, exported where that has not been done."""
        weights = _sha256(Path(self._model) / "model.safetensors")
        graph = self._cache.expanduser() / "data" / f"minilm-{weights[:12]}.onnx"
        if not graph.exists():
            new = graph.with_suffix(".new")
            graph.parent.mkdir(parents=True, exist_ok=True)
            export = ["export", self._model, str(new)]
            list(peer.run("onnxruntime_encode.py", export, self._threads))
            new.replace(graph)
        return graph


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- Figures -----------------------------------------------------------------------------------


def summary(rounds: Sequence[Rates]) -> Figures:
    """Medians over the rounds, of figures and of ratios within a round."""
    values: dict[str, list[float]] = defaultdict(list)
    for rates in rounds:
        for name, value in (rates | _ratios(rates)).items():
            values[name].append(value)
    return {name: median(several) for name, several in values.items()}


def _ratios(rates: Rates) -> Rates:
    return {
        f"{name}_ratio_{way}_{peer}": rates[f"{name}_ours_grpc_{way}_texts_s"]
        / rates[f"{name}_{peer}_texts_s"]
        for name in SETS
        for way, peer in RATIOS
    }


def table(figures: Figures) -> str:
    """Sets as columns; figures of no set below."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for figure, value in figures.items():
        name, _, rest = figure.partition("_")
        text = "-" if value is None else f"{value:.4g}"
        if name in SETS:
            rows[rest][name] = text
        else:
            rows[figure][""] = text
    return harness.table([*SETS, ""], rows)


if __name__ == "__main__":
    sys.exit(main())
