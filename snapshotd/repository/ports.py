"""What the store needs of the world: objects in a bucket or a directory, and a key that wraps keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeAlias, TypeVar

from snapshotd.repository.model import ObjectInfo

T = TypeVar("T")
BytesLike: TypeAlias = bytes | bytearray | memoryview


class Run(Protocol):
    """Does blocking work in some thread."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


# Called with the bytes done and the bytes in all, never with fewer done than before.
ByteProgress = Callable[[int, int], None]


class ObjectStore(Protocol):
    """Named immutable bytes. Keys are parts of ``[A-Za-z0-9._-]`` joined by ``/``.

    Every method raises ``DumontError``: ``Unavailable`` when a repetition may help, ``Unauthenticated``
    when the credentials are refused, ``ResourceExhausted`` when there is no room.
    """

    async def put(self, key: str, data: bytes) -> None:
        """Write an object whole, over one of the same key if there is one."""
        ...

    async def create(self, key: str, data: bytes) -> None:
        """Write an object that must not exist; of several at once exactly one does.

        Raises:
            AlreadyExists: another was there first.
        """
        ...

    async def get(self, key: str, limit: int) -> bytes:
        """Read an object of at most ``limit`` bytes.

        Raises:
            NotFound: there is none.
            DataLoss: it is larger; no more than the limit was read.
        """
        ...

    async def read(self, key: str, limit: int, use: Callable[[BytesLike], T], run: Run) -> T:
        """Read an object as ``get`` does and use its bytes in one thread, without a way back in between.

        Args:
            use: called once, with the bytes, after they are all there; what it raises is raised.
            run: has the thread wait for the bytes and for ``use``. Cancelled, it may leave it to go on.

        Raises:
            NotFound, DataLoss: as ``get``.
        """
        ...

    async def stat(self, key: str) -> ObjectInfo | None:
        """Size and age without the bytes; None when there is no such object."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key begins with ``prefix``, in no order."""
        ...

    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...


class KeyWrapper(Protocol):
    """Encrypts data keys with a key that never leaves its keeper: a key file, or a KMS."""

    @property
    def key_id(self) -> str:
        """Names the wrapping key without giving it away."""
        ...

    def wrap(self, data_key: bytes, context: bytes) -> bytes: ...

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The data key; raises ``DataLoss`` when it was wrapped by another key or for another context."""
        ...


class Trust(Protocol):
    """Whose signatures count, which may change while the node runs."""

    @property
    def ids(self) -> frozenset[str]:
        """The trusted keys; what was refused or accepted under other ones is to be looked at again."""
        ...

    def verify(self, signer: str, document: bytes, signature: bytes) -> None:
        """Raises ``PermissionDenied`` when the key is not trusted, ``DataLoss`` when it signed other text."""
        ...
