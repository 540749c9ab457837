"""Uploads in the background. Each is in a journal before it begins, retried until it succeeds, and resumed by
the next daemon.
"""

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

# Failures that may pass on their own or when an operator acts, so that the upload is retried.
PASSING = (Unavailable, Unauthenticated, ResourceExhausted)
LONGEST_PAUSE = 60.0


@dataclass
class Upload:
    """An upload under way.

    Attributes:
        again: the snapshot is published, but damaged.
        listeners: are told of its bytes.
    """

    again: bool = False
    task: asyncio.Task[None] | None = None
    listeners: list[ByteProgress] = field(default_factory=list)

    def report(self, done: int, total: int) -> None:
        """Tell all listeners how many bytes are done."""
        for listener in self.listeners:
            listener(done, total)


class Uploads:
    """The uploads of this node: at most one for each snapshot, which later callers join.

    Args:
        published: called with the id of a snapshot once it has been published.
        retry_seconds: the first pause after a failure that may pass. Each further one is twice as long.
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
        """Go on with the uploads that an earlier daemon had begun."""
        for pending in self.journal.pending():
            log.info("upload_resumed", snapshot=pending.snapshot)
            self._begin(pending)

    async def publish(self, snapshot: Snapshot, progress: ByteProgress, again: bool = False) -> None:
        """Upload a snapshot of this node and wait until it is published. Cancelling the wait does not end it.

        Args:
            snapshot: held by this node.
            progress: is told of the bytes.
            again: send missing and damaged chunks even if the snapshot is published.

        Raises:
            AlreadyExists: another snapshot of that id is published.
            Aborted: UPLOAD_CANCELLED, the snapshot was deleted or this daemon ends.
            DataLoss: its files are not those that were captured.
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
                    f"the upload of snapshots/{name} was cancelled",
                    metadata={"snapshot": name},
                ) from None
            raise
        finally:
            upload.listeners.remove(progress)

    def pending(self, snapshot: str) -> bool:
        """Whether an upload is under way, so that the snapshot may be published at any moment."""
        return snapshot in self._running

    async def cancel(self, snapshot: str) -> None:
        """Cancel the upload of a snapshot, if there is one, and remove it from the journal."""
        upload = self._running.get(snapshot)
        if upload is not None and upload.task is not None:
            upload.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, DumontError):
                await upload.task
        self.journal.remove(snapshot)

    async def close(self) -> None:
        """Stop all uploads. The next daemon resumes them."""
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
            log.error("upload_failed", snapshot=snapshot, reason=error.reason, error=error.message)
        elif error is not None:
            log.error("upload_defect", snapshot=snapshot, exc_info=error)

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
                    "upload_interrupted",
                    snapshot=snapshot,
                    reason=error.reason,
                    error=error.message,
                    pause=pause,
                )
            except OSError as error:
                # A failure of this node's own disk, which may be full. A retry finds what was published
                # already.
                log.warning("upload_interrupted", snapshot=snapshot, error=str(error), pause=pause)
            except DumontError:
                self.journal.remove(snapshot)
                raise
            # Jitter, so that nodes do not all return to a struggling store at once.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(LONGEST_PAUSE, 2 * pause)
        self.journal.remove(snapshot)
        log.info("snapshot_published", snapshot=snapshot)
        self.published(snapshot)

    async def _publish(self, held: Snapshot, pending: PendingUpload, upload: Upload) -> None:
        # The image files may have to be decrypted first. While the store is down, each attempt would do that
        # in vain.
        await self.repository.objects.stat(manifest_key(pending.snapshot))
        reader = f"upload of {pending.snapshot}"
        # One upload at a time reads image files, so that those of one snapshot alone are decrypted into
        # memory.
        async with self._reading:
            self.store.pin(reader, pending.snapshot)
            try:
                images = await self.store.images(held)
                await self.repository.publish(held.manifest, images, upload.report, pending.key, upload.again)
            finally:
                await self.store.unpin(reader)
