"""The index against a matrix product over everything."""

import threading

import numpy as np
import pytest

from embedder.search import index as index_module
from embedder.search.index import Filter, Hits, VectorIndex
from foretell.vectors import Vectors

COLS = 8


class Model:
    """What the index promises, as plainly as possible."""

    def __init__(self) -> None:
        self.rows: dict[str, Vectors] = {}

    def search(self, query: Vectors, k: int, one: Filter) -> tuple[list[str], list[float]]:
        allowed = self.rows if one.allow is None else [i for i in self.rows if i in one.allow]
        scored = [
            (-float(np.einsum("j,j->", self.rows[id], query)), id)
            for id in allowed
            if id not in one.deny
        ]
        best = sorted(scored)[:k]
        return [id for _, id in best], [-score for score, _ in best]

    def agrees(self, found: Hits, query: Vectors, k: int, one: Filter) -> None:
        ids, scores = self.search(query, k, one)
        np.testing.assert_allclose(found.scores, np.array(scores, np.float32), atol=1e-5)
        assert len(found.ids) == len(ids)
        for position, (mine, theirs) in enumerate(zip(found.ids, ids, strict=True)):
            # Scores that differ in the last bits may change places.
            if mine != theirs:
                other = float(np.einsum("j,j->", self.rows[mine], query))
                assert abs(other - scores[position]) < 1e-5


def fill(index: VectorIndex, model: Model, ids: list[str], vectors: Vectors, seq: int = 1) -> None:
    index.put(ids, vectors, seq)
    model.rows.update(zip(ids, vectors, strict=True))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_rows(rng: np.random.Generator, count: int, *, different: int = 10_000) -> Vectors:
    """Rows of which many may be equal."""
    pool = rng.standard_normal((different, COLS)).astype(np.float32)
    return pool[rng.integers(0, different, count)]


@pytest.mark.parametrize("different", [10_000, 20], ids=["distinct", "many equal"])
def test_random_operations_agree_with_the_model(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, different: int
) -> None:
    monkeypatch.setattr(index_module, "DEAD_LEAST", 16)  # so that it is built anew now and then
    index, model = VectorIndex(COLS), Model()
    names = [f"id {i}" for i in range(400)]
    for step in range(60):
        some = [str(name) for name in rng.choice(names, rng.integers(1, 40), replace=False)]
        if rng.random() < 0.6:
            fill(index, model, some, random_rows(rng, len(some), different=different), step)
        else:
            index.remove(some)
            for name in some:
                model.rows.pop(name, None)
        assert len(index) == len(model.rows)
        while rng.random() < 0.5 and index.maintain():
            pass
        queries = random_rows(rng, 5)
        filters = [
            Filter(),
            Filter(deny=frozenset(rng.choice(names, 30))),
            Filter(allow=tuple(rng.choice(names, 30))),
            Filter(allow=tuple(rng.choice(names, 30)), deny=frozenset(rng.choice(names, 200))),
            Filter(deny=frozenset(names)),
        ]
        k = int(rng.integers(1, 50))
        hits = index.search(queries, k, filters, include_vectors=True)
        for found, query, one in zip(hits, queries, filters, strict=True):
            model.agrees(found, query, k, one)
            assert found.vectors is not None
            for id, vector in zip(found.ids, found.vectors, strict=True):
                assert np.array_equal(vector, model.rows[id])


@pytest.mark.parametrize("cols", [8, 384])
def test_equal_vectors_come_in_the_order_of_their_ids_whatever_their_number(cols: int) -> None:
    """A matrix product gives equal rows different last bits, by their place in the matrix."""
    index = VectorIndex(cols)
    ids = [f"{i:05}" for i in range(3_003)]
    shuffled = [str(id) for id in np.random.default_rng(1).permutation(ids)]
    row = np.random.default_rng(2).standard_normal(cols).astype(np.float32)
    index.put(shuffled, np.tile(row, (len(ids), 1)), 1)
    for queries in (1, 25):  # faiss computes few and many queries differently
        for found in index.search(np.tile(row, (queries, 1)), 7):
            assert found.ids == ids[:7]


def test_an_empty_index_has_no_hits() -> None:
    index = VectorIndex(COLS)
    index.remove(["nothing"])
    index.put([], np.empty((0, COLS), np.float32), 1)
    (found,) = index.search(np.ones((1, COLS), np.float32), 5, include_vectors=True)
    assert found.ids == []
    assert found.vectors is not None
    assert found.vectors.shape == (0, COLS)
    assert index.get(["a"]) == {}
    assert index.changed_after(0)[0] == []


def test_k_may_exceed_what_there_is(rng: np.random.Generator) -> None:
    index, model = VectorIndex(COLS), Model()
    fill(index, model, ["a", "b"], random_rows(rng, 2))
    query = random_rows(rng, 1)
    (found,) = index.search(query, 1_000)
    model.agrees(found, query[0], 1_000, Filter())
    assert len(found.ids) == 2


def test_numbers_that_overflow_do_not_break_it() -> None:
    index = VectorIndex(COLS)
    huge = np.full((3, COLS), 3e38, np.float32)
    huge[1] *= -1
    huge[2, ::2] *= -1
    index.put(["a", "b", "c"], huge, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        (found,) = index.search(np.full((1, COLS), 3e38, np.float32), 3)
    assert found.ids[0] == "a"


def test_get_gives_copies(rng: np.random.Generator) -> None:
    index, model = VectorIndex(COLS), Model()
    fill(index, model, ["a", "b"], random_rows(rng, 2))
    before = index.get(["b", "none"])
    index.put([f"more {i}" for i in range(10_000)], random_rows(rng, 10_000), 2)
    assert list(before) == ["b"]
    assert np.array_equal(before["b"], model.rows["b"])


def test_changes_come_in_the_order_of_their_seq(rng: np.random.Generator) -> None:
    index = VectorIndex(COLS)
    index.put(["a", "b", "c"], random_rows(rng, 3), 3)
    index.put(["d"], random_rows(rng, 1), 4)
    index.put(["a"], random_rows(rng, 1), 5)
    index.put(["e", "f"], random_rows(rng, 2), np.array([2, 6]))
    index.remove(["c"])
    ids, seqs = index.changed_after(0)
    assert list(zip(ids, seqs.tolist(), strict=True)) == [
        ("e", 2),
        ("b", 3),
        ("d", 4),
        ("a", 5),
        ("f", 6),
    ]
    assert index.changed_after(4)[0] == ["a", "f"]


def test_dead_slots_are_dropped(rng: np.random.Generator) -> None:
    index, model = VectorIndex(COLS), Model()
    ids = [str(i) for i in range(2_000)]
    for seq in range(4):
        fill(index, model, ids, random_rows(rng, 2_000), seq)
        while index.maintain():
            pass
    assert len(index.frozen().ids) == 2_000
    query = random_rows(rng, 1)
    model.agrees(index.search(query, 20)[0], query[0], 20, Filter())
    total = sum(len(some) for some, _, _ in index.chunks(300))
    assert total == 2_000


def test_searches_beside_changes_see_whole_states(rng: np.random.Generator) -> None:
    """Every search sees each batch of 50 equal vectors entirely or not at all."""
    index = VectorIndex(COLS)
    stop = threading.Event()
    faults: list[str] = []

    def search() -> None:
        query = np.ones((1, COLS), np.float32)
        while not stop.is_set():
            (found,) = index.search(query, 50, include_vectors=True)
            assert found.vectors is not None
            if len(found.ids) not in (0, 50) or len(set(found.scores.tolist())) > 1:
                faults.append(f"{len(found.ids)} {set(found.scores.tolist())}")

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    ids = [str(i) for i in range(50)]
    for seq in range(200):
        index.put(ids, np.full((50, COLS), float(seq), np.float32), seq)
        if seq % 10 == 9:
            index.remove(ids)
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
