"""A short seeded run against real services; and a service with bugs, which must be noticed."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from bench import fuzz
from bench.fuzzing import kept
from bench.fuzzing.messages import examples, methods, requests
from bench.fuzzing.wire import Conversation, conversations, converse


def test_strange_requests_do_no_harm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "ROUND", 12)
    status = fuzz.main(["--requests", "300", "--seed", "3"])
    said, complaints = capsys.readouterr()
    figures = json.loads(said.splitlines()[-1])["figures"]
    assert status == 0, complaints
    assert figures["requests"] >= 300
    assert figures["codes_ok"] > 20
    assert figures["codes_invalid_argument"] > 50


def test_every_method_has_requests_that_follow_from_the_seed() -> None:
    assert len({method.full_name for method in methods()}) == 22
    for method in methods():
        some = examples(requests(method, kept.READABLE), 10, 5)
        assert some == examples(requests(method, kept.READABLE), 10, 5)
        assert len({request.data for request in some}) > 1


class Buggy(grpc.GenericRpcHandler):
    """Answers every call with the code."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def answer(data: bytes, context: Any) -> bytes:
            await context.abort(self.code, "a bug")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture(params=[grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def buggy(request: pytest.FixtureRequest) -> AsyncIterator[tuple[str, grpc.StatusCode]]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Buggy(request.param),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", request.param
    await server.stop(None)


async def test_bugs_are_noticed(
    buggy: tuple[str, grpc.StatusCode], capsys: pytest.CaptureFixture[str]
) -> None:
    address, code = buggy
    embed = next(method for method in methods() if method.name == "Embed")
    some = await asyncio.to_thread(examples, requests(embed, kept.READABLE), 5, 1)
    outcome = fuzz.Outcome()
    await fuzz._send_all(address, some, outcome)
    assert outcome.codes[code.name] == len(some)
    assert not outcome.good
    assert some[0].data.hex()[:50] in capsys.readouterr().err


async def test_answers_over_a_plain_connection_are_read(
    buggy: tuple[str, grpc.StatusCode],
) -> None:
    address, code = buggy
    strategy = conversations(requests(methods()[0], kept.READABLE))
    talks: list[Conversation] = await asyncio.to_thread(examples, strategy, 30, 1)
    found = await asyncio.gather(*(converse(address, talk) for talk in talks if talk.complete))
    assert code.value[0] in {answer.status for answers in found for answer in answers}


def test_what_has_changed_is_named() -> None:
    assert kept.changes({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5}) == ["b", "c"]
