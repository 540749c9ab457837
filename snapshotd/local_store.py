"""The store of this node's own snapshots as configured: image files on its disk, or sealed there."""

from __future__ import annotations

from pathlib import Path

import structlog

from dumont.errors import FailedPrecondition
from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.adapters.snapshot_store.directory import STAGED, DirectoryStore
from snapshotd.adapters.snapshot_store.sealed import SealedStore
from snapshotd.config import Settings
from snapshotd.failpoints import Failpoints
from snapshotd.instances.journal import Journal
from snapshotd.object_store import SIGNING_KEY
from snapshotd.repository.signing import Signer
from snapshotd.system.mounts import UNSEALED_SOURCE
from snapshotd.system.tmpfs import Tmpfs

log = structlog.get_logger(__name__)

# Below the directory of the plain ones; no snapshot can have this id.
SEALED = ".sealed"


def open_store(settings: Settings, failpoints: Failpoints, journal: Journal) -> DirectoryStore | SealedStore:
    """Open it, as an earlier daemon left it.

    Args:
        journal: of the instances that this one will take over, some of which map unsealed image files.

    Raises:
        FailedPrecondition: ENCRYPTION_KEY_MISSING, KEY_FILE_UNUSABLE, PLAIN_SNAPSHOTS or
            UNSEALED_MEMORY_UNUSABLE.
    """
    root = settings.cache_dir or settings.state_dir / "snapshots"
    plain = DirectoryStore(root, settings.threads)
    # Also where none may be: what it removes was never a snapshot, and is readable.
    plain.open()
    memory = _memory(settings)
    if not settings.encrypt_local:
        give_back_memory(settings, journal)
        if sealed := _ids(root / SEALED):
            log.warning(
                "encrypted snapshots are left alone until this node runs with --encrypt-local again",
                snapshots=sealed,
            )
        return plain
    if settings.encryption_key_file is None:
        raise FailedPrecondition(
            "ENCRYPTION_KEY_MISSING", "--encrypt-local needs a key; name it with --encryption-key-file"
        )
    _refuse_plain(root)
    store = SealedStore(
        root / SEALED,
        DirectoryStore(memory.directory, settings.threads),
        Signer.open(settings.state_dir / SIGNING_KEY),
        KeyFile(settings.encryption_key_file),
        settings.threads,
        failpoints,
    )
    _mount(memory)
    for instance in journal.read():
        if instance.snapshot:
            store.pin(instance.id, instance.snapshot)
    store.open()
    return store


def give_back_memory(settings: Settings, journal: Journal) -> None:
    """Unmount what snapshots were unsealed to, unless an instance goes on: its shim has this very mount,
    and its next capture is staged there.
    """
    if not journal.read():
        _memory(settings).unmount()


def _memory(settings: Settings) -> Tmpfs:
    """Where image files of sealed snapshots are while they are used."""
    return Tmpfs(UNSEALED_SOURCE, settings.state_dir / "unsealed")


def _mount(memory: Tmpfs) -> None:
    try:
        memory.directory.mkdir(mode=0o700, exist_ok=True)
        if not memory.mounted() and (why := memory.mount("mode=0700", "noswap")):
            log.warning(
                "this kernel cannot keep unsealed snapshots out of the swap; have none, or an encrypted one",
                error=why,
            )
    except OSError as error:
        raise FailedPrecondition(
            "UNSEALED_MEMORY_UNUSABLE",
            f"no tmpfs can be had at {memory.directory} for snapshots while they are used: {error}; run "
            "without --encrypt-local",
            metadata={"directory": str(memory.directory)},
        ) from error


def _refuse_plain(root: Path) -> None:
    # Also without a manifest: it is readable all the same.
    plain = sorted(path.name for path in root.iterdir() if path.name != SEALED)
    if plain:
        raise FailedPrecondition(
            "PLAIN_SNAPSHOTS",
            f"{root} holds snapshots that are not encrypted: {', '.join(plain)}; start without "
            "--encrypt-local and delete them, then start with it",
            metadata={"snapshots": ",".join(plain)},
        )


def _ids(sealed: Path) -> list[str]:
    return sorted(path.name for path in sealed.glob("*") if not path.name.startswith(STAGED))
