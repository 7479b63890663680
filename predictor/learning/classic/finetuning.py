"""Fine-tunes the text encoder itself: behavior texts to behavior types.

As Devlin et al., 2019 ("BERT", section 4): a linear head on the pooled vector, AdamW at 2e-5,
batches of 16, 3 epochs. The head starts from the logistic regression on the frozen vectors, so that
the first steps do not spoil the encoder (Kumar et al., 2022, "Fine-tuning can distort pretrained
features"). What comes out is an encoder like any other: a folder that the embedder loads, and whose
vectors every other model can read.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from scipy.special import log_softmax  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from tqdm import tqdm

from foretell.errors import InvalidArgumentError
from foretell.vectors import Vectors
from predictor.learning import sources
from predictor.learning.classic.heads import of_both_classes
from predictor.learning.classic.recipe import ClassicRecipe
from predictor.learning.data import Events
from predictor.learning.measures.type_metrics import type_metrics
from predictor.learning.sentiment import SENTENCES, sentiment_axis
from predictor.learning.sequence.parallel import device
from predictor.learning.sources import Dataset
from predictor.models.calibration import softmax
from predictor.models.history import Ints
from predictor.models.version import EncoderConfig

ENCODER = "encoder"
"""Folder of the fine-tuned encoder within the version's."""

BATCH_TEXTS = 16
MAX_TOKENS = 512
LEARNING_RATE = 2e-5
HEAD_LEARNING_RATE = 1e-3
"""Of the head, whose inputs have length one."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls to nothing."""

STOP_SHARE, MEASURED_SHARE = 0.1, 0.2
"""Of the events: by which the epoch is chosen, and by which the result is measured."""

PATIENCE = 2
"""Epochs without a better log loss after which it stops."""

LEAST_EVENTS = 20

MOST_TEXTS = 10_000
"""Different ones that are learned from without a GPU, and reads of an epoch: some minutes."""

POOLING_KEYS = {"mean": "mean_tokens", "cls": "cls_token", "last_token": "lasttoken"}
"""Of an encoder's 1_Pooling/config.json, in the form of sentence-transformers."""


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned encoder."""

    dataset: Dataset
    """With its vectors instead of those of the encoder that it was made from."""
    files: dict[str, bytes]
    """Of its folder."""
    report: dict[str, dict[str, Any]]
    """type_metrics of events that it was not fitted on, whose texts others may have had:
    `fine_tuned`, and `frozen`, a logistic regression on the vectors of the encoder that it was made
    from, fitted on the same events."""


class _Texts:
    """Different texts of training events, and how many events of each type have each of them.

    Many events share a text: whoever reads it for one learns from all of them.
    """

    def __init__(self, dataset: Dataset, train: Events, seed: int) -> None:
        rng = np.random.default_rng(seed)
        vectors = np.concatenate([dataset.item_vectors, dataset.text_vectors])
        of_event, every = dataset.own_texts(train)
        rows = (train.type >= 0) & (of_event >= 0)
        rows[rows] = (np.abs(vectors).max(axis=1, initial=0) > 0)[of_event[rows]]
        read, place = np.unique(of_event[rows], return_inverse=True)
        named = [every[number] for number in read.tolist()]
        self.texts = sorted(set(named))
        number = {text: at for at, text in enumerate(self.texts)}
        of_read = np.array([number[text] for text in named], np.int64)
        _, first = np.unique(of_read, return_index=True)
        self.of_event: Ints = of_read[place]
        """(events,) the number of the text."""
        self.vectors, self.types = vectors[read[first]], train.type[rows]
        if device().type == "cpu" and len(self.texts) > MOST_TEXTS:
            drawn = np.sort(rng.permutation(len(self.texts))[:MOST_TEXTS])
            some = np.isin(self.of_event, drawn)
            self.of_event = np.searchsorted(drawn, self.of_event[some])
            self.texts = [self.texts[at] for at in drawn.tolist()]
            self.vectors, self.types = self.vectors[drawn], self.types[some]
        events = rng.permutation(len(self.types))
        measured, stop = int(len(events) * MEASURED_SHARE), int(len(events) * STOP_SHARE)
        self.measured, self.stop, self.learned = np.split(events, [measured, measured + stop])
        if len(events) < LEAST_EVENTS or len(np.unique(self.types[self.learned])) < 2:
            raise InvalidArgumentError(
                f"{len(events)} events to train on have a text, of "
                f"{len(np.unique(self.types))} behavior types: bert_finetune needs {LEAST_EVENTS} "
                "of at least two",
                reason="TOO_FEW_EVENTS",
                field="behavior_text",
            )

    def counts(self, events: Ints, types: int) -> sparse.csr_matrix:
        """(texts, types) float32: how many of some events have each text and type."""
        ones = np.ones(len(events), np.float32)
        shape = (len(self.texts), types)
        return sparse.csr_matrix((ones, (self.of_event[events], self.types[events])), shape)


class _Classifier(nn.Module):
    """An encoder and a head."""

    def __init__(self, name: str, pooling: str, weight: Vectors, bias: Vectors) -> None:
        super().__init__()
        location = _location(name)
        try:
            self.encoder: Any = transformers.AutoModel.from_pretrained(location)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(location)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgumentError(
                f"the encoder {name} cannot be loaded here: {str(error).splitlines()[0]}",
                field="encoder",
            ) from None
        positions = getattr(self.encoder.config, "max_position_embeddings", MAX_TOKENS)
        self.max_tokens = min(MAX_TOKENS, positions, self.tokenizer.model_max_length)
        self.pooling = pooling
        self.head = nn.Linear(weight.shape[1], len(weight))
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(texts, types)."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens,
            padding_side="right", return_tensors="pt",
        ).to(self.head.weight.device)  # fmt: skip
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"]
        if self.pooling == "mean":
            pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        else:
            last = mask.sum(1) - 1 if self.pooling == "last_token" else torch.zeros_like(mask[:, 0])
            pooled = states[torch.arange(len(states), device=states.device), last]
        logits: Tensor = self.head(nn.functional.normalize(pooled, dim=-1))
        return logits

    @torch.inference_mode()
    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, types), longest first so that little padding is computed."""
        self.eval()
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        out = np.zeros((len(texts), self.head.out_features), np.float32)
        for begin in range(0, len(order), 4 * BATCH_TEXTS):
            some = order[begin : begin + 4 * BATCH_TEXTS]
            out[some] = self([texts[at] for at in some]).float().cpu().numpy()
        return out


def fine_tune(
    dataset: Dataset,
    train: Events,
    recipe: ClassicRecipe,
    out: Path,
    *,
    cache_dir: Path,
    progress: bool,
) -> FineTuned:
    """Fine-tunes the data set's encoder on the training part, and reads all texts with it.

    Args:
        dataset: with vectors of an encoder that can be loaded here, by its name.
        train: the training part: what an event's own text says of its type.
        recipe: its epochs at most, and its seed: of the division of the events, the order of their
            texts, and dropout.
        out: the version's directory: ENCODER in it is the new encoder's name.
        cache_dir: of the embedder that reads the texts, see sources.embedder.
        progress: whether to show bars and losses.

    Raises:
        InvalidArgumentError: too few texts, or the encoder is not at hand.
    """
    torch.manual_seed(recipe.seed)
    texts = _Texts(dataset, train, recipe.seed)
    names = train.behavior_types
    learned = texts.counts(texts.learned, len(names)).tocoo()
    frozen = LogisticRegression(max_iter=2_000)
    frozen.fit(texts.vectors[learned.row], learned.col, sample_weight=learned.data)
    weight, bias = _of_all(frozen, len(names))
    encoder = dataset.encoder
    model = _Classifier(encoder.name, encoder.pooling, weight, bias).to(device())
    before = (texts.vectors @ weight.T + bias).astype(np.float32)
    _fit(model, texts, recipe, progress=progress)
    measured, place = np.unique(texts.of_event[texts.measured], return_inverse=True)
    after = model.scores([texts.texts[at] for at in measured.tolist()])
    true = texts.types[texts.measured]
    report = {
        name: type_metrics(softmax(scores[place]), true, names)
        for name, scores in (("fine_tuned", after), ("frozen", before[measured]))
    }
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder))
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
        read = _read(dataset, folder, cache_dir, progress=progress)
    named = EncoderConfig(name=str(out / ENCODER), pooling=encoder.pooling, cols=encoder.cols)
    return FineTuned(replace(read, encoder=named), files, report)


def _of_all(model: LogisticRegression, types: int) -> tuple[Vectors, Vectors]:
    """Weights of the types that were met; the others stay improbable."""
    weight, bias = of_both_classes(model.coef_, model.intercept_)
    full = np.zeros((types, weight.shape[1]), np.float32)
    shift = np.full(types, bias.min() - 5, np.float32)
    full[model.classes_], shift[model.classes_] = weight, bias
    return full, shift


def _fit(model: _Classifier, texts: _Texts, recipe: ClassicRecipe, *, progress: bool) -> None:
    """Leaves the weights of the epoch that is best on texts.stop; the start is one too."""
    rng = np.random.default_rng(recipe.seed)
    types = model.head.out_features
    shares = normalize(texts.counts(texts.learned, types), "l1")
    read = len(texts.learned)
    if model.head.weight.device.type == "cpu":
        read = min(read, MOST_TEXTS)
    steps = -(-read // BATCH_TEXTS)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": LEARNING_RATE},
            {"params": model.head.parameters(), "lr": HEAD_LEARNING_RATE},
        ],
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _slope(recipe.epochs * steps))
    best, best_epoch, kept = _loss(model, texts), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order = texts.of_event[rng.permutation(texts.learned)[:read]]
        bar: tqdm[Any] = tqdm(
            range(0, len(order), BATCH_TEXTS), desc=f"fine-tune {epoch}/{recipe.epochs}",
            unit="batches", disable=not progress, leave=False,
        )  # fmt: skip
        for begin in bar:
            some = order[begin : begin + BATCH_TEXTS]
            logits = model([texts.texts[at] for at in some.tolist()])
            share = torch.from_numpy(shares[some].toarray()).to(logits.device)
            loss = nn.functional.cross_entropy(logits, share)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        found = _loss(model, texts)
        if progress:
            tqdm.write(f"fine-tune {epoch}: log loss {found:.4f} (best {best:.4f})", file=bar.fp)
        if found < best:
            best, best_epoch, kept = found, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= PATIENCE:
            break
    model.load_state_dict(kept)


def _slope(steps: int) -> Callable[[int], float]:
    """Of the learning rates: from the step to the share of the highest one."""
    warm = max(1, round(WARM_UP * steps))
    return lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def _loss(model: _Classifier, texts: _Texts) -> float:
    """The log loss of the events that the epoch is chosen by."""
    counts = texts.counts(texts.stop, model.head.out_features)
    read = np.flatnonzero(np.diff(counts.indptr))
    scores = model.scores([texts.texts[at] for at in read.tolist()])
    likely = counts[read].multiply(log_softmax(scores, axis=1)).sum()
    return float(-likely / max(counts.sum(), 1))


def _save(model: _Classifier, folder: Path) -> None:
    """As a folder that transformers, sentence-transformers and the embedder read."""
    model.encoder.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    pooling = {f"pooling_mode_{key}": name == model.pooling for name, key in POOLING_KEYS.items()}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": model.head.in_features, **pooling})
    )
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": model.max_tokens})
    )


def _read(dataset: Dataset, folder: str, cache_dir: Path, *, progress: bool) -> Dataset:
    """The data set with the vectors that an embedder gives with this encoder."""
    texts = [
        text if vector.any() else ""
        for text, vector in zip(
            [*dataset.item_texts, *dataset.events.texts],
            [*dataset.item_vectors, *dataset.text_vectors],
            strict=True,
        )
    ]
    with sources.embedder(None, cache_dir, folder) as client:
        read = [*texts, *SENTENCES]
        vectors = sources.encode(read, dataset.encoder.cols, client, progress=progress)
    items, of_events, sentences = np.split(vectors, [len(dataset.item_vectors), len(texts)])
    return replace(
        dataset, item_vectors=items, text_vectors=of_events, sentiment=sentiment_axis(sentences)
    )


def _location(name: str) -> str:
    """Where transformers finds an encoder: one that is a package has its files in `model`."""
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return name
    return str(Path(spec.submodule_search_locations[0]) / "model")
