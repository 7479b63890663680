"""The model that answers: activation, the swap in every process, deletion.

The active version is a row in the shared database. Every process looks at it with each heartbeat
and swaps by the same path, the one that was asked to activate included.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from foretell.errors import DeadlineExceededError, ForetellError
from foretell.predictor.v1 import model_service_pb2 as pb
from predictor import publishing, registry
from predictor.catalog import Catalog
from predictor.embedder import Embedder
from predictor.models import model_dir
from predictor.models.history import HISTORY_EVENTS
from predictor.models.version import Version
from predictor.processes import Presence
from serving.database import Database
from serving.idempotency import first_answer, once

log = logging.getLogger(__name__)

LEASE = "models"
"""Held while collections of a version are made or deleted."""

CATCH_UP_S = 30.0
"""How long a swap waits for the new version's vectors: without the embedder it goes on without
them, and they follow when it is back."""

LOOK_S = 0.05
"""Between two looks at what other processes have confirmed."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded version with the vectors that its histories need."""

    version: Version
    items: Catalog | None
    """None without an item head."""
    texts: Catalog | None
    """None where training saw no texts."""

    @property
    def name(self) -> str:
        """Of the version."""
        return self.version.config.version

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Position of each item that the version knew in training."""
        return {item_id: at for at, item_id in enumerate(self.version.item_ids)}

    @property
    def history_events(self) -> int:
        """Latest events of a user that its parts read."""
        if self.version.reads_whole_histories:
            return HISTORY_EVENTS
        return self.version.config.history_length

    def asked_for(self, k: int) -> int:
        """Items that Search is asked for where k are wanted; 0: the ranker finds enough alone."""
        ranker = self.version.ranker
        if ranker is None:
            return max(k, self.version.config.candidates)
        return ranker.searched if ranker.finds(k) else max(k, ranker.searched)

    @cached_property
    def type_index(self) -> dict[str, int]:
        """Index of each behavior type that the version knows."""
        return {name: at for at, name in enumerate(self.version.config.behavior_types)}


class Models:
    """This process's active model, and the changes to which is active."""

    def __init__(
        self, db: Database, data_dir: Path, embedder: Embedder, presence: Presence
    ) -> None:
        self.served: ServedModel | None = None
        self._db = db
        self._data_dir = data_dir
        self._embedder = embedder
        self._presence = presence
        self._generation = 0
        self._trouble = ""
        self._followers: list[asyncio.Task[None]] = []
        self._look = asyncio.Event()
        self._swapping = asyncio.Lock()
        self._changing = asyncio.Lock()

    def look(self) -> None:
        """Asks `run` to see whether another version is active."""
        self._look.set()

    async def run(self) -> None:
        """Swaps whenever another version is active, until it is cancelled."""
        while True:
            await self._look.wait()
            self._look.clear()
            await self.swap()

    async def swap(self, loaded: Version | None = None) -> None:
        """Serves the active version, if that is another than the one served.

        A version that cannot be loaded leaves the one before in place; the reason is logged and
        reported to the other processes, and the next look tries again.
        """
        async with self._swapping:
            active = registry.active(self._db.connection())
            if active.generation == self._generation:
                return
            try:
                if loaded is None or loaded.config.version != active.version:
                    loaded = await asyncio.to_thread(self._load, active.version)
            except ForetellError as error:
                if error.message != self._trouble:
                    log.error("version %s cannot be served: %s", active.version, error.message)
                    self._trouble = error.message
                    await self._presence.report(self._generation, error.message)
                return
            await self._serve(loaded)
            self._generation, self._trouble = active.generation, ""
            log.info("serving version %s", active.version)
            await self._presence.report(active.generation)

    async def activate(
        self, request: pb.ActivateModelRequest, deadline: float
    ) -> pb.ActivateModelResponse:
        """Publishes a version and makes it the active one in all live processes.

        Args:
            request: names the version.
            deadline: of the event loop's clock.

        Raises:
            NotFoundError: it is not registered.
            FailedPreconditionError: the embedder's encoder is not the one it was trained for.
            InvalidArgumentError: its files are damaged.
            DeadlineExceededError: the embedder does not answer, or not all processes have
                followed; these will.
        """
        connection = self._db.connection()
        answered = first_answer(connection, request, pb.ActivateModelResponse)
        if answered is not None:
            await self._confirmed(request.version, deadline)
            return answered
        where = f"the embedder at {self._embedder.address}"
        async with _by(deadline, f"publishing the version to {where}"), self._exclusive():
            registry.get(connection, request.version)
            loaded = await asyncio.to_thread(self._load, request.version)
            await self._publish(loaded)
            apply = once(
                lambda connection: _activate(connection, request.version),
                request,
                pb.ActivateModelResponse,
            )
            response, _ = await self._db.write(apply)
        async with _by(deadline, "swapping"):
            await self.swap(loaded)
        await self._confirmed(request.version, deadline)
        return response

    async def delete(
        self, request: pb.DeleteModelRequest, deadline: float
    ) -> pb.DeleteModelResponse:
        """Deletes a version's collections, its row and its files.

        Raises:
            NotFoundError: it is not registered.
            FailedPreconditionError: it is the active one.
            DeadlineExceededError: the embedder does not answer.
        """
        name = request.version
        connection = self._db.connection()
        answered = first_answer(connection, request, pb.DeleteModelResponse)
        if answered is not None:
            return answered
        async with _by(deadline, "deleting the version's collections"), self._exclusive():
            registry.check_deletable(connection, name)
            await publishing.unpublish(self._embedder, name)
            apply = once(
                lambda connection: _remove(connection, name), request, pb.DeleteModelResponse
            )
            response, _ = await self._db.write(apply)
            await asyncio.to_thread(registry.remove_files, self._data_dir, name)
        return response

    async def close(self) -> None:
        """Stops following the collections."""
        await _cancel(self._followers)

    def _load(self, name: str) -> Version:
        version = model_dir.load(registry.models_dir(self._data_dir) / name)
        version.network.freeze()
        version.check_golden()  # warms the network up as well
        return version

    async def _publish(self, version: Version) -> None:
        """Sees to it that the version's collections are complete; under the lease.

        Collections of its name that this registration has not finished may be half a publication,
        or another model's: they are made anew.
        """
        name = version.config.version
        model = registry.get(self._db.connection(), name)
        await publishing.check_encoder(self._embedder, version.config.encoder)
        if model.published and await publishing.published(self._embedder, version):
            return
        await self._db.write(lambda c: registry.set_published(c, name, False))
        await publishing.unpublish(self._embedder, name)
        await publishing.publish(self._embedder, version)
        await self._db.write(lambda c: registry.set_published(c, name, True))

    async def _restore(self, version: Version) -> None:
        """Publishes a version again whose collections the embedder has lost."""
        async with self._exclusive():  # the first process does it, the others find it done
            await self._publish(version)

    async def _serve(self, version: Version) -> None:
        """Follows the version's vectors and, once they are there, answers with it."""
        config = version.config
        items = texts = None
        if config.has_items:
            items = Catalog(publishing.items_collection(config.version), config.dims)
        if config.has_texts:
            texts = Catalog(publishing.behaviors_collection(config.version), config.dims)
        catalogs = [catalog for catalog in (items, texts) if catalog is not None]
        followers = [
            asyncio.create_task(catalog.follow(self._embedder, lambda: self._restore(version)))
            for catalog in catalogs
        ]
        try:
            async with asyncio.timeout(CATCH_UP_S if self._embedder.available else 0):
                for catalog in catalogs:
                    await catalog.caught_up.wait()
        except TimeoutError:
            log.warning("version %s goes on without vectors until they come", config.version)
        except asyncio.CancelledError:
            await _cancel(followers)
            raise
        self.served = ServedModel(version, items, texts)
        await _cancel(self._followers)
        self._followers = followers

    @contextlib.asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One change of versions at a time, over all processes."""
        async with self._changing:
            while not await self._presence.hold(LEASE):
                await asyncio.sleep(LOOK_S)
            try:
                yield
            finally:
                await self._presence.release(LEASE)

    async def _confirmed(self, name: str, deadline: float) -> None:
        """Returns when all live processes serve the version.

        Raises:
            DeadlineExceededError: names those that do not.
        """
        while True:
            connection = self._db.connection()
            active = registry.active(connection)
            if active.version != name:  # another activation came after this one
                return
            late = [
                process
                for process in self._presence.live()
                if process.generation < active.generation
            ]
            if not late:
                return
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                names = ", ".join(
                    f"{process.name} ({process.note})" if process.note else process.name
                    for process in late
                )
                raise DeadlineExceededError(
                    f"version {name!r} is active; not served yet by {names}",
                    reason="PROCESSES_LATE",
                    metadata={"processes": ",".join(process.name for process in late)},
                )
            # Not beyond the deadline: what is left behind it is for the answer's way.
            await asyncio.sleep(min(LOOK_S, left_s))


def _activate(connection: sqlite3.Connection, name: str) -> pb.ActivateModelResponse:
    activation = registry.activate(connection, name)
    return pb.ActivateModelResponse(
        model=registry.get(connection, name).to_proto(name), previous_version=activation.previous
    )


def _remove(connection: sqlite3.Connection, name: str) -> pb.DeleteModelResponse:
    registry.remove(connection, name)
    return pb.DeleteModelResponse()


@contextlib.asynccontextmanager
async def _by(deadline: float, what: str) -> AsyncIterator[None]:
    """Bounds a block in time.

    Raises:
        DeadlineExceededError: `what` was not done.
    """
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceededError(f"{what} was not done in time", reason="TOO_SLOW") from None


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
