"""A history summed up and the network over it: as in a loop, in a directory, from strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from foretell.errors import InvalidArgumentError
from foretell.projection import AffineLayer, Projection
from predictor.models import model_dir
from predictor.models.calibration import ItemCalibration, TypeCalibration
from predictor.models.history import GAPS, HOURS, HistoryBatch, starts
from predictor.models.sequence import bag as bags
from predictor.models.sequence.bag import BAG, Bag, BagNetwork, features_of, log_shares_at
from predictor.models.sequence.encoders import NetworkConfig
from predictor.models.version import EncoderConfig, Golden, Version, VersionConfig

DIMS, TYPES = 3, 2
CONFIG = NetworkConfig(
    behavior_types=TYPES, dims=DIMS, hidden=4, model_type=BAG, layers=1, heads=1, traces=False
)
SHARES = np.array([0.75, 0.25], np.float32)


def histories(lengths: list[int], seed: int = 0, types: int = TYPES) -> HistoryBatch:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    known = rng.random(tokens) < 0.7
    return HistoryBatch(
        rng.standard_normal((tokens, DIMS)).astype(np.float32) * known[:, None],
        known,
        rng.integers(0, types + 1, tokens),
        rng.integers(0, GAPS, tokens),
        rng.integers(0, HOURS, tokens),
        np.array(lengths, np.int64),
    )


def summed_up(batch: HistoryBatch, row: int, shares: NDArray[np.float32]) -> NDArray[np.float64]:
    """What Bag with a clock says of one history, in a loop over its events."""
    begin, length = int(starts(batch.lengths)[row]), int(batch.lengths[row])
    events = [
        (batch.vectors[at], bool(batch.known[at]), int(batch.types[at]), int(batch.gaps[at]))
        for at in range(begin, begin + length)
    ][::-1]
    types = len(shares)

    def mean(weights: list[float]) -> NDArray[np.float64]:
        some = [(w, v) for w, (v, known, _, _) in zip(weights, events, strict=True) if known and w]
        total = sum(w for w, _ in some)
        return sum((w / total * v for w, v in some), np.zeros(DIMS))

    def fading(half_life: float) -> list[float]:
        return [2 ** (-age / half_life) for age in range(length)]

    newest = next((at for at, event in enumerate(events) if event[1]), -1)
    columns = [mean([float(at == newest) for at in range(length)])]
    columns += [mean(fading(half_life)) for half_life in bags.TEXT_HALF_LIVES]
    if types <= bags.FEW_TYPES:
        columns += [mean([float(event[2] == code) for event in events]) for code in range(types)]
    found = []
    for half_life in bags.TYPE_HALF_LIVES:
        sums = bags.PRIOR_EVENTS * shares.astype(np.float64)
        for weight, (_, _, code, _) in zip(fading(half_life), events, strict=True):
            if code < types:
                sums[code] += weight
        found.append(sums / sums.sum())
    columns += [*found, *(np.log(share) for share in found)]
    last = events[0][2] if events else types
    columns.append(np.arange(types) == last)
    gap = events[0][3] if events else 0
    weights = fading(bags.GAP_HALF_LIFE)
    gaps = sum(w * event[3] for w, event in zip(weights, events, strict=True))
    usual = gaps / sum(weights) if events else 0.0
    columns.append(np.array([gap / GAPS, gap == 0, gap == 1, usual / GAPS, np.log1p(length)]))
    hour = int(batch.hours[begin + length - 1]) if length else None
    columns.append(np.array([hour % 24 / 24 if hour is not None else 0.0]))
    columns.append(np.array([hour is not None and hour % 24 == n for n in range(24)]))
    columns.append(np.array([hour is not None and hour // 24 == n for n in range(7)]))
    return np.concatenate(columns)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from([1, 2, bags.FEW_TYPES, bags.FEW_TYPES + 1]),
)
def test_many_histories_are_summed_up_as_each_in_a_loop(
    lengths: list[int], seed: int, types: int
) -> None:
    batch = histories(lengths, seed, types)
    shares = np.full(types, 1 / types, np.float32)
    features = Bag(batch, shares, clock=True).features()
    assert features.dtype == np.float32
    config = replace(CONFIG, behavior_types=types, clock=True)
    assert features.shape == (len(lengths), features_of(config))
    without = Bag(batch, shares).features()
    assert without.shape[1] == features_of(replace(config, clock=False))
    assert (features[:, : without.shape[1]] == without).all()
    for row in range(len(lengths)):
        assert features[row] == pytest.approx(summed_up(batch, row, shares), abs=1e-5)


def test_no_histories_at_all() -> None:
    network = made()
    found = network.predict(histories([]))
    assert found.type_logits.shape == (0, TYPES)
    assert found.queries.shape == (0, DIMS)
    assert found.log_gaps.shape == (0,)


def test_where_the_log_shares_are() -> None:
    batch = histories([7, 2])
    features = Bag(batch, SHARES, clock=True).features()
    for half_life in bags.TYPE_HALF_LIVES:
        at = log_shares_at(CONFIG, half_life)
        assert at == log_shares_at(replace(CONFIG, clock=True), half_life)
        shares = np.exp(features[:, at])
        assert shares.sum(axis=1) == pytest.approx(1)
    some = batch.types[:7] < TYPES
    expected = np.bincount(batch.types[:7][some], minlength=TYPES) + SHARES
    whole = np.exp(features[0, log_shares_at(CONFIG, np.inf)])
    assert whole == pytest.approx(expected / expected.sum(), abs=1e-6)


def grown(features: int, types: int) -> str:
    rng = np.random.default_rng(0)
    data = lightgbm.Dataset(rng.standard_normal((300, features)), rng.integers(0, types, 300))
    parameters = {"objective": "multiclass", "num_class": types, "verbose": -1, "num_threads": 1}
    return lightgbm.train(parameters, data, 3).model_to_string()


def made(*, trees: bool = False, config: NetworkConfig = CONFIG) -> BagNetwork:
    torch.manual_seed(0)
    network = BagNetwork(config)
    with torch.no_grad():
        network.start.copy_(torch.tensor([3.0, 1.0]))
        network.log_shares.copy_(torch.from_numpy(np.log(SHARES)))
        network.log_gap.fill_(2.0)
    if trees:
        network.grow(grown(features_of(config), config.behavior_types))
    return network.eval()


def test_what_the_network_answers() -> None:
    network, batch = made(), histories([4, 0, 3])
    found = network.predict(batch)
    features = torch.from_numpy(Bag(batch, SHARES).features())
    first, last = network.affine
    with torch.no_grad():
        logits = last(torch.relu(first(features))).numpy()
    assert found.type_logits[[0, 2]] == pytest.approx(logits[[0, 2]], abs=1e-6)
    assert found.type_logits[1].tolist() == [3.0, 1.0]  # after an empty history: the start
    assert found.log_gaps.tolist() == [2.0] * 3
    newest = batch.vectors[:4][batch.known[:4]][-1]
    assert found.queries[0, :-1] == pytest.approx(newest[:-1])
    assert found.queries[1].tolist() == [0.0] * (DIMS - 1) + [1.0]  # the most popular items
    assert (found.queries[:, -1] == 1).all()


def test_each_history_is_read_alone() -> None:
    network, batch = made(trees=True), histories([5, 0, 2, 9])
    together = network.predict(batch).type_logits
    for row, (begin, length) in enumerate(zip(starts(batch.lengths), batch.lengths, strict=True)):
        tokens = slice(begin, begin + length)
        alone = network.predict(
            HistoryBatch(batch.vectors[tokens], batch.known[tokens], batch.types[tokens],
                         batch.gaps[tokens], batch.hours[tokens], batch.lengths[row : row + 1])
        )  # fmt: skip
        assert alone.type_logits[0] == pytest.approx(together[row], abs=1e-5)


def test_trees_add_to_the_layers() -> None:
    batch = histories([4, 0, 3])
    with_trees, without = made(trees=True), made()
    booster = lightgbm.Booster(model_str=with_trees.trees)
    scores = booster.predict(Bag(batch, SHARES).features(), raw_score=True)
    difference = with_trees.predict(batch).type_logits - without.predict(batch).type_logits
    assert difference[[0, 2]] == pytest.approx(np.asarray(scores)[[0, 2]], abs=1e-5)
    assert difference[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"\(features, types\)"):
        without.grow(grown(5, TYPES))


def version(*, trees: bool = True, config: NetworkConfig = CONFIG) -> Version:
    network, golden = made(trees=trees, config=config), histories([4, 0, 3])
    rng = np.random.default_rng(0)
    types = TypeCalibration(temperature=1.5, biases=(0.0, 0.1))
    answers = network.predict(golden)
    return Version(
        VersionConfig(
            version="v", encoder=EncoderConfig(name="e", pooling="mean", cols=6),
            behavior_types=("buy", "view"), history_length=50, network=config,
            repeats="allowed", has_items=True, has_texts=False, has_times=True, candidates=200,
            type_calibration=types, item_calibration=ItemCalibration(),
        ),
        network,
        Projection((AffineLayer(rng.standard_normal((DIMS, 6)).astype(np.float32),
                                np.zeros(DIMS, np.float32)),)),
        ("a", "b"),
        np.arange(2),
        np.zeros((2, DIMS), np.float32),
        Golden(golden, types.probabilities(answers.type_logits), answers.queries),
        reports={"metrics.json": {}},
    )  # fmt: skip


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("trees", [False, True])
def test_a_directory_answers_as_before(tmp_path: Path, layers: int, trees: bool) -> None:
    before = version(trees=trees, config=replace(CONFIG, layers=layers))
    model_dir.write(tmp_path / "v", before, "", {})
    assert (tmp_path / "v" / "trees.txt").exists() is trees
    after = model_dir.load(tmp_path / "v")
    after.network.freeze()
    after.check_golden()
    batch = histories([3, 0, 8], seed=3)
    for ours, theirs in zip(after.predict(batch), before.predict(batch), strict=True):
        assert np.array_equal(ours, theirs)


def resign(directory: Path, **network: int) -> None:
    """Makes config.json say that all is well, as a stranger could."""
    config = json.loads((directory / "config.json").read_text())
    config["network"] |= network
    for name in config["files"]:
        config["files"][name] = sha256((directory / name).read_bytes()).hexdigest()
    (directory / "config.json").write_text(json.dumps(config))


def change_weights(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "weights.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t["start"].fill(np.nan), "start has numbers that are not finite"),
        (lambda t: t.pop("log_gap"), "log_gap is missing"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "extra belongs to no such bag"),
        (lambda t: t.update(start=np.zeros(3, np.float32)), r"start has shape \(3,\)"),
        (lambda t: t.update({"affine.0.bias": np.zeros(5, np.float32)}), "affine.0.bias has shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    model_dir.write(tmp_path / "v", version(), "", {})
    change_weights(tmp_path / "v", change)
    resign(tmp_path / "v")
    with pytest.raises(InvalidArgumentError, match=rf"weights\.safetensors.*{complaint}"):
        model_dir.load(tmp_path / "v")


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"hidden": 5}, "affine.*has shape|too few"),
        ({"hidden": 10**9}, "network.hidden is 1000000000"),
        ({"hidden": 4_000}, "too few"),
        ({"layers": 10**9}, "network.layers"),
        ({"layers": -1}, "network.layers"),
        ({"layers": 4}, "too few|missing"),
        ({"layers": 0}, "belongs to no such bag"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, sizes: dict[str, int], complaint: str
) -> None:
    model_dir.write(tmp_path / "v", version(), "", {})
    resign(tmp_path / "v", **sizes)
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        model_dir.load(tmp_path / "v")
    assert caught.value.reason == "BAD_MODEL_DIRECTORY"


def test_what_fitted_it_is_part_of_its_type() -> None:
    for name, ours in (
        ("bag", True),
        ("bag:logistic", True),
        ("bag:", False),
        ("bag:\ud800", False),
    ):
        assert bags.is_bag(replace(CONFIG, model_type=name)) is ours
    with pytest.raises(ValueError, match="none of"):
        bags.make_network(replace(CONFIG, model_type="bag:No Name"))


@pytest.mark.parametrize("text", ["", "tree\n", grown(5, TYPES), grown(20, TYPES + 1), "ä"])
def test_trees_that_do_not_fit_are_refused(tmp_path: Path, text: str) -> None:
    model_dir.write(tmp_path / "v", version(), "", {})
    (tmp_path / "v" / "trees.txt").write_text(text)
    resign(tmp_path / "v")
    with pytest.raises(InvalidArgumentError, match=r"trees\.txt: "):
        model_dir.load(tmp_path / "v")
