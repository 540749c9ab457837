"""Compatibility, mounts, host logs and the journal: each a few lines, each a promise."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dumont.errors import FailedPrecondition
from snapshotd import compatibility
from snapshotd.adapters.facts import cpu_features
from snapshotd.instances.journal import Journal
from snapshotd.model import Canary, Instance, Phase, State
from snapshotd.shim.hostlog import HostLog
from snapshotd.system.mounts import external_mounts

FACTS = {"kernel": "6.18", "torch": "2.13.0", "weights": "abc"}


def test_equal_facts_are_compatible_and_more_here_do_no_harm() -> None:
    compatibility.check("s1", FACTS, {**FACTS, "new": "fact"})


@pytest.mark.parametrize("fact", sorted(FACTS))
@pytest.mark.parametrize("here", ["other", None])
def test_each_fact_that_differs_or_is_missing_is_named(fact: str, here: str | None) -> None:
    facts = {name: value for name, value in {**FACTS, fact: here}.items() if value is not None}
    with pytest.raises(FailedPrecondition) as refusal:
        compatibility.check("s1", FACTS, facts)
    assert refusal.value.reason == "INCOMPATIBLE"
    assert refusal.value.metadata["fact"] == fact
    assert fact in refusal.value.message


def test_cpu_features_do_not_depend_on_their_order() -> None:
    one = cpu_features("processor : 0\nflags : sse avx amx\n")
    assert one == cpu_features("processor : 0\nflags\t: amx avx sse\n")
    assert one != cpu_features("flags : sse avx\n")


def mount(point: str, kind: str) -> str:
    return f"36 35 98:0 /root {point} rw,noatime master:1 - {kind} /dev/root rw"


def test_a_model_host_gets_real_file_systems_devices_and_sys() -> None:
    lines = [
        mount("/", "ext4"),
        mount("/proc", "proc"),
        mount("/dev", "devtmpfs"),
        mount("/dev/shm", "tmpfs"),
        mount("/dev/pts", "devpts"),
        mount("/sys", "sysfs"),
        mount("/sys/fs/cgroup", "cgroup2"),
        mount("/home", "xfs"),
        mount("/data/my\\040models", "nfs4"),
        mount("/dev/shm", "tmpfs"),
    ]
    assert external_mounts(lines) == ["/data/my models", "/dev", "/dev/shm", "/home", "/sys"]


def test_the_nodes_own_run_directory_stays_out() -> None:
    lines = [mount("/run", "tmpfs"), mount("/run/user/0", "tmpfs"), mount("/runtime", "ext4")]
    assert external_mounts(lines) == ["/runtime"]


def test_a_host_log_keeps_its_end_in_two_bounded_files(tmp_path: Path) -> None:
    log = HostLog(tmp_path / "host.log", limit=100)
    for number in range(100):
        log.write(b"line %04d\n" % number)
    kept = (tmp_path / "host.log.1").read_bytes() + (tmp_path / "host.log").read_bytes()
    assert kept.endswith(b"line 0099\n")
    assert 100 < len(kept) <= 200


def test_a_host_log_that_cannot_be_written_loses_lines_and_raises_nothing(tmp_path: Path) -> None:
    log = HostLog(tmp_path / "host.log", limit=20)
    log.write(b"before\n")
    (tmp_path / "host.log").rename(tmp_path / "moved-away")
    log.write(b"does not fit into it\n")
    os.close(log.fd)
    log.write(b"nowhere to go\n")
    assert (tmp_path / "moved-away").read_bytes() == b"before\n"


def test_a_host_log_continues_after_a_restart(tmp_path: Path) -> None:
    HostLog(tmp_path / "host.log").write(b"before\n")
    HostLog(tmp_path / "host.log").write(b"after\n")
    assert (tmp_path / "host.log").read_bytes() == b"before\nafter\n"


def an_instance(identifier: str) -> Instance:
    return Instance(
        id=identifier,
        deployment="deployments/qa",
        model="m",
        engine="causal_lm",
        state=State.SERVING,
        create_time=datetime(2026, 11, 1, tzinfo=UTC),
        pid=42,
        phases=(Phase("load", 1.5),),
        canary=Canary((1, 2), -0.5),
        versions={"torch": "2.13.0"},
    )


def test_the_journal_gives_back_what_was_written_and_not_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for identifier in ("a", "b", "c"):
        journal.write(an_instance(identifier))
    journal.forget("b")
    journal.forget("never-there")
    assert Journal(tmp_path).read() == [an_instance("a"), an_instance("c")]


def test_a_journal_entry_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(an_instance("a"))
    (tmp_path / "broken.json").write_text("{")
    assert journal.read() == [an_instance("a")]
    assert not (tmp_path / "broken.json").exists()
