"""Estimates by a clock that the tests move."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from foretell.errors import DeadlineExceededError, ResourceExhaustedError
from serving.admission import STRETCH, WINDOW_S, Admission

SLACK = 10


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    """One that has measured 100 a second."""
    made = Admission(0.5, SLACK, clock)
    work(made, clock, 100, 1.0)
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def work(admission: Admission, clock: Clock, amount: int, seconds: float) -> None:
    with admission.admitted(amount):
        clock.now += seconds


def wait(admission: Admission, stack: ExitStack, *amounts: int) -> None:
    for amount in amounts:
        stack.enter_context(admission.admitted(amount))


def test_all_is_admitted_while_no_rate_is_known(clock: Clock, stack: ExitStack) -> None:
    wait(Admission(0.5, SLACK, clock), stack, *[1_000] * 100)


def test_refuses_where_the_wait_is_longer_than_allowed(
    admission: Admission, stack: ExitStack
) -> None:
    wait(admission, stack, *[5] * 11)
    with pytest.raises(ResourceExhaustedError) as raised:
        wait(admission, stack, 5)
    assert raised.value.reason == "OVERLOADED"
    assert raised.value.retry_after_s == pytest.approx(0.55)


def test_is_free_again_when_calls_end(admission: Admission) -> None:
    for _ in range(3):
        with ExitStack() as stack:
            wait(admission, stack, *[10] * 6)


def test_a_small_call_waits_only_for_as_much_of_a_large_one(
    admission: Admission, stack: ExitStack
) -> None:
    wait(admission, stack, 10_000, 10)


def test_a_large_call_may_wait_in_proportion(admission: Admission, stack: ExitStack) -> None:
    wait(admission, stack, *[10_000] * (STRETCH + 1))
    with pytest.raises(ResourceExhaustedError):
        wait(admission, stack, 10_000)


def test_what_is_little_always_waits(clock: Clock, stack: ExitStack) -> None:
    admission = Admission(0.5, SLACK, clock)
    work(admission, clock, 100, 1_000.0)
    wait(admission, stack, *[1] * SLACK)
    with pytest.raises(ResourceExhaustedError):
        wait(admission, stack, 1)


def test_refuses_what_would_be_late(admission: Admission, stack: ExitStack) -> None:
    wait(admission, stack, 30)
    with pytest.raises(ResourceExhaustedError):  # 0.2 s alone and 0.2 s of the other
        stack.enter_context(admission.admitted(20, 0.35))
    stack.enter_context(admission.admitted(20, 0.45))
    with pytest.raises(DeadlineExceededError, match=r"about 0\.5 s and the deadline is in 0\.4 s"):
        stack.enter_context(admission.admitted(50, 0.4))
    with pytest.raises(DeadlineExceededError, match="has passed"):
        stack.enter_context(admission.admitted(1, 0.0))


def test_a_rate_from_a_bad_moment_does_not_refuse_for_ever(clock: Clock) -> None:
    admission = Admission(0.5, SLACK, clock)
    work(admission, clock, 100, 100.0)
    refused = 0
    while refused < 100:
        try:
            with admission.admitted(100, 30.0):
                break
        except DeadlineExceededError:
            refused += 1
    assert 1 <= refused < 10


def test_the_rate_follows_what_is_measured(
    admission: Admission, clock: Clock, stack: ExitStack
) -> None:
    for _ in range(30):
        work(admission, clock, 100, 10.0)
    with pytest.raises(DeadlineExceededError, match=r"about 0\.9\d* s"):
        stack.enter_context(admission.admitted(10, 0.5))


def test_neither_failed_calls_nor_idle_time_nor_little_work_count(
    admission: Admission, clock: Clock, stack: ExitStack
) -> None:
    for _ in range(30):
        with suppress(KeyError), admission.admitted(100):
            clock.now += WINDOW_S
            raise KeyError
        clock.now += 1_000
        work(admission, clock, 1, 10.0)
    with pytest.raises(DeadlineExceededError, match=r"about 0\.5 s"):
        stack.enter_context(admission.admitted(50, 0.4))
