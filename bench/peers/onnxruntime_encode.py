"""ONNX Runtime by hand, run by bench.embed in an environment of its own.

    onnxruntime_encode.py export MODEL GRAPH
    onnxruntime_encode.py encode MODEL GRAPH TEXTS --threads N

`export` writes the transformers model in the folder MODEL as float32 ONNX. `encode` reads TEXTS, a
JSON file {name: [text, ...]}, and prints {"set", "texts", "seconds"} for each set: texts in the
order of their length, batches of at most 2,048 tokens, padding included, mean pooling, vectors of
length 1, tokenizing included.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

BATCH_TOKENS = 2_048
MAX_TOKENS = 256


def say(**values: object) -> None:
    """One JSON object on a line of its own."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def export(model: str, graph: str) -> None:
    """Writes the graph of hidden states, (texts, tokens, cols)."""
    import torch
    import transformers

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Of the exporters and kinds of attention, this gives the graph that runs fastest: ONNX
            # Runtime finds the whole attention in it.
            self.network = transformers.AutoModel.from_pretrained(
                model, attn_implementation="eager"
            )

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.network(
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state

    ids = torch.randint(1_000, 2_000, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    axes = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        Hidden().eval(),
        (ids, mask),
        graph,
        dynamo=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
    )
    say(graph=graph)


def encode(model: str, graph: str, texts: str, threads: int) -> None:
    """Encodes each set of texts and says how long it took."""
    import onnxruntime
    import tokenizers

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    def vectors(some: list[str]) -> np.ndarray:
        sequences = [each.ids for each in tokenizer.encode_batch(some)]
        order = np.argsort([-len(each) for each in sequences], kind="stable")
        out = np.empty((len(some), 0), np.float32)
        start = 0
        while start < len(order):
            longest = len(sequences[order[start]])
            rows = order[start : start + max(1, BATCH_TOKENS // longest)]
            start += len(rows)
            ids = np.zeros((len(rows), longest), np.int64)
            for place, row in enumerate(rows):
                ids[place, : len(sequences[row])] = sequences[row]
            mask = ids != 0  # 0 is padding
            (hidden,) = session.run(
                None, {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
            )
            pooled = np.einsum("btc,bt->bc", hidden, mask.astype(np.float32))
            if not out.shape[1]:
                out = np.empty((len(some), pooled.shape[1]), np.float32)
            out[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return out

    sets = json.loads(Path(texts).read_text())
    for name, some in sets.items():
        vectors(some[:64])
        started = time.perf_counter()
        vectors(some)
        seconds = time.perf_counter() - started
        say(set=name, texts=len(some), seconds=seconds)


parser = argparse.ArgumentParser()
parser.add_argument("what", choices=("export", "encode"))
parser.add_argument("model")
parser.add_argument("graph")
parser.add_argument("texts", nargs="?")
parser.add_argument("--threads", type=int)
given = parser.parse_args()
if given.what == "export":
    export(given.model, given.graph)
else:
    encode(given.model, given.graph, given.texts, given.threads)
