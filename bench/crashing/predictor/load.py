"""The callers: events that come, come again and are deleted, and some reads.

Each caller has users of its own and one call in flight, so that it knows what is there: the answer
of every call, repeated or not, is compared with that.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from bench.crashing import calling
from bench.crashing.model import Done, Key, Model, Value, Write
from bench.crashing.predictor import contents
from foretell import Client

CALLERS = 6

SIZES = (1, 1, 2, 5, 20, 100)
"""Events of a call."""

REPEATED_SHARE = 0.1
"""Of the answered writes that are sent once more."""

Answer = tuple[int, ...]
"""Numbers of a response: accepted and duplicates, or deleted events."""


class Repeat(Enum):
    """How a write whose answer was lost is sent again."""

    SAME_REQUEST = auto()
    """With its request_id: the answer is the first one."""
    NEW_REQUEST = auto()
    """With another request_id: event ids keep it from being done twice."""
    NEVER = auto()


@dataclass(frozen=True, eq=False)
class Call:
    """A write with all that is needed to send it again.

    Attributes:
        first: the answer where it is done.
        again: the answer to a new request with the same content after it was done.
    """

    write: Write
    send: Callable[[Client, str], Answer]
    first: Answer
    again: Answer
    repeat: Repeat
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def repeated(self, client: Client, done: bool) -> str:
        """Sends it once more; says what is wrong with the answer.

        Args:
            client: of the service.
            done: whether it has been done before.
        """
        same = self.repeat is Repeat.SAME_REQUEST
        answer = self.send(client, self.request_id if same else uuid.uuid4().hex)
        right = self.again if done and not same else self.first
        if answer == right:
            return ""
        return f"repeated ({self.repeat.name}), a write was answered {answer}, not {right}"


@dataclass
class Owner:
    """What one caller knows of its users.

    Attributes:
        lost: the write whose answer was lost.
        keys: all cells of its users.
    """

    users: Sequence[str]
    model: Model = field(default_factory=Model)
    lost: Call | None = None
    keys: Sequence[Key] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [Key(user, cell) for user in self.users for cell in contents.CELLS]

    def filled(self, user: str) -> list[Key]:
        """A user's cells that have an event."""
        keys = (Key(user, cell) for cell in contents.CELLS)
        return [key for key in keys if self.model.value(key) is not None]

    def acknowledge(self, write: Write) -> None:
        """A write is done."""
        self.model.acknowledge(Done(write, self.model.acknowledged_seq + 1))


@dataclass
class Ledger(calling.Ledger):
    """What all callers know, through every restart."""

    owners: Sequence[Owner] = field(
        default_factory=lambda: [Owner(contents.user_ids(number)) for number in range(CALLERS)]
    )


def ingest(owner: Owner, cells: Mapping[Key, str], repeat: Repeat) -> Call:
    """Events of cells; one in a cell that has an event already must have an event_id."""
    events = [contents.event(key, value) for key, value in cells.items()]
    fresh: dict[Key, Value] = {
        key: value for key, value in cells.items() if owner.model.value(key) is None
    }
    if not all(contents.with_id(key.id) for key in fresh) and repeat is Repeat.NEW_REQUEST:
        repeat = Repeat.SAME_REQUEST  # nothing else would keep it from being done twice

    def send(client: Client, request_id: str) -> Answer:
        done = client.ingest_events(events, request_id=request_id)
        return done.accepted, done.duplicates

    return Call(
        Write(fresh, owner.model.acknowledged_seq),
        send,
        (len(fresh), len(cells) - len(fresh)),
        (0, len(cells)),
        repeat,
    )


def delete(owner: Owner, user: str, repeat: Repeat) -> Call:
    """All events of a user."""
    filled = owner.filled(user)

    def send(client: Client, request_id: str) -> Answer:
        return (client.delete_user(user, request_id=request_id).deleted_events,)

    write = Write(dict.fromkeys(filled), owner.model.acknowledged_seq)
    return Call(write, send, (len(filled),), (0,), repeat)


class Caller(calling.Caller[Ledger]):
    """One thread's calls."""

    def actions(self) -> Mapping[Callable[[], None], float]:
        """Writes, and reads of what was just written."""
        return {self._ingest: 0.75, self._delete: 0.08, self._list: 0.1, self._predict: 0.07}

    @property
    def _owner(self) -> Owner:
        return self.ledger.owners[self.number]

    def _ingest(self) -> None:
        keys = self._owner.keys
        chosen = self.rng.choice(len(keys), self.rng.choice(SIZES), replace=False)
        cells = {
            keys[at]: contents.some_value(self.rng)
            for at in chosen
            if contents.with_id(keys[at].id) or self._owner.model.value(keys[at]) is None
        }
        if cells:
            self._write(ingest(self._owner, cells, self._repeat()))

    def _delete(self) -> None:
        user = str(self.rng.choice(self._owner.users))
        self._write(delete(self._owner, user, self._repeat()))

    def _list(self) -> None:
        user = str(self.rng.choice(self._owner.users))
        listed = self.client.list_events(user, page_size=1_000).elements
        found = sorted(key for key, _ in map(contents.cell_of, listed))
        if found != self._owner.filled(user):
            self.ledger.problem(f"{user} has other events than were acknowledged")

    def _predict(self) -> None:
        user = str(self.rng.choice(self._owner.users))
        read, known = self.client.predict(user, k=1).history_events, len(self._owner.filled(user))
        if read != known:
            self.ledger.problem(f"a prediction rests on {read} events of {user}, not {known}")

    def _write(self, call: Call) -> None:
        owner = self._owner
        owner.lost = call
        answer = call.send(self.client, call.request_id)
        owner.acknowledge(call.write)
        owner.lost = None
        with self.ledger.lock:
            self.ledger.acknowledged += 1
        if answer != call.first:
            self.ledger.problem(f"a write was answered {answer}, not {call.first}")
        if call.repeat is not Repeat.NEVER and self.rng.random() < REPEATED_SHARE:
            wrong = call.repeated(self.client, done=True)
            if wrong:
                self.ledger.problem(wrong)

    def _repeat(self) -> Repeat:
        return Repeat(self.rng.choice([repeat.value for repeat in Repeat], p=(0.4, 0.4, 0.2)))
