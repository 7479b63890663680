"""EventService in memory."""

from __future__ import annotations

import bisect
import time
import uuid
from collections import Counter
from typing import NamedTuple

from foretell import checks, limits
from foretell.predictor.v1 import event_service_pb2 as pb
from foretell.predictor.v1 import event_service_pb2_grpc as pb_grpc
from foretell.testing.embedder import FakeEmbedder
from foretell.testing.paging import make_token, read_token


class Stored(NamedTuple):
    """An event as it is kept: in the order of time, of one time as they came."""

    time_us: int
    number: int
    event: pb.Event


class FakeEvents(pb_grpc.EventServiceServicer):
    """EventService as its contract says. Behavior texts are in the embedder at once.

    Attributes:
        by_user: each user's events, oldest first.
        types: events by behavior type.
        items: events by item id.
    """

    def __init__(self, embedder: FakeEmbedder) -> None:
        self.by_user: dict[str, list[Stored]] = {}
        self.types: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self._texts: Counter[str] = Counter()
        self._event_ids: set[str] = set()
        self._embedder = embedder
        self._number = 0
        self._last_us = 0

    def history(self, user_id: str) -> list[pb.Event]:
        """The user's last 5,000 events, oldest first."""
        stored = self.by_user.get(user_id, [])
        return [each.event for each in stored[-limits.HISTORY_EVENTS :]]

    def IngestEvents(
        self, request: pb.IngestEventsRequest, context: object
    ) -> pb.IngestEventsResponse:
        """Stores events; each type, item and text counts from now on."""
        checks.count(len(request.events), "events", limits.BATCH)
        response = pb.IngestEventsResponse()
        new: list[str] = []

        def store(event: pb.Event, index: int) -> None:
            checks.event(event, f"events[{index}]")
            if event.event_id in self._event_ids:
                response.duplicates += 1
                return
            if event.behavior_type not in self.types and len(self.types) >= limits.BEHAVIOR_TYPES:
                raise checks.too_many_types()
            self._store(event)
            new.append(event.text)

        _, failures = checks.split(request.events, store)
        self._embedder.keep_behaviors(text for text in dict.fromkeys(new) if text)
        response.accepted = len(new)
        response.failures.extend(failures)
        return response

    def _store(self, event: pb.Event) -> None:
        kept = pb.Event()
        kept.CopyFrom(event)
        time_us = kept.timestamp.ToMicroseconds()
        if not kept.HasField("timestamp"):
            # Events that came in one call are no basket: each has a time of its own.
            time_us = self._last_us = max(time.time_ns() // 1_000, self._last_us + 1)
        kept.timestamp.FromMicroseconds(time_us)
        self._number += 1
        stored = Stored(time_us, self._number, kept)
        bisect.insort(self.by_user.setdefault(kept.user_id, []), stored, key=lambda each: each[:2])
        self._count(kept, 1)
        if kept.event_id:
            self._event_ids.add(kept.event_id)

    def _count(self, event: pb.Event, sign: int) -> None:
        for counter, key in (
            (self.types, event.behavior_type),
            (self.items, event.item_id),
            (self._texts, event.text),
        ):
            if key:
                counter[key] += sign
                if not counter[key]:
                    del counter[key]

    def ListEvents(self, request: pb.ListEventsRequest, context: object) -> pb.ListEventsResponse:
        """Lists a user's events, newest first."""
        checks.identifier(request.user_id, "user_id")
        size = checks.page_size(request.page_size)
        stored = self.by_user.get(request.user_id, [])
        token = read_token(request.page_token, request.user_id)
        if token:
            stored = stored[: bisect.bisect_left(stored, _position(token), key=lambda e: e[:2])]
        page = stored[-size:][::-1]
        last = f"{page[-1].time_us}:{page[-1].number}" if len(stored) > size else ""
        return pb.ListEventsResponse(
            events=[each.event for each in page],
            next_page_token=last and make_token(last, request.user_id),
        )

    def DeleteUser(self, request: pb.DeleteUserRequest, context: object) -> pb.DeleteUserResponse:
        """Deletes a user's events, and the texts that were only theirs."""
        checks.identifier(request.user_id, "user_id")
        gone = self.by_user.pop(request.user_id, [])
        for each in gone:
            self._count(each.event, -1)
            self._event_ids.discard(each.event.event_id)
        texts = {each.event.text for each in gone} - self._texts.keys()
        self._embedder.drop_behaviors(sorted(filter(None, texts)))
        return pb.DeleteUserResponse(deletion_id=uuid.uuid4().hex, deleted_events=len(gone))


def _position(token: str) -> tuple[int, int]:
    try:
        time_us, number = token.split(":")
        return (int(time_us), int(number))
    except ValueError:
        raise checks.bad_page_token() from None
