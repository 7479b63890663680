"""Page tokens: where a list goes on, opaque to its caller."""

from __future__ import annotations

import base64
import json
import zlib
from typing import TypeVar

from foretell import checks

T = TypeVar("T", int, str)


def encode(position: tuple[int, int] | tuple[int, str] | None, subject: str) -> str:
    """The token of a position in the list of `subject`; empty for None, the end."""
    if position is None:
        return ""
    text = json.dumps([*position, _stamp(subject)], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode()


def decode(token: str, kind: type[T], subject: str) -> tuple[int, T] | None:
    """The position of a token of the same list; None, the beginning, for the empty one.

    Raises:
        InvalidArgumentError: the token is not of this list.
    """
    if not token:
        return None
    try:
        first, second, stamp = json.loads(base64.urlsafe_b64decode(token))
    except (ValueError, TypeError):
        raise checks.bad_page_token() from None
    if type(first) is not int or type(second) is not kind or stamp != _stamp(subject):
        raise checks.bad_page_token()
    if abs(first) >= 2**63 or (isinstance(second, int) and abs(second) >= 2**63):
        raise checks.bad_page_token()
    return first, second


def _stamp(subject: str) -> int:
    return zlib.crc32(subject.encode())
