"""Connections that are reset: the client repeats calls by itself, and nothing is done twice."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from foretell import Client, ClientSettings, Collection, Event, Item
from serving.process import started

if TYPE_CHECKING:
    from tests.faults.conftest import Proxy

Before = Callable[[str], "Proxy"]
Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a predictor without an embedder."""
    folder = tmp_path_factory.mktemp("network")
    flags = ["--port", "0", "--embedder", "127.0.0.1:1", "--data-dir", str(folder / "data")]
    with started("predictor", flags, log=folder / "log") as service:
        yield service.address


QUICK = ClientSettings(initial_backoff_s=0.01, max_backoff_s=0.1)

PASSED = (0, 9, 12, 15, 18, 21, 24, 30, 36, 40, 60, 100, 140, 150, 160, 10_000)
"""Bytes of answers that still arrive: none, a frame's head, some of the headers, some of the
message, all of it and more."""


def test_a_write_whose_answer_is_lost_is_done_once(
    embedder_address: str, predictor: str, proxy: Before, eventually: Eventually
) -> None:
    """Wherever in the answer the connection is reset; a begun answer ends gRPC's repeating."""
    to_embedder, to_predictor = proxy(embedder_address), proxy(predictor)
    proxies = (to_embedder, to_predictor)
    with (
        ThreadPoolExecutor(2) as calls,
        Client(embedder_address, predictor) as direct,
        Client(to_embedder.address, to_predictor.address, settings=QUICK) as client,
    ):
        client.create_vector_collection("lost", 1)
        for passed in PASSED:
            client.list_events("nobody")
            client.list_items()
            for each in proxies:
                each.hold(but_for=passed)
            name = f"after {passed}"
            ingested = calls.submit(client.ingest_events, [Event(name, "view", text="shoes")])
            put = calls.submit(client.put_vectors, "lost", [name], [[1.0]])

            def written(name: str = name) -> bool:
                there = direct.get_items([name], collection="lost").items
                return bool(there and direct.list_events(name).elements)

            eventually(written)
            seq = collection(direct, "lost").seq
            for each in proxies:
                each.reset()
                each.resume()
            assert ingested.result(30).accepted == 1
            assert put.result(30).seq == seq  # of the first time
            assert len(direct.list_events(name).elements) == 1
            assert collection(direct, "lost").seq == seq
        direct.delete_collection("lost")


def collection(client: Client, name: str) -> Collection:
    (found,) = (each for each in client.list_collections() if each.name == name)
    return found


CALLERS, CALLS, EVENTS = 4, 30, 20


def test_a_network_that_resets_again_and_again_loses_and_doubles_nothing(
    embedder_address: str, predictor: str, proxy: Before
) -> None:
    to_embedder, to_predictor = proxy(embedder_address), proxy(predictor)
    chance = random.Random(1)
    for each in (to_embedder, to_predictor):
        each.reset_after(iter(lambda: chance.randint(2_000, 20_000), None))

    def call(client: Client, caller: int) -> None:
        for number in range(CALLS):
            name = f"{caller}/{number}"
            events = [Event(f"user {caller}", "view", text=f"{name}/{n}") for n in range(EVENTS)]
            assert client.ingest_events(events).accepted == EVENTS
            items = [Item(f"{name}/{n}", "red shoes") for n in range(EVENTS)]
            assert client.upsert_items(items, collection="reset").upserted == EVENTS

    with (
        ThreadPoolExecutor(CALLERS) as callers,
        Client(embedder_address, predictor) as direct,
        Client(to_embedder.address, to_predictor.address, settings=QUICK) as client,
    ):
        direct.create_text_collection("reset")
        for done in [callers.submit(call, client, caller) for caller in range(CALLERS)]:
            done.result(60)
        for caller in range(CALLERS):
            listed = direct.list_events(f"user {caller}", page_size=1_000).elements
            assert len({event.text for event in listed}) == len(listed) == CALLS * EVENTS
        assert collection(direct, "reset").items == CALLERS * CALLS * EVENTS
        direct.delete_collection("reset")
    assert min(to_embedder.resets, to_predictor.resets) >= 5
