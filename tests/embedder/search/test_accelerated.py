"""The index with an accelerator, which is built, extended and compacted beside searches."""

import threading
import weakref
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embedder.search import accelerators, building, searcher
from embedder.search import index as index_module
from embedder.search.accelerators import Accelerator
from embedder.search.building import Asked, Build
from embedder.search.index import Filter, Frozen, IndexOptions, VectorIndex
from embedder.search.searcher import Searcher
from embedder.search.slots import Slots, SlotTable
from embedder.settings import IndexKind
from foretell.vectors import Vectors

COLS = 8

IVF = IndexOptions(IndexKind.IVF)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerators of some vectors already, and small steps."""
    make_small(monkeypatch)


def make_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accelerators, "LEAST", 64)
    patch.setattr(index_module, "LEAST", 64)
    patch.setattr(index_module, "DEAD_LEAST", 32)
    patch.setattr(index_module, "TAIL_LEAST", 16)
    patch.setattr(searcher, "SELECTED_LEAST", 8)
    patch.setattr(building, "TESTED", 16)
    patch.setattr(building, "ADDED_TOGETHER", 32)


def clustered(count: int, cols: int = 64, seed: int = 0) -> Vectors:
    centres = np.random.default_rng(0).standard_normal((200, cols))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 200, count)] + 0.7 * rng.standard_normal((count, cols))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def filled(rows: Vectors, options: IndexOptions = IVF) -> VectorIndex:
    """An index of all rows, their numbers being the ids, maintained."""
    index = VectorIndex(rows.shape[1], options)
    index.put([str(row) for row in range(len(rows))], rows, 1)
    maintain(index)
    return index


def maintain(index: VectorIndex) -> None:
    while index.maintain():
        pass


class AgreesWithADictionary(RuleBasedStateMachine):
    """The accelerator is asked for more hits than there are slots, so that answers are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        make_small(self.patch)
        self.patch.setattr(searcher, "SPARE_HITS", 2_048)
        self.patch.setattr(accelerators, "PROBES", 1_000)
        self.index = VectorIndex(COLS, IVF)
        self.rows: dict[str, Vectors] = {}
        self.seqs: dict[str, int] = {}
        self.seq = 0
        self.rng = np.random.default_rng(0)
        self.put(0, 120)

    def teardown(self) -> None:
        self.patch.undo()

    @rule(first=st.integers(0, 400), count=st.integers(1, 150))
    def put(self, first: int, count: int) -> None:
        ids = [f"id {number}" for number in range(first, first + count)]
        rows = self.rng.integers(-3, 4, (count, COLS)).astype(np.float32)  # many are equal
        self.seq += 1
        self.index.put(ids, rows, self.seq)
        self.rows.update(zip(ids, rows, strict=True))
        self.seqs.update(dict.fromkeys(ids, self.seq))

    @rule(first=st.integers(0, 400), count=st.integers(1, 80))
    def remove(self, first: int, count: int) -> None:
        ids = [f"id {number}" for number in range(first, first + count)]
        self.seq += 1
        self.index.remove(ids)
        for id in ids:
            self.rows.pop(id, None)
            self.seqs.pop(id, None)

    @rule(steps=st.integers(1, 6))
    def maintain(self, steps: int) -> None:
        for _ in range(steps):
            self.index.maintain()

    @rule()
    def restart(self) -> None:
        frozen = self.index.frozen()
        self.index = VectorIndex.restored(COLS, IVF, frozen)

    @rule(
        k=st.integers(1, 30),
        queries=st.integers(1, 5),
        allow=st.none() | st.tuples(st.integers(0, 400), st.integers(1, 300)),
        deny=st.tuples(st.integers(0, 400), st.integers(0, 100)),
        most_denied=st.sampled_from([10, 1_000]),
    )
    def search(
        self,
        k: int,
        queries: int,
        allow: tuple[int, int] | None,
        deny: tuple[int, int],
        most_denied: int,
    ) -> None:
        self.patch.setattr(searcher, "MOST_DENIED", most_denied)
        allowed = None if allow is None else {f"id {allow[0] + i}" for i in range(allow[1])}
        one = Filter(allowed, frozenset(f"id {deny[0] + i}" for i in range(deny[1])))
        block = self.rng.integers(-3, 4, (queries, COLS)).astype(np.float32)
        mixed = [Filter() if row % 2 else one for row in range(queries)]
        found = self.index.search(block, k, mixed, include_vectors=True)
        for query, which, hits in zip(block, mixed, found, strict=True):
            passing = [
                id
                for id in self.rows
                if (which.allow is None or id in which.allow) and id not in which.deny
            ]
            # Whole numbers: scores are exact, ties go by id.
            best = sorted((-float(self.rows[id] @ query), id) for id in passing)[:k]
            assert hits.ids == [id for _, id in best]
            assert hits.scores.tolist() == [-score for score, _ in best]
            assert hits.vectors is not None
            for id, vector in zip(hits.ids, hits.vectors, strict=True):
                assert np.array_equal(vector, self.rows[id])

    @invariant()
    def holds_what_was_put(self) -> None:
        assert len(self.index) == len(self.rows)
        ids, seqs = self.index.changed_after(-1)
        assert dict(zip(ids, seqs.tolist(), strict=True)) == self.seqs
        assert self.index.covered <= len(self.index.frozen().ids)


TestAgreesWithADictionary = AgreesWithADictionary.TestCase
TestAgreesWithADictionary.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None
)


def test_most_of_the_nearest_are_found() -> None:
    rows = clustered(12_000)
    queries = clustered(300, seed=1)
    index = filled(rows[:10_000])
    assert (index.name, index.covered) == ("ivf_rabitq", 10_000)
    index.put([str(row) for row in range(10_000, 12_000)], rows[10_000:], 2)
    exactly = filled(rows, IndexOptions(IndexKind.EXACT))
    truth = exactly.search(queries, 10)
    for _ in range(2):  # with a tail, then extended
        found = index.search(queries, 10)
        same = [len({*a.ids} & {*b.ids}) for a, b in zip(found, truth, strict=True)]
        assert sum(same) / 3_000 >= 0.97
        maintain(index)
    assert index.covered > 11_000
    assert index.recall is not None
    assert index.recall >= 0.98
    assert (exactly.name, exactly.covered, exactly.recall) == ("exact", 0, 1.0)


def test_it_is_tuned_to_what_is_asked() -> None:
    """Far from all clusters: for such queries an index looks into too few lists at first."""
    rows = clustered(10_000)
    index = filled(rows)
    exactly = filled(rows, IndexOptions(IndexKind.EXACT))
    asked = np.random.default_rng(1).standard_normal((600, 64)).astype(np.float32)
    truth = exactly.search(asked[:300], 10)

    def recall() -> float:
        found = index.search(asked[:300], 10)
        same = [len({*a.ids} & {*b.ids}) for a, b in zip(found, truth, strict=True)]
        return sum(same) / 3_000

    before = recall()
    for start in range(300, 600, 4):
        index.search(asked[start : start + 4], 10)
    assert index.maintain()
    assert not index.maintain()
    assert index.recall is not None
    assert index.recall > before + 0.05
    assert abs(recall() - index.recall) < 0.02
    assert recall() >= 0.96


@pytest.mark.usefixtures("small")
def test_k_come_back_where_k_match() -> None:
    """Those that match lie where an accelerator does not look."""
    rng = np.random.default_rng(0)
    near, far = np.ones(COLS), -np.ones(COLS)
    rows = np.concatenate([near + 0.1 * rng.standard_normal((1_000, COLS)),
                           far + 0.1 * rng.standard_normal((60, COLS))])  # fmt: skip
    index = filled(np.asarray(rows, np.float32))
    assert index.name == "ivf_rabitq"
    query = np.asarray(near[None], np.float32)
    others = [str(row) for row in range(1_000, 1_060)]
    for one in (Filter(allow=others), Filter(deny=frozenset(map(str, range(1_000))))):
        (hits,) = index.search(query, 50, [one])
        assert len(hits.ids) == 50
        assert {*hits.ids} <= {*others}
    index.remove([str(row) for row in range(1_000)])
    (hits,) = index.search(query, 50)
    assert {*hits.ids} <= {*others}
    assert len(hits.ids) == 50


@pytest.mark.usefixtures("small")
def test_how_a_collection_is_searched_follows_its_size() -> None:
    index = VectorIndex(COLS, IndexOptions(approximate_from=500))
    rows = np.random.default_rng(0).standard_normal((3_000, COLS)).astype(np.float32)
    names, lists = [], []
    for end in (100, 600, 3_000):
        index.put([str(row) for row in range(end)], rows[:end], end)
        maintain(index)
        names.append(index.name)
        accelerator = index.frozen().accelerator
        lists.append(0 if accelerator is None else accelerator._index.nlist)
    for left in (400, 200):
        index.remove([str(row) for row in range(left, 3_000)])
        maintain(index)
        names.append(index.name)
    assert names == ["exact", *["ivf_rabitq"] * 3, "exact"]
    assert lists[1] < lists[2]
    assert index.frozen().ids == [str(row) for row in range(200)]


@pytest.mark.usefixtures("small")
def test_what_was_frozen_stays_and_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((700, COLS)).astype(np.float32)
    index = filled(rows[:500])
    index.put([str(row) for row in range(500, 510)], rows[500:510], 2)
    index.remove(["3"])
    frozen = index.frozen()
    assert frozen.accelerator is not None
    with (tmp_path / "accelerator").open("wb") as file:
        frozen.accelerator.write(file.write)
    before = index.search(rows[:20], 5)
    index.put([str(row) for row in range(700)], rows[::-1], 3)
    maintain(index)

    assert len(frozen.ids) == 510
    assert frozen.seqs[3] == -1
    np.testing.assert_array_equal(frozen.rows, rows[:510])
    accelerator = Accelerator.read(tmp_path / "accelerator", frozen.accelerator.kind)
    restored = VectorIndex.restored(
        COLS, IVF, Frozen(frozen.ids, frozen.seqs, frozen.rows, accelerator)
    )
    assert restored.covered == 500
    accelerator.effort = frozen.accelerator.effort
    for mine, theirs in zip(restored.search(rows[:20], 5), before, strict=True):
        assert mine.ids == theirs.ids
    assert restored.recall is None
    assert restored.maintain()
    assert restored.recall is not None
    restored.put(["new"], rows[510:511], 4)
    restored.remove(["5"])
    assert len(restored) == 509
    assert (len(frozen.ids), frozen.seqs[5]) == (510, 1)


@pytest.mark.usefixtures("small")
def test_nothing_is_lost_beside_rebuilding() -> None:
    """A thread writes, one maintains, two search; a vector's first number is its version."""
    index = VectorIndex(COLS, IVF)
    base = np.random.default_rng(0).standard_normal((300, COLS)).astype(np.float32)
    base[:, 0] = 0
    index.put([f"always {row}" for row in range(300)], base, 1)
    present: dict[str, int] = {}
    stop = threading.Event()
    faults: list[str] = []
    built: list[Accelerator | None] = []

    def keep_up() -> None:
        while not stop.is_set():
            index.maintain()
            accelerator = index.frozen().accelerator
            if not built or built[-1] is not accelerator:
                built.append(accelerator)

    def search() -> None:
        queries = np.random.default_rng(1).standard_normal((8, COLS)).astype(np.float32)
        while not stop.is_set():
            for hits in index.search(queries, 20, include_vectors=True):
                assert hits.vectors is not None
                if len(hits.ids) != 20 or len({*hits.ids}) != 20:
                    faults.append(f"{len({*hits.ids})} different of {len(hits.ids)} hits")

    threads = [threading.Thread(target=run) for run in (keep_up, search, search)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(2)
    try:
        for version in range(2, 250):
            ids = [f"id {number}" for number in rng.choice(500, 60, replace=False)]
            if version % 4 == 3:
                index.remove(ids)
                for id in ids:
                    present.pop(id, None)
            else:
                rows = rng.standard_normal((60, COLS)).astype(np.float32)
                rows[:, 0] = version
                index.put(ids, rows, version)
                present.update(dict.fromkeys(ids, version))
                found = {id: int(row[0]) for id, row in index.get(ids).items()}
                if found != dict.fromkeys(ids, version):
                    faults.append(f"version {version} is not there after it was put")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    maintain(index)
    assert len(built) > 2
    assert {id: int(row[0]) for id, row in index.get([*present]).items()} == present
    assert len(index) == 300 + len(present)
    changed, seqs = index.changed_after(1)
    assert dict(zip(changed, seqs.tolist(), strict=True)) == present
    (hits,) = index.search(np.zeros((1, COLS), np.float32), len(index))
    assert {*hits.ids} == {*present, *(f"always {row}" for row in range(300))}


class Growing(SlotTable):
    """Whenever somebody has asked how long it is, it grows by what all queries find first."""

    def __len__(self) -> int:
        count = super().__len__()
        self.write(np.full((1, COLS), 9, np.float32), 1)
        self.name([f"new {count}"])
        return count


def table_of(rows: Vectors, kind: type[SlotTable] = SlotTable) -> SlotTable:
    table = kind(rows.shape[1])
    table.write(rows, 1)
    table.name([str(row) for row in range(len(rows))])
    return table


def test_a_trial_search_may_meet_a_change() -> None:
    """Upkeep measures the recall beside changes."""
    table = table_of(np.ones((50, COLS), np.float32), Growing)
    (hits,) = Searcher(table, None).search(np.ones((1, COLS), np.float32), 5)
    assert len(hits.ids) == 5


def test_the_rows_of_a_search_outlive_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """faiss has their address only."""
    table = table_of(np.ones((50, COLS), np.float32))
    score = getattr(faiss, "pairwise_indexed_inner_product")  # noqa: B009

    def beside_a_change(*arguments: Any) -> None:
        rows = weakref.ref(table.rows)
        table.reserve(10 * table.room)
        assert rows() is not None
        score(*arguments)

    monkeypatch.setattr(faiss, "pairwise_indexed_inner_product", beside_a_change)
    (hits,) = Searcher(table, None).search(np.ones((1, COLS), np.float32), 5)
    assert hits.scores.tolist() == [COLS] * 5


def test_a_build_may_meet_a_change() -> None:
    class GrowingLater(SlotTable):
        def live(self, first: int = 0) -> Slots:
            if len(self) == 100:
                more = np.random.default_rng(1).standard_normal((self.room, COLS))
                self.write(more.astype(np.float32), 1)
                self.name([f"new {row}" for row in range(len(more))])
            return super().live(first)

    rows = np.random.default_rng(0).standard_normal((100, COLS)).astype(np.float32)
    build = Build(table_of(rows, GrowingLater), "ivf_rabitq", compact=False)
    assert build.step(Asked(COLS))


def test_denied_ids_behind_the_accelerator_do_not_count_against_it() -> None:
    class FindsThree(Accelerator):
        covered = 8

        def search(self, queries: Vectors, hits: int, allowed: Any = None) -> Slots:
            return np.tile(np.array([0, 1, 2] + [-1] * (hits - 3)), (len(queries), 1))

    table = table_of(np.ones((14, COLS), np.float32))
    three = FindsThree("ivf_rabitq", faiss.IndexFlat(COLS))
    deny = Filter(deny=frozenset(map(str, range(8, 14))))
    (hits,) = Searcher(table, three).search(np.ones((1, COLS), np.float32), 5, [deny])
    assert len(hits.ids) == 5


needs_gpu = pytest.mark.skipif(
    getattr(faiss, "get_num_gpus", lambda: 0)() == 0, reason="needs a faiss with a GPU"
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", [IndexKind.AUTO, IndexKind.IVF])
def test_a_gpu_is_the_default(kind: IndexKind, tmp_path: Path) -> None:
    rows, queries = clustered(12_000), clustered(100, seed=1)
    index = filled(rows, IndexOptions(kind))
    assert index.name == ("gpu_flat" if kind is IndexKind.AUTO else "gpu_ivf")
    index.remove([str(row) for row in range(500)])
    plain = VectorIndex(64)  # never maintained: searched on the CPU
    plain.put([str(row) for row in range(500, 12_000)], rows[500:], 1)
    deny = Filter(deny=frozenset(str(row) for row in range(500, 5_000)))
    allow = Filter(allow=[str(row) for row in range(400, 8_000)])
    frozen = index.frozen()
    assert frozen.accelerator is not None
    with (tmp_path / "index").open("wb") as file:
        frozen.accelerator.write(file.write)
    read = Accelerator.read(tmp_path / "index", index.name)
    restored = VectorIndex.restored(
        64, IndexOptions(kind), Frozen(frozen.ids, frozen.seqs, frozen.rows, read)
    )
    for one in (Filter(), deny, allow):
        for each in (index, restored):
            found = each.search(queries, 10, [one] * 100)
            truth = plain.search(queries, 10, [one] * 100)
            same = [len({*a.ids} & {*b.ids}) for a, b in zip(found, truth, strict=True)]
            assert sum(same) / 1_000 >= 0.98
