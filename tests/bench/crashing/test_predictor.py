"""The check of a predictor's events notices what a fake has lost, doubled or answers otherwise."""

import threading
from collections.abc import Callable, Iterator

import pytest

from bench.crashing.model import Key, Kind
from bench.crashing.predictor import check, contents
from bench.crashing.predictor.load import Owner, Repeat, delete, ingest
from bench.crashing.predictor.subject import Predictor
from foretell import Client, Event
from foretell.testing import FakeServices

WRITES = 60


@pytest.fixture
def fakes() -> Iterator[FakeServices]:
    with FakeServices() as services:
        yield services


@pytest.fixture
def client(fakes: FakeServices) -> Iterator[Client]:
    with Client(fakes.embedder_address, fakes.predictor_address) as connected:
        yield connected


@pytest.fixture
def loaded(fakes: FakeServices, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A subject that has written to the fake, which was then "killed"."""
    monkeypatch.setattr(check, "TEXTS_S", 0.1)
    made = Predictor(fakes.embedder_address)
    assert made.check(fakes.predictor_address) == []
    killed = threading.Event()
    made.load(fakes.predictor_address, (1,), killed)
    while made.acknowledged < WRITES:
        killed.wait(0.001)
    killed.set()
    assert made.end() == []
    return made


def test_the_truth_is_read_as_it_is(loaded: Predictor, fakes: FakeServices) -> None:
    assert loaded.check(fakes.predictor_address) == []
    assert loaded.check(fakes.predictor_address) == []  # what was repeated is known


def some_event(client: Client) -> Event:
    users = (user for caller in range(6) for user in contents.user_ids(caller))
    return next(event for user in users for event in client.list_events(user).elements)


def lost(client: Client) -> None:
    client.delete_user(some_event(client).user_id)


def resurrected(client: Client) -> None:
    client.ingest_events([Event("user 0-0", "view", text="of nobody", attributes={"cell": "x"})])


def doubled(client: Client) -> None:
    found = some_event(client)
    client.ingest_events(
        [
            Event(
                found.user_id,
                found.behavior_type,
                found.timestamp,
                found.item_id,
                found.text,
                attributes=found.attributes,
            )
        ]
    )


@pytest.mark.parametrize(
    ("damage", "kind"),
    [(lost, Kind.LOST), (resurrected, Kind.RESURRECTED), (doubled, Kind.DUPLICATED)],
)
def test_damaged_contents_are_noticed(
    loaded: Predictor,
    fakes: FakeServices,
    client: Client,
    damage: Callable[[Client], None],
    kind: Kind,
) -> None:
    damage(client)
    found = loaded.check(fakes.predictor_address)
    assert kind in {violation.kind for violation in found}
    assert loaded.check(fakes.predictor_address) == [] or kind is Kind.DUPLICATED


def test_what_a_service_counts_is_compared_with_what_it_lists(client: Client) -> None:
    client.ingest_events([Event("ann", "view", item_id="a"), Event("bob", "buy", text="b")])
    reading = check.read(client, ["ann", "bob"])
    check.compare_totals(client, reading)
    check.compare_texts(client, reading)
    assert reading.violations == []
    part = check.read(client, ["ann"])
    check.compare_totals(client, part)
    said = [what for _, what in part.violations]
    assert any("GetInfo counts 2 events of 2 users" in what for what in said)
    assert any("behavior types have the shares" in what for what in said)


@pytest.mark.parametrize("repeat", [Repeat.SAME_REQUEST, Repeat.NEW_REQUEST])
def test_the_answer_to_a_repeated_write_tells_whether_it_was_done(
    client: Client, repeat: Repeat
) -> None:
    owner = Owner(["ann"])
    call = ingest(owner, {Key("ann", "002"): "view|item 01||"}, repeat)
    assert call.repeated(client, done=True) != "" or repeat is Repeat.SAME_REQUEST
    assert call.repeated(client, done=True) == ""
    assert (call.repeated(client, done=False) == "") is (repeat is Repeat.SAME_REQUEST)
    owner.acknowledge(call.write)
    call = delete(owner, "ann", repeat)
    assert call.repeated(client, done=False) == ""
    assert call.repeated(client, done=True) == ""


def test_an_event_without_an_id_is_repeated_with_its_request_alone() -> None:
    cells = {Key("ann", "001"): "view|item 01||"}
    assert ingest(Owner(["ann"]), cells, Repeat.NEW_REQUEST).repeat is Repeat.SAME_REQUEST
