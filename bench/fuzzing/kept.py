"""Data that no fuzzed request names in a write: it must be the same afterwards."""

from __future__ import annotations

import numpy as np

import foretell
from bench.fuzzing.messages import Words, words

ITEMS = tuple(f"kept-{number}" for number in range(40))
USERS = tuple(f"kept-user-{number}" for number in range(20))
VECTORS = "kept-vectors"
COLS = 8

STRANGE_IDS = ("fuzz-1", "fuzz-2", "fuzz-3", "")
STRANGE_USERS = ("fuzz-user-1", "fuzz-user-2", "")
STRANGE_COLLECTIONS = ("fuzz-a", "fuzz-b", "fuzz-c")

READABLE: Words = words(
    (*STRANGE_IDS, *ITEMS[:5]),
    (*STRANGE_USERS, *USERS[:5]),
    ("items", "behaviors", VECTORS, *STRANGE_COLLECTIONS),
    STRANGE_COLLECTIONS,
)
"""What reads may name."""

WRITABLE: Words = words(
    STRANGE_IDS, STRANGE_USERS, ("items", VECTORS, *STRANGE_COLLECTIONS), STRANGE_COLLECTIONS
)
"""What writes may name: collections that hold something kept, but no id of it."""


def put(client: foretell.Client) -> None:
    """Stores it."""
    client.upsert_items(
        [
            foretell.Item(item_id, f"tea number {at}", {"brand": "acme", "price": str(at)})
            for at, item_id in enumerate(ITEMS)
        ]
    )
    client.create_vector_collection(VECTORS, COLS)
    client.put_vectors(VECTORS, ITEMS, np.random.default_rng(1).standard_normal((len(ITEMS), COLS)))
    client.ingest_events(
        [
            foretell.Event(
                user,
                ("view", "buy", "search")[at % 3],
                item_id=ITEMS[at],
                text=f"text {at} of {user}",
            )
            for user in USERS
            for at in range(10)
        ]
    )


def read(client: foretell.Client) -> dict[str, object]:
    """All of it, by what it is, in a form that can be compared."""
    found: dict[str, object] = {}
    for collection in ("items", VECTORS):
        answer = client.get_items(ITEMS, collection=collection, include_vectors=True)
        assert answer.vectors is not None
        for item, row in zip(answer.items, answer.vectors, strict=True):
            found[f"{collection}/{item.id}"] = (item.text, item.attributes, row.tobytes())
    for user in USERS:
        found[user] = [
            (event.behavior_type, event.item_id, event.text, event.timestamp)
            for event in client.list_events(user).elements
        ]
    return found


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what is another now, or gone."""
    return [name for name in sorted(before | after) if before.get(name) != after.get(name)]
