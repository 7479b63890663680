"""Page tokens: where a list goes on, unreadable enough that nobody builds on it."""

from __future__ import annotations

import base64

from foretell import checks

_BETWEEN = "\n"
"""Ids have no control characters."""


def make_token(last: str, of: str) -> str:
    """The token after `last`, the position of an element in the list `of`."""
    return base64.urlsafe_b64encode(f"{of}{_BETWEEN}{last}".encode()).decode()


def read_token(token: str, of: str) -> str:
    """`last` of a token; empty for the first page.

    Raises:
        InvalidArgumentError: it is of another list, or no token at all.
    """
    if not token:
        return ""
    try:
        found, last = base64.b64decode(token, b"-_", validate=True).decode().split(_BETWEEN)
    except ValueError:
        raise checks.bad_page_token() from None
    if found != of:
        raise checks.bad_page_token()
    return last
