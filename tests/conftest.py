"""Fixtures that several packages' tests share. Real services run once per session."""

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from serving.process import ServiceProcess, started

# A busy machine is no failure, and a failure is the same in every run.
settings.register_profile("foretell", deadline=None, derandomize=True)
settings.load_profile("foretell")


@pytest.fixture(scope="session")
def embedder_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's embedder writes its log."""
    return tmp_path_factory.mktemp("embedder") / "log"


@pytest.fixture(scope="session")
def embedder_address(tmp_path_factory: pytest.TempPathFactory, embedder_log: Path) -> Iterator[str]:
    """A real embedder process with a data directory, shared by all tests of the session.

    Tests that need an empty `items` use collections of their own instead.
    """
    data = tmp_path_factory.mktemp("embedder-data")
    arguments = ["--port", "0", "--data-dir", str(data)]
    with started("embedder", arguments, log=embedder_log) as service:
        yield service.address


def _can_be_bound(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives ports that nobody listens on, each but once.

    They are for commands that cannot say which one they got. No connection of another test takes
    them meanwhile, for they lie below those that systems give by themselves; and processes that
    run tests at the same time begin in different places.
    """
    ports = (10_000 + number % 20_000 for number in itertools.count(97 * os.getpid()))
    return lambda: next(port for port in ports if _can_be_bound(port))


@pytest.fixture
def free_ports(free_port: Callable[[], int]) -> tuple[int, int]:
    """Two ports that nobody listens on."""
    return free_port(), free_port()


@pytest.fixture
def start_embedder(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts embedders of a test's own, with the given flags; stops those that still run."""
    with contextlib.ExitStack() as running:

        def start(*arguments: str) -> ServiceProcess:
            return running.enter_context(
                started("embedder", ["--port", "0", *arguments], log=tmp_path / "embedder.log")
            )

        yield start
