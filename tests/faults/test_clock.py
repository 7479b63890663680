"""A clock that jumps: deadlines hold, events keep their order, nothing is done twice."""

import mmap
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from foretell import Client, Event, FallbackReason, Item, Method
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.faults.conftest import Proxy

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]

HOUR = 3_600

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static int64_t jump(void) {
    static volatile int64_t *seconds;
    if (!seconds) {
        int file = open(getenv("FAULTS_CLOCK"), O_RDONLY);
        seconds = mmap(0, sizeof *seconds, PROT_READ, MAP_SHARED, file, 0);
    }
    return *seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""
"""Adds the seconds in a file to the time of day, of a process that loads it first; what counts from
the machine's start goes on as it is."""


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`jump(SECONDS)` puts the clock of services that start after this so far from the true one."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library, file = (tmp_path / name for name in ("clock.c", "clock.so", "clock"))
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    file.write_bytes(bytes(8))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAULTS_CLOCK", str(file))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 8) as memory:

        def set_to(seconds: int) -> None:
            memory[:] = struct.pack("q", seconds)

        yield set_to


def test_a_clock_that_jumps(
    jump: Callable[[int], None], start_predictor: Start, embedder_address: str,
    proxy: Callable[[str], "Proxy"], eventually: Eventually,
) -> None:  # fmt: skip
    between = proxy(embedder_address)
    service = start_predictor(between.address, "--embedder-deadline-ms", "1000")
    items = [Item("clock tea", "green tea"), Item("clock shoes", "red shoes")]
    told: list[str] = []
    with (
        ThreadPoolExecutor(1) as calls,
        Client(embedder_address, service.address, timeout_s=10) as client,
    ):
        client.upsert_items(items)
        first = [Event("ann", "view", item_id="clock tea")]
        assert client.ingest_events(first, request_id="first").accepted == 1
        for seconds in (0, HOUR, -HOUR, 20 * HOUR, 0):
            jump(seconds)
            events = [Event("bob", "search", text=f"{len(told)} {n}") for n in range(3)]
            assert client.ingest_events(events).accepted == 3
            told += [event.text for event in events]
            listed = client.list_events("bob", page_size=1_000).elements
            assert [event.text for event in reversed(listed)] == told
            assert listed[0].timestamp is not None
            ahead = listed[0].timestamp - datetime.now(UTC)
            assert ahead > timedelta(seconds=seconds - 60)
            # The kept answer of a write counts as long as the jumps are shorter than it is kept.
            assert client.ingest_events(first, request_id="first").accepted == 1
            assert len(client.list_events("ann").elements) == 1
            # Calls to the embedder are neither late at once nor wait for ever ...
            answer = client.predict("ann", k=1)
            assert [item.method for item in answer.items] == [Method.CONTENT]
            # ... nor are those during which the clock jumps.
            held = between.held
            between.hold()
            waiting = calls.submit(client.predict, "ann", k=1)
            eventually(lambda held=held: between.held > held)  # type: ignore[misc]
            jump(-seconds)
            answer = waiting.result(10)
            assert answer.items[0].method is Method.PERSONAL_FREQUENCY
            assert answer.fallback_reason is FallbackReason.NO_MODEL
            between.resume()
            eventually(lambda: client.predictor_info().embedder_available)
            eventually(lambda: client.predictor_info().pending_texts == 0)

        soon = Event("eve", "buy", datetime.now(UTC) + timedelta(hours=23), item_id="clock tea")
        jump(-2 * HOUR)
        (failure,) = client.ingest_events([soon]).failures
        assert failure.error.field == "events[0].timestamp"
        jump(0)
        assert client.ingest_events([soon]).accepted == 1
        client.delete_items([item.id for item in items])
