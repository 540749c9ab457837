"""What falls due, when, and what is never touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.expiry import (
    DeleteSnapshot,
    Facts,
    Forget,
    GiveUp,
    Held,
    KeepWarm,
    Park,
    Plan,
    Stop,
    plan,
    plan_node,
    plan_room,
)
from controller.model import (
    Checkpoint,
    Deployment,
    Instance,
    InstanceState,
    Moment,
    Node,
    NodeState,
    Report,
    Snapshot,
    StartMode,
)

WALL, STEADY = 1_700_000_000.0, 5000.0


def at(seconds: float) -> Moment:
    return Moment(WALL + seconds, STEADY + seconds)


def deployment(mode: StartMode = StartMode.CHECKPOINT, **changes: Any) -> Deployment:
    checkpoint = Checkpoint(mode is StartMode.CHECKPOINT, ttl=1000.0)
    made = Deployment("qa", "u", "m", "causal_lm", mode, checkpoint, None, None, WALL, WALL, "e")
    return replace(made, **changes)


def instance(
    state: InstanceState = InstanceState.SERVING, identifier: str = "i1", **changes: Any
) -> Instance:
    report = Report(identifier, "qa", state, create_time=WALL)
    return replace(Instance("n1", state, report, STEADY, STEADY), **changes)


def snapshot(identifier: str = "s1", **changes: Any) -> Snapshot:
    return replace(Snapshot(identifier, "qa", "n1", WALL, owner="u"), **changes)


def facts(mode: StartMode = StartMode.CHECKPOINT, **changes: Any) -> Facts:
    far = Node("n1", "x:1", state=NodeState.READY, heartbeat_at=STEADY + 1e6)
    started = frozenset({"i1", "i2"})
    return replace(Facts(deployment(mode), nodes={"n1": far}, started=started), **changes)


def actions(known: Facts, now: Moment) -> list[object]:
    return [type(action) for action in plan(known, now).actions]


@pytest.mark.parametrize(
    ("mode", "state", "due", "action"),
    [
        (StartMode.COLD, InstanceState.SERVING, 0.0, Stop),
        (StartMode.CHECKPOINT, InstanceState.SERVING, 300.0, Park),
        (StartMode.CHECKPOINT, InstanceState.PARKED, 600.0, Stop),
        (StartMode.COLD, InstanceState.PARKED, 600.0, Stop),
        (StartMode.CHECKPOINT, InstanceState.FAILED, 300.0, Stop),
    ],
)
def test_an_unused_instance_falls_due_at_its_time_and_not_before(
    mode: StartMode, state: InstanceState, due: float, action: type
) -> None:
    known = facts(mode, instances=(instance(state),))
    if due:
        early = plan(known, at(due - 1))
        assert early.actions == ()
        assert early.again_in == pytest.approx(1.0)
    assert actions(known, at(due)) == [action]


@pytest.mark.parametrize(
    "state", [s for s in InstanceState if s not in (InstanceState.UNKNOWN, InstanceState.GONE)]
)
@pytest.mark.parametrize("mode", StartMode)
@pytest.mark.parametrize("guard", [{"in_flight": 1}, {"busy": True}, {"node": "elsewhere"}])
def test_what_works_or_is_out_of_reach_is_left_alone(
    state: InstanceState, mode: StartMode, guard: dict[str, Any]
) -> None:
    known = facts(mode, instances=(instance(state, **guard),))
    assert not [a for a in plan(known, at(1e5)).actions if isinstance(a, Park | Stop)]


@pytest.mark.parametrize(
    "state",
    [InstanceState.CAPTURING, InstanceState.PARKING, InstanceState.RESUMING, InstanceState.STARTING],
)
def test_what_settles_by_itself_is_left_alone(state: InstanceState) -> None:
    assert actions(facts(instances=(instance(state),)), at(1e5)) == []


def test_a_start_or_a_waiting_request_keeps_everything_of_its_deployment() -> None:
    known = facts(
        StartMode.COLD,
        instances=(instance(), instance(InstanceState.PARKED, "i2")),
        snapshots=(snapshot(),),
        starting=True,
    )
    assert actions(known, at(1e6)) == []


def test_an_explicit_idle_timeout_replaces_the_default() -> None:
    known = facts(instances=(instance(),), deployment=deployment(idle_timeout=7.0, park_timeout=1.0))
    assert plan(known, at(0)).again_in == pytest.approx(7.0)
    assert actions(known, at(7)) == [Park]
    parked = replace(known, instances=(instance(InstanceState.PARKED),))
    assert actions(parked, at(1)) == [Stop]


def test_an_instance_that_could_not_be_parked_is_stopped() -> None:
    assert actions(facts(instances=(instance(park_refused=True),)), at(300)) == [Stop]


def test_a_warm_instance_stays_and_a_second_one_goes() -> None:
    first, second = instance(), instance(identifier="i2")
    assert actions(facts(StartMode.WARM, instances=(first,)), at(1e5)) == []
    surplus = plan(facts(StartMode.WARM, instances=(first, second)), at(0)).actions
    assert [(type(a), a.target) for a in surplus] == [(Stop, "instances/i2")]


def test_a_warm_deployment_without_an_instance_is_started_after_its_back_off() -> None:
    assert actions(facts(StartMode.WARM), at(0)) == [KeepWarm]
    gone = facts(StartMode.WARM, instances=(instance(InstanceState.FAILED),))
    assert actions(gone, at(0)) == [KeepWarm]
    waiting = facts(StartMode.WARM, retry_at={"deployments/qa/instances": STEADY + 4})
    assert plan(waiting, at(0)).again_in == pytest.approx(4.0)


def test_a_snapshot_goes_its_ttl_after_its_last_use() -> None:
    known = facts(snapshots=(snapshot(),), last_use=WALL + 500)
    assert plan(known, at(1499)).actions == ()
    assert actions(known, at(1500)) == [DeleteSnapshot]
    unused = facts(snapshots=(snapshot(),))
    assert actions(unused, at(1000)) == [DeleteSnapshot]


def test_a_snapshot_stays_while_its_deployment_works() -> None:
    answering = facts(snapshots=(snapshot(),), instances=(instance(in_flight=1),))
    restoring = facts(snapshots=(snapshot(),), instances=(instance(InstanceState.STARTING, busy=True),))
    assert actions(answering, at(1e5)) == []
    assert actions(restoring, at(1e5)) == []


def test_only_the_newest_snapshot_is_kept_and_a_quarantined_one_for_its_ttl() -> None:
    old, new = snapshot("old"), snapshot("new", create_time=WALL + 1)
    bad = snapshot("bad", create_time=WALL + 2, quarantined=True)
    known = facts(snapshots=(old, new, bad), last_use=WALL + 900)
    assert [a.target for a in plan(known, at(5)).actions] == ["snapshots/old"]
    only_bad = facts(snapshots=(bad,), last_use=WALL + 900)
    assert actions(only_bad, at(1002)) == [DeleteSnapshot]


def test_what_this_controller_did_not_write_down_is_never_touched() -> None:
    # Given a database that knows neither the deployment, nor the instance, nor the snapshot
    orphans = facts(
        deployment=None,
        started=frozenset(),
        instances=(instance(), instance(InstanceState.PARKED, "i2"), instance(InstanceState.FAILED, "i3")),
        snapshots=(snapshot(owner=None), snapshot("bad", owner=None, quarantined=True)),
    )
    # Then nothing is due, now or ever
    assert plan(orphans, at(1e6)) == Plan((), None)
    # Nor when a deployment of that name is made again
    again = replace(orphans, deployment=deployment(uid="another", model="other"))
    other = tuple(replace(i, report=replace(i.report, model="m")) for i in orphans.instances)
    assert plan(replace(again, instances=other), at(1e6)).actions == ()


def test_what_is_left_of_a_deployment_that_was_deleted_goes() -> None:
    strange = replace(instance(), report=Report("x", "qa", InstanceState.SERVING))
    for gone in (None, deployment(uid="made since", model="other")):
        mine = instance()
        mine = replace(mine, report=replace(mine.report, model="m"))
        known = facts(deployment=gone, instances=(mine, *((strange,) if gone is None else ())))
        known = replace(known, snapshots=(snapshot(), snapshot("nobody's", owner="")))
        left = [a.target for a in plan(known, at(0)).actions]
        assert left == ["instances/i1", "snapshots/s1", "snapshots/nobody's"]


def test_a_deleted_deployment_is_emptied_then_forgotten_and_its_orphans_stay() -> None:
    deleting = deployment(deleting=True)
    orphan = snapshot("orphan", owner=None)
    full = facts(deployment=deleting, instances=(instance(),), snapshots=(snapshot(), orphan))
    assert [a.target for a in plan(full, at(0)).actions] == ["instances/i1", "snapshots/s1"]
    in_use = facts(deployment=deleting, instances=(instance(in_flight=1),))
    assert actions(in_use, at(0)) == []
    assert actions(facts(deployment=deleting, snapshots=(orphan,)), at(0)) == [Forget]


def test_each_kind_of_node_keeps_its_newest_snapshot() -> None:
    # Given snapshots of two kernels, the newer of them made on the newer kernel
    six = {"compatibility": {"kernel": "6.1", "weights": "abc"}}
    old_on_six = snapshot("old", **six)
    new_on_six = snapshot("new", create_time=WALL + 1, compatibility={"kernel": "6.1", "weights": "x"})
    on_seven = snapshot("other", create_time=WALL + 2, compatibility={"kernel": "7.0"})
    # Then only the one that its own kind of node has replaced goes
    known = facts(snapshots=(old_on_six, new_on_six, on_seven), last_use=WALL + 900)
    assert [a.target for a in plan(known, at(5)).actions] == ["snapshots/old"]


def test_a_snapshot_that_no_node_can_restore_goes_after_its_ttl_however_busy_its_deployment_is() -> None:
    stranded = snapshot(
        "stranded", unusable_since=WALL + 10, incompatibility="kernel", compatibility={"k": "1"}
    )
    known = facts(snapshots=(stranded, snapshot()), last_use=WALL + 5000)
    assert plan(known, at(1009)).actions == ()
    assert [a.target for a in plan(known, at(1010)).actions] == ["snapshots/stranded"]


def test_a_node_is_given_up_after_three_missing_heartbeats() -> None:
    quiet = Node("n1", "x:1", state=NodeState.READY, heartbeat_at=STEADY)
    assert plan_node(quiet, 15.0, {}, at(14)).again_in == pytest.approx(1.0)
    (given_up,) = plan_node(quiet, 15.0, {}, at(15)).actions
    assert isinstance(given_up, GiveUp)
    mute = replace(quiet, state=NodeState.CONNECTING, since=STEADY, heartbeat_at=STEADY + 14)
    assert len(plan_node(mute, 15.0, {}, at(15)).actions) == 1
    lost = replace(quiet, state=NodeState.UNREACHABLE)
    assert plan_node(lost, 15.0, {}, at(1e6)) == Plan((), None)


def test_a_failed_action_is_put_off() -> None:
    known = facts(instances=(instance(),), retry_at={"instances/i1": STEADY + 310})
    assert plan(known, at(305)).again_in == pytest.approx(5.0)
    assert actions(known, at(310)) == [Park]


def test_a_wall_clock_that_jumps_moves_no_idle_timer() -> None:
    known = facts(instances=(instance(),))
    assert plan(known, Moment(WALL + 3600, STEADY + 10)).actions == ()


def held(identifier: str, last_use: float, *, in_use: bool = False, **changes: Any) -> Held:
    return Held(snapshot(identifier, size_bytes=10, **changes), last_use, in_use)


def test_beyond_a_node_s_limit_what_was_used_longest_ago_goes_and_no_more() -> None:
    limited = Node("n1", "x:1", snapshot_limit_bytes=25)
    kept = [held("old", 1.0), held("older", 0.5), held("new", 2.0)]
    assert [action.id for action in plan_room(limited, kept)] == ["older"]
    assert plan_room(replace(limited, snapshot_limit_bytes=30), kept) == ()
    assert plan_room(replace(limited, snapshot_limit_bytes=0), kept) == ()


def test_what_is_used_or_not_ours_stays_and_what_is_published_is_the_node_s_own_to_let_go() -> None:
    limited = Node("n1", "x:1", snapshot_limit_bytes=15)
    kept = [
        held("orphan", 0.0, owner=None),
        held("restored from", 1.0, in_use=True),
        held("published", 2.0, published=True),
        held("here alone", 3.0),
        held("newest", 4.0),
    ]
    assert [action.id for action in plan_room(limited, kept)] == ["here alone", "newest"]
