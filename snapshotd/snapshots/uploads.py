"""Uploads in the background: written down before they begin, resumed by the next daemon, retried for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from dumont.errors import Aborted, DumontError, ResourceExhausted, Unauthenticated, Unavailable
from snapshotd.model import Snapshot
from snapshotd.ports import SnapshotStore
from snapshotd.repository.object_keys import manifest_key
from snapshotd.repository.ports import ByteProgress
from snapshotd.repository.repository import Repository, check_conditional_create
from snapshotd.snapshots.upload_journal import PendingUpload, UploadJournal

log = structlog.get_logger(__name__)

# What may pass by itself, or by an operator's hand.
PASSING = (Unavailable, Unauthenticated, ResourceExhausted)
LONGEST_PAUSE = 60.0


@dataclass
class Upload:
    """One under way, and who wants to hear of its bytes. ``again``: what is published already is damaged."""

    again: bool = False
    task: asyncio.Task[None] | None = None
    listeners: list[ByteProgress] = field(default_factory=list)

    def tell(self, done: int, total: int) -> None:
        for listener in self.listeners:
            listener(done, total)


class Uploads:
    """One upload for each snapshot at a time; whoever asks for another joins it.

    Args:
        retry_seconds: first pause after a failure that may pass; each further one is twice as long.
        published: called with the id of a snapshot once it is published and noted.
    """

    def __init__(
        self,
        store: SnapshotStore,
        repository: Repository,
        journal: UploadJournal,
        published: Callable[[str], None],
        retry_seconds: float = 1.0,
    ) -> None:
        self.store = store
        self.repository = repository
        self.journal = journal
        self.published = published
        self.retry_seconds = retry_seconds
        self._running: dict[str, Upload] = {}
        self._checked = False
        self._reading = asyncio.Lock()

    def resume(self) -> None:
        """Go on with what the daemon before this one had begun."""
        for pending in self.journal.pending():
            log.info("upload resumed", snapshot=pending.snapshot)
            self._begin(pending)

    async def publish(self, snapshot: Snapshot, progress: ByteProgress, again: bool = False) -> None:
        """Upload a snapshot of this node and wait until it is published. Leaving does not end the upload.

        Args:
            snapshot: held by this node.
            progress: told of the bytes.
            again: send missing and damaged chunks also if it is published.

        Raises:
            AlreadyExists: another snapshot of that id is published.
            Aborted: UPLOAD_CANCELLED, the snapshot was deleted, or this daemon ends.
            DataLoss: its files are not what was captured.
        """
        name = snapshot.manifest.id
        upload = self._running.get(name)
        if upload is None:
            upload = self._begin(PendingUpload.of(name, self.repository.new_key(name)), again)
        upload.listeners.append(progress)
        assert upload.task is not None
        try:
            await asyncio.shield(upload.task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if upload.task.cancelled() and not (current and current.cancelling()):
                raise Aborted(
                    "UPLOAD_CANCELLED",
                    f"the upload of snapshots/{name} was given up",
                    metadata={"snapshot": name},
                ) from None
            raise
        finally:
            upload.listeners.remove(progress)

    def pending(self, snapshot: str) -> bool:
        """Whether it may be published any moment, or already is without this node having noted it."""
        return snapshot in self._running

    async def cancel(self, snapshot: str) -> None:
        """End the upload of a snapshot, if there is one, and forget that it was wanted."""
        upload = self._running.get(snapshot)
        if upload is not None and upload.task is not None:
            upload.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, DumontError):
                await upload.task
        self.journal.remove(snapshot)

    async def close(self) -> None:
        """End all; the next daemon resumes them."""
        tasks = [upload.task for upload in self._running.values() if upload.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, pending: PendingUpload, again: bool = False) -> Upload:
        upload = self._running[pending.snapshot] = Upload(again)
        upload.task = asyncio.create_task(self._upload(pending, upload), name=f"upload {pending.snapshot}")
        upload.task.add_done_callback(lambda task: self._ended(pending.snapshot, task))
        return upload

    def _ended(self, snapshot: str, task: asyncio.Task[None]) -> None:
        self._running.pop(snapshot, None)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, DumontError):
            log.error("upload failed", snapshot=snapshot, reason=error.reason, error=error.message)
        elif error is not None:
            log.error("upload failed by a defect", snapshot=snapshot, exc_info=error)

    async def _check_store(self) -> None:
        if not self._checked:
            await check_conditional_create(self.repository.objects)
            self._checked = True

    async def _upload(self, pending: PendingUpload, upload: Upload) -> None:
        snapshot = pending.snapshot
        pause = self.retry_seconds
        while True:
            try:
                await asyncio.to_thread(self.journal.add, pending)
                held = await self.store.get(snapshot)
                await self._check_store()
                await self._publish(held, pending, upload)
                await self.store.note_published(snapshot)
                break
            except PASSING as error:
                log.warning(
                    "upload interrupted",
                    snapshot=snapshot,
                    reason=error.reason,
                    error=error.message,
                    pause=pause,
                )
            except OSError as error:
                # This node's own disk, full perhaps; what was published is found published then.
                log.warning("upload interrupted", snapshot=snapshot, error=str(error), pause=pause)
            except DumontError:
                self.journal.remove(snapshot)
                raise
            # Jitter, so that nodes do not come back to a struggling store all at once.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(LONGEST_PAUSE, 2 * pause)
        self.journal.remove(snapshot)
        log.info("snapshot published", snapshot=snapshot)
        self.published(snapshot)

    async def _publish(self, held: Snapshot, pending: PendingUpload, upload: Upload) -> None:
        # Before the image files are had, which may mean to decrypt them: while the store is down that would
        # be for nothing, again and again.
        await self.repository.objects.stat(manifest_key(pending.snapshot))
        reader = f"upload of {pending.snapshot}"
        # One after the other: image files that are brought to memory for it should be those of one.
        async with self._reading:
            self.store.pin(reader, pending.snapshot)
            try:
                images = await self.store.images(held)
                await self.repository.publish(held.manifest, images, upload.tell, pending.key, upload.again)
            finally:
                await self.store.unpin(reader)
