import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bench import datasets, embed, embed_cuda, harness
from bench.harness import Peer
from bench.texts import SETS, Texts
from embedder.settings import Device

PRODUCTS = [
    f"{kind} {made}, {size} Oz, {department}, National"
    for department, kinds in {"Grocery": ("Honey", "Coffee", "Rice"), "Pastry": ("Bread",)}.items()
    for kind in kinds
    for made in ("Plain", "Fine")
    for size in (4, 8, 12)
]


@pytest.fixture(autouse=True)
def products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few products in place of the data set."""
    items = tmp_path / "items.csv"
    items.write_text("item_id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(PRODUCTS)))
    monkeypatch.setattr(
        datasets, "files", lambda name, data, cache: datasets.Files(tmp_path / "none", items)
    )


def test_texts_are_new_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    texts, again = Texts(tmp_path), Texts(tmp_path)
    # 8 types with 3 sizes: there are 24 short texts.
    taken = [texts.take("short", 10), texts.take("mixed", 30), texts.joined(6, 20)]
    assert taken == [again.take("short", 10), again.take("mixed", 30), again.joined(6, 20)]
    flat = [text for some in taken for text in some]
    assert len(set(flat)) == len(flat) == 60
    assert Texts(tmp_path, seed=1).take("short", 10) != taken[0]


def test_sets_differ_in_length(tmp_path: Path) -> None:
    texts = Texts(tmp_path)
    words = {name: [len(text.split()) for text in texts.take(name, 9)] for name in SETS}
    assert max(words["short"]) == 4
    assert min(words["long"]) == 4 * 6 + 2
    assert min(words["mixed"]) == 4
    assert max(words["mixed"]) == 4 * 6 + 2


async def test_a_rate_counts_every_text_once_and_keeps_all_callers_busy() -> None:
    seen: list[str] = []
    together = 0
    running = 0

    async def encode(texts: Sequence[str]) -> None:
        nonlocal running, together
        running += 1
        together = max(together, running)
        await asyncio.sleep(0)
        running -= 1
        seen.extend(texts)

    texts = [str(i) for i in range(10)]
    assert await harness.rate(encode, texts, size=3, callers=2) > 0
    assert sorted(seen) == texts
    assert together == 2


def rates(ours: float, theirs: float) -> embed.Rates:
    return {
        f"{name}_{figure}_texts_s": value
        for name in SETS
        for figure, value in {
            "ours_grpc_batch": ours,
            "ours_grpc_single": ours / 2,
            "onnxruntime": theirs,
            "sentence_transformers": theirs / 2,
        }.items()
    }


def test_figures_are_medians_of_rounds_and_of_their_ratios() -> None:
    # The machine was slow in the second round, for both sides.
    figures = embed.summary([rates(300, 100), rates(40, 20), rates(200, 100)])
    assert figures["short_ours_grpc_batch_texts_s"] == 200
    assert figures["long_ratio_batch_onnxruntime"] == 2
    assert figures["long_ratio_single_onnxruntime"] == 1
    assert figures["mixed_ratio_batch_sentence_transformers"] == 4
    rows = [line.split() for line in embed.table(figures).splitlines()]
    assert ["ratio_batch_onnxruntime", "2", "2", "2", "-"] in rows


def test_another_round_begins_where_the_budget_has_room_for_it() -> None:
    assert embed._next(harness.Budget(0), done=0)
    assert not embed._next(harness.Budget(0), done=1)
    assert embed._next(harness.Budget(1_000), done=1)


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Peers that measure nothing: what they were asked to do."""
    asked: list[list[str]] = []

    class FakePeer(Peer):
        def versions(self, *distributions: str) -> dict[str, str]:
            return dict.fromkeys(distributions, "1")

        def run(self, script: str, arguments: Sequence[str], threads: int) -> Iterator[Any]:  # type: ignore[override]
            asked.append([script, arguments[0]])
            if arguments[0] == "export":
                Path(arguments[2]).touch()
                return
            sets = json.loads(Path(arguments[-3]).read_text())
            for name, texts in sets.items():
                yield {"set": name, "texts": len(texts), "seconds": 2.0}

    def peer(name: str, cache: Path) -> Peer:
        return FakePeer(name, Path(sys.executable))

    monkeypatch.setattr(harness, "peer", peer)
    monkeypatch.setattr(embed, "COUNTS", dict.fromkeys(SETS, 4))
    return asked


def test_peers_run_in_every_round_that_has_time_for_them(
    peers: list[list[str]], tmp_path: Path
) -> None:
    made = embed.Peers(tmp_path, 1, fresh=False)
    first = made.rates(Texts(tmp_path), left_s=0)
    assert first == {f"{name}_{peer}_texts_s": 2.0 for name in SETS for peer in embed.DISTRIBUTIONS}
    assert ["onnxruntime_encode.py", "export"] in peers
    assert not made.from_cache
    count = len(peers)
    made.rates(Texts(tmp_path), left_s=10_000)
    assert len(peers) == count + 2  # the graph was there
    assert made.rates(Texts(tmp_path), left_s=0) == first
    assert made.from_cache
    assert len(peers) == count + 2
    assert made.versions["onnxruntime/tokenizers"] == "1"


def test_without_a_cuda_device_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert embed.main(["--device", "cuda", "--model-shape", "bert-base"]) == 2
    output = capsys.readouterr()
    assert "no CUDA device" in output.err
    assert not output.out


def test_figures_of_a_network_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    monkeypatch.setitem(embed_cuda.SHAPES, "tiny-bert", tiny)
    for name, value in {"CALL": 4, "IN_FLIGHT": 2, "CALLS": 3, "REPETITIONS": 2}.items():
        monkeypatch.setattr(embed_cuda, name, value)
    model = embed_cuda.save("tiny-bert", tmp_path / "model")
    figures = embed_cuda.measure("tiny-bert", model, Device.CPU, tmp_path, threads=1)
    assert (figures["tiny_bert_tokens_s"] or 0) > 0
    assert (figures["tiny_bert_ours_grpc_batch_texts_s"] or 0) > 0
    assert figures["tiny_bert_model_flops_utilization"] is None


def test_operations_and_peaks() -> None:
    # BERT-base: 85 M weights in its matrices, 2 operations each, and the attention.
    flops = embed_cuda.flops_per_token(transformers.BertConfig(), 50)
    assert flops == pytest.approx(2 * 85e6, rel=0.02)
    assert embed_cuda.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert embed_cuda.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert embed_cuda.peak_flops("another") is None
