"""Certificates, tokens, scopes, quotas: a real server and the real client."""

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

import foretell
from bench.fuzzing.messages import methods
from foretell import _security
from foretell._channel import target
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from serving import security
from serving.calls import Call
from serving.security import OPEN, SCOPES, ConcurrentCalls, Scope, read_tokens
from serving.server import running
from serving.settings import ServiceSettings

READER, WRITER = "reader-0123456789", "writer-0123456789"

TOKENS = f"""
[[token]]
name = "reader"
token = "{READER}"
scopes = ["read"]
rate = "3/hour"

[[token]]
name = "writer"
sha256 = "{hashlib.sha256(WRITER.encode()).hexdigest()}"
scopes = ["read", "write"]
"""


class Servicer(rpc.EmbedderServiceServicer):
    def __init__(self) -> None:
        self.calls = 0

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        self.calls += 1
        return pb.GetInfoResponse(version="1")

    async def WatchItems(self, request: Any, context: Any) -> AsyncIterator[pb.WatchItemsResponse]:
        yield pb.WatchItemsResponse(seq=1)
        await asyncio.Event().wait()

    async def DeleteItems(self, request: Any, context: Any) -> pb.DeleteItemsResponse:
        return pb.DeleteItemsResponse(deleted=1)

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_EmbedderServiceServicer_to_server(self, server)
        return ["foretell.embedder.v1.EmbedderService"]


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves with settings and gives the address."""
    async with AsyncExitStack() as stack:

        async def start(**values: Any) -> str:
            servicer = Servicer()  # type: ignore[abstract]  # the other methods are not called
            settings = ServiceSettings(drain_s=0, grace_s=0, **values)
            return await stack.enter_async_context(running(settings, servicer.register))

        yield start


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of files are seen by the next call."""
    monkeypatch.setattr(_security, "LOOK_S", 0.0)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def certificate(authority: trustme.CA, folder: Path, name: str = "server") -> dict[str, Path]:
    """A new certificate for this machine in files; again: a rotation."""
    made = authority.issue_cert("127.0.0.1", "localhost")
    files = {what: folder / f"{name}.{what}" for what in ("pem", "key", "ca")}
    made.private_key_pem.write_to_path(files["key"])
    files["pem"].write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    authority.cert_pem.write_to_path(files["ca"])
    return files


def secured(**values: Any) -> foretell.ClientSettings:
    texts: dict[str, Any] = {name: str(value) for name, value in values.items()}
    return foretell.ClientSettings(security=foretell.Security(**texts), initial_backoff_s=0.01)


async def version(address: str, settings: foretell.ClientSettings) -> str:
    async with foretell.AsyncClient(address, settings=settings, timeout_s=5) as client:
        return (await client.embedder_info()).version


def token_file(folder: Path, token: str, name: str = "token") -> Path:
    path = folder / name
    path.write_text(token + "\n")
    return path


def tokens_file(folder: Path, content: str = TOKENS) -> Path:
    path = folder / "tokens.toml"
    path.write_text(content)
    path.chmod(0o600)
    return path


# --- TLS ------------------------------------------------------------------------------------------


async def test_tls(serve: Serve, authority: trustme.CA, tmp_path: Path) -> None:
    files = certificate(authority, tmp_path)
    address = await serve(tls_certificate_file=files["pem"], tls_key_file=files["key"])
    assert await version(address, secured(ca_file=files["ca"])) == "1"
    with pytest.raises(UnavailableError):  # not encrypted
        await version(address, secured())
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.ca")
    with pytest.raises(UnavailableError):  # another authority
        await version(address, secured(ca_file=tmp_path / "other.ca"))


async def test_mutual_tls(serve: Serve, authority: trustme.CA, tmp_path: Path) -> None:
    files = certificate(authority, tmp_path)
    address = await serve(
        tls_certificate_file=files["pem"],
        tls_key_file=files["key"],
        tls_client_ca_file=files["ca"],
    )
    shown = {"certificate_file": files["pem"], "key_file": files["key"]}
    assert await version(address, secured(ca_file=files["ca"], **shown)) == "1"
    with pytest.raises(UnavailableError):
        await version(address, secured(ca_file=files["ca"]))


async def test_certificates_are_read_again(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = trustme.CA(), trustme.CA()
    files = certificate(old, tmp_path)
    address = await serve(tls_certificate_file=files["pem"], tls_key_file=files["key"])
    ca_file = tmp_path / "client.ca"
    old.cert_pem.write_to_path(ca_file)
    async with foretell.AsyncClient(address, settings=secured(ca_file=ca_file)) as client:
        await client.embedder_info()
        whole = files["key"].read_bytes()
        files["key"].write_bytes(whole[:100])  # a rotation, half-done
        assert await version(address, secured(ca_file=ca_file)) == "1"
        assert "certificates stay as before" in caplog.text
        certificate(new, tmp_path)
        with pytest.raises(UnavailableError):  # the old authority does not know the new one
            await version(address, _with_authority(tmp_path, old))
        assert await version(address, _with_authority(tmp_path, new)) == "1"
        new.cert_pem.write_to_path(ca_file)
        assert (await client.embedder_info()).version == "1"  # the same client goes on


def _with_authority(folder: Path, authority: trustme.CA) -> foretell.ClientSettings:
    path = folder / "one.ca"
    authority.cert_pem.write_to_path(path)
    return secured(ca_file=path)


async def test_certificates_that_do_not_fit_are_refused(
    serve: Serve, authority: trustme.CA, tmp_path: Path
) -> None:
    one, other = (certificate(authority, tmp_path, name) for name in ("one", "other"))
    with pytest.raises(FailedPreconditionError, match="key"):
        await serve(tls_certificate_file=one["pem"], tls_key_file=other["key"])
    with pytest.raises(FailedPreconditionError, match="tls_key_file"):
        await serve(tls_certificate_file=one["pem"])


async def test_other_addresses_need_security(serve: Serve, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(FailedPreconditionError, match="allow_insecure"):
            await serve(host=host)
    await serve(host="0.0.0.0", allow_insecure=True)
    await serve(host="0.0.0.0", tokens_file=tokens_file(tmp_path))
    await serve(host="localhost")


# --- Tokens ---------------------------------------------------------------------------------------


async def test_tokens_scopes_and_rates(serve: Serve, tmp_path: Path) -> None:
    address = await serve(tokens_file=tokens_file(tmp_path))
    with pytest.raises(UnauthenticatedError, match="token is needed"):
        await version(address, secured())
    with pytest.raises(UnauthenticatedError, match="not known"):
        await version(address, secured(token_file=token_file(tmp_path, "no-such-token-0000")))
    reader = secured(token_file=token_file(tmp_path, READER, "reader"))
    async with foretell.AsyncClient(address, settings=reader) as client:
        assert (await client.embedder_info()).version == "1"
        with pytest.raises(PermissionDeniedError) as denied:
            await client.delete_items(["a"])
        assert denied.value.metadata == {"scope": "write", "token": "reader"}
        for _ in range(2):
            await client.embedder_info()
        with pytest.raises(ResourceExhaustedError, match="3 per 1 hour") as exhausted:
            await client.embedder_info()
        assert 0 < (exhausted.value.retry_after_s or 0) <= 3_600
    writer = secured(token_file=token_file(tmp_path, WRITER, "writer"))
    async with foretell.AsyncClient(address, settings=writer) as client:
        assert (await client.delete_items(["a"])).deleted == 1
        with pytest.raises(PermissionDeniedError, match="admin"):
            await client.delete_collection("a")


async def test_tokens_are_read_again(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tokens_file(tmp_path)
    address = await serve(tokens_file=file)
    mine = token_file(tmp_path, WRITER)
    async with foretell.AsyncClient(address, settings=secured(token_file=mine)) as client:
        await client.embedder_info()
        file.write_text("[[token]]\nname = ")  # half-written: the tokens before stand
        await client.embedder_info()
        assert "tokens stay as before" in caplog.text
        file.write_text(TOKENS.replace(hashlib.sha256(WRITER.encode()).hexdigest(), "0" * 64))
        with pytest.raises(UnauthenticatedError):
            await client.embedder_info()
        mine.write_text(READER)
        await client.embedder_info()


async def test_health_needs_no_token(serve: Serve, tmp_path: Path) -> None:
    address = await serve(tokens_file=tokens_file(tmp_path))
    probe = [sys.executable, "-m", "serving.probe", address]
    done = subprocess.Popen(probe)
    assert await asyncio.to_thread(done.wait, 30) == 0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "one at least"),
        ("token = 3", "one at least"),
        ("[[token]]\nname = ", "Invalid value"),
        ('[[token]]\nname = "a"\nscopes = ["read"]', "token 1: .*one of token and sha256"),
        ('[[token]]\nname = "a"\ntoken = "short"\nscopes = ["read"]', "token 1: token: .*16"),
        (f'[[token]]\nname = "a"\ntoken = "{READER}"\nscopes = []', "token 1: scopes"),
        (f'[[token]]\nname = "a"\ntoken = "{READER}"\nscopes = ["all"]', "token 1: scopes.0"),
        (f'[[token]]\nname = "a"\ntoken = "{READER}"\nscopes = ["read"]\nrate = "x"', "rate"),
        (f'[[token]]\nname = "a"\ntoken = "{READER}"\nscopes = ["read"]\nratio = "x"', "ratio"),
        (TOKENS + TOKENS, "same name"),
        (TOKENS + f'[[token]]\nname = "b"\ntoken = "{READER}"\nscopes = ["read"]', "same secret"),
    ],
)
def test_mistakes_in_the_tokens_file_are_named(
    tmp_path: Path, content: str, complaint: str
) -> None:
    with pytest.raises(FailedPreconditionError, match=complaint) as raised:
        read_tokens(tokens_file(tmp_path, content))
    assert READER not in raised.value.message


def test_a_tokens_file_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    file = tokens_file(tmp_path)
    file.chmod(0o644)
    with pytest.raises(FailedPreconditionError, match="chmod"):
        read_tokens(file)
    with pytest.raises(FailedPreconditionError, match="No such file"):
        read_tokens(tmp_path / "none")


def test_every_method_has_a_scope() -> None:
    names = {f"/{method.containing_service.full_name}/{method.name}" for method in methods()}
    assert set(SCOPES) - names == {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}
    assert names < set(SCOPES)
    reads = {name for name, scope in SCOPES.items() if scope is Scope.READ}
    assert not [name for name in reads if "Delete" in name or "Put" in name or "Ingest" in name]


# --- The client -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"key_file": "a"}, "certificate_file"),
        ({"certificate_file": "a"}, "key_file"),
        ({"ca_file": "/no/such/file"}, "ca_file"),
        ({"token_file": "/no/such/file"}, "token_file"),
        ({"token_file": os.devnull}, "token_file"),
    ],
)
def test_bad_settings_of_the_client_are_named(values: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        foretell.Client("127.0.0.1:1", settings=secured(**values))
    assert raised.value.field == field


class Context:
    """Of a call that nobody sent."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None


async def test_too_many_calls_at_once_are_told_when_to_come_back() -> None:
    stage = ConcurrentCalls(1, 1)
    context: Any = Context()
    one, other, health = (Call(method, context, False) for method in ("/a/b", "/a/c", OPEN + "x/y"))
    stage.begin(one)
    stage.begin(health)
    with pytest.raises(ResourceExhaustedError) as raised:
        stage.begin(other)
    assert raised.value.retry_after_s
    stream, another = (Call("/a/w", context, True) for _ in range(2))
    stage.begin(stream)  # streams have a number of their own
    with pytest.raises(ResourceExhaustedError, match="streams"):
        stage.begin(another)
    stage.end(health)
    stage.end(one)
    stage.begin(other)


async def test_a_stream_ends_when_its_token_goes(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "STREAM_LOOK_S", 0.05)
    file = tokens_file(tmp_path)
    address = await serve(tokens_file=file)
    settings = secured(token_file=token_file(tmp_path, WRITER))
    async with foretell.AsyncClient(address, settings=settings) as client:
        changes = client.watch_items()
        assert (await anext(changes)).seq == 1
        file.write_text(TOKENS.replace(hashlib.sha256(WRITER.encode()).hexdigest(), "0" * 64))
        with pytest.raises(UnauthenticatedError):
            await asyncio.wait_for(anext(changes), 20)


async def test_reflection_needs_a_token_too(serve: Serve, tmp_path: Path) -> None:
    address = await serve(tokens_file=tokens_file(tmp_path))
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with grpc.aio.insecure_channel(address) as channel:

        async def code(data: bytes, *metadata: tuple[str, str]) -> grpc.StatusCode:
            call: Any = channel.stream_stream(method)
            stream = call(iter([data]), metadata=metadata)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stream.read()
                stream.cancel()  # after an answer it would wait for the next question
                return grpc.StatusCode.OK
            found: grpc.StatusCode = await stream.code()
            return found

        assert await code(b"") is grpc.StatusCode.UNAUTHENTICATED
        shown = ("authorization", f"Bearer {WRITER}")
        assert await code(b"\x3a\x00", shown) is grpc.StatusCode.OK
        assert await code(b"\x3a\xff", shown) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ("localhost:1", "localhost:1"),
        ("127.0.0.1:1,127.0.0.2:2", "ipv4:127.0.0.1:1,127.0.0.2:2"),
        ("[::1]:1, [::2]:2", "ipv6:[::1]:1,[::2]:2"),
        ("unix:/tmp/a", "unix:/tmp/a"),
    ],
)
def test_addresses(addresses: str, expected: str) -> None:
    assert target(addresses) == expected


@pytest.mark.parametrize(
    "addresses", ["a:1,b:2", "127.0.0.1:1,", "127.0.0.1:1,[::1]:1", "127.0.0.1:0,127.0.0.1:1"]
)
def test_bad_lists_of_addresses_are_named(addresses: str) -> None:
    with pytest.raises(InvalidArgumentError, match="IP:PORT"):
        target(addresses)


async def test_of_two_servers_each_gets_its_share_and_one_may_stop(tmp_path: Path) -> None:
    servicers = [Servicer() for _ in range(2)]  # type: ignore[abstract]
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        settings = ServiceSettings(drain_s=0, grace_s=5)
        addresses = [
            await first.enter_async_context(running(settings, servicers[0].register)),
            await stack.enter_async_context(running(settings, servicers[1].register)),
        ]
        async with foretell.AsyncClient(",".join(addresses), timeout_s=20) as client:
            while not all(servicer.calls for servicer in servicers):
                await client.embedder_info()
            calls = [asyncio.create_task(client.embedder_info()) for _ in range(50)]
            await first.aclose()
            calls += [asyncio.create_task(client.embedder_info()) for _ in range(50)]
            assert all(info.version == "1" for info in await asyncio.gather(*calls))
