"""Who may call: TLS, bearer tokens with scopes, rates and quotas; all from files."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import ssl
import stat
import time
import tomllib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import grpc
import limits as rates
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from foretell._security import Watched
from foretell.errors import (
    FailedPreconditionError,
    ForetellError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from serving.calls import Call
from serving.settings import ServiceSettings

log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a token allows."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


SCOPES: Final[Mapping[str, Scope]] = {
    f"/foretell.{service}/{method}": scope
    for service, scope, methods in (
        (
            "embedder.v1.EmbedderService",
            Scope.READ,
            "Embed GetItems ListItems Search ListCollections WatchItems GetInfo",
        ),
        ("embedder.v1.EmbedderService", Scope.WRITE, "UpsertItems PutVectors DeleteItems"),
        ("embedder.v1.EmbedderService", Scope.ADMIN, "CreateCollection DeleteCollection"),
        ("predictor.v1.EventService", Scope.READ, "ListEvents"),
        ("predictor.v1.EventService", Scope.WRITE, "IngestEvents DeleteUser"),
        ("predictor.v1.PredictionService", Scope.READ, "Predict PredictMany Rank"),
        ("predictor.v1.ModelService", Scope.READ, "ListModels GetInfo"),
        ("predictor.v1.ModelService", Scope.ADMIN, "ActivateModel DeleteModel"),
    )
    for method in methods.split()
} | {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.READ}
"""What each method asks for; what is not here asks for admin."""

OPEN: Final = "/grpc.health.v1."
"""Methods that anybody may call, and that no limit holds up."""

STREAM_LOOK_S: Final = 2.0
"""Between two looks whether the tokens of open streams still allow them."""


# --- TLS ------------------------------------------------------------------------------------------


def check_binding(settings: ServiceSettings) -> None:
    """Refuses to be open to the network without saying so.

    Raises:
        FailedPreconditionError: the address is not this machine's alone, and neither a certificate
            nor tokens are asked for.
    """
    closed = settings.tls_certificate_file or settings.tokens_file or settings.allow_insecure
    if not closed and not _loopback(settings.host):
        raise FailedPreconditionError(
            f"host: {settings.host} can be reached from other machines: set tls_certificate_file "
            "and tls_key_file, or tokens_file, or allow_insecure where the network itself is "
            "trusted",
            reason="INSECURE_BINDING",
        )


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def server_credentials(settings: ServiceSettings) -> grpc.ServerCredentials | None:
    """Credentials that follow their files; None where no certificate is set.

    A rotation may be seen half-done: what does not fit together is logged and passed over.

    Raises:
        FailedPreconditionError: the files do not fit together, or cannot be read.
    """
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    authorities = settings.tls_client_ca_file
    if certificate is None and key is None and authorities is None:
        return None
    if certificate is None or key is None:
        missing = "tls_key_file" if key is None else "tls_certificate_file"
        raise FailedPreconditionError(f"{missing}: is missing", reason="BAD_CERTIFICATE")

    def read() -> grpc.ServerCertificateConfiguration:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            if authorities is not None:
                context.load_verify_locations(authorities)
            return grpc.ssl_server_certificate_configuration(
                [(key.read_bytes(), certificate.read_bytes())],
                authorities.read_bytes() if authorities is not None else None,
            )
        except (OSError, ssl.SSLError) as error:
            raise FailedPreconditionError(
                f"the certificate {certificate} and its key {key} cannot be used: {error}",
                reason="BAD_CERTIFICATE",
            ) from None

    files = [str(path) for path in (certificate, key, authorities) if path is not None]
    watched = Watched(
        files, read, lambda error: log.error("certificates stay as before: %s", error)
    )
    # The fetcher runs at each handshake; an unchanged object is no work.
    return grpc.dynamic_ssl_server_credentials(
        watched.get(), watched.get, require_client_authentication=authorities is not None
    )


# --- Tokens ---------------------------------------------------------------------------------------


class Token(BaseModel):
    """An entry of the tokens file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    token: str = Field(default="", repr=False)
    sha256: str = Field(default="", repr=False, pattern="^([0-9a-f]{64})?$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    rate: str = ""
    quota: str = ""

    @field_validator("token")
    @classmethod
    def _long_enough(cls, value: str) -> str:
        if value and (len(value) < 16 or not value.isascii() or not value.isprintable()):
            # pydantic's message would show the value
            raise ValueError("a token has 16 characters or more, printable ASCII")
        return value

    @field_validator("rate", "quota")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            rates.parse(value)  # raises ValueError
        return value

    @model_validator(mode="after")
    def _one_secret(self) -> Token:
        if bool(self.token) == bool(self.sha256):
            raise ValueError("one of token and sha256 is needed")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token."""
        if self.sha256:
            return bytes.fromhex(self.sha256)
        return hashlib.sha256(self.token.encode()).digest()

    @property
    def limits(self) -> list[rates.RateLimitItem]:
        """Of its calls."""
        return [rates.parse(value) for value in (self.rate, self.quota) if value]


def read_tokens(file: Path) -> list[Token]:
    """The tokens of a file.

    Raises:
        FailedPreconditionError: it cannot be read, others may read it, or an entry is wrong; the
            message names the entry and the key and shows no secret.
    """
    try:
        if stat.S_IMODE(file.stat().st_mode) & stat.S_IROTH:
            raise _bad_tokens(file, "everybody may read it: chmod o-r")
        with file.open("rb") as opened:
            content = tomllib.load(opened)
    except (OSError, ValueError) as error:
        raise _bad_tokens(file, str(error)) from None
    entries = content.get("token")
    if not isinstance(entries, list) or not entries or len(content) > 1:
        raise _bad_tokens(file, "it holds [[token]] tables, one at least, and nothing else")
    tokens = []
    for number, entry in enumerate(entries):
        try:
            tokens.append(Token.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _bad_tokens(file, f"token {number + 1}: {where}: {first['msg']}") from None
    for what in ("name", "digest"):
        values = [getattr(token, what) for token in tokens]
        if len(set(values)) < len(values):
            raise _bad_tokens(file, f"two tokens have the same {what.replace('digest', 'secret')}")
    return tokens


def _bad_tokens(file: Path, what: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"tokens_file: {file}: {what}", reason="BAD_TOKENS_FILE")


class Tokens:
    """Asks each call for a token that allows it. A stage.

    The file is read again when it changes; one that is wrong then is logged, and the tokens before
    stand. A stream ends some seconds after its token has gone. Counts of rates and quotas are this
    process's and begin anew with it.

    Raises:
        FailedPreconditionError: as `read_tokens`.
    """

    def __init__(self, file: Path) -> None:
        self._tokens = Watched(
            [str(file)],
            lambda: [(token, token.digest, token.limits) for token in read_tokens(file)],
            lambda error: log.error("tokens stay as before: %s", error),
        )
        self._counts = FixedWindowRateLimiter(MemoryStorage())
        self._streams: dict[Call, str] = {}
        self._looking: asyncio.TimerHandle | None = None

    def begin(self, call: Call) -> None:
        """Finds the caller by its token.

        Raises:
            UnauthenticatedError: no token, or none that is known.
            PermissionDeniedError: the token lacks the method's scope.
            ResourceExhaustedError: it has had its calls.
        """
        if call.method.startswith(OPEN):
            return
        presented = _presented(call)
        token, limits = self._allowed(call, presented)
        call.caller = token.name
        for limit in limits:
            if not self._counts.hit(limit, token.name):
                reset = self._counts.get_window_stats(limit, token.name).reset_time
                raise _exhausted(token, limit, reset)
        if call.streaming:
            self._streams[call] = presented
            if self._looking is None:
                self._look_later()

    def end(self, call: Call) -> None:
        """Looks at its token no more."""
        self._streams.pop(call, None)

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(STREAM_LOOK_S, self._look)

    def _look(self) -> None:
        """Ends the streams whose tokens allow them no more."""
        self._looking = None
        for call, presented in list(self._streams.items()):
            try:
                self._allowed(call, presented)
            except ForetellError as error:
                call.stop(error)
        if self._streams:
            self._look_later()

    def _allowed(self, call: Call, presented: str) -> tuple[Token, list[rates.RateLimitItem]]:
        token, limits = self._known(presented)
        scope = SCOPES.get(call.method, Scope.ADMIN)
        if scope not in token.scopes:
            raise PermissionDeniedError(
                f"the token {token.name!r} lacks the scope {scope}",
                reason="SCOPE_MISSING",
                metadata={"scope": scope, "token": token.name},
            )
        return token, limits

    def _known(self, presented: str) -> tuple[Token, list[rates.RateLimitItem]]:
        digest = hashlib.sha256(presented.encode()).digest()
        found = None
        for token, known, limits in self._tokens.get():  # all of them: the time tells nothing
            if hmac.compare_digest(digest, known):
                found = token, limits
        if found is None:
            raise UnauthenticatedError("the token is not known", reason="TOKEN_UNKNOWN")
        return found


def _presented(call: Call) -> str:
    for key, value in call.context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            kind, _, token = value.partition(" ")
            if kind.lower() == "bearer" and token:
                return token
    raise UnauthenticatedError(
        "a token is needed: metadata `authorization: Bearer TOKEN`", reason="TOKEN_MISSING"
    )


def _exhausted(token: Token, limit: rates.RateLimitItem, reset: float) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"the token {token.name!r} has had its {limit}",
        reason="QUOTA_EXCEEDED",
        metadata={"token": token.name, "limit": str(limit)},
        retry_after_s=max(0.001, reset - time.time()),
    )


# --- Load -----------------------------------------------------------------------------------------


class ConcurrentCalls:
    """Refuses calls beyond a number in flight. A stage.

    Args:
        most: calls with one answer.
        most_streams: calls whose answer is a stream: they stay open, and hold up no others.
    """

    def __init__(self, most: int, most_streams: int) -> None:
        self._most = {False: most, True: most_streams}
        self._running = {False: 0, True: 0}

    def begin(self, call: Call) -> None:
        """Counts it.

        Raises:
            ResourceExhaustedError: too many are in flight.
        """
        if call.method.startswith(OPEN):
            return
        kind = call.streaming
        if self._running[kind] >= self._most[kind]:
            what = "streams are open" if kind else "calls are in flight"
            raise ResourceExhaustedError(
                f"{self._most[kind]:,} {what}",
                reason="TOO_MANY_STREAMS" if kind else "TOO_MANY_CALLS",
                retry_after_s=5.0 if kind else 0.1,
            )
        self._running[kind] += 1

    def end(self, call: Call) -> None:
        """Counts it no more."""
        if not call.method.startswith(OPEN):
            self._running[call.streaming] -= 1


def stages(settings: ServiceSettings) -> Sequence[Tokens | ConcurrentCalls]:
    """What holds calls up, in order.

    Raises:
        FailedPreconditionError: the tokens file is wrong.
    """
    tokens = [Tokens(settings.tokens_file)] if settings.tokens_file is not None else []
    return [*tokens, ConcurrentCalls(settings.max_concurrent_calls, settings.max_streams)]
