"""Typed errors: raised by the services, sent as google.rpc.Status, raised again by the client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "foretell"
DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata key under which gRPC carries a google.rpc.Status."""


class ForetellError(Exception):
    """An error with a status code, a reason and where it applies the field at fault.

    Attributes:
        message: what is wrong, for people.
        reason: what is wrong, for programs: UPPER_SNAKE, stable.
        field: the request's field at fault, such as `items[3].id`; empty where none is.
        metadata: values that belong to the reason.
        retry_after_s: seconds after which a repetition may succeed; None where unknown.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code.name
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def to_status(self) -> status_pb2.Status:
        """The error as google.rpc.Status with one ErrorInfo, as AIP-193 asks."""
        details: list[
            error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo
        ] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)]
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            details.append(retry)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class InvalidArgumentError(ForetellError):
    """The request can never succeed as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(ForetellError):
    """A single thing that the request names does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(ForetellError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPreconditionError(ForetellError):
    """The state of the service forbids it; something else must happen first."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhaustedError(ForetellError):
    """Too much at once; `retry_after_s` says when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceededError(ForetellError):
    """It was not done in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnavailableError(ForetellError):
    """The service cannot be reached or is not ready."""

    code = grpc.StatusCode.UNAVAILABLE


class UnauthenticatedError(ForetellError):
    """No valid credentials."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(ForetellError):
    """The credentials do not allow it."""

    code = grpc.StatusCode.PERMISSION_DENIED


class CancelledError(ForetellError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class InternalError(ForetellError):
    """A bug of the service's, or an answer that no foretell service gives."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[int, type[ForetellError]] = {
    kind.code.value[0]: kind for kind in ForetellError.__subclasses__()
}


def from_status(status: status_pb2.Status) -> ForetellError:
    """The typed error of a google.rpc.Status (of an element of a batch, or of a call)."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad_request, retry):
            detail.Unpack(message)  # leaves it alone where the type differs
    violations = bad_request.field_violations
    return _BY_CODE.get(status.code, InternalError)(
        status.message,
        reason=info.reason,
        field=violations[0].field if violations else "",
        metadata=info.metadata,
        retry_after_s=(
            retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
        ),
    )


def from_rpc_error(error: grpc.RpcError) -> ForetellError:
    """The typed error of a failed call, of the sync or the async gRPC API."""
    status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    trailing = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    for key, value in trailing:
        if key == DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:  # not ours: the plain code and text stand
                break
    return from_status(status)
