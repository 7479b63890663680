"""Credentials of a channel from files, read again when they change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import grpc

from foretell.errors import InvalidArgumentError

T = TypeVar("T")

LOOK_S: Final = 1.0
"""Least time between two looks at the files."""


@dataclass(frozen=True, slots=True)
class Security:
    """What a channel proves and what it asks for.

    Raises:
        InvalidArgumentError: settings that do not go together.
    """

    tls: bool = False
    """Whether to encrypt; any of the following files but the token's implies it."""
    ca_file: str = ""
    """PEM file of the authorities that may have signed the service's certificate; default: the
    system's."""
    certificate_file: str = ""
    """PEM file of this client's certificate, where the service asks for one."""
    key_file: str = ""
    """PEM file of its key."""
    server_name: str = ""
    """The name in the service's certificate, where it is not the address's."""
    token_file: str = ""
    """File with the bearer token that is sent with each call."""

    def __post_init__(self) -> None:
        if bool(self.certificate_file) != bool(self.key_file):
            raise InvalidArgumentError(
                "certificate_file and key_file go together",
                reason="BAD_SETTING",
                field="key_file" if self.certificate_file else "certificate_file",
            )

    @property
    def encrypted(self) -> bool:
        """Whether the channel uses TLS."""
        return self.tls or bool(self.ca_file or self.certificate_file)

    @property
    def tls_files(self) -> list[str]:
        """The files that `credentials` reads."""
        return [path for path in (self.ca_file, self.certificate_file, self.key_file) if path]

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a new channel; None without TLS.

        Raises:
            InvalidArgumentError: a file cannot be read.
        """
        if not self.encrypted:
            return None
        ca, key, certificate = (
            read_file(path, field).encode() if path else None
            for path, field in (
                (self.ca_file, "ca_file"),
                (self.key_file, "key_file"),
                (self.certificate_file, "certificate_file"),
            )
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)

    @property
    def options(self) -> list[tuple[str, str]]:
        """Channel arguments."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def read_file(path: str, field: str) -> str:
    """A file's text.

    Raises:
        InvalidArgumentError: it cannot be read; names the setting.
    """
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{field}: {path} cannot be read ({error})", reason="BAD_SETTING", field=field
        ) from None


class Watched(Generic[T]):
    """What was made of some files, made anew when one of them has changed.

    Args:
        paths: the files.
        make: reads them. What it raises reaches the caller at first; later the value before stands,
            and the next look tries again: a file may be half-written.
        failed: told of what `make` raised later, once for each state of the files.
    """

    def __init__(
        self,
        paths: list[str],
        make: Callable[[], T],
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._paths = [Path(path) for path in paths]
        self._make = make
        self._failed = failed
        self._state = self._stat()
        self._value = make()
        self._next = time.monotonic() + LOOK_S
        self._complained: object = None

    def get(self) -> T:
        """The value; cheap."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_S
            state = self._stat()
            if state != self._state:
                try:
                    self._value = self._make()
                    self._state = state
                except Exception as error:
                    if self._complained != state:
                        self._complained = state
                        self._failed(error)
        return self._value

    def _stat(self) -> list[tuple[int, int, int] | None]:
        states: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                found = path.stat()
            except OSError:
                states.append(None)
            else:
                states.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return states
