"""Reads all that an embedder holds, in every way that there is, and compares the ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.crashing.embedder import contents
from bench.crashing.embedder.contents import ITEMS, PROJECTIONS, VECTORS
from bench.crashing.model import Key, Kind, Value, Violation
from foretell import Client, Filter, Item, attribute
from foretell.vectors import Vectors

ALIKE = 1e-4
"""How much a number of a vector of length 1 may differ: a text's with the batch that it was encoded
in (float32, up to 1e-6 was seen), a projected one with the order of a sum."""

SAMPLE = 24
"""Ids a collection that are searched for."""

K = 30
"""Hits a search: more than there are items of one text, as a rule."""

PAGE = 100
"""So that there are several pages."""


@dataclass
class Reading:
    """What an embedder holds.

    Attributes:
        cells: a value for all that is there; of derived collections the residuals.
        vectors: by collection and id.
        seq: its last write, or the last that a collection that is still there shows.
        violations: where two ways to read differ.
    """

    cells: dict[Key, Value] = field(default_factory=dict)
    vectors: dict[str, dict[str, Vectors]] = field(default_factory=dict)
    seq: int = 0
    violations: list[Violation] = field(default_factory=list)

    def disagree(self, what: str) -> None:
        """Notes a disagreement."""
        self.violations.append(Violation(Kind.DISAGREEMENT, what))


def read(client: Client, text_vectors: dict[str, Vectors], seed: Sequence[int]) -> Reading:
    """Reads everything; nobody may write meanwhile.

    Args:
        client: of an embedder.
        text_vectors: of all texts, empty ones too, by an embedder that had nothing stored.
        seed: of the sample of ids that are searched for.
    """
    reading = Reading()
    rng = np.random.default_rng(list(seed))
    items: list[Item] = []
    for collection in client.list_collections():
        name = collection.name
        if name not in (ITEMS, VECTORS, *PROJECTIONS):
            continue
        reading.seq = max(reading.seq, collection.seq)
        listed = _list(client, name)
        vectors = _get(client, name, listed, reading)
        reading.vectors[name] = vectors
        if collection.items != len(listed):
            reading.disagree(f"{name} has {collection.items} items and lists {len(listed)}")
        _watch(client, name, vectors, reading)
        _search(client, name, vectors, rng, reading)
        if name != VECTORS:
            _conditions(client, name, listed, reading)
        if name == ITEMS:
            items = listed
            _texts(items, vectors, text_vectors, reading)
        elif name == VECTORS:
            _rows(vectors, reading)
    for name in PROJECTIONS.keys() & reading.vectors.keys():
        _derived(name, items, reading)
    return reading


def _list(client: Client, name: str) -> list[Item]:
    items: list[Item] = []
    token = ""
    while True:
        page = client.list_items(collection=name, page_size=PAGE, page_token=token)
        items += page.elements
        token = page.next_page_token
        if not token:
            return items


def _get(client: Client, name: str, listed: list[Item], reading: Reading) -> dict[str, Vectors]:
    """Vectors by id; asks for all ids that there may be."""
    listed_ids = [item.id for item in listed]
    if listed_ids != sorted(set(listed_ids)):
        reading.disagree(f"{name} does not list each id once and in order")
    ids = contents.VECTOR_IDS if name == VECTORS else contents.ITEM_IDS
    found = client.get_items(ids, collection=name, include_vectors=True)
    by_id = {item.id: item for item in listed}
    for item in found.items:
        if by_id.pop(item.id, None) != item:
            reading.disagree(f"{name} gives {item} by id and does not list it like that")
    for left in by_id.values():
        reading.disagree(f"{name} lists {left} and does not give it by id")
    assert found.vectors is not None
    return dict(zip([item.id for item in found.items], found.vectors, strict=True))


def _watch(client: Client, name: str, vectors: dict[str, Vectors], reading: Reading) -> None:
    """WatchItems from the start gives the same, to the bit."""
    told: dict[str, Vectors] = {}
    watch = client.watch_items(collection=name)
    for changes in watch:
        told |= zip(changes.ids, changes.vectors, strict=True)
        for id in changes.deleted_ids:
            told.pop(id, None)
        if changes.caught_up:
            break
    watch.close()  # type: ignore[attr-defined]
    for difference in differences(vectors, told):
        reading.disagree(f"WatchItems of {name} and GetItems differ in {difference}")


def differences(
    one: dict[str, Vectors], other: dict[str, Vectors], tolerance: float = 0.0
) -> list[str]:
    """Ids that only one has, or whose vectors differ by more than the tolerance in a number."""
    return sorted(
        id
        for id in one.keys() | other.keys()
        if id not in one or id not in other or np.abs(one[id] - other[id]).max() > tolerance
    )


def _search(
    client: Client,
    name: str,
    vectors: dict[str, Vectors],
    rng: np.random.Generator,
    reading: Reading,
) -> None:
    """Each of a sample of ids finds itself, nothing that is not there, and the right scores."""
    if not vectors:
        return
    ids = list(vectors)
    block = np.stack(list(vectors.values()))
    asked = [ids[at] for at in rng.choice(len(ids), min(SAMPLE, len(ids)), replace=False)]
    found = client.search(ids=asked, collection=name, k=K)
    for failure in found.failures:
        reading.disagree(f"Search in {name} does not know {asked[failure.index]}")
    for id, hits in zip(asked, found.hits, strict=True):
        where = f"Search for {id} in {name}"
        scores = dict(zip(ids, block @ vectors[id], strict=True))
        strange = set(hits.ids) - scores.keys()
        if strange:
            reading.disagree(f"{where} finds {sorted(strange)}, which is not there")
            continue
        if len(set(hits.ids)) != min(K, len(ids)):
            reading.disagree(f"{where} finds {len(set(hits.ids))} items of {len(ids)}")
        right = np.array([scores[hit] for hit in hits.ids])
        if np.abs(right - hits.scores).max(initial=0) > ALIKE:
            reading.disagree(f"{where} gives scores of other vectors")
        own = scores[id]
        as_near = sum(score >= own - ALIKE for score in scores.values())
        if as_near <= K and id not in hits.ids:
            reading.disagree(f"{where} does not find it")


def _conditions(client: Client, name: str, listed: list[Item], reading: Reading) -> None:
    """A condition over attributes finds all the items that have them, and no others."""
    if not listed:
        return
    for shade in filter(None, contents.SHADES):
        right = {item.id for item in listed if item.attributes.get("shade") == shade}
        where = Filter(where=attribute("shade") == shade)
        found = client.search(ids=[listed[0].id], collection=name, k=len(listed), filters=where)
        wrong = right.symmetric_difference(found.hits[0].ids)
        if wrong:
            reading.disagree(f"in {name} the condition {shade} is wrong about {sorted(wrong)}")


def _texts(
    items: list[Item],
    vectors: dict[str, Vectors],
    text_vectors: dict[str, Vectors],
    reading: Reading,
) -> None:
    for item in items:
        reading.cells[Key(ITEMS, item.id)] = contents.item_value(item)
        right = text_vectors.get(item.text)
        if right is None:
            reading.disagree(f"nobody wrote the text of {item}")
        elif item.id in vectors and np.abs(vectors[item.id] - right).max() > ALIKE:
            reading.disagree(f"{ITEMS} has a vector of another text for {item}")


def _rows(vectors: dict[str, Vectors], reading: Reading) -> None:
    for id, vector in vectors.items():
        value = contents.NAME_OF_ROW.get(vector.tobytes())
        reading.cells[Key(VECTORS, id)] = value
        if value is None:
            reading.disagree(f"nobody wrote the vector of {VECTORS}/{id}")


def _derived(name: str, items: list[Item], reading: Reading) -> None:
    """A derived vector is the projection of the source's, with one of the residuals."""
    source, own = reading.vectors[ITEMS], reading.vectors[name]
    if source.keys() != own.keys():
        reading.disagree(f"{name} and {ITEMS} differ in {sorted(source.keys() ^ own.keys())}")
    both = [item for item in items if item.id in source and item.id in own]
    if not both:
        return
    block = np.stack([source[item.id] for item in both])
    texts = [item.text for item in both]
    projected = {
        residual: PROJECTIONS[name].apply(block, texts, np.tile(row, (len(both), 1)))
        for residual, row in contents.RESIDUAL_OF.items()
    }
    for position, item in enumerate(both):
        rows = {residual: block[position] for residual, block in projected.items()}
        value = contents.name_of(own[item.id], rows, ALIKE)
        if value is None:
            reading.disagree(f"{name} has no projection of the vector that {item} has")
        if value != contents.NO_RESIDUAL:
            reading.cells[Key(name, item.id)] = value
