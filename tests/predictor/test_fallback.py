"""Predictions without a model, and with one whose embedder is gone."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as embedder_grpc
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb
from predictor.database import open_database
from predictor.events import EventStore
from predictor.fallback import PopularItems
from predictor.ingestion import NewEvent, ingest
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.predictor.conftest import Stubs

Start = Callable[..., ServiceProcess]
Connect = Callable[[str], "Stubs"]


def event(user: str, behavior_type: str, item: str = "", text: str = "") -> event_pb.Event:
    return event_pb.Event(user_id=user, behavior_type=behavior_type, item_id=item, text=text)


def ingest_events(stubs: "Stubs", *events: event_pb.Event) -> None:
    done = stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=events))
    assert done.accepted == len(events)


def predict(stubs: "Stubs", **query: object) -> pb.Prediction:
    request = pb.PredictRequest(query=pb.PredictionQuery(**query))  # type: ignore[arg-type]
    return stubs.predictions.Predict(request, timeout=30).prediction


def answers(prediction: pb.Prediction) -> list[tuple[str, str]]:
    """Item ids and methods."""
    return [
        (item.item_id, pb.Method.Name(item.method).removeprefix("METHOD_"))
        for item in prediction.items
    ]


def test_without_an_embedder_the_users_own_then_the_popular_items(
    start_predictor: Start, connect: Connect, absent: str
) -> None:
    stubs = connect(start_predictor(absent).address)
    ingest_events(
        stubs,
        *(event("ann", "buy", item) for item in ("a", "b", "b", "c")),
        *(event("bob", "view", item) for item in ("d", "d", "d", "e", "a")),
        event("bob", "search", text="nothing"),
    )
    answer = predict(stubs, user_id="ann", k=5)
    assert answer.fallback_reason == pb.FALLBACK_REASON_NO_MODEL
    assert answers(answer) == [
        ("b", "PERSONAL_FREQUENCY"),
        ("c", "PERSONAL_FREQUENCY"),  # of equals the latest
        ("a", "PERSONAL_FREQUENCY"),
        ("d", "POPULAR"),
        ("e", "POPULAR"),
    ]
    assert [item.interest_score for item in answer.items] == pytest.approx(
        [2 / 4, 1 / 4, 1 / 4, 3 / 10, 1 / 10]
    )
    assert [item.probability for item in answer.items] == [0] * 5
    assert (answer.history_events, answer.candidates, answer.model_version) == (4, 0, "")
    types = {t.behavior_type: t.probability for t in answer.behavior_types}
    assert list(types) == ["buy", "view", "search"]
    assert sum(types.values()) == pytest.approx(1)

    inline = [event("", "view", "e"), event("", "view", "e"), event("", "view", "e")]
    answer = predict(stubs, user_id="ann", history=inline, k=2)
    assert answers(answer) == [("e", "PERSONAL_FREQUENCY"), ("b", "PERSONAL_FREQUENCY")]
    answer = predict(stubs, user_id="ann", repeats=pb.REPEATS_EXCLUDED, deny_item_ids=["d"], k=5)
    assert answers(answer) == [("e", "POPULAR")]
    assert answer.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
    answer = predict(stubs, user_id="nobody", k=2)
    assert answer.fallback_reason == pb.FALLBACK_REASON_NO_HISTORY
    assert answers(answer) == [("d", "POPULAR"), ("a", "POPULAR")]
    types = {t.behavior_type: t.probability for t in answer.behavior_types}
    assert types == pytest.approx({"buy": 0.4, "view": 0.5, "search": 0.1})


def test_with_the_embedder_what_is_similar_comes_first(
    start_predictor: Start,
    connect: Connect,
    catalogue_embedder: ServiceProcess,
    catalogue: dict[str, str],
) -> None:
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    ingest_events(
        stubs,
        event("ann", "view", "tea-0"),
        event("ann", "search", text="bread"),
        event("bob", "view", "never upserted"),
    )
    answer = predict(stubs, user_id="ann", k=8)
    assert {method for _, method in answers(answer)} == {"CONTENT"}
    kinds = [item_id.split("-")[0] for item_id, _ in answers(answer)]
    assert {"bread", "tea"} <= set(kinds)
    assert "tea-0" not in dict(answers(answer))  # the item itself is not similar to itself
    scores = [item.interest_score for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] <= scores[0] <= 1.0001
    # What the catalogue lacks is not answered, however popular; what it has fills up.
    answer = predict(stubs, user_id="bob", k=1_000)
    assert dict(answers(answer)).keys() == catalogue.keys()
    assert answers(answer)[0] == ("tea-0", "POPULAR")
    assert answer.shortfall_reason == pb.SHORTFALL_REASON_CATALOGUE_EXHAUSTED
    # Ids that do not exist are named.
    inline = [event("", "view", "gone-1"), event("", "view", "tea-1")]
    answer = predict(stubs, history=inline, allow_item_ids=["tea-2", "gone-2", "tea-1"], k=3)
    assert answer.missing_ids == ["gone-2", "gone-1"]
    assert answers(answer) == [("tea-2", "CONTENT"), ("tea-1", "PERSONAL_FREQUENCY")]
    assert answer.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
    ranked = stubs.predictions.Rank(
        pb.RankRequest(
            query=pb.PredictionQuery(user_id="ann"), item_ids=["soap-1", "bread-2", "x", "tea-0"]
        )
    ).prediction
    assert [item.item_id for item in ranked.items] == ["bread-2", "soap-1", "tea-0"]
    assert ranked.missing_ids == ["x"]
    assert not ranked.shortfall_reason


def test_a_deleted_item_is_popular_no_more(
    start_predictor: Start, connect: Connect, catalogue_embedder: ServiceProcess,
    embedder: embedder_grpc.EmbedderServiceStub,
) -> None:  # fmt: skip
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    item = embedder_pb.Item(id="soon gone", text="a candle")
    embedder.UpsertItems(embedder_pb.UpsertItemsRequest(items=[item]))
    ingest_events(stubs, event("ann", "buy", "soon gone"))
    assert answers(predict(stubs, user_id="new", k=1)) == [("soon gone", "POPULAR")]
    embedder.DeleteItems(embedder_pb.DeleteItemsRequest(ids=["soon gone"]))
    assert "soon gone" not in dict(answers(predict(stubs, user_id="new", k=100)))


def test_a_model_without_items_leaves_them_to_the_fallbacks(
    start_predictor: Start,
    connect: Connect,
    catalogue_embedder: ServiceProcess,
    make_version: Callable[..., Path],
    register: Callable[[Path], None],
) -> None:
    register(make_version("types", has_items=False))
    stubs = connect(start_predictor(catalogue_embedder.address).address)
    stubs.models.ActivateModel(model_pb.ActivateModelRequest(version="types"))
    ingest_events(stubs, event("ann", "view", "cheese-1"), event("ann", "buy", "cheese-1"))
    answer = predict(stubs, user_id="ann", k=3)
    assert answer.fallback_reason == pb.FALLBACK_REASON_NO_ITEM_HEAD
    assert answer.model_version == "types"
    assert answers(answer)[0][0].startswith("cheese")
    assert {method for _, method in answers(answer)} == {"CONTENT"}
    assert {t.behavior_type for t in answer.behavior_types} == {"view", "buy", "search"}
    (model,) = stubs.models.ListModels(model_pb.ListModelsRequest()).models
    assert (model.items, model.active) == (0, True)


def test_the_embedder_is_killed_while_predictions_run(
    start_predictor: Start,
    start_embedder: Callable[..., ServiceProcess],
    connect: Connect,
    make_version: Callable[..., Path],
    register: Callable[[Path], None],
    eventually: Callable[[Callable[[], bool]], None],
    tmp_path: Path,
) -> None:
    """The types stay the model's; items fall back, and come back with the embedder."""
    data = str(tmp_path / "embedder-data")
    own = start_embedder("--data-dir", data)
    port = own.address.rsplit(":", 1)[1]
    fill(own.address, {"a": "apple", "b": "bread", "c": "candle"})
    register(make_version("m", item_ids=("a", "b", "c")))
    stubs = connect(start_predictor(own.address, "--embedder-deadline-ms", "500").address)
    stubs.models.ActivateModel(model_pb.ActivateModelRequest(version="m"))
    ingest_events(stubs, event("ann", "view", "b"), event("bob", "view", "c"))
    before = predict(stubs, user_id="ann", k=3)
    assert {method for _, method in answers(before)} == {"MODEL"}

    os.kill(own.process.pid, signal.SIGSTOP)  # it is there, but silent
    begin = time.monotonic()
    silent = predict(stubs, user_id="ann", k=3)
    assert time.monotonic() - begin < 2
    own.kill()
    gone = predict(stubs, user_id="ann", k=3)
    for answer in (silent, gone):
        assert answer.fallback_reason == pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
        assert answers(answer) == [
            ("b", "PERSONAL_FREQUENCY"),
            ("c", "POPULAR"),
            ("a", "POPULAR"),
        ]
        assert list(answer.behavior_types) == list(before.behavior_types)
        assert answer.model_version == "m"
    assert not stubs.models.GetInfo(model_pb.GetInfoRequest()).embedder_available
    # A text of an inline history has no vector now.
    inline = [event("", "search", text="something new")]
    assert predict(stubs, user_id="ann", history=inline).pending_texts == 1

    start_embedder("--data-dir", data, "--port", port)
    eventually(lambda: not predict(stubs, user_id="ann", k=3).fallback_reason)
    assert list(predict(stubs, user_id="ann", k=3).items) == list(before.items)


def test_a_near_deadline_is_answered_without_the_embedder(
    start_predictor: Start,
    start_embedder: Callable[..., ServiceProcess],
    connect: Connect,
    make_version: Callable[..., Path],
    register: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    own = start_embedder("--data-dir", str(tmp_path / "embedder-data"))
    fill(own.address, {"a": "apple", "b": "bread"})
    register(make_version("m", item_ids=("a", "b")))
    # The predictor itself would wait a minute for the embedder.
    stubs = connect(start_predictor(own.address, "--embedder-deadline-ms", "60000").address)
    ingest_events(stubs, event("ann", "view", "b"))
    assert answers(predict(stubs, user_id="ann", k=1)) == [("a", "CONTENT")]
    request = pb.PredictRequest(query=pb.PredictionQuery(user_id="ann", k=1, deny_item_ids=["c"]))

    def without_the_embedder() -> pb.Prediction:
        os.kill(own.process.pid, signal.SIGSTOP)
        try:
            return stubs.predictions.Predict(request, timeout=2.0).prediction
        finally:
            os.kill(own.process.pid, signal.SIGCONT)

    answer = without_the_embedder()
    assert answer.fallback_reason == pb.FALLBACK_REASON_NO_MODEL
    assert answers(answer) == [("b", "PERSONAL_FREQUENCY")]
    # One caller's haste says nothing about the embedder.
    assert answers(predict(stubs, user_id="ann", k=1)) == [("a", "CONTENT")]
    stubs.models.ActivateModel(model_pb.ActivateModelRequest(version="m"))
    assert answers(predict(stubs, user_id="ann", k=1))[0][1] == "MODEL"
    answer = without_the_embedder()
    assert answer.fallback_reason == pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
    assert answers(answer) == [("b", "PERSONAL_FREQUENCY")]


def fill(address: str, items: dict[str, str]) -> None:
    with grpc.insecure_channel(address) as channel:
        embedder_grpc.EmbedderServiceStub(channel).UpsertItems(
            embedder_pb.UpsertItemsRequest(
                items=[embedder_pb.Item(id=i, text=text) for i, text in items.items()]
            )
        )


async def test_popular_items_are_counted_anew_only_when_events_came(tmp_path: Path) -> None:
    db = open_database(tmp_path)
    try:
        store = EventStore(db)
        counted = 0
        count = store.popular

        def counting() -> object:
            nonlocal counted
            counted += 1
            return count()

        store.popular = counting  # type: ignore[method-assign, assignment]
        popular = PopularItems(store)
        assert (await popular.get()).items == {}
        one = NewEvent("u", "view", 1, "a", None, None, None, None)
        await db.write(lambda connection: ingest(connection, [one]))
        while not (await popular.get()).items:
            pass  # it may wait a few times as long as the last count took
        done = counted
        for _ in range(50):
            assert (await popular.get()).items == {"a": 1}
            popular._next = 0.0
        assert counted == done
    finally:
        db.close()
