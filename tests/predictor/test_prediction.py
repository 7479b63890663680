"""Predictions by a model over gRPC: one predictor with the catalogue's embedder."""

import contextlib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as embedder_grpc
from foretell.errors import from_status
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.vectors import Vectors, from_block
from predictor.models import model_dir
from predictor.models.history import history_batch
from predictor.models.version import Version
from serving.process import ServiceProcess, started

if TYPE_CHECKING:
    from tests.predictor.conftest import Stubs

SECOND = 1_000_000


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictions")


@pytest.fixture(scope="module")
def version(
    directory: Path, write_version: Callable[..., Path], catalogue_embedder: ServiceProcess
) -> Version:
    """Two users' texts and items for the model `m`."""
    return model_dir.load(write_version(directory / "m", "m"))


@pytest.fixture(scope="module")
def metrics_port(free_port: Callable[[], int]) -> int:
    return free_port()


@pytest.fixture(scope="module")
def predictor(
    directory: Path,
    metrics_port: int,
    version: Version,
    catalogue_embedder: ServiceProcess,
    stubs_of: Callable[[grpc.Channel], "Stubs"],
    register_in: Callable[[Path, Path], None],
    eventually: Callable[[Callable[[], bool]], None],
) -> Iterator["Stubs"]:
    data = directory / "data"
    flags = ["--port", "0", "--embedder", catalogue_embedder.address, "--data-dir", str(data)]
    flags += ["--metrics-port", str(metrics_port)]
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(started("predictor", flags, log=directory / "log"))
        stubs = stubs_of(stack.enter_context(grpc.insecure_channel(service.address)))
        register_in(directory / "m", data)
        stubs.models.ActivateModel(model_pb.ActivateModelRequest(version="m"))
        done = stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=EVENTS))
        assert done.accepted == len(EVENTS)
        eventually(lambda: not info(stubs).pending_texts)
        yield stubs


def event(user: str, n: int, behavior_type: str, item: str = "", text: str = "") -> event_pb.Event:
    made = event_pb.Event(user_id=user, behavior_type=behavior_type, item_id=item, text=text)
    made.timestamp.FromMicroseconds(n * SECOND)
    return made


EVENTS = [
    event("ann", 10, "view", "coffee-0"),
    event("ann", 10, "buy", "coffee-0"),
    event("ann", 99, "search", text="something to spread on bread"),
    event("ann", 5_000, "view", "cheese-2"),
    event("ann", 5_001, "never seen in training", "gone-1"),
    event("bob", 1, "buy", "soap-1"),
    event("bob", 2, "buy", "soap-1"),
    event("bob", 3, "buy", "tea-1"),
]


def info(stubs: "Stubs") -> model_pb.GetInfoResponse:
    return stubs.models.GetInfo(model_pb.GetInfoRequest())


def predict(stubs: "Stubs", **query: object) -> pb.Prediction:
    request = pb.PredictRequest(query=pb.PredictionQuery(**query))  # type: ignore[arg-type]
    return stubs.predictions.Predict(request).prediction


def ids(prediction: pb.Prediction) -> list[str]:
    return [item.item_id for item in prediction.items]


class Expected:
    """The answer worked out from the version and the embedder's vectors, without the service."""

    def __init__(
        self,
        version: Version,
        embedder: embedder_grpc.EmbedderServiceStub,
        catalogue: dict[str, str],
        history: list[event_pb.Event],
    ) -> None:
        texts = [event.text or "-" for event in history]
        vectors = from_block(
            embedder.Embed(embedder_pb.EmbedRequest(texts=[*catalogue.values(), *texts])).vectors
        )
        residuals = dict(zip(version.item_ids, version.residuals, strict=True))
        self.ids = list(catalogue)
        rows = np.stack([residuals[item_id] for item_id in self.ids])
        self.items = version.projection.apply(vectors[: len(catalogue)], residuals=rows)
        by_text = version.projection.apply(vectors[len(catalogue) :])
        tokens = np.zeros((len(history), version.config.dims), np.float32)
        known = np.zeros(len(history), np.bool_)
        for at, one in enumerate(history):
            if one.item_id in catalogue:
                tokens[at], known[at] = self.items[self.ids.index(one.item_id)], True
            elif one.text:
                tokens[at], known[at] = by_text[at], True
        types = version.config.behavior_types
        index = [
            types.index(e.behavior_type) if e.behavior_type in types else len(types)
            for e in history
        ]
        times = [e.timestamp.ToMicroseconds() for e in history]
        batch = history_batch(
            tokens, known, np.array(index), np.array(times), np.array([len(history)])
        )
        probabilities, queries, gaps_s = version.predict(batch)
        self.types = dict(zip(types, probabilities[0].tolist(), strict=True))
        self.gap_s = float(gaps_s[0])
        self.scores: Vectors = self.items @ queries[0]

    def best(self, k: int) -> list[str]:
        return [self.ids[at] for at in np.argsort(-self.scores)[:k]]


@pytest.fixture
def expected(
    version: Version,
    embedder: embedder_grpc.EmbedderServiceStub,
    catalogue: dict[str, str],
) -> Callable[[list[event_pb.Event]], Expected]:
    return lambda history: Expected(version, embedder, catalogue, history)


Expect = Callable[[list[event_pb.Event]], Expected]


def test_a_stored_user_gets_what_the_version_says(
    predictor: "Stubs", expected: Expect, version: Version
) -> None:
    right = expected([e for e in EVENTS if e.user_id == "ann"])
    answer = predict(predictor, user_id="ann", k=5)
    found = {each.behavior_type: each.probability for each in answer.behavior_types}
    assert found == pytest.approx(right.types, abs=1e-3)
    ranked = [each.probability for each in answer.behavior_types]
    assert ranked == sorted(ranked, reverse=True)
    assert answer.predicted_behavior_type == answer.behavior_types[0].behavior_type
    assert answer.expected_gap_s == pytest.approx(right.gap_s, rel=1e-2)
    assert ids(answer) == right.best(5)
    scores = np.sort(right.scores)[::-1]
    np.testing.assert_allclose(
        [item.interest_score for item in answer.items], scores[:5], rtol=1e-3, atol=1e-3
    )
    assert answer.candidates == version.config.candidates == 20
    probabilities = version.item_probabilities(scores[:20], scores[:20])
    np.testing.assert_allclose(
        [item.probability for item in answer.items], probabilities[:5], rtol=2e-2, atol=1e-4
    )
    assert {item.method for item in answer.items} == {pb.METHOD_MODEL}
    assert answer.model_version == "m"
    assert not answer.fallback_reason
    assert not answer.shortfall_reason
    assert (answer.history_events, answer.pending_texts) == (5, 0)


def test_an_inline_history_follows_the_stored_one(predictor: "Stubs", expected: Expect) -> None:
    inline = [
        event("", 6_000, "search", text="black tea, never asked for before"),
        event("", 6_001, "buy", "apple-0"),
    ]
    right = expected([e for e in EVENTS if e.user_id == "ann"] + inline)
    before = info(predictor)
    answer = predict(predictor, user_id="ann", history=inline, k=4)
    assert {t.behavior_type: t.probability for t in answer.behavior_types} == pytest.approx(
        right.types, abs=1e-3
    )
    assert ids(answer) == right.best(4)
    assert (answer.history_events, answer.pending_texts) == (7, 0)
    # The same history, all of it inline, in any order of writing.
    copies = [event_pb.Event.FromString(e.SerializeToString()) for e in EVENTS[:5]]
    for copy in copies:
        copy.user_id = ""
    alone = predict(predictor, history=[*inline, *copies], k=4)
    assert ids(alone) == ids(answer)
    assert alone.missing_ids == ["gone-1"]
    assert info(predictor) == before  # nothing was stored


def test_a_longer_history_than_the_model_reads_is_cut(predictor: "Stubs", expected: Expect) -> None:
    long = [event("", n, "view", "tea-2" if n % 3 else "bread-1") for n in range(1, 60)]
    answer = predict(predictor, user_id="bob", history=long, k=3)
    assert answer.history_events == 20
    assert ids(answer) == expected(long[-20:]).best(3)


def test_many_users_get_the_same_answers_as_one_by_one(predictor: "Stubs") -> None:
    queries = [
        pb.PredictionQuery(user_id="ann"),
        pb.PredictionQuery(user_id="x" * 129),
        pb.PredictionQuery(user_id="bob", k=3),
        pb.PredictionQuery(user_id="ann", k=2, deny_item_ids=["coffee-0"]),
        pb.PredictionQuery(),
        pb.PredictionQuery(user_id="bob", k=0),
    ]
    many = predictor.predictions.PredictMany(pb.PredictManyRequest(queries=queries))
    assert [failure.index for failure in many.failures] == [1, 5]
    assert from_status(many.failures[0].status).field == "queries[1].user_id"
    for at, prediction in enumerate(many.predictions):
        if at in (1, 5):
            assert prediction == pb.Prediction()
            continue
        one = predictor.predictions.Predict(pb.PredictRequest(query=queries[at])).prediction
        assert ids(one) == ids(prediction)
        assert one.fallback_reason == prediction.fallback_reason
        assert [t.probability for t in one.behavior_types] == pytest.approx(
            [t.probability for t in prediction.behavior_types], abs=1e-5
        )


def test_filters_hold(predictor: "Stubs", expected: Expect) -> None:
    best = expected([e for e in EVENTS if e.user_id == "ann"]).best(30)
    denied = predict(predictor, user_id="ann", k=5, deny_item_ids=best[:3])
    assert ids(denied) == best[3:8]
    allow = [best[20], best[4], best[7], "no such item"]
    allowed = predict(predictor, user_id="ann", k=5, allow_item_ids=allow)
    assert ids(allowed) == [best[4], best[7], best[20]]
    assert allowed.missing_ids == ["no such item"]
    assert allowed.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
    assert allowed.candidates == 3
    assert all(0 < item.probability < 1 for item in allowed.items)
    both = predict(
        predictor, user_id="ann", allow_item_ids=allow[:3], deny_item_ids=[best[4], "nothing"]
    )
    assert ids(both) == [best[7], best[20]]
    none = predict(predictor, user_id="ann", allow_item_ids=best[:1], deny_item_ids=best[:1])
    assert ids(none) == []
    assert none.shortfall_reason == pb.SHORTFALL_REASON_FILTERED


def test_repeats(predictor: "Stubs", expected: Expect) -> None:
    own = {"coffee-0", "cheese-2"}
    every = predict(predictor, user_id="ann", k=30)
    assert own <= set(ids(every))  # as the version was trained: allowed
    assert not every.shortfall_reason
    inline = [event("", 6_000, "view", "apple-0")]
    without = predict(predictor, user_id="ann", k=30, history=inline, repeats=pb.REPEATS_EXCLUDED)
    assert set(ids(every)) - set(ids(without)) == own | {"apple-0"}
    assert without.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
    assert without.candidates == 27


@pytest.mark.parametrize("others", [-1, 0])
def test_deny_lists_up_to_the_full_length(predictor: "Stubs", others: int) -> None:
    deny = [f"nothing {n}" for n in range(limits.FILTER_IDS + others)]
    denied = predict(predictor, user_id="ann", deny_item_ids=deny)
    plain = predict(predictor, user_id="ann")
    assert ids(denied) == ids(plain)
    assert not denied.fallback_reason
    assert [item.probability for item in denied.items] == pytest.approx(
        [item.probability for item in plain.items]
    )


def test_a_deny_list_of_the_full_length_beside_own_items(predictor: "Stubs") -> None:
    deny = [f"nothing {n}" for n in range(limits.FILTER_IDS)]
    answer = predict(
        predictor, user_id="ann", k=28, deny_item_ids=deny, repeats=pb.REPEATS_EXCLUDED
    )
    assert not {"coffee-0", "cheese-2"} & set(ids(answer))
    assert len(answer.items) == 28
    assert not answer.shortfall_reason


def test_all_that_there_is_is_said_to_be_all(predictor: "Stubs", catalogue: dict[str, str]) -> None:
    answer = predict(predictor, user_id="ann", k=1_000)
    assert set(ids(answer)) == set(catalogue)
    assert answer.shortfall_reason == pb.SHORTFALL_REASON_CATALOGUE_EXHAUSTED
    assert answer.candidates == len(catalogue)


def test_rank_orders_the_callers_items(predictor: "Stubs", expected: Expect) -> None:
    order = expected([e for e in EVENTS if e.user_id == "ann"]).best(30)
    given = [order[9], "gone-2", order[2], order[20], order[2]]
    answer = predictor.predictions.Rank(
        pb.RankRequest(query=pb.PredictionQuery(user_id="ann"), item_ids=given)
    ).prediction
    assert ids(answer) == [order[2], order[9], order[20]]
    assert answer.missing_ids == ["gone-2"]
    assert not answer.shortfall_reason
    probabilities = [item.probability for item in answer.items]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 < each < 1 for each in probabilities)
    query = pb.PredictionQuery(user_id="ann", k=1, deny_item_ids=[order[2]])
    answer = predictor.predictions.Rank(pb.RankRequest(query=query, item_ids=given)).prediction
    assert ids(answer) == [order[9]]


def test_rank_keeps_the_users_own_items_unless_told(predictor: "Stubs") -> None:
    query = pb.PredictionQuery(user_id="ann")
    request = pb.RankRequest(query=query, item_ids=["coffee-0", "tea-0"])
    assert set(ids(predictor.predictions.Rank(request).prediction)) == {"coffee-0", "tea-0"}
    request.query.repeats = pb.REPEATS_EXCLUDED
    assert ids(predictor.predictions.Rank(request).prediction) == ["tea-0"]


def test_a_user_without_history_gets_the_popular_items(
    predictor: "Stubs", version: Version
) -> None:
    answer = predict(predictor, user_id="nobody", k=6)
    assert answer.fallback_reason == pb.FALLBACK_REASON_NO_HISTORY
    assert ids(answer)[:4] == ["soap-1", "coffee-0", "tea-1", "cheese-2"]
    assert len(answer.items) == 6  # then anything that is there
    assert {item.method for item in answer.items} == {pb.METHOD_POPULAR}
    np.testing.assert_allclose(
        [item.interest_score for item in answer.items], [2 / 8, 2 / 8, 1 / 8, 1 / 8, 0, 0]
    )
    empty = history_batch(
        np.zeros((0, version.config.dims), np.float32),
        np.zeros(0, np.bool_),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
        np.zeros(1, np.int64),
    )
    probabilities = version.predict(empty)[0][0]
    assert {t.behavior_type: t.probability for t in answer.behavior_types} == pytest.approx(
        dict(zip(version.config.behavior_types, probabilities.tolist(), strict=True)), abs=1e-4
    )
    ranked = predictor.predictions.Rank(
        pb.RankRequest(
            query=pb.PredictionQuery(user_id="nobody"), item_ids=["bread-0", "tea-1", "gone-1"]
        )
    ).prediction
    assert ids(ranked) == ["tea-1", "bread-0"]
    assert not ranked.shortfall_reason


def test_timings_add_up(predictor: "Stubs") -> None:
    answer = predictor.predictions.Predict(
        pb.PredictRequest(query=pb.PredictionQuery(user_id="ann"))
    )
    timings = answer.timings
    assert timings.forward_us > 0
    assert timings.search_us > 0
    assert timings.total_us >= timings.forward_us + timings.search_us


def test_a_new_item_is_answered_and_a_deleted_one_is_not(
    predictor: "Stubs",
    embedder: embedder_grpc.EmbedderServiceStub,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    before = info(predictor).items
    embedder.UpsertItems(
        embedder_pb.UpsertItemsRequest(items=[embedder_pb.Item(id="new", text="a new soap")])
    )
    try:
        answer = predict(predictor, user_id="ann", k=1_000)
        assert "new" in ids(answer)  # from its text alone, at once
        eventually(lambda: info(predictor).items == before + 1)
        # It is a token's vector too.
        known = predict(predictor, history=[event("", 1, "view", "new")], k=1)
        assert not known.missing_ids
    finally:
        embedder.DeleteItems(embedder_pb.DeleteItemsRequest(ids=["new"]))
    assert "new" not in ids(predict(predictor, user_id="ann", k=1_000))
    eventually(lambda: info(predictor).items == before)
    assert predict(predictor, history=[event("", 1, "view", "new")], k=1).missing_ids == ["new"]


def test_passes_of_the_model_and_its_answers_are_counted(
    predictor: "Stubs", metrics_port: int
) -> None:
    def counts() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return {name: float(value) for name, value in
                (line.rsplit(" ", 1) for line in lines if line[0] != "#")}  # fmt: skip

    answered = 'foretell_predictions_total{fallback_reason="none"}'
    before = counts()
    for _ in range(3):
        predictor.predictions.Predict(
            pb.PredictRequest(query=pb.PredictionQuery(user_id="ann", k=3))
        )
    after = counts()
    grown = {name: after[name] - before[name] for name in after if name in before}
    assert grown[answered] == 3
    assert grown["foretell_forward_seconds_count"] == 3
    assert grown["foretell_forward_batch_queries_sum"] == 3
    assert 0 < grown["foretell_forward_seconds_sum"] < 30
    assert after['foretell_model_info{version="m"}'] == 1
