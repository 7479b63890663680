"""sentence-transformers, run by bench.embed in an environment of its own.

    sentence_transformers_encode.py MODEL TEXTS --threads N

Reads TEXTS, a JSON file {name: [text, ...]}, and prints {"set", "texts", "seconds"} for each set:
`SentenceTransformer.encode` with its defaults (float32, batches of 32 in the order of their
length), vectors of length 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("texts")
parser.add_argument("--threads", type=int, required=True)
given = parser.parse_args()
torch.set_num_threads(given.threads)
model = SentenceTransformer(given.model, device="cpu")
for name, texts in json.loads(Path(given.texts).read_text()).items():
    model.encode(texts[:64], normalize_embeddings=True)
    started = time.perf_counter()
    model.encode(texts, normalize_embeddings=True)
    seconds = time.perf_counter() - started
    result = {"set": name, "texts": len(texts), "seconds": seconds}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
