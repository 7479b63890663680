"""The text encoder: the default one, and tiny ones of other kinds made here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embedder.encoding import choice
from embedder.encoding.backend import NetworkBackend
from embedder.encoding.choice import Agreement
from embedder.encoding.encoder import TokenBatch, Tokenizer, identity, locate
from embedder.encoding.padded import PaddedModel, export_onnx
from embedder.settings import Device, Pooling, Precision, Runtime
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


def load(encoder: str = "", pooling: Pooling | None = None, **options: Any) -> choice.Encoder:
    files = locate(encoder, pooling)
    options = {"precision": Precision.FLOAT32, "device": Device.CPU} | options
    return choice.load(files, Tokenizer(files, None), **options)


def backend(encoder: str = "", pooling: Pooling | None = None, **options: Any) -> NetworkBackend:
    return load(encoder, pooling, **options).backend


@pytest.fixture(scope="module")
def minilm() -> NetworkBackend:
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
    minilm: NetworkBackend, tokenizer: Tokenizer
) -> None:
    vectors = minilm.encode(tokenizer(TEXTS))
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    red, *_, crimson, tax = vectors
    assert red @ crimson > 0.5 > red @ tax + 0.2


def test_the_default_gives_what_its_authors_give(
    minilm: NetworkBackend, tokenizer: Tokenizer
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
    minilm: NetworkBackend, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tokenizer(TEXTS * 3)
    together = minilm.encode(batch)
    monkeypatch.setattr(minilm, "batch_tokens", 20)
    apart = minilm.encode(batch)
    np.testing.assert_allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize(("batch_tokens", "passes"), [(None, 2), (128, 5), (1_024, 1)])
def test_a_pass_has_as_many_tokens_as_asked_for(
    tiny: Callable[[str], str],
    batch_tokens: int | None,
    passes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = backend(tiny("bert"), batch_tokens=batch_tokens)
    network = encoder._network
    sizes = []

    def counted(ids: Any, lengths: Any) -> torch.Tensor:
        sizes.append(len(ids))
        return network(ids, lengths)

    counted.pads = False  # type: ignore[attr-defined]
    monkeypatch.setattr(encoder, "_network", counted)
    encoder.encode(TokenBatch.of([[5] * 32] * 20))
    assert len(sizes) == passes
    assert sum(sizes) == 640


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of agreements of the test's own."""
    monkeypatch.setattr(choice, "CACHE", tmp_path)
    return tmp_path


def test_bfloat16_agrees_with_float32(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at the first start, and kept for the next ones."""
    rounded = load(precision=Precision.BFLOAT16)
    assert "bfloat16" in rounded.path
    assert "packed" in rounded.path
    assert 0.9999 <= rounded.agreement.cosine < 1
    assert 0.99 <= rounded.agreement.recall_at_10 <= 1
    monkeypatch.setattr(choice, "_agreement", None)
    assert load(precision=Precision.BFLOAT16).agreement == rounded.agreement
    (kept,) = cache.glob("*.json")
    kept.write_text("{")
    with pytest.raises(TypeError):  # what is damaged is measured again
        load(precision=Precision.BFLOAT16)


@pytest.mark.parametrize(
    ("flag", "agreement", "expected"),
    [
        ("avx512_bf16", Agreement(0.9999, 0.99), "torch bfloat16 (avx512_bf16), packed"),
        ("avx512_bf16", Agreement(0.9998, 1.0), "torch float32, packed"),
        ("avx512_bf16", Agreement(1.0, 0.98), "torch float32, packed"),
        (None, Agreement(1.0, 1.0), "torch float32, packed"),
    ],
)
def test_the_fastest_path_that_holds_is_the_default(
    flag: str | None,
    agreement: Agreement,
    expected: str,
    tiny: Callable[[str], str],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "bfloat16_flag", lambda: flag)
    monkeypatch.setattr(choice, "_agreement", lambda *_: agreement)
    assert load(tiny("bert"), precision=Precision.AUTO).path == expected


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_packed_and_padded_agree(precision: Precision, tokenizer: Tokenizer) -> None:
    """Both ways to run BERT, on texts of many lengths together."""
    files = locate("", None)
    model = choice.load_model(files)
    dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
    encoder = backend(precision=precision)
    words = ["many", "words", "of", "which", "some", "are", "long", "and", "others", "not"]
    texts = [" ".join(words[i % 9 :] * (1 + i % 5) * (1 + 5 * (i % 3))) for i in range(60)]
    ours = encoder.encode(tokenizer(texts))
    encoder._network = PaddedModel(model, dtype, "cpu")
    theirs = encoder.encode(tokenizer(texts))
    assert (ours * theirs).sum(axis=1).min() > (0.99999 if dtype is torch.float32 else 0.9995)


def test_onnx_runtime_gives_what_torch_gives(cache: Path, tokenizer: Tokenizer) -> None:
    """The network is exported at the first use and kept."""
    encoder = load(runtime=Runtime.ONNXRUNTIME)
    assert encoder.path == "onnxruntime float32, padded"
    assert encoder.agreement.cosine > 0.99999
    assert encoder.agreement.recall_at_10 > 0.999
    assert len(list(cache.glob("*.onnx"))) == 1
    batch = tokenizer(TEXTS)
    np.testing.assert_allclose(encoder.backend.encode(batch), backend().encode(batch), atol=1e-5)
    with pytest.raises(FailedPreconditionError, match="float32"):
        load(runtime=Runtime.ONNXRUNTIME, precision=Precision.BFLOAT16)


def test_several_processes_may_export_at_once(
    tiny: Callable[[str], str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("bert")

    def beside_another(model: Any, file: Path) -> None:
        export_onnx(model, file)
        monkeypatch.setattr(choice, "export_onnx", export_onnx)
        load(folder, runtime=Runtime.ONNXRUNTIME)

    monkeypatch.setattr(choice, "export_onnx", beside_another)
    load(folder, runtime=Runtime.ONNXRUNTIME)
    assert len(list(cache.glob("*.onnx"))) == 1


def test_without_a_home_directory_it_is_measured_at_each_start(
    tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "CACHE", Path("~nobody-has-this-name/encoders"))
    assert load(tiny("bert"), precision=Precision.BFLOAT16).agreement.cosine > 0.99
    with pytest.raises(OSError, match="home directory"):
        load(tiny("bert"), runtime=Runtime.ONNXRUNTIME)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512_bf16 avx2", "avx512_bf16"),
        ("fpu avx512_bf16 amx_bf16", "amx_bf16"),
        ("fpu", None),
    ],
)
def test_the_processors_flags_are_read(
    flags: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(choice, "_CPUINFO", file)
    assert choice.bfloat16_flag() == expected


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
    folder = tiny(kind)
    encoder = backend(folder, pooling)
    model = choice.load_model(locate(folder, pooling))
    sequences = [[5, 6, 7], [8, 9], list(range(10, 40)), [11], [5, 6, 7, 8]]
    found = encoder.encode(TokenBatch.of(sequences))
    for sequence, vector in zip(sequences, found, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([sequence])).last_hidden_state[0].numpy()
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
    for encoder in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(FailedPreconditionError) as raised:
            load(encoder)
        assert encoder in raised.value.message
        assert "\n" not in raised.value.message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_an_encoder_that_was_cut_short_is_refused_in_one_line(
    tiny: Callable[[str], str], file: str
) -> None:
    path = Path(tiny("bert")) / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FailedPreconditionError, match="cannot be loaded"):
        load(str(path.parent))


def test_cuda_without_a_device_is_refused(
    tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPreconditionError, match="no CUDA device"):
        load(tiny("bert"), device=Device.CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives(minilm: NetworkBackend, tokenizer: Tokenizer) -> None:
    batch = tokenizer(TEXTS * 50)
    for precision, least in ((Precision.FLOAT32, 0.9999), (Precision.AUTO, 0.999)):
        on_gpu = backend(precision=precision, device=Device.CUDA)
        cosines = (minilm.encode(batch) * on_gpu.encode(batch)).sum(axis=1)
        assert cosines.min() > least
