"""Followers of a collection, as the predictor has: they go on after a restart where they were."""

from __future__ import annotations

import threading

from bench.crashing.embedder.check import ALIKE, differences
from foretell import Client
from foretell.errors import CancelledError, ForetellError, UnavailableError
from foretell.vectors import Vectors


class Follower:
    """Keeps a copy of a collection by WatchItems."""

    def __init__(self, collection: str) -> None:
        self._collection = collection
        self._vectors: dict[str, Vectors] = {}
        self._seq = 0
        self._thread: threading.Thread | None = None
        self._problem = ""

    def follow(self, client: Client) -> None:
        """Begins to follow, in a thread; it ends with the service, or when the client is closed."""
        self._thread = threading.Thread(target=self._run, args=(client, False))
        self._thread.start()

    def end(self) -> None:
        """Waits for the thread."""
        if self._thread is not None:
            self._thread.join()

    def catch_up(self, client: Client, vectors: dict[str, Vectors]) -> list[str]:
        """Reads on up to now; what is wrong with the copy then. It starts anew where anything is.

        Args:
            client: of the service after its restart.
            vectors: what the collection holds.
        """
        self._run(client, True)
        wrong = [self._problem] if self._problem else []
        wrong += [
            f"a follower of {self._collection} has another {id}"
            # Projected anew after a restart, a vector may differ in its last bits.
            for id in differences(vectors, self._vectors, ALIKE)
        ]
        if wrong:
            self._vectors, self._seq, self._problem = {}, 0, ""
        return wrong

    def _run(self, client: Client, only_catch_up: bool) -> None:
        try:
            for changes in client.watch_items(collection=self._collection, after_seq=self._seq):
                self._vectors |= zip(changes.ids, changes.vectors, strict=True)
                for id in changes.deleted_ids:
                    self._vectors.pop(id, None)
                self._seq = changes.seq
                if only_catch_up and changes.caught_up:
                    return
        except (UnavailableError, CancelledError):
            return
        except ForetellError as error:
            self._problem = f"a follower of {self._collection} was refused: {error!r}"
