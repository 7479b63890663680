"""A network that delays, holds and resets; and services to have faults with."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from foretell import Client
from predictor.models.version import EncoderConfig
from serving.process import ServiceProcess, started
from tests.predictor.conftest import (  # noqa: F401  # fixtures
    absent,
    eventually,
    make_version,
    register,
    register_in,
    start_predictor,
    write_version,
)

PIECE = 65_536
"""Bytes that are passed on at once."""


class Proxy:
    """Passes connections on to a service, as well as a test lets it.

    Attributes:
        address: host:port where it listens.
        delay_s: how long each piece of an answer stays here.
        resets: connections that were reset.
        held: pieces of answers that had to wait for `resume`.
    """

    def __init__(self, target: str, port: int = 0) -> None:
        self.delay_s = 0.0
        self.resets = 0
        self.held = 0
        self._target = target
        self._port = port
        self._lifetimes: Iterator[int | None] = itertools.repeat(None)
        self._connections: set[_Connection] = set()
        self._passing: int | None = None
        self._resumed = asyncio.Event()
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(listening)))
        self._thread.start()
        listening.wait()

    def hold(self, but_for: int = 0) -> None:
        """Answers stay here, but for so many of their bytes, until `resume`."""
        self._do(lambda: self._hold(but_for))

    def resume(self) -> None:
        """Ends `hold`."""
        self._do(lambda: self._hold(None))

    def reset(self) -> None:
        """Resets all connections; what is held of them is lost."""
        self._do(self._reset)

    def reset_after(self, lifetimes: Iterable[int | None]) -> None:
        """Resets connections that begin from now on after so many bytes each; None: never."""
        self._lifetimes = iter(lifetimes)

    def close(self) -> None:
        """Resets all connections and listens no more."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _do(self, work: Callable[[], object]) -> None:
        async def done() -> None:
            work()

        asyncio.run_coroutine_threadsafe(done(), self._loop).result(10)

    def _reset(self) -> None:
        for connection in tuple(self._connections):
            connection.reset()

    def _hold(self, but_for: int | None) -> None:
        self._passing = but_for
        (self._resumed.set if but_for is None else self._resumed.clear)()

    async def _run(self, listening: threading.Event) -> None:
        self._loop, self._closed = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        listening.set()
        await self._closed.wait()
        server.close()
        while self._connections:  # those that come at the last moment too
            self._reset()
            await asyncio.sleep(0.01)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        connection = _Connection(self, writer, next(self._lifetimes))
        self._connections.add(connection)
        try:
            answers, service = await asyncio.open_connection(host, int(port))
            await connection.run(reader, answers, service)
        except OSError:  # nobody is there, or has left
            pass
        finally:
            self._connections.discard(connection)
            writer.transport.abort()

    async def pass_answer(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        """Passes on a piece of an answer, when it may be."""
        await asyncio.sleep(self.delay_s)
        while self._passing is not None:
            part, piece = piece[: self._passing], piece[self._passing :]
            self._passing -= len(part)
            writer.write(part)
            if not piece:
                return
            self.held += 1
            await self._resumed.wait()
        writer.write(piece)


class _Connection:
    """A caller's connection and the one to the service."""

    def __init__(self, proxy: Proxy, caller: asyncio.StreamWriter, lifetime: int | None) -> None:
        self._proxy = proxy
        self._caller = caller
        self._left = lifetime
        self._passing: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def reset(self) -> None:
        """Ends the caller's side with RST in place of FIN."""
        self._proxy.resets += 1
        linger = struct.pack("ii", 1, 0)
        self._caller.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self._caller.transport.abort()
        self._passing.cancel()

    async def run(
        self,
        requests: asyncio.StreamReader,
        answers: asyncio.StreamReader,
        service: asyncio.StreamWriter,
    ) -> None:
        """Until one side ends, or it is reset."""
        ways = [self._pass(requests, service, False), self._pass(answers, self._caller, True)]
        tasks = [asyncio.ensure_future(way) for way in ways]
        self._passing = asyncio.ensure_future(
            asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        )
        with contextlib.suppress(asyncio.CancelledError):
            await self._passing
        for task in tasks:
            task.cancel()
        service.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answering: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE):
                if self._left is not None and len(piece) >= self._left:
                    writer.write(piece[: self._left])
                    self.reset()
                    return
                if self._left is not None:
                    self._left -= len(piece)
                if answering:
                    await self._proxy.pass_answer(piece, writer)
                else:
                    writer.write(piece)
                await writer.drain()


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Puts a proxy before an address: `proxy(ADDRESS, port=...)`."""
    with contextlib.ExitStack() as proxies:

        def before(target: str, port: int = 0) -> Proxy:
            made = Proxy(target, port)
            proxies.callback(made.close)
            return made

        yield before


@pytest.fixture(scope="session")
def encoder(embedder_address: str) -> EncoderConfig:
    """The encoder of the session's embedder, for versions that `make_version` writes."""
    with Client(embedder_address) as client:
        info = client.embedder_info()
    return EncoderConfig(name=info.encoder, pooling=info.pooling, cols=info.cols)


@pytest.fixture
def own_embedder(tmp_path: Path) -> Iterator[ServiceProcess]:
    """An embedder of the test's own, with data in `tmp_path`/embedder."""
    flags = ["--port", "0", "--precision", "float32", "--data-dir", str(tmp_path / "embedder")]
    with started("embedder", flags, log=tmp_path / "embedder.log") as service:
        yield service
