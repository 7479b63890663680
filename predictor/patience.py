"""How long a request waits for others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from foretell.errors import UnavailableError

RESERVE_SHARE = 0.2
"""Part of a request's time that stays for an answer without the embedder."""


class Patience:
    """Bounds all of a request's calls of the embedder by one moment.

    It is set so early that an answer without the embedder is still in time: a call that is cut
    off by it says nothing about the embedder, only about the caller's deadline.
    """

    def __init__(self, deadline: float | None) -> None:
        self._until = None
        if deadline is not None:
            now = asyncio.get_running_loop().time()
            self._until = now + (deadline - now) * (1 - RESERVE_SHARE)

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """For a block that calls the embedder.

        Raises:
            UnavailableError: the moment has come.
        """
        try:
            async with asyncio.timeout_at(self._until):
                yield
        except TimeoutError:
            raise UnavailableError("the deadline is near", reason="DEADLINE_NEAR") from None
