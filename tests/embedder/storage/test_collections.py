"""Collections against a plain model, through random operations and restarts."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedder.search.index import Filter
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from foretell.projection import Activation, AffineLayer, Projection
from foretell.terms import TermRows
from foretell.texts import text_id
from foretell.vectors import Vectors, to_block

COLS = 12


def a_projection(
    seed: int = 0, *, normalize: bool = False, terms: tuple[str, ...] = ()
) -> Projection:
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, COLS), (5, 6))]
    rows = rng.standard_normal((len(terms), 5)).astype(np.float32)
    idf = rng.uniform(1, 3, len(terms)).astype(np.float32)
    return Projection(
        (
            AffineLayer(weights[0], rng.standard_normal(6).astype(np.float32), Activation.TANH),
            AffineLayer(weights[1], np.zeros(5, np.float32)),
        ),
        normalize,
        TermRows(terms, idf, rows) if terms else None,
    )


def upsert(texts: dict[str, str], collection: str = "", request_id: str = "") -> Any:
    items = [pb.Item(id=id, text=text) for id, text in texts.items()]
    return pb.UpsertItemsRequest(collection=collection, items=items, request_id=request_id)


def derived(name: str, projection: Projection, source: str = "items") -> Any:
    return pb.CreateCollectionRequest(name=name, derived=projection.to_derived(source))


def put(collection: str, rows: dict[str, Vectors]) -> Any:
    return pb.PutVectorsRequest(
        collection=collection, ids=list(rows), vectors=to_block(np.array(list(rows.values())))
    )


class Model:
    """What should be there."""

    def __init__(self, vector_of: Callable[[str], Vectors]) -> None:
        self.vector_of = vector_of
        self.texts: dict[str, str] = {}
        self.given: dict[str, Vectors] = {}
        self.derived: dict[str, Projection] = {}
        self.residuals: dict[str, dict[str, Vectors]] = {}

    def vectors(self, name: str) -> dict[str, Vectors]:
        if name == "given":
            return self.given
        text = {
            id: self.vector_of(text) if text else np.zeros(COLS, np.float32)
            for id, text in self.texts.items()
        }
        if name == "items":
            return text
        return {
            id: self.derived[name].apply(
                row[None],
                [self.texts[id]],
                self.residuals[name].get(id, np.zeros(5, np.float32))[None],
            )[0]
            for id, row in text.items()
        }

    def agrees(self, collections: Any) -> None:
        """Vectors, items, counts and searches are what they should be."""
        names = {"items", "behaviors", "given", *self.derived}
        assert {each.name for each in collections.messages()} == names
        for name in names - {"behaviors"}:
            collection = collections.get(name)
            expected = self.vectors(name)
            found = collection.index.get(list(expected))
            assert found.keys() == expected.keys()
            assert len(collection.index) == len(expected)
            for id, row in expected.items():
                np.testing.assert_allclose(found[id], row, atol=1e-5)
            items = collections.items(collection, [*expected, "no such id"])
            assert items.keys() == expected.keys()
            if name != "given":
                assert {id: item.text for id, item in items.items()} == self.texts
            listed = [item.id for item in collections.items_after(collection, "")]
            assert listed == sorted(expected)
            query = np.ones((1, collection.row.cols), np.float32)
            (hits,) = collection.index.search(query, 5, [Filter()])
            best = sorted((-float(row.sum()), id) for id, row in expected.items())[:5]
            np.testing.assert_allclose(hits.scores, [-score for score, _ in best], atol=1e-4)


def state(collections: Any) -> dict[str, Any]:
    """Seqs of all that is there and of all that is gone, which a restart must not change."""
    found: dict[str, Any] = {"": collections.applied_seq}
    for collection in collections.all():
        ids, seqs = collection.index.changed_after(-1)
        changed = dict(zip(ids, seqs.tolist(), strict=True))
        found[collection.row.name] = (collection.seq, changed, dict(collection.tombstones))
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_random_operations_and_restarts(
    open_collections: Callable[[], Any], vector_of: Callable[[str], Vectors], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    opened = open_collections()
    model = Model(vector_of)
    ids = [f"id {i}" for i in range(30)]
    pool = ["", *(f"text {i}" for i in range(12))]
    await opened.collections.create(
        pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=5))
    )

    def some(count: int = 8) -> list[str]:
        return [str(id) for id in rng.choice(ids, rng.integers(1, count), replace=False)]

    def rows(names: list[str]) -> dict[str, Vectors]:
        return {name: rng.standard_normal(5).astype(np.float32) for name in names}

    async def upsert_items() -> None:
        texts = {id: str(rng.choice(pool)) for id in some()}
        response = await opened.writer.upsert_items(upsert(texts))
        assert response.upserted == len(texts)
        model.texts.update(texts)

    async def delete_items() -> None:
        gone = some()
        response = await opened.writer.delete_items(pb.DeleteItemsRequest(ids=gone))
        assert set(response.missing_ids) == {id for id in gone if id not in model.texts}
        for id in gone:
            model.texts.pop(id, None)
            for residuals in model.residuals.values():
                residuals.pop(id, None)

    async def create_derived() -> None:
        name = f"derived.{rng.integers(3)}"
        terms = ("text", "text 3", "3", "7")[: rng.integers(5)]
        projection = a_projection(
            int(rng.integers(100)), normalize=bool(rng.integers(2)), terms=terms
        )
        if name in model.derived:
            await opened.collections.delete(pb.DeleteCollectionRequest(name=name))
        await opened.collections.create(derived(name, projection))
        model.derived[name] = projection
        model.residuals[name] = {}

    async def put_residuals() -> None:
        if not model.derived:
            return
        name = str(rng.choice(sorted(model.derived)))
        new = rows(some())
        response = await opened.writer.put_vectors(put(name, new))
        known = {id: row for id, row in new.items() if id in model.texts}
        assert response.written == len(known)
        assert len(response.failures) == len(new) - len(known)
        model.residuals[name].update(known)

    async def put_given() -> None:
        new = rows(some())
        await opened.writer.put_vectors(put("given", new))
        model.given.update(new)

    async def delete_given() -> None:
        gone = some()
        await opened.writer.delete_items(pb.DeleteItemsRequest(collection="given", ids=gone))
        for id in gone:
            model.given.pop(id, None)

    async def snapshot() -> None:
        """Of some collections; the others are replayed from further back."""
        for collection in opened.collections.all():
            if rng.integers(2):
                seq = collection.seq
                opened.collections.snapshots.write(collection.row, seq, collection.index.frozen())

    steps = {
        upsert_items: 0.3,
        delete_items: 0.15,
        create_derived: 0.1,
        put_residuals: 0.2,
        put_given: 0.1,
        delete_given: 0.1,
        snapshot: 0.05,
    }
    for number in range(80):
        await list(steps)[rng.choice(len(steps), p=list(steps.values()))]()
        if number % 10 == 9:
            model.agrees(opened.collections)
            before = state(opened.collections)
            opened.close()
            opened = open_collections()
            assert state(opened.collections) == before
        model.agrees(opened.collections)


async def test_concurrent_writes_leave_memory_and_store_equal(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    collections = opened.collections
    terms = ("text", *(f"{number}" for number in range(10)), *(f"text {i}" for i in range(4)))
    projection = a_projection(terms=terms)
    await collections.create(derived("d", projection))

    async def creations() -> None:
        """Filled while other writes share their commits."""
        for number in range(5):
            await collections.create(derived(f"late.{number}", projection))

    async def upserts(worker: int) -> None:
        for round in range(10):
            await opened.writer.upsert_items(
                upsert({f"id {i}": f"text {worker} {round} {i}" for i in range(worker, 10)})
            )

    async def deletes() -> None:
        for _ in range(20):
            await opened.writer.delete_items(pb.DeleteItemsRequest(ids=["id 7", "id 8", "id 9"]))

    async def residuals(value: float) -> None:
        for _ in range(10):
            row = np.full(5, value, np.float32)
            await opened.writer.put_vectors(put("d", {f"id {i}": row for i in range(10)}))

    writes = (deletes(), residuals(1), residuals(2), creations())
    await asyncio.gather(*(upserts(i) for i in range(4)), *writes)
    ids = [f"id {i}" for i in range(10)]
    names = ["items", "d", *(f"late.{number}" for number in range(5))]
    before = [collections.get(name).index.get(ids) for name in names]
    opened.close()
    reopened = open_collections().collections
    for name, rows in zip(names, before, strict=True):
        after = reopened.get(name).index.get(ids)
        assert after.keys() == rows.keys()
        for id, row in rows.items():
            np.testing.assert_allclose(after[id], row, atol=1e-5)


async def test_a_known_text_is_not_encoded_again_even_after_a_restart(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    first = await opened.writer.upsert_items(upsert({"a": "same", "b": "same", "c": "other"}))
    assert first.encoded == 2
    opened.close()
    opened = open_collections()
    again = await opened.writer.upsert_items(upsert({"d": "same", "a": "other"}))
    assert again.encoded == 0
    behaviors = await opened.writer.upsert_items(
        pb.UpsertItemsRequest(collection="behaviors", items=[pb.Item(text="same")])
    )
    assert behaviors.encoded == 0
    assert opened.collections.get("behaviors").index.known([text_id("same")]) == [True]
    assert opened.backend.batches == []


async def test_a_text_that_was_encoded_twice_has_one_vector(
    open_collections: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first vector had left the memory and was not in the store yet."""
    opened = open_collections()
    monkeypatch.setattr(opened.writer._texts, "_max_rows", 0)
    encode, free = opened.backend.encode, threading.Event()

    def inexact(batch: Any) -> Vectors:
        vectors: Vectors = encode(batch) + np.float32(len(opened.backend.batches) / 1_000)
        if len(opened.backend.batches) == 2:
            free.set()
        return vectors

    monkeypatch.setattr(opened.backend, "encode", inexact)
    opened.store.database.submit(lambda connection: free.wait(30))
    first = asyncio.ensure_future(opened.writer.upsert_items(upsert({"a": "same"})))
    while not opened.backend.batches or opened.writer._texts._in_flight:
        await asyncio.sleep(0.001)
    second = asyncio.ensure_future(opened.writer.upsert_items(upsert({"b": "same"})))
    assert [(await one).encoded for one in (first, second)] == [1, 1]
    found = opened.collections.get("items").index.get(["a", "b"])
    np.testing.assert_array_equal(found["a"], found["b"])
    opened.close()
    again = open_collections().collections.get("items").index.get(["a", "b"])
    np.testing.assert_array_equal(again["b"], found["b"])


async def test_a_text_that_no_item_has_leaves_the_store(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    collections = opened.collections

    def texts() -> int:
        connection = opened.store.database.connection()
        return int(connection.execute("SELECT COUNT(*) FROM texts").fetchone()[0])

    await opened.writer.upsert_items(upsert({"a": "one", "b": "one", "c": "two"}))
    assert texts() == 2
    await opened.writer.delete_items(pb.DeleteItemsRequest(ids=["a"]))
    assert texts() == 2
    await opened.writer.upsert_items(upsert({"b": "three"}))
    assert texts() == 2
    await collections.create(pb.CreateCollectionRequest(name="other", text=pb.TextCollection()))
    await opened.writer.upsert_items(upsert({"x": "four", "y": "three"}, "other"))
    assert texts() == 3
    await collections.delete(pb.DeleteCollectionRequest(name="other"))
    assert texts() == 2
    await opened.writer.delete_items(pb.DeleteItemsRequest(ids=["b", "c"]))
    assert texts() == 0


async def test_of_items_with_one_id_the_last_stands(
    open_collections: Callable[[], Any], vector_of: Callable[[str], Vectors]
) -> None:
    opened = open_collections()
    collections = opened.collections
    request = pb.UpsertItemsRequest(
        items=[pb.Item(id="a", text="first"), pb.Item(id="a", text="last")]
    )
    response = await opened.writer.upsert_items(request)
    assert response.upserted == 1
    np.testing.assert_allclose(collections.get("items").index.get(["a"])["a"], vector_of("last"))


async def test_a_faulty_item_does_not_harm_the_others(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    collections = opened.collections
    items = [pb.Item(id="a", text="a"), pb.Item(text="b"), pb.Item(id="c", text="x" * 20_001)]
    response = await opened.writer.upsert_items(pb.UpsertItemsRequest(items=items))
    assert response.upserted == 1
    assert [failure.index for failure in response.failures] == [1, 2]
    assert len(collections.get("items").index) == 1


async def test_a_repeated_request_gives_the_first_answer(
    open_collections: Callable[[], Any], vector_of: Callable[[str], Vectors]
) -> None:
    opened = open_collections()
    request = upsert({"a": "first"}, request_id="r")
    first = await opened.writer.upsert_items(request)
    await opened.writer.upsert_items(upsert({"a": "second"}))
    opened.close()
    opened = open_collections()
    collections = opened.collections
    again = await opened.writer.upsert_items(request)
    assert again == first
    row = collections.get("items").index.get(["a"])["a"]
    np.testing.assert_allclose(row, vector_of("second"))
    with pytest.raises(InvalidArgumentError):
        await opened.writer.upsert_items(upsert({"a": "other"}, request_id="r"))


async def test_a_repeated_create_and_delete_give_the_first_answer(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    collections = opened.collections
    create = derived("d", a_projection())
    create.request_id = "create"
    delete = pb.DeleteCollectionRequest(name="d", request_id="delete")
    assert await collections.create(create) == await collections.create(create)
    await collections.delete(delete)
    await collections.delete(delete)
    with pytest.raises(NotFoundError):
        collections.get("d")


async def test_attributes_may_change_alone(open_collections: Callable[[], Any]) -> None:
    opened = open_collections()
    collections = opened.collections
    item = pb.Item(id="a", text="text", attributes={"colour": "red"})
    await opened.writer.upsert_items(pb.UpsertItemsRequest(items=[item]))
    changes = collections.get("items").index.changed_after(0)
    item.attributes["colour"] = "blue"
    response = await opened.writer.upsert_items(pb.UpsertItemsRequest(items=[item]))
    assert response.upserted == 1
    found = collections.items(collections.get("items"), ["a"])["a"]
    assert found.attributes == {"colour": "blue"}
    # Whoever follows the vectors is told nothing.
    after = collections.get("items").index.changed_after(0)
    assert (changes[0], changes[1].tolist()) == (after[0], after[1].tolist())


async def test_a_source_and_what_is_derived_from_it_share_a_commit(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    free = threading.Event()
    opened.store.database.submit(lambda connection: free.wait(30))  # so that the others wait
    creations = [
        opened.collections.create(pb.CreateCollectionRequest(name="t", text=pb.TextCollection())),
        opened.collections.create(derived("d", a_projection(), "t")),
        opened.collections.delete(pb.DeleteCollectionRequest(name="d")),
        opened.collections.create(derived("d", a_projection(1), "t")),
    ]
    waiting = [asyncio.ensure_future(each) for each in creations]
    await asyncio.sleep(0)
    free.set()
    *_, last = await asyncio.wait_for(asyncio.gather(*waiting), 30)
    assert last.collection == opened.collections.get("d").message()
    assert last.collection.source == "t"
    await opened.writer.upsert_items(upsert({"a": "text"}, "t"))
    assert opened.collections.get("d").index.known(["a"]) == [True]


async def test_what_may_not_be_created_or_deleted(open_collections: Callable[[], Any]) -> None:
    opened = open_collections()
    collections = opened.collections
    await collections.create(derived("d", a_projection()))
    await collections.create(
        pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=COLS))
    )
    with pytest.raises(AlreadyExistsError):
        await collections.create(derived("d", a_projection()))
    with pytest.raises(AlreadyExistsError):
        await collections.create(pb.CreateCollectionRequest(name="items", text=pb.TextCollection()))
    for source in ("d", "given"):
        with pytest.raises(InvalidArgumentError) as raised:
            await collections.create(derived("dd", a_projection(), source))
        assert (raised.value.reason, raised.value.field) == ("WRONG_KIND", "derived.source")
    for source in ("none", ""):
        with pytest.raises(NotFoundError):
            await collections.create(derived("dd", a_projection(), source))
    with pytest.raises(InvalidArgumentError) as raised:
        await collections.create(pb.CreateCollectionRequest(name="x"))
    assert raised.value.reason == "NO_KIND"
    for name in ("items", "behaviors"):
        with pytest.raises(FailedPreconditionError):
            await collections.delete(pb.DeleteCollectionRequest(name=name))
    await collections.create(pb.CreateCollectionRequest(name="t", text=pb.TextCollection()))
    await collections.create(derived("t.d", a_projection(), "t"))
    with pytest.raises(FailedPreconditionError) as refused:
        await collections.delete(pb.DeleteCollectionRequest(name="t"))
    assert refused.value.reason == "HAS_DERIVED"
    await collections.delete(pb.DeleteCollectionRequest(name="t.d"))
    await collections.delete(pb.DeleteCollectionRequest(name="t"))
    with pytest.raises(NotFoundError):
        await collections.delete(pb.DeleteCollectionRequest(name="t"))


async def test_a_collection_deleted_while_its_texts_are_encoded_is_not_found(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="t", text=pb.TextCollection())
    await opened.collections.create(create)
    loop = asyncio.get_running_loop()

    def replace(texts: list[str]) -> None:
        async def run() -> None:
            await opened.collections.delete(pb.DeleteCollectionRequest(name="t"))
            await opened.collections.create(create)

        asyncio.run_coroutine_threadsafe(run(), loop).result(30)

    opened.backend.before = replace
    with pytest.raises(NotFoundError):
        await opened.writer.upsert_items(upsert({"a": "text"}, "t"))
    assert len(opened.collections.get("t").index) == 0
