"""Which controller this is, decided from the records in the database and the state directory. Pure.

A node belongs to one fleet and takes commands from no other. All controllers that share a database are one
fleet and have one identity. It must survive whatever happens to the database, and a database other than the
last one must not be mistaken for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dumont.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Identity:
    """A fleet's identity.

    ``starts`` counts the starts of its controllers. The count of its start is the number of a controller's
    session.
    """

    id: str
    starts: int


@dataclass(frozen=True, slots=True)
class Established:
    """The identity of this controller's fleet, as of this start.

    ``outdated``: the database is older than the last start, so it knows nothing of the time since.
    """

    identity: Identity
    outdated: bool = False


# Given the stored identity and whether the database holds nothing else, says who this controller is.
Decide = Callable[[Identity | None, bool], Established]


def establish(
    stored: Identity | None,
    remembered: Identity | None,
    *,
    empty: bool,
    wanted: str,
    accept: bool,
    new_id: str,
) -> Established:
    """Decide which controller this is, and whether it may use this database.

    Args:
        stored: the identity in the database; None: it has none.
        remembered: the identity of the last start in the state directory; None: there was none.
        empty: whether the database holds no deployment.
        wanted: the id that a person asks for, to replace a controller that was lost; or empty.
        accept: whether a person says that the database is the right one.
        new_id: the id for a controller that is new.

    Raises:
        FailedPrecondition: DATABASE_EMPTY, this database is empty and the last one was not;
            DATABASE_FOREIGN, it is another controller's; CONTROLLER_ID_TAKEN, this controller has another id
            than the wanted one.
    """
    known = stored or remembered
    if wanted and known is not None and known.id != wanted:
        raise FailedPrecondition(
            "CONTROLLER_ID_TAKEN",
            f"this is controller {known.id} and cannot become {wanted}; leave --controller-id out, or use an "
            "empty state directory and database",
            metadata={"controller": known.id, "wanted": wanted},
        )
    if remembered is not None and not accept:
        if stored is None and empty:
            raise FailedPrecondition(
                "DATABASE_EMPTY",
                f"the database is empty, and controller {remembered.id} was started {remembered.starts} "
                "times with one that was not; restore it from a backup, or start once with "
                "--accept-database (DUMONT_CONTROLLER_ACCEPT_DATABASE=true): then nothing is deleted, and "
                "dumont snapshot ls --orphans shows what can be adopted",
                metadata={"controller": remembered.id},
            )
        if stored is not None and stored.id != remembered.id:
            raise FailedPrecondition(
                "DATABASE_FOREIGN",
                f"the database is that of controller {stored.id}, and this state directory was used by "
                f"{remembered.id}; check --database and --state-dir, or start once with --accept-database",
                metadata={"controller": remembered.id, "database": stored.id},
            )
    identifier = known.id if known is not None else wanted or new_id
    starts = max(one.starts for one in (stored, remembered, Identity("", 0)) if one is not None)
    outdated = remembered is not None and (stored is None or stored.starts < remembered.starts)
    return Established(Identity(identifier, starts + 1), outdated)
