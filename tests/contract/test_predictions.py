"""PredictionService: the contract of the fake and of the real one.

Scores differ, of course: tests look at what any method must keep to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb

if TYPE_CHECKING:
    from tests.contract.conftest import Failed, Refused, Services

INVALID = "INVALID_ARGUMENT"
TEXTS = {
    "tea": "green tea with mint",
    "mate": "mate tea with mint",
    "coffee": "strong black coffee",
    "car": "a blue sports car",
    "wheel": "a wheel of a sports car",
    "soap": "lavender soap",
}


class Shop:
    """Items and users of one test."""

    def __init__(self, services: Services, prefix: str) -> None:
        self.services = services
        self.prefix = prefix
        self.items = [self.item(name) for name in TEXTS]
        items = [embedder_pb.Item(id=self.item(name), text=text) for name, text in TEXTS.items()]
        services.embedder.UpsertItems(embedder_pb.UpsertItemsRequest(items=items), timeout=60)

    def item(self, name: str) -> str:
        """The id of an item."""
        return f"{self.prefix}-{name}"

    def ingest(self, user: str, *names: str, behavior_type: str = "buy") -> None:
        """Stores that a user had items, in this order."""
        events = [
            event_pb.Event(
                user_id=user,
                behavior_type=behavior_type,
                item_id=self.item(name),
                timestamp=Timestamp(seconds=1_700_000_000 + at),
            )
            for at, name in enumerate(names)
        ]
        answer = self.services.events.IngestEvents(event_pb.IngestEventsRequest(events=events))
        assert answer.accepted == len(names)

    def predict(self, **query: Any) -> pb.Prediction:
        """Predicts among the items of this test, unless told otherwise."""
        fields = {"allow_item_ids": self.items} | query
        request = pb.PredictRequest(query=pb.PredictionQuery(**fields))
        answer = self.services.predictions.Predict(request, timeout=60)
        assert answer.timings.total_us > 0
        return well_formed(answer.prediction)

    def rank(self, item_ids: list[str], **query: Any) -> pb.Prediction:
        """Orders items."""
        request = pb.RankRequest(query=pb.PredictionQuery(**query), item_ids=item_ids)
        return well_formed(self.services.predictions.Rank(request, timeout=60).prediction)

    def close(self) -> None:
        """Deletes the items."""
        deletion = embedder_pb.DeleteItemsRequest(ids=self.items)
        self.services.embedder.DeleteItems(deletion, timeout=60)


def well_formed(prediction: pb.Prediction) -> pb.Prediction:
    """What holds for every prediction."""
    types = [each.probability for each in prediction.behavior_types]
    assert types == sorted(types, reverse=True)
    assert not types or sum(types) == pytest.approx(1, abs=1e-5)
    methods = [item.method for item in prediction.items]
    assert methods == sorted(methods)  # the order of fallback
    for method in set(methods):
        scores = [item.interest_score for item in prediction.items if item.method == method]
        assert scores == sorted(scores, reverse=True)
    ids = [item.item_id for item in prediction.items]
    assert len(set(ids)) == len(ids)
    assert all(0 <= item.probability <= 1 for item in prediction.items)
    return prediction


def ids(prediction: pb.Prediction) -> list[str]:
    return [item.item_id for item in prediction.items]


@pytest.fixture
def shop(services: Services, unique: str) -> Iterator[Shop]:
    found = Shop(services, unique)
    yield found
    found.close()


@pytest.fixture
def active(services: Services, unique: str) -> str:
    """A version that answers, with the types `buy` and `view`."""
    version = f"{unique}-model"
    services.register_model(version, ["buy", "view"])
    services.models.ActivateModel(model_pb.ActivateModelRequest(version=version), timeout=60)
    return version


# --- with any method ------------------------------------------------------------------------------


def test_an_unknown_user_is_no_error(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea")
    prediction = shop.predict(user_id=f"{unique}-unknown")
    assert prediction.fallback_reason == pb.FALLBACK_REASON_NO_HISTORY
    assert prediction.history_events == 0
    assert sorted(ids(prediction)) == sorted(shop.items)
    assert {item.method for item in prediction.items} == {pb.METHOD_POPULAR}
    assert prediction.items[0].item_id == shop.item("tea")
    assert prediction.behavior_types


def test_nobodys_prediction_is_that_of_an_unknown_user(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea")
    assert ids(shop.predict())[0] == shop.item("tea")


def test_k_bounds_the_items(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea")
    prediction = shop.predict(user_id=unique, k=2)
    assert len(prediction.items) == 2
    assert prediction.shortfall_reason == pb.SHORTFALL_REASON_UNSPECIFIED


def test_too_few_items_have_a_reason(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea")
    for user in (unique, f"{unique}-unknown"):
        prediction = shop.predict(user_id=user, k=1_000)
        assert sorted(ids(prediction)) == sorted(shop.items)
        assert prediction.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
        everything = shop.predict(user_id=user, k=1_000, allow_item_ids=[])
        assert set(shop.items) <= set(ids(everything))
        reason = everything.shortfall_reason
        assert reason == pb.SHORTFALL_REASON_CATALOGUE_EXHAUSTED


def test_allow_and_deny_lists_hold_and_missing_ids_are_named(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea", "coffee")
    allow = [shop.item("tea"), shop.item("car"), shop.item("nobody"), shop.item("soap")]
    for user in (unique, f"{unique}-unknown"):
        prediction = shop.predict(
            user_id=user, allow_item_ids=allow, deny_item_ids=[shop.item("tea"), "whatever"]
        )
        assert sorted(ids(prediction)) == sorted([shop.item("car"), shop.item("soap")])
        assert list(prediction.missing_ids) == [shop.item("nobody")]
        assert prediction.shortfall_reason == pb.SHORTFALL_REASON_FILTERED


def test_repeats_are_allowed_or_excluded(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea", "coffee")
    inline = [event_pb.Event(behavior_type="buy", item_id=shop.item("car"))]
    allowed = shop.predict(user_id=unique, history=inline, repeats=pb.REPEATS_ALLOWED)
    assert sorted(ids(allowed)) == sorted(shop.items)
    excluded = shop.predict(user_id=unique, history=inline, repeats=pb.REPEATS_EXCLUDED)
    assert sorted(ids(excluded)) == sorted(shop.item(name) for name in ("mate", "wheel", "soap"))
    assert excluded.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
    assert sorted(ids(shop.predict(user_id=unique))) == sorted(shop.items)


def test_an_inline_history_counts_and_is_not_stored(
    services: Services, shop: Shop, unique: str
) -> None:
    shop.ingest(unique, "tea")
    inline = [
        event_pb.Event(behavior_type="buy", item_id=shop.item("coffee")),
        event_pb.Event(behavior_type="search", text="a quick car"),
        event_pb.Event(behavior_type="view", item_id=shop.item("nobody")),
    ]
    prediction = shop.predict(user_id=unique, history=inline)
    assert prediction.history_events == 4
    assert list(prediction.missing_ids) == [shop.item("nobody")]
    assert shop.predict(history=inline).history_events == 3
    assert shop.predict(user_id=unique).history_events == 1
    listed = services.events.ListEvents(event_pb.ListEventsRequest(user_id=unique))
    assert len(listed.events) == 1


def test_stored_events_count_in_the_next_prediction(shop: Shop, unique: str) -> None:
    assert shop.predict(user_id=unique).history_events == 0
    shop.ingest(unique, "tea", "coffee")
    assert shop.predict(user_id=unique).history_events == 2


def test_rank_orders_the_items_that_exist(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea")
    items = [shop.item(name) for name in ("car", "tea", "nobody", "soap", "car")]
    for user in (unique, f"{unique}-unknown", ""):
        prediction = shop.rank(items, user_id=user)
        expected = sorted(shop.item(name) for name in ("car", "tea", "soap"))
        assert sorted(ids(prediction)) == expected
        assert list(prediction.missing_ids) == [shop.item("nobody")]
        assert prediction.shortfall_reason == pb.SHORTFALL_REASON_UNSPECIFIED


def test_rank_keeps_to_k_and_to_its_lists(shop: Shop, unique: str) -> None:
    shop.ingest(unique, "tea")
    assert len(shop.rank(shop.items, user_id=unique, k=2).items) == 2
    denied = shop.rank(shop.items, user_id=unique, deny_item_ids=[shop.item("car")])
    assert shop.item("car") not in ids(denied)
    assert denied.shortfall_reason == pb.SHORTFALL_REASON_FILTERED
    allowed = shop.rank(shop.items, user_id=unique, allow_item_ids=[shop.item("car"), "other"])
    assert ids(allowed) == [shop.item("car")]
    new = shop.rank(shop.items, user_id=unique, repeats=pb.REPEATS_EXCLUDED)
    assert shop.item("tea") not in ids(new)


def test_many_queries_are_answered_each(
    services: Services, failed: Failed, shop: Shop, unique: str
) -> None:
    shop.ingest(unique, "tea")
    queries = [
        pb.PredictionQuery(user_id=unique, k=2, allow_item_ids=shop.items),
        pb.PredictionQuery(user_id="u" * 129),
        pb.PredictionQuery(user_id=f"{unique}-unknown", k=3, allow_item_ids=shop.items),
        pb.PredictionQuery(k=0),
    ]
    answer = services.predictions.PredictMany(pb.PredictManyRequest(queries=queries), timeout=60)
    assert [len(each.items) for each in answer.predictions] == [2, 0, 3, 0]
    assert [each.history_events for each in answer.predictions] == [1, 0, 0, 0]
    assert failed(answer.failures) == {
        1: (INVALID, "TOO_LONG", "queries[1].user_id"),
        3: (INVALID, "BAD_K", "queries[3].k"),
    }
    assert answer.timings.total_us > 0
    alone = shop.predict(user_id=unique, k=2)
    assert ids(answer.predictions[0]) == ids(alone)


def test_256_queries_are_answered(services: Services, shop: Shop, unique: str) -> None:
    queries = [pb.PredictionQuery(user_id=unique, k=1, allow_item_ids=shop.items)] * 256
    answer = services.predictions.PredictMany(pb.PredictManyRequest(queries=queries), timeout=60)
    assert [len(each.items) for each in answer.predictions] == [1] * 256


# --- without a model ------------------------------------------------------------------------------


def test_where_nothing_was_ever_ingested_there_are_no_behavior_types(
    bare: Services, unique: str
) -> None:
    shop = Shop(bare, unique)
    prediction = shop.predict()
    assert list(prediction.behavior_types) == []
    assert sorted(ids(prediction)) == sorted(shop.items)
    assert prediction.fallback_reason == pb.FALLBACK_REASON_NO_HISTORY
    shop.close()


def test_without_a_model_similar_items_come_first_then_the_users_own(
    bare: Services, unique: str
) -> None:
    shop = Shop(bare, unique)
    shop.ingest(unique, "car", "tea", "car")
    shop.ingest(f"{unique}-other", "soap", behavior_type="view")
    prediction = shop.predict(user_id=unique)
    assert prediction.fallback_reason == pb.FALLBACK_REASON_NO_MODEL
    assert prediction.model_version == ""
    methods = {item.item_id: item.method for item in prediction.items}
    assert methods[shop.item("wheel")] == methods[shop.item("mate")] == pb.METHOD_CONTENT
    assert methods[shop.item("car")] == pb.METHOD_PERSONAL_FREQUENCY
    assert methods[shop.item("tea")] == pb.METHOD_PERSONAL_FREQUENCY
    assert ids(prediction).index(shop.item("car")) < ids(prediction).index(shop.item("tea"))
    shares = {item.item_id: item.interest_score for item in prediction.items}
    assert shares[shop.item("car")] == pytest.approx(2 / 3)
    assert {item.probability for item in prediction.items} == {0.0}
    assert prediction.candidates == 0
    assert [each.behavior_type for each in prediction.behavior_types] == ["buy", "view"]
    shop.close()


# --- with a model ---------------------------------------------------------------------------------


def test_a_model_answers_with_probabilities(shop: Shop, active: str, unique: str) -> None:
    shop.ingest(unique, "tea", "coffee")
    prediction = shop.predict(user_id=unique)
    assert prediction.model_version == active
    assert prediction.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED
    assert sorted(ids(prediction)) == sorted(shop.items)
    assert {item.method for item in prediction.items} == {pb.METHOD_MODEL}
    assert prediction.candidates == len(shop.items)
    probabilities = [item.probability for item in prediction.items]
    assert 1 > probabilities[0] >= probabilities[-1] > 0
    assert {each.behavior_type for each in prediction.behavior_types} == {"buy", "view"}


def test_a_models_probabilities_are_over_all_candidates(
    shop: Shop, active: str, unique: str
) -> None:
    shop.ingest(unique, "tea", "coffee")
    prediction = shop.predict(user_id=unique, k=2)
    assert prediction.candidates == len(shop.items)
    assert 0 < sum(item.probability for item in prediction.items) < 1


def test_a_model_knows_new_items_and_forgets_deleted_ones(
    services: Services, shop: Shop, active: str, unique: str
) -> None:
    shop.ingest(unique, "tea")
    new = embedder_pb.Item(id=shop.item("new"), text="iced tea")
    services.embedder.UpsertItems(embedder_pb.UpsertItemsRequest(items=[new]))
    allow = [shop.item("new"), shop.item("car")]
    found = wait_for(
        lambda: shop.predict(user_id=unique, allow_item_ids=allow),
        lambda prediction: not prediction.missing_ids,
    )
    assert sorted(ids(found)) == sorted(allow)
    services.embedder.DeleteItems(embedder_pb.DeleteItemsRequest(ids=[new.id]))
    found = wait_for(
        lambda: shop.predict(user_id=unique, allow_item_ids=allow),
        lambda prediction: bool(prediction.missing_ids),
    )
    assert ids(found) == [shop.item("car")]
    assert list(found.missing_ids) == [new.id]


def wait_for(
    ask: Callable[[], pb.Prediction], done: Callable[[pb.Prediction], bool]
) -> pb.Prediction:
    """What the predictor knows of the catalogue follows it by some milliseconds."""
    for _ in range(1_000):
        prediction = ask()
        if done(prediction):
            break
    return prediction


def test_a_model_without_a_history_falls_back(shop: Shop, active: str, unique: str) -> None:
    prediction = shop.predict(user_id=unique)
    assert prediction.fallback_reason == pb.FALLBACK_REASON_NO_HISTORY
    assert prediction.model_version == active
    assert sorted(ids(prediction)) == sorted(shop.items)


def test_a_model_ranks(shop: Shop, active: str, unique: str) -> None:
    shop.ingest(unique, "tea")
    prediction = shop.rank([*shop.items, shop.item("nobody")], user_id=unique)
    assert sorted(ids(prediction)) == sorted(shop.items)
    assert {item.method for item in prediction.items} == {pb.METHOD_MODEL}


# --- faults ---------------------------------------------------------------------------------------

EVENT = event_pb.Event(behavior_type="view", item_id="i")
QUERY_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "long user": ({"user_id": "u" * 129}, "TOO_LONG", "user_id"),
    "user with control characters": ({"user_id": "a\nb"}, "CONTROL_CHARACTERS", "user_id"),
    "k 0": ({"k": 0}, "BAD_K", "k"),
    "k 1001": ({"k": 1_001}, "BAD_K", "k"),
    "long history": ({"history": [EVENT] * 1_001}, "TOO_MANY", "history"),
    "history of somebody": (
        {"history": [event_pb.Event(user_id="u", behavior_type="view", item_id="i")]},
        "USER_ID_IN_HISTORY",
        "history[0].user_id",
    ),
    "history without type": (
        {"history": [EVENT, event_pb.Event(item_id="i")]},
        "EMPTY_ID",
        "history[1].behavior_type",
    ),
    "history without item or text": (
        {"history": [event_pb.Event(behavior_type="view")]},
        "EMPTY_TEXT",
        "history[0].text",
    ),
    "history before 1970": (
        {
            "history": [
                event_pb.Event(behavior_type="v", item_id="i", timestamp=Timestamp(seconds=-1))
            ]
        },
        "BAD_TIMESTAMP",
        "history[0].timestamp",
    ),
    "history in the future": (
        {
            "history": [
                event_pb.Event(
                    behavior_type="v", item_id="i", timestamp=Timestamp(seconds=4_000_000_000)
                )
            ]
        },
        "BAD_TIMESTAMP",
        "history[0].timestamp",
    ),
    "long allow list": ({"allow_item_ids": ["a"] * 10_001}, "TOO_MANY", "allow_item_ids"),
    "long deny list": ({"deny_item_ids": ["a"] * 10_001}, "TOO_MANY", "deny_item_ids"),
    "empty allowed id": ({"allow_item_ids": ["a", ""]}, "EMPTY_ID", "allow_item_ids[1]"),
    "long denied id": ({"deny_item_ids": ["a" * 129]}, "TOO_LONG", "deny_item_ids[0]"),
    "repeats": ({"repeats": 9}, "BAD_REPEATS", "repeats"),
}


@pytest.mark.parametrize("case", QUERY_FAULTS)
def test_bad_queries_are_refused(
    services: Services, refused: Refused, failed: Failed, case: str
) -> None:
    fields, reason, field = QUERY_FAULTS[case]
    query = pb.PredictionQuery(**fields)
    predictions = services.predictions
    refused(predictions.Predict, pb.PredictRequest(query=query), INVALID, reason, f"query.{field}")
    rank = pb.RankRequest(query=query, item_ids=["a"])
    refused(predictions.Rank, rank, INVALID, reason, f"query.{field}")
    many = predictions.PredictMany(pb.PredictManyRequest(queries=[query]), timeout=60)
    assert failed(many.failures) == {0: (INVALID, reason, f"queries[0].{field}")}
    assert list(many.predictions) == [pb.Prediction()]


@pytest.mark.parametrize(("number", "reason"), [(0, "EMPTY"), (257, "TOO_MANY")])
def test_too_few_or_many_queries_are_refused(
    services: Services, refused: Refused, number: int, reason: str
) -> None:
    request = pb.PredictManyRequest(queries=[pb.PredictionQuery()] * number)
    refused(services.predictions.PredictMany, request, INVALID, reason, "queries")


@pytest.mark.parametrize(
    ("item_ids", "reason", "field"),
    [
        ([], "EMPTY", "item_ids"),
        (["a"] * 1_001, "TOO_MANY", "item_ids"),
        (["a", ""], "EMPTY_ID", "item_ids[1]"),
        (["a" * 129], "TOO_LONG", "item_ids[0]"),
    ],
)
def test_bad_ranks_are_refused(
    services: Services, refused: Refused, item_ids: list[str], reason: str, field: str
) -> None:
    request = pb.RankRequest(item_ids=item_ids)
    refused(services.predictions.Rank, request, INVALID, reason, field)


def test_the_longest_query_is_answered(shop: Shop) -> None:
    history = [event_pb.Event(behavior_type="view", item_id=shop.item("tea"))] * 1_000
    many = [f"{number}" for number in range(9_998)]
    prediction = shop.predict(
        history=history,
        k=1_000,
        allow_item_ids=[*many, shop.item("car"), shop.item("soap")],
        deny_item_ids=[*many, shop.item("car")],
    )
    assert ids(prediction) == [shop.item("soap")]
    assert len(prediction.missing_ids) == len(many)


def test_the_largest_rank_is_answered(shop: Shop) -> None:
    prediction = shop.rank([*(f"{number}" for number in range(999)), shop.item("soap")])
    assert ids(prediction) == [shop.item("soap")]
    assert prediction.shortfall_reason == pb.SHORTFALL_REASON_UNSPECIFIED
