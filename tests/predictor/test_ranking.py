"""A version with a ranker and type models over gRPC: the service answers what the parts say."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import lightgbm
import numpy as np
import pytest

from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as embedder_grpc
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.vectors import Vectors, from_block
from predictor.models import model_dir
from predictor.models.history import Histories, history_batch
from predictor.models.ranking.candidates import Recipe
from predictor.models.ranking.features import FeatureGroups, feature_names
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.ranker import NewItems, Ranker
from predictor.models.ranking.tables import KINDS, STATISTICS, Neighbours, Tables
from predictor.models.types.models import NO_HISTORY, ItemTypeModel, Rule, TypeModel
from predictor.models.types.tables import ItemTypes
from predictor.models.version import Version
from serving.process import ServiceProcess, started

if TYPE_CHECKING:
    from tests.predictor.conftest import Stubs

TYPES = ("view", "buy", "search")
SECOND = 1_000_000
HORIZON = 40 * SECOND
RECIPE = Recipe(searched=8, own=5, popular=3, related=4)


def trees(columns: int, classes: int = 1, names: tuple[str, ...] = ()) -> str:
    """Trees that look at many columns."""
    rng = np.random.default_rng(columns)
    table = rng.standard_normal((400, columns))
    label = rng.integers(0, max(2, classes), 400)
    parameters: dict[str, Any] = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5, "seed": 1}
    if classes > 1:
        parameters |= {"objective": "multiclass", "num_class": classes}
    data = lightgbm.Dataset(table, label, feature_name=list(names) or "auto")
    return lightgbm.train(parameters, data, 8).model_to_string()


def ranker(items: int) -> Ranker:
    rng = np.random.default_rng(1)
    groups = FeatureGroups(has_times=True, repeats=True)
    names = feature_names(groups)
    near = rng.integers(0, items, (items, 3)).astype(np.int32)
    share = rng.random((items, 3), np.float32)
    statistics = rng.random((items, len(STATISTICS)), np.float32)
    statistics[::3] = 0  # nobody had these
    tables = Tables(
        statistics,
        {kind: Neighbours(near, share * 9, share) for kind in KINDS},
        rng.standard_normal((items, 4)).astype(np.float16),
        rng.integers(1, 4, items).astype(np.int32),
        2.5,
        rng.permutation(items)[:6].astype(np.int32),
    )
    weights = NewItems(model_score=0.3, likeness=0.5)
    return Ranker(tables, RECIPE, groups, trees(len(names), names=names), weights)


def type_models(items: int) -> tuple[TypeModel, ItemTypeModel]:
    rng = np.random.default_rng(2)
    table = ItemTypes(
        rng.integers(0, 9, (items, 3)).astype(np.float32),
        rng.dirichlet(np.ones(3), items).astype(np.float32),
        np.array([0.5, 0.3, 0.2], np.float32),
        (rng.standard_normal((items, 4)) / 2).astype(np.float16),
    )
    rule = Rule(0.8, (0.1, 0.0, -0.2), (1.0, 1.5, 2.0))
    one = np.zeros(1, np.int64)
    first = TypeModel("", table, rule, True).features(NO_HISTORY).shape[1]
    second = ItemTypeModel("", table, rule, True).features(NO_HISTORY, one, one).shape[1]
    return (
        TypeModel(trees(first, 3), table, rule, True),
        ItemTypeModel(trees(second, 3), table, rule, True),
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranking")


@pytest.fixture(scope="module")
def version(
    directory: Path,
    write_version: Callable[..., Path],
    catalogue_embedder: ServiceProcess,
    catalogue: dict[str, str],
) -> Version:
    next_type, item_type = type_models(len(catalogue))
    parts = {
        "ranker": ranker(len(catalogue)),
        "type_model": next_type,
        "item_type_model": item_type,
    }
    changes = {"horizon": HORIZON, "has_texts": False}
    return model_dir.load(write_version(directory / "r", "r", parts=parts, **changes))


EVENTS = [
    ("ann", 10, "view", "coffee-0"),
    ("ann", 10, "buy", "coffee-0"),
    ("ann", 99, "search", "bread-3"),
    ("ann", 5_000, "view", "cheese-2"),
    ("ann", 5_001, "never seen in training", "gone-1"),
    ("ann", 5_002, "buy", "coffee-0"),
    ("bob", 1, "buy", "soap-1"),
]


def messages() -> list[event_pb.Event]:
    made = []
    for user, second, kind, item in EVENTS:
        event = event_pb.Event(user_id=user, behavior_type=kind, item_id=item)
        event.timestamp.FromMicroseconds(second * SECOND)
        made.append(event)
    return made


@pytest.fixture(scope="module")
def predictor(
    directory: Path,
    version: Version,
    catalogue_embedder: ServiceProcess,
    stubs_of: Callable[[grpc.Channel], "Stubs"],
    register_in: Callable[[Path, Path], None],
) -> Iterator["Stubs"]:
    data = directory / "data"
    flags = ["--port", "0", "--embedder", catalogue_embedder.address, "--data-dir", str(data)]
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(started("predictor", flags, log=directory / "log"))
        stubs = stubs_of(stack.enter_context(grpc.insecure_channel(service.address)))
        register_in(directory / "r", data)
        stubs.models.ActivateModel(model_pb.ActivateModelRequest(version="r"))
        stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=messages()))
        yield stubs


class Offline:
    """What the version's parts say of ann, from arrays."""

    def __init__(
        self,
        version: Version,
        embedder: embedder_grpc.EmbedderServiceStub,
        catalogue: dict[str, str],
    ) -> None:
        self.version, self.ids = version, list(catalogue)
        request = embedder_pb.EmbedRequest(texts=list(catalogue.values()))
        texts = from_block(embedder.Embed(request).vectors)
        self.vectors: Vectors = version.projection.apply(texts, residuals=version.residuals)
        own = [event for event in EVENTS if event[0] == "ann"]
        item = np.array([self.ids.index(e[3]) if e[3] in self.ids else len(self.ids) for e in own])
        kind = np.array([TYPES.index(e[2]) if e[2] in TYPES else -2 for e in own])
        times = np.array([e[1] * SECOND for e in own])
        lengths = np.array([len(own)])
        self.histories = Histories(item, kind, times, lengths, times[-1:] + HORIZON)
        known = item < len(self.ids)
        tokens = np.where(known[:, None], self.vectors[np.where(known, item, 0)], 0)
        codes = np.where(kind < 0, len(TYPES), kind)
        batch = history_batch(tokens.astype(np.float32), known, codes, times, lengths)
        self.scores = self.vectors @ version.predict(batch).queries[0]

    def vector_of(self, item: np.ndarray) -> Vectors:
        there = (item >= 0) & (item < len(self.ids))
        return np.where(there[:, None], self.vectors[np.where(there, item, 0)], 0)

    def best(self, allow: list[str] | None = None, *, repeats: bool = True) -> list[str]:
        assert self.version.ranker is not None
        zeros = np.zeros(RECIPE.searched, np.int64)
        order = np.argsort(-self.scores)
        if not repeats:
            order = order[~np.isin(order, self.histories.item)]
        found = Pairs.of(zeros, order[: RECIPE.searched])
        pairs = self.version.ranker.candidates(self.histories, found, repeats=repeats)
        if allow is not None:
            chosen = np.array([self.ids.index(item_id) for item_id in allow])
            pairs = Pairs.of(chosen * 0, chosen)
        pairs = pairs.chosen(pairs.item < len(self.ids))
        scores = self.version.ranker.score(
            self.histories, pairs, self.scores[pairs.item], self.vector_of
        )
        return [self.ids[pairs.item[at]] for at in np.argsort(-scores, kind="stable")]


@pytest.fixture
def offline(
    version: Version, embedder: embedder_grpc.EmbedderServiceStub, catalogue: dict[str, str]
) -> Offline:
    return Offline(version, embedder, catalogue)


def predict(stubs: "Stubs", **query: object) -> pb.Prediction:
    request = pb.PredictRequest(query=pb.PredictionQuery(user_id="ann", **query))  # type: ignore[arg-type]
    return stubs.predictions.Predict(request).prediction


def ids(prediction: pb.Prediction) -> list[str]:
    return [item.item_id for item in prediction.items]


def test_items_are_those_of_the_ranker_in_its_order(predictor: "Stubs", offline: Offline) -> None:
    answer = predict(predictor, k=6)
    right = offline.best()
    assert ids(answer) == right[:6]
    assert answer.candidates == len(right) < len(offline.ids)
    assert {item.method for item in answer.items} == {pb.METHOD_MODEL}
    scores = [item.interest_score for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    probabilities = [item.probability for item in answer.items]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < probabilities[0] < 1
    assert answer.history_events == 6
    assert not answer.fallback_reason


def test_the_parts_are_listed(predictor: "Stubs") -> None:
    (model,) = predictor.models.ListModels(model_pb.ListModelsRequest()).models
    assert list(model.parts) == ["ranker", "type_model", "item_type_model"]


def test_many_users_at_once_get_what_each_gets_alone(predictor: "Stubs", offline: Offline) -> None:
    queries = [pb.PredictionQuery(user_id=user, k=4) for user in ("ann", "bob", "nobody", "ann")]
    together = predictor.predictions.PredictMany(pb.PredictManyRequest(queries=queries))
    alone = [
        predictor.predictions.Predict(pb.PredictRequest(query=query)).prediction
        for query in queries
    ]
    assert [ids(each) for each in together.predictions] == [ids(each) for each in alone]
    assert ids(alone[0]) == offline.best()[:4]
    assert alone[2].fallback_reason == pb.FALLBACK_REASON_NO_HISTORY


def test_what_may_not_be_answered_is_not(predictor: "Stubs", offline: Offline) -> None:
    everything = offline.best()
    denied = predict(predictor, k=5, deny_item_ids=everything[:2])
    assert not set(everything[:2]) & set(ids(denied))
    fresh = predict(predictor, k=5, repeats=pb.REPEATS_EXCLUDED)
    assert not {"coffee-0", "bread-3", "cheese-2"} & set(ids(fresh))
    assert ids(fresh) == offline.best(repeats=False)[:5]
    allowed = predict(predictor, allow_item_ids=["tea-1", "soap-4", "apple-2"])
    assert ids(allowed) == offline.best(["tea-1", "soap-4", "apple-2"])


def test_more_items_than_there_are_candidates(predictor: "Stubs", offline: Offline) -> None:
    answer = predict(predictor, k=len(offline.ids))
    assert sorted(ids(answer)) == sorted(offline.ids)
    assert {item.method for item in answer.items} == {pb.METHOD_MODEL}


def test_types_are_those_of_the_type_model(
    predictor: "Stubs", offline: Offline, version: Version
) -> None:
    assert version.type_model is not None
    right = version.type_model.predict(offline.histories)
    answer = predict(predictor)
    found = {each.behavior_type: each.probability for each in answer.behavior_types}
    assert found == pytest.approx(dict(zip(TYPES, right[0].tolist(), strict=True)), abs=1e-6)
    assert answer.predicted_behavior_type == TYPES[version.type_model.choose(right)[0]]


def test_rank_tells_what_the_user_would_do_with_each_item(
    predictor: "Stubs", offline: Offline, version: Version
) -> None:
    wanted = ["tea-3", "coffee-0", "soap-0"]
    request = pb.RankRequest(query=pb.PredictionQuery(user_id="ann"), item_ids=wanted)
    answer = predictor.predictions.Rank(request).prediction
    assert ids(answer) == offline.best(wanted)
    assert version.item_type_model is not None
    item = np.array([offline.ids.index(item_id) for item_id in ids(answer)])
    right = version.item_type_model.predict(offline.histories, item * 0, item)
    for row, scored in zip(right, answer.items, strict=True):
        found = {each.behavior_type: each.probability for each in scored.behavior_types}
        assert found == pytest.approx(dict(zip(TYPES, row.tolist(), strict=True)), abs=1e-6)
    assert not predict(predictor, k=1).items[0].behavior_types


def test_inline_events_of_long_ago_count_as_of_the_last_stored_one(
    predictor: "Stubs",
) -> None:
    def asked(second: int) -> pb.Prediction:
        event = event_pb.Event(behavior_type="view", item_id="tea-1")
        event.timestamp.FromMicroseconds(second * SECOND)
        return predict(predictor, history=[event], k=5)

    long_ago, at_the_last = asked(0), asked(EVENTS[5][1])
    assert long_ago.items == at_the_last.items
    assert long_ago.behavior_types == at_the_last.behavior_types


def test_an_item_newer_than_the_version_can_be_answered(
    predictor: "Stubs",
    embedder: embedder_grpc.EmbedderServiceStub,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    new = embedder_pb.Item(id="brand-new", text="new coffee")
    embedder.UpsertItems(embedder_pb.UpsertItemsRequest(items=[new]))
    try:
        request = pb.RankRequest(
            query=pb.PredictionQuery(user_id="ann"), item_ids=["brand-new", "soap-0"]
        )
        answer = predictor.predictions.Rank(request).prediction
        assert sorted(ids(answer)) == ["brand-new", "soap-0"]
        assert all(item.behavior_types for item in answer.items)
        assert "brand-new" in ids(predict(predictor, k=31))
    finally:
        embedder.DeleteItems(embedder_pb.DeleteItemsRequest(ids=["brand-new"]))
    eventually(lambda: "brand-new" not in ids(predict(predictor, k=31)))
