"""Requests that cannot be answered yet, in order of arrival, bounded by number, bytes and deadlines. Pure."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from dumont.errors import ResourceExhausted

# Requests that may wait for one deployment.
DEFAULT_LENGTH: Final = 1024
# Bytes of requests that may wait for one deployment: a thousand of the largest allowed would fill a machine.
MOST_BYTES: Final = 256 << 20
RETRY_AFTER: Final = 1.0

_serials = count()


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A request's place in the order of arrival, which it keeps when it has to wait again.

    Args:
        arrived: monotonic time.
        deadline: monotonic time after which the caller no longer waits; None: it waits for ever.
        sequences: answers that it asks for, each of which takes one sequence of an instance.
        size: of the request, in bytes.
    """

    arrived: float
    deadline: float | None = field(default=None, compare=False)
    sequences: int = field(default=1, compare=False)
    size: int = field(default=0, compare=False)
    # Decides between tickets of the same instant.
    serial: int = field(default_factory=_serials.__next__, init=False)


class Queue:
    """The tickets of one deployment, first come, first served.

    Args:
        deployment: its id, for the message of a refusal.
        length: how many may wait.
    """

    def __init__(self, deployment: str, length: int = DEFAULT_LENGTH) -> None:
        self._deployment = deployment
        self._length = length
        self._tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """All tickets, the next one first."""
        return tuple(self._tickets)

    @property
    def head(self) -> Ticket | None:
        """The next ticket; None: the queue is empty."""
        return self._tickets[0] if self._tickets else None

    def enter(self, ticket: Ticket) -> None:
        """Add a ticket at its place.

        Raises:
            ResourceExhausted: QUEUE_FULL.
        """
        if len(self._tickets) >= self._length:
            raise ResourceExhausted(
                "QUEUE_FULL",
                f"{len(self._tickets)} requests already wait for deployments/{self._deployment}; call again "
                "later, or raise the controller's --max-queue",
                metadata={
                    "deployment": f"deployments/{self._deployment}",
                    "waiting": str(len(self._tickets)),
                },
                retry_after=RETRY_AFTER,
            )
        waiting = sum(known.size for known in self._tickets)
        if waiting + ticket.size > MOST_BYTES:
            raise ResourceExhausted(
                "QUEUE_FULL",
                f"{waiting} bytes of requests already wait for deployments/{self._deployment}; "
                "call again later",
                metadata={"deployment": f"deployments/{self._deployment}", "waiting_bytes": str(waiting)},
                retry_after=RETRY_AFTER,
            )
        insort(self._tickets, ticket)

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket that is admitted or no longer waited for; does nothing if it has left before."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def expired(self, now: float) -> list[Ticket]:
        """The tickets whose deadline has passed."""
        return [t for t in self._tickets if t.deadline is not None and t.deadline <= now]

    @property
    def next_deadline(self) -> float | None:
        """The monotonic time at which the next ticket expires; None: none does."""
        return min((t.deadline for t in self._tickets if t.deadline is not None), default=None)
