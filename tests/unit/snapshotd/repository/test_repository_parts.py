"""The store's parts: chunks, codec, keys, the key file, the journal."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dumont.errors import (
    DataLoss,
    DumontError,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from snapshotd.adapters.object_store.directory import DirectoryObjects
from snapshotd.adapters.object_store.key_file import KeyFile
from snapshotd.adapters.object_store.trusted_keys import TrustedKeysFile
from snapshotd.model import ImageFile
from snapshotd.repository.chunk_writer import ChunkWriter, Unpack
from snapshotd.repository.chunking import SMALL, Span, cut, join, read, size_of
from snapshotd.repository.codec import OVERHEAD, Codec
from snapshotd.repository.model import CHUNK, Piece, WrappedKey
from snapshotd.repository.repository import Repository
from snapshotd.repository.signing import Signer, TrustedKeys
from snapshotd.repository.workers import Limits, Workers
from snapshotd.snapshots.upload_journal import PendingUpload, UploadJournal
from tests.unit.snapshotd.repository.world import MemoryObjects, a_key_file, a_node, a_signer, an_image, noise


@settings(deadline=None)
@given(plain=st.binary(min_size=1, max_size=2000), encrypted=st.booleans())
def test_a_packed_chunk_opens_to_what_it_was_and_hardly_grows(plain: bytes, encrypted: bool) -> None:
    codec = Codec("s1", bytes(32) if encrypted else None)
    name = codec.name(plain)
    stored = codec.pack(name, plain)
    assert len(stored) <= len(plain) + OVERHEAD
    assert codec.open(name, stored, len(plain)) == plain


@settings(deadline=None)
@given(stored=st.binary(max_size=300), encrypted=st.booleans())
def test_whatever_else_is_opened_is_refused(stored: bytes, encrypted: bool) -> None:
    codec = Codec("s1", bytes(32) if encrypted else None)
    with pytest.raises(DataLoss):
        codec.open("ab" * 32, stored, 100)


def test_a_chunk_is_sealed_to_its_snapshot_and_name() -> None:
    codec, plain = Codec("s1", bytes(32)), noise(1000)
    name = codec.name(plain)
    stored = codec.pack(name, plain)
    assert codec.pack(name, plain) != stored
    for other in (Codec("s2", bytes(32)), Codec("s1", bytes(31) + b"\1")):
        with pytest.raises(DataLoss):
            other.open(other.name(plain), stored, len(plain))


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_chunk_in_work_takes_no_more_than_three_times_its_size(encrypted: bool) -> None:
    codec, plain = Codec("s1", bytes(32) if encrypted else None), noise(1 << 20)
    name = codec.name(plain)
    tracemalloc.start()
    try:
        stored = codec.pack(name, plain)
        _, packing = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        kept, _ = tracemalloc.get_traced_memory()
        codec.open(name, stored, len(plain))
        _, opening = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # beside the plain bytes; an opened chunk unpacks into memory of its thread, which this does not see
    assert len(plain) <= packing <= 2.1 * len(plain)
    assert opening - kept <= 1.1 * len(plain)


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    codec = Codec("s1", None)
    plain = noise(10_000)
    assert len(codec.pack(codec.name(plain), plain)) == len(plain) + 1
    assert len(codec.pack("", b"a" * 10_000)) < 100


def a_file(name: str, size: int) -> ImageFile:
    return ImageFile(name, size, "0" * 64)


def test_a_file_is_parts_of_chunks_and_holes() -> None:
    large = a_file("a.img", 4 * CHUNK + SMALL)
    names = dict(zip(cut([large]), ["x", None, None, "y", "z"], strict=True))
    (file,) = join([large], names)
    assert file.size == large.size
    assert [(extent.chunk, extent.size) for extent in file.extents] == [
        ("x", CHUNK), ("", 2 * CHUNK), ("y", CHUNK), ("z", SMALL),
    ]  # fmt: skip
    assert [(piece.offset, piece.size, piece.chunk) for piece in file.pieces()] == [
        (0, CHUNK, "x"),
        (3 * CHUNK, CHUNK, "y"),
        (4 * CHUNK, SMALL, "z"),
    ]


def test_small_files_share_a_chunk() -> None:
    files = [a_file("a.img", 10), a_file("empty.img", 0), a_file("large.img", SMALL), a_file("z.img", 20)]
    contents = list(cut(files))
    together = (Span("a.img", 0, 10), Span("z.img", 0, 20))
    assert contents == [(Span("large.img", 0, SMALL),), together]
    joined = {file.name: list(file.pieces()) for file in join(files, dict(zip(contents, "xy", strict=True)))}
    assert [(piece.chunk, piece.start, piece.size) for piece in joined["z.img"]] == [("y", 10, 20)]
    assert joined["empty.img"] == []


@given(sizes=st.lists(st.sampled_from([0, 1, SMALL - 1, SMALL, CHUNK, CHUNK + 1]), max_size=300))
def test_every_byte_is_in_one_chunk_and_no_chunk_is_too_large(sizes: list[int]) -> None:
    files = [a_file(f"f-{number}.img", size) for number, size in enumerate(sizes)]
    contents = list(cut(files))
    assert all(0 < size_of(content) <= CHUNK for content in contents)
    names = {content: str(number) for number, content in enumerate(contents)}
    assert [file.size for file in join(files, names)] == sizes


def test_a_file_cut_short_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"12345")
    with pytest.raises(DataLoss):
        read(tmp_path, (Span("a.img", 0, 6),))


def test_a_signing_key_is_made_once_and_private(tmp_path: Path) -> None:
    first, second = Signer.open(tmp_path / "key"), Signer.open(tmp_path / "key")
    assert first.key_id == second.key_id
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(FailedPrecondition, match="read by others"):
        Signer.open(tmp_path / "key")


def test_a_list_of_trusted_keys_is_read_with_its_comments() -> None:
    own, friend, stranger = a_signer(), a_signer(), a_signer()
    trusted = TrustedKeys.parse(f"# nodes\n\n{friend.line()} node two\n", own)
    for signer in (own, friend):
        trusted.verify(signer.key_id, b"text", signer.sign(b"text"))
    for signer, text in ((stranger, b"text"), (friend, b"other")):
        with pytest.raises(DumontError):
            trusted.verify(signer.key_id, text, signer.sign(b"text"))


@pytest.mark.parametrize("line", ["rsa AAAA", "ed25519", "ed25519 AAAA", "ed25519 !!!!", "x"])
def test_a_line_that_is_no_key_is_named(line: str) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        TrustedKeys.parse(f"\n{line}", a_signer())
    assert refusal.value.reason == "TRUSTED_KEYS_UNREADABLE"
    assert refusal.value.metadata["line"] == "2"


class TestTrustedKeysFile:
    """The keys of a file count from the moment they stand there."""

    def keys(self, path: Path, *signers: Signer) -> TrustedKeysFile:
        self.write(path, *signers)
        return TrustedKeysFile(path, a_signer())

    def write(self, path: Path, *signers: Signer) -> None:
        # Moved there whole, as an editor or a configuration manager does it.
        scratch = path.with_suffix(".new")
        scratch.write_text("".join(f"{signer.line()}\n" for signer in signers))
        scratch.replace(path)

    def test_a_key_counts_when_it_is_added_and_no_more_when_it_is_taken_away(self, tmp_path: Path) -> None:
        first, second = a_signer(), a_signer()
        trusted = self.keys(tmp_path / "keys", first)
        with pytest.raises(PermissionDenied):
            trusted.verify(second.key_id, b"text", second.sign(b"text"))
        self.write(tmp_path / "keys", second)
        trusted.verify(second.key_id, b"text", second.sign(b"text"))
        with pytest.raises(PermissionDenied):
            trusted.verify(first.key_id, b"text", first.sign(b"text"))

    @pytest.mark.parametrize("text", [None, "ed25519 half-a-li"])
    def test_while_it_cannot_be_read_the_last_keys_count(self, tmp_path: Path, text: str | None) -> None:
        path, friend = tmp_path / "keys", a_signer()
        trusted = self.keys(path, friend)
        known = trusted.ids
        path.unlink()
        if text is not None:
            path.write_text(text)
        trusted.verify(friend.key_id, b"text", friend.sign(b"text"))
        assert trusted.ids == known
        stranger = a_signer()
        with pytest.raises(PermissionDenied):
            trusted.verify(stranger.key_id, b"text", stranger.sign(b"text"))

    async def test_what_was_refused_is_listed_once_its_signer_is_trusted(self, tmp_path: Path) -> None:
        objects, signer, own = MemoryObjects(), a_signer(), a_signer()
        await a_node(objects, signer).publish(an_image(tmp_path / "images"), tmp_path / "images")
        store = Repository(objects, own, self.keys(tmp_path / "keys"), workers=1, threads=1)
        assert await store.list() == []
        self.write(tmp_path / "keys", signer)
        assert [found.manifest.id for found in await store.list()] == ["s1"]
        self.write(tmp_path / "keys")
        assert await store.list() == []


def test_a_key_file_wraps_for_one_context(tmp_path: Path) -> None:
    keys = KeyFile(a_key_file(tmp_path / "key"))
    wrapped = keys.wrap(b"k" * 32, b"s1")
    assert keys.unwrap(wrapped, b"s1") == b"k" * 32
    assert keys.key_id == KeyFile(tmp_path / "key").key_id
    for keeper, data, context in (
        (keys, wrapped, b"s2"),
        (keys, wrapped[:-1], b"s1"),
        (keys, b"", b"s1"),
        (KeyFile(a_key_file(tmp_path / "other")), wrapped, b"s1"),
    ):
        with pytest.raises(DataLoss):
            keeper.unwrap(data, context)


@pytest.mark.parametrize(
    ("content", "mode"), [(None, 0o600), (b"short", 0o600), (b"x" * 64, 0o600), (bytes(32), 0o644)]
)
def test_a_key_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, mode: int) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(FailedPrecondition) as refusal:
        KeyFile(path)
    assert refusal.value.reason == "KEY_FILE_UNUSABLE"


def test_the_journal_remembers_uploads_until_they_are_done(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path / "uploads")
    journal.open()
    sealed = WrappedKey("key", b"\0\1wrapped")
    journal.add(PendingUpload.of("s1", None))
    journal.add(PendingUpload.of("s2", sealed))
    (tmp_path / "uploads" / "broken.json").write_text("{")

    resumed = UploadJournal(tmp_path / "uploads").pending()

    assert [(upload.snapshot, upload.key) for upload in resumed] == [("s1", None), ("s2", sealed)]
    journal.remove("s1")
    journal.remove("s1")
    assert [upload.snapshot for upload in journal.pending()] == ["s2"]


@given(cores=st.integers(1, 1024))
def test_every_core_has_work_and_chunks_in_flight_stay_below_336_mib(cores: int) -> None:
    limits = Limits.of(cores)
    assert limits.threads == min(cores, 12)
    assert limits.threads <= limits.calls < limits.chunks
    assert limits.chunks * 3 * CHUNK <= 336 << 20


async def test_cancelled_work_has_ended_when_the_cancellation_is_seen() -> None:
    workers = Workers(1, 1)
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait(10)
        ended.set()

    task = asyncio.create_task(workers.compute(work))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    await asyncio.wait([task], timeout=0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    workers.close()


async def test_a_cancellation_is_not_hidden_by_what_a_worker_raises_on_its_way_out() -> None:
    workers, waiting = Workers(2, 1), asyncio.Event()

    async def work(item: int) -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise Unavailable("STORE_UNAVAILABLE", "cut")

    task = asyncio.create_task(workers.each(range(2), work))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    workers.close()


async def test_an_error_of_a_worker_is_raised_as_it_is() -> None:
    workers = Workers(2, 1)

    async def work(item: int) -> None:
        raise Unavailable("STORE_UNAVAILABLE", f"cut at {item}")

    with pytest.raises(Unavailable, match="cut"):
        await workers.each(range(9), work)
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()
    workers.close()


async def test_a_disk_that_fills_up_in_the_middle_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_node(MemoryObjects())
    snapshot = await store.publish(an_image(tmp_path / "images"), tmp_path / "images")

    def full(places: ChunkWriter, pieces: list[Piece], unpack: Unpack) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ChunkWriter, "fill", full)
    (tmp_path / "into").mkdir()
    with pytest.raises(ResourceExhausted) as refusal:
        await store.fetch(snapshot, tmp_path / "into")
    assert refusal.value.reason == "DISK_FULL"


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a//b", "a/../b", "", ".hidden", "a\0b", "a/"])
async def test_a_directory_never_leaves_itself(tmp_path: Path, key: str) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    with pytest.raises(InvalidArgument):
        await objects.put(key, b"")
    assert not (tmp_path / "x").exists()


async def test_a_directory_that_is_full_or_broken_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    for number, reason in ((errno.ENOSPC, "STORE_FULL"), (errno.EIO, "STORE_UNAVAILABLE")):

        def fail(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(DumontError) as refusal:
            await objects.put("a", b"data")
        assert refusal.value.reason == reason
        assert [path for path in (tmp_path / "objects").rglob("*") if path.is_file()] == []
