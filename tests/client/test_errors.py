"""Errors to google.rpc.Status and back."""

from collections.abc import Sequence

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from foretell import errors

KINDS = errors.ForetellError.__subclasses__()
Trailing = Sequence[tuple[str, bytes | str]] | None
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    st.sampled_from(KINDS),
    WORDS,
    st.from_regex(r"[A-Z][A-Z_]{0,20}", fullmatch=True),
    WORDS,
    st.dictionaries(WORDS, WORDS, max_size=3),
    st.none() | st.floats(0, 1e6),
)
def test_an_error_goes_and_comes_unchanged(
    kind: type[errors.ForetellError],
    message: str,
    reason: str,
    field: str,
    metadata: dict[str, str],
    retry_after_s: float | None,
) -> None:
    error = kind(
        message, reason=reason, field=field, metadata=metadata, retry_after_s=retry_after_s
    )
    status = status_pb2.Status.FromString(error.to_status().SerializeToString())
    back = errors.from_status(status)
    assert type(back) is kind
    assert (back.message, back.reason, back.field) == (message, reason, field)
    assert back.metadata == metadata
    if retry_after_s is None:
        assert back.retry_after_s is None
    else:
        assert back.retry_after_s == pytest.approx(retry_after_s, abs=1e-6)
    assert str(back) == message


def details(status: status_pb2.Status) -> list[str]:
    return [detail.TypeName() for detail in status.details]


def test_a_status_has_one_error_info_and_what_else_there_is_to_say() -> None:
    plain = errors.NotFoundError("nothing").to_status()
    assert plain.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert details(plain) == ["google.rpc.ErrorInfo"]
    info = error_details_pb2.ErrorInfo.FromString(plain.details[0].value)
    assert (info.domain, info.reason) == ("foretell", "NOT_FOUND")
    full = errors.ResourceExhaustedError("full", field="texts", retry_after_s=0.25).to_status()
    assert details(full) == [
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
        "google.rpc.RetryInfo",
    ]


def test_every_code_has_an_error_of_its_own() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert grpc.StatusCode.UNKNOWN not in codes


@pytest.mark.parametrize("code", [2, 9_999, -1])
def test_a_code_that_no_service_sends_is_an_internal_error(code: int) -> None:
    error = errors.from_status(status_pb2.Status(code=code, message="odd"))
    assert type(error) is errors.InternalError
    assert error.message == "odd"


class RpcError(grpc.RpcError):
    """A failed call, as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, text: str, trailing: Trailing) -> None:
        self._values = code, text, trailing

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str:
        return self._values[1]

    def trailing_metadata(self) -> Trailing:  # type: ignore[override]
        return self._values[2]


def test_a_calls_error_is_that_of_its_status() -> None:
    sent = errors.InvalidArgumentError("k is 0", reason="BAD_K", field="k")
    trailing: Trailing = [
        ("other", "x"),
        (errors.DETAILS_KEY, sent.to_status().SerializeToString()),
    ]
    error = errors.from_rpc_error(RpcError(grpc.StatusCode.INVALID_ARGUMENT, "k is 0", trailing))
    assert type(error) is errors.InvalidArgumentError
    assert (error.reason, error.field) == ("BAD_K", "k")


@pytest.mark.parametrize(
    "trailing",
    [None, [], [("other", "x")], [(errors.DETAILS_KEY, b"\xff\xff")]],
    ids=["none", "empty", "others", "damaged"],
)
def test_without_a_status_code_and_text_stand(
    trailing: Trailing,
) -> None:
    error = errors.from_rpc_error(RpcError(grpc.StatusCode.UNAVAILABLE, "no route", trailing))
    assert type(error) is errors.UnavailableError
    assert (error.message, error.reason) == ("no route", "UNAVAILABLE")


def test_foreign_details_are_left_aside() -> None:
    status = errors.NotFoundError("nothing", reason="NO_ITEM").to_status()
    foreign = Any()
    foreign.Pack(error_details_pb2.Help())
    status.details.insert(0, foreign)
    assert errors.from_status(status).reason == "NO_ITEM"
