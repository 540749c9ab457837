"""The ports of the repository: an object store, a wrapping key, and a list of trusted keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeAlias, TypeVar

from snapshotd.repository.model import ObjectInfo

T = TypeVar("T")
BytesLike: TypeAlias = bytes | bytearray | memoryview


class Run(Protocol):
    """Runs blocking work in a thread."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Run ``work`` in a thread."""
        ...


# Called with the number of bytes done, which never decreases, and the number of all bytes.
ByteProgress = Callable[[int, int], None]


class ObjectStore(Protocol):
    """Immutable objects by key. A key consists of parts of ``[A-Za-z0-9._-]``, joined by ``/``.

    Every method raises ``DumontError``: ``Unavailable`` if a retry may succeed, ``Unauthenticated`` if the
    credentials are refused, ``ResourceExhausted`` if there is no space.
    """

    async def put(self, key: str, data: bytes) -> None:
        """Write an object atomically, replacing one of the same key."""
        ...

    async def create(self, key: str, data: bytes) -> None:
        """Write an object that must not exist. Of several concurrent calls for a key exactly one succeeds.

        Raises:
            AlreadyExists: there is an object of that key.
        """
        ...

    async def get(self, key: str, limit: int) -> bytes:
        """Read an object of at most ``limit`` bytes.

        Raises:
            NotFound: there is none.
            DataLoss: OBJECT_TOO_LARGE, it is larger; no more than the limit was read.
        """
        ...

    async def read(self, key: str, limit: int, use: Callable[[BytesLike], T], run: Run) -> T:
        """Read an object and use its bytes in the thread that read them.

        Args:
            use: called once with all bytes, in that thread; its exceptions are raised here.
            run: runs the read and ``use`` in a thread. If it is cancelled, the thread may go on.

        Raises:
            NotFound, DataLoss: as :meth:`get`.
        """
        ...

    async def stat(self, key: str) -> ObjectInfo | None:
        """The size and age of an object; None if there is none."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key begins with ``prefix``, in no particular order."""
        ...

    async def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        ...


class KeyWrapper(Protocol):
    """Encrypts data keys with a key that never leaves its keeper: a key file, or a KMS."""

    @property
    def key_id(self) -> str:
        """Identifies the wrapping key without revealing it."""
        ...

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        """Encrypt a data key, bound to a context without which it cannot be decrypted."""
        ...

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """Decrypt a data key.

        Raises:
            DataLoss: KEY_DAMAGED, it was wrapped by another key or for another context.
        """
        ...


class Trust(Protocol):
    """The keys whose signatures are trusted, which may change while the node runs."""

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the trusted keys. When they change, earlier decisions must be made again."""
        ...

    def verify(self, signer: str, document: bytes, signature: bytes) -> None:
        """Check a signature.

        Raises:
            PermissionDenied: UNTRUSTED_SIGNER, the key is not trusted.
            DataLoss: SIGNATURE_WRONG, the key did not sign this document.
        """
        ...
