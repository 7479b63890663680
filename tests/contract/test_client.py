"""The Python client with the fake and with the real services: one story from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest

import foretell

if TYPE_CHECKING:
    from tests.contract.conftest import Services

START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def client(services: Services) -> Iterator[foretell.Client]:
    with foretell.Client(services.embedder_address, services.predictor_address) as found:
        yield found


def test_items_and_searches(client: foretell.Client, unique: str) -> None:
    client.create_text_collection(unique)
    items = [
        foretell.Item("t", "green tea with mint", {"brand": "x"}),
        foretell.Item("c", "a blue sports car"),
        foretell.Item("", "nameless"),
    ]
    written = client.upsert_items(items, collection=unique)
    assert written.upserted == 2
    assert [(each.index, type(each.error)) for each in written.failures] == [
        (2, foretell.InvalidArgumentError)
    ]
    assert written.failures[0].error.field == "items[2].id"
    found = client.get_items(["c", "t", "none"], collection=unique, include_vectors=True)
    assert found.items == (items[1], items[0])
    assert found.missing_ids == ("none",)
    assert found.vectors is not None
    result = client.search(
        texts=["mint tea"], collection=unique, k=1, filters=foretell.Filter(deny_ids=["c"])
    )
    assert result.hits[0].ids == ("t",)
    brand = foretell.attribute("brand")
    for where, ids in ((brand == "x", ("t",)), (brand != "x", ("c",))):
        found_ids = client.search(texts=["mint tea"], collection=unique, where=where).hits[0].ids
        assert found_ids == ids
    query = client.embed(["mint tea"]).vectors
    np.testing.assert_allclose(result.hits[0].scores, found.vectors[1] @ query[0], atol=2e-3)
    assert client.delete_items(["t"], collection=unique).deleted == 1
    assert [item.id for item in client.list_items(collection=unique).elements] == ["c"]


def test_collections(client: foretell.Client, unique: str) -> None:
    client.create_text_collection(unique)
    layer = foretell.AffineLayer(np.eye(2, 384, dtype=np.float32), np.ones(2, np.float32))
    name = f"{unique}.derived"
    made = client.create_derived_collection(name, unique, foretell.Projection((layer,)))
    assert (made.kind, made.source, made.cols) == (foretell.CollectionKind.DERIVED, unique, 2)
    client.upsert_items([foretell.Item("empty")], collection=unique)
    client.put_vectors(name, ["empty"], [[1.0, 2.0]])
    changes = next(iter(client.watch_items(collection=name)))
    assert (changes.ids, changes.vectors.tolist()) == (("empty",), [[2.0, 3.0]])
    assert changes.caught_up
    with pytest.raises(foretell.AlreadyExistsError):
        client.create_vector_collection(unique, 3)
    with pytest.raises(foretell.FailedPreconditionError) as caught:
        client.delete_collection(unique)
    assert caught.value.reason == "HAS_DERIVED"
    for each in (name, unique):
        client.delete_collection(each)
    with pytest.raises(foretell.NotFoundError):
        client.list_items(collection=unique)


def test_events_and_predictions(client: foretell.Client, unique: str) -> None:
    names = ("tea", "coffee", "car")
    ids = [f"{unique}-{name}" for name in names]
    client.upsert_items(foretell.Item(item, name) for item, name in zip(ids, names, strict=True))
    events = [
        foretell.Event(unique, "buy", START + timedelta(hours=at), item_id=item)
        for at, item in enumerate([*ids[:2], ids[0]])
    ]
    assert client.ingest_events(events).accepted == 3
    assert client.list_events(unique).elements == tuple(reversed(events))
    inline = foretell.Event("", "view", item_id=ids[2])
    prediction = client.predict(unique, history=[inline], k=2, allow_item_ids=ids)
    assert len(prediction.items) == 2
    assert prediction.history_events == 4
    assert sum(each.probability for each in prediction.behavior_types) == pytest.approx(1)
    many = client.predict_many(
        [foretell.PredictionQuery(unique, k=1, allow_item_ids=ids), foretell.PredictionQuery(k=0)]
    )
    assert len(many.predictions[0].items) == 1
    assert [each.index for each in many.failures] == [1]
    ranked = client.rank(unique, ids, repeats=foretell.Repeats.EXCLUDED)
    assert [item.item_id for item in ranked.items] == [ids[2]]
    assert ranked.shortfall_reason is foretell.ShortfallReason.FILTERED
    assert client.delete_user(unique).deleted_events == 3
    assert client.list_events(unique).elements == ()
    client.delete_items(ids)


def test_models(services: Services, client: foretell.Client, unique: str) -> None:
    with pytest.raises(foretell.NotFoundError):
        client.activate_model(unique)
    services.register_model(unique, ["buy", "view"])
    assert client.list_models(page_size=1).elements[0].version == unique
    activated = client.activate_model(unique)
    assert activated.model.version == unique
    assert activated.model.active
    assert client.predictor_info().model_version == unique
    with pytest.raises(foretell.FailedPreconditionError):
        client.delete_model(unique)


async def test_the_async_client(services: Services, unique: str) -> None:
    async with foretell.AsyncClient(
        services.embedder_address, services.predictor_address
    ) as client:
        await client.create_vector_collection(unique, 2)
        await client.put_vectors(unique, ["a", "b"], [[1.0, 0.0], [0.0, 1.0]])
        result = await client.search(vectors=[[0.0, 2.0]], collection=unique, k=1)
        assert (result.hits[0].ids, result.hits[0].scores.tolist()) == (("b",), [2.0])
        async for changes in client.watch_items(collection=unique):
            assert set(changes.ids) == {"a", "b"}
            break
        ingested = await client.ingest_events([foretell.Event(unique, "view", text="tea")])
        assert ingested.accepted == 1
        assert (await client.predict(unique)).history_events == 1
        with pytest.raises(foretell.InvalidArgumentError) as caught:
            await client.predict(unique, k=1_001)
        assert (caught.value.reason, caught.value.field) == ("BAD_K", "query.k")
