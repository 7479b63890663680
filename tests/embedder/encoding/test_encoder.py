"""The text encoder: the default one, and tiny ones of other kinds made here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embedder.encoding import torch_backend
from embedder.encoding.encoder import TokenBatch, Tokenizer, identity, locate
from embedder.encoding.torch_backend import TorchBackend
from embedder.settings import Device, Pooling, Precision
from foretell.errors import FailedPreconditionError
from foretell.vectors import Vectors

TEXTS = [
    "red running shoes",
    "a",
    "Größe 42, läuft klein",
    "the quick brown fox jumps over the lazy dog " * 8,
    "crimson sneakers for running",
    "value added tax law",
]


def backend(encoder: str = "", pooling: Pooling | None = None, **options: Any) -> TorchBackend:
    files = locate(encoder, pooling)
    precision = options.get("precision", Precision.FLOAT32)
    return TorchBackend(files, Device.CPU, precision, threads=1)


@pytest.fixture(scope="module")
def minilm() -> TorchBackend:
    return backend()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(locate("", None), None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Saves a random encoder of a kind to a folder and gives its path."""
    kinds: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(
                vocab_size=30_522,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=40,
            )
        ),
        "llama": lambda: transformers.LlamaModel(
            transformers.LlamaConfig(
                vocab_size=30_522,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        ),
        "t5": lambda: transformers.T5Model(
            transformers.T5Config(
                vocab_size=30_522, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
            )
        ),
    }

    def save(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        kinds[kind]().save_pretrained(folder)
        source = locate("", None).location
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return str(folder)

    return save


def test_vectors_have_length_one_and_near_texts_are_near(
    minilm: TorchBackend, tokenizer: Tokenizer
) -> None:
    vectors = minilm.encode(tokenizer(TEXTS))
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    red, *_, crimson, tax = vectors
    assert red @ crimson > 0.5 > red @ tax + 0.2


def test_the_default_gives_what_its_authors_give(
    minilm: TorchBackend, tokenizer: Tokenizer
) -> None:
    """By transformers alone, text by text: mean over the tokens, divided by the length."""
    location = locate("", None).location
    model = transformers.AutoModel.from_pretrained(location).eval()
    plain = transformers.AutoTokenizer.from_pretrained(location)
    vectors = minilm.encode(tokenizer(TEXTS))
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            tokens = plain(text, return_tensors="pt", truncation=True, max_length=256)
            hidden = model(**tokens).last_hidden_state[0].mean(dim=0)
        expected = (hidden / hidden.norm()).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_text_has_the_same_vector_alone_and_in_a_batch(
    minilm: TorchBackend, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tokenizer(TEXTS * 3)
    together = minilm.encode(batch)
    monkeypatch.setattr(minilm, "batch_tokens", 20)
    apart = minilm.encode(batch)
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_bfloat16_is_faithful(minilm: TorchBackend, tokenizer: Tokenizer) -> None:
    batch = tokenizer(TEXTS)
    rounded = backend(precision=Precision.BFLOAT16)
    assert rounded.precision == "bfloat16"
    cosines = (minilm.encode(batch) * rounded.encode(batch)).sum(axis=1)
    assert cosines.min() > 0.9995


def test_precision_follows_the_processor_and_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, faithful, expected in (
        (True, 0.99, "bfloat16"),
        (True, 1.01, "float32"),  # no cosine is that large: the trial fails
        (False, 0.99, "float32"),
    ):
        monkeypatch.setattr(torch_backend, "_has_bfloat16", lambda _, able=able: able)
        monkeypatch.setattr(torch_backend, "FAITHFUL", faithful)
        assert backend(precision=Precision.AUTO).precision == expected


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx512_bf16 avx2", True), ("fpu amx_bf16", True), ("fpu", False)]
)
def test_the_processors_flags_are_read(
    flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(torch_backend, "_CPUINFO", file)
    assert torch_backend._has_bfloat16("cpu") is expected


def test_long_texts_are_cut(tokenizer: Tokenizer) -> None:
    assert tokenizer.max_tokens == 256  # by the encoder's sentence_bert_config.json
    assert tokenizer(["word " * 5_000, "word"]).lengths.tolist() == [256, 3]
    short = Tokenizer(locate("", None), 8)
    assert short(["word " * 5_000]).lengths.tolist() == [8]
    with pytest.raises(FailedPreconditionError, match="reads at most 512"):
        Tokenizer(locate("", None), 513)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pooling(tiny: Callable[[str], str], kind: str, pooling: Pooling) -> None:
    """Padding, order and batch do not matter; checked against the plain definition."""
    encoder = backend(tiny(kind), pooling)
    sequences = [[5, 6, 7], [8, 9], list(range(10, 40)), [11], [5, 6, 7, 8]]
    found = encoder.encode(TokenBatch.of(sequences))
    for sequence, vector in zip(sequences, found, strict=True):
        with torch.inference_mode():
            hidden = encoder._model(torch.tensor([sequence])).last_hidden_state[0].numpy()
        pooled: Vectors = {
            Pooling.MEAN: hidden.mean(axis=0),
            Pooling.CLS: hidden[0],
            Pooling.LAST_TOKEN: hidden[-1],
        }[pooling]
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-5)


def test_an_encoder_decoder_gives_its_encoder(tiny: Callable[[str], str]) -> None:
    encoder = backend(tiny("t5"))
    assert encoder.encode(TokenBatch.of([[5, 6], [7]])).shape == (2, 16)


def test_pooling_comes_from_the_encoders_files(tiny: Callable[[str], str]) -> None:
    folder = Path(tiny("bert"))
    assert locate(str(folder), None).pooling is Pooling.MEAN
    (folder / "1_Pooling").mkdir()
    config = folder / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert locate(str(folder), None).pooling is Pooling.CLS
    assert locate(str(folder), Pooling.MEAN).pooling is Pooling.MEAN
    config.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(FailedPreconditionError, match="pooling_mode_max_tokens"):
        locate(str(folder), None)
    assert locate(str(folder), Pooling.CLS).pooling is Pooling.CLS


def test_the_identity_knows_weights_pooling_and_length(tiny: Callable[[str], str]) -> None:
    def known_as(folder: str, pooling: Pooling, max_tokens: int) -> str:
        files = locate(folder, pooling)
        return identity(backend(folder, pooling), Tokenizer(files, max_tokens), pooling)

    folder = tiny("bert")
    same = known_as(folder, Pooling.MEAN, 32)
    assert known_as(folder, Pooling.MEAN, 32) == same
    assert known_as(tiny("bert"), Pooling.MEAN, 32) == same  # the same weights elsewhere
    assert known_as(folder, Pooling.CLS, 32) != same
    assert known_as(folder, Pooling.MEAN, 31) != same
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight += 1e-3
    model.save_pretrained(folder)
    assert known_as(folder, Pooling.MEAN, 32) != same


def test_what_is_no_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    def load(encoder: str) -> None:
        Tokenizer(locate(encoder, None), None)
        backend(encoder)

    for encoder in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(FailedPreconditionError) as raised:
            load(encoder)
        assert encoder in raised.value.message
        assert "\n" not in raised.value.message


def test_cuda_without_a_device_is_refused(
    tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPreconditionError, match="no CUDA device"):
        TorchBackend(locate(tiny("bert"), None), Device.CUDA, Precision.FLOAT32, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives(minilm: TorchBackend, tokenizer: Tokenizer) -> None:
    batch = tokenizer(TEXTS * 50)
    for precision, least in ((Precision.FLOAT32, 0.9999), (Precision.AUTO, 0.999)):
        on_gpu = TorchBackend(locate("", None), Device.CUDA, precision, 1)
        cosines = (minilm.encode(batch) * on_gpu.encode(batch)).sum(axis=1)
        assert cosines.min() > least
