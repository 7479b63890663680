"""Reads all that a predictor tells of its events, and compares the ways."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.crashing.model import Key, Kind, Value, Violation
from bench.crashing.predictor import contents
from foretell import Client, Event, PredictionQuery

PAGE = 100
"""So that there are several pages."""

ALIKE = 1e-9
"""How much two shares may differ."""

TEXTS_S = 30.0
"""How long texts may take on their way to the embedder and out of it."""


@dataclass
class Reading:
    """What a predictor holds.

    Attributes:
        cells: a value for all that is there.
        events: as they are listed.
        violations: what is there twice, and where two ways to read differ.
    """

    cells: dict[Key, Value] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def disagree(self, what: str) -> None:
        """Notes a disagreement."""
        self.violations.append(Violation(Kind.DISAGREEMENT, what))


def read(client: Client, users: Sequence[str]) -> Reading:
    """Reads the events of some users; nobody may write meanwhile."""
    reading = Reading()
    answers = client.predict_many(PredictionQuery(user, k=1) for user in users)
    for user, prediction in zip(users, answers.predictions, strict=True):
        listed = list(_listed(client, user))
        times = [event.timestamp for event in listed if event.timestamp is not None]
        if times != sorted(times, reverse=True):
            reading.disagree(f"{user}'s events are not listed newest first")
        for event in listed:
            key, value = contents.cell_of(event)
            if key in reading.cells:
                reading.violations.append(Violation(Kind.DUPLICATED, f"{user}/{key.id}"))
            reading.cells[key] = value
        if prediction.history_events != len(listed):
            reading.disagree(
                f"{user} has {len(listed)} events; a prediction has {prediction.history_events}"
            )
        reading.events += listed
    return reading


def compare_totals(client: Client, reading: Reading) -> None:
    """What is counted, with a reading of all users; notes where they differ."""
    info = client.predictor_info()
    users = {event.user_id for event in reading.events}
    if (info.events, info.users) != (len(reading.events), len(users)):
        reading.disagree(
            f"GetInfo counts {info.events} events of {info.users} users; "
            f"{len(reading.events)} of {len(users)} are listed"
        )
    types = Counter(event.behavior_type for event in reading.events)
    shares = {name: count / len(reading.events) for name, count in types.items()}
    told = {each.behavior_type: each.probability for each in client.predict("").behavior_types}
    if told.keys() != shares.keys() or any(abs(told[t] - shares[t]) > ALIKE for t in told):
        reading.disagree(f"behavior types have the shares {told}, not {shares}")


def compare_texts(client: Client, reading: Reading) -> None:
    """The embedder comes to hold the texts of all events, and no others; notes what differs."""
    texts = {event.text for event in reading.events} - {""}
    deadline = time.monotonic() + TEXTS_S
    while True:
        items = client.list_items(collection="behaviors", page_size=1_000).elements
        pending = client.predictor_info().pending_texts
        wrong = texts ^ {item.text for item in items}
        if not wrong and not pending:
            return
        if time.monotonic() > deadline:
            reading.disagree(f"{pending} texts are pending; `behaviors` is wrong about {wrong}")
            return
        time.sleep(0.02)


def _listed(client: Client, user: str) -> Iterator[Event]:
    token = ""
    while True:
        page = client.list_events(user, page_size=PAGE, page_token=token)
        yield from page.elements
        token = page.next_page_token
        if not token:
            return
