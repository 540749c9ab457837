"""What falls due, when, and what is never touched."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.expiry import DeleteSnapshot, Facts, Forget, GiveUp, KeepWarm, Park, Stop, plan
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


def deployment(mode: StartMode = StartMode.CHECKPOINT, **changes: object) -> Deployment:
    checkpoint = Checkpoint(mode is StartMode.CHECKPOINT, ttl=1000.0)
    made = Deployment("qa", "u", "m", "causal_lm", mode, checkpoint, None, None, WALL, WALL, "e")
    return replace(made, **changes)


def instance(
    state: InstanceState = InstanceState.SERVING, identifier: str = "i1", **changes: object
) -> Instance:
    report = Report(identifier, "qa", state, create_time=WALL)
    return replace(Instance("n1", state, report, STEADY, STEADY), **changes)


def snapshot(identifier: str = "s1", **changes: object) -> Snapshot:
    return replace(Snapshot(identifier, "qa", "n1", WALL), **changes)


def facts(mode: StartMode = StartMode.CHECKPOINT, **changes: object) -> Facts:
    far = Node("n1", "x:1", state=NodeState.READY, heartbeat_at=STEADY + 1e6)
    return replace(Facts(deployments={"qa": deployment(mode)}, nodes={"n1": far}), **changes)


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
        assert (early.actions, early.wake_in) == ((), pytest.approx(1.0))
    assert actions(known, at(due)) == [action]


@pytest.mark.parametrize(
    "state", [s for s in InstanceState if s not in (InstanceState.UNKNOWN, InstanceState.GONE)]
)
@pytest.mark.parametrize("mode", StartMode)
@pytest.mark.parametrize("guard", [{"in_flight": 1}, {"busy": True}, {"node": "elsewhere"}])
def test_what_works_or_is_out_of_reach_is_left_alone(
    state: InstanceState, mode: StartMode, guard: dict[str, object]
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
        starting=frozenset({"qa"}),
    )
    assert actions(known, at(1e6)) == []


def test_an_explicit_idle_timeout_replaces_the_default() -> None:
    known = facts(instances=(instance(),), deployments={"qa": deployment(idle_timeout=7.0, park_timeout=1.0)})
    assert plan(known, at(0)).wake_in == pytest.approx(7.0)
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
    assert plan(waiting, at(0)).wake_in == pytest.approx(4.0)


def test_a_snapshot_goes_its_ttl_after_its_last_use() -> None:
    known = facts(snapshots=(snapshot(),), last_use={"qa": WALL + 500})
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
    known = facts(snapshots=(old, new, bad), last_use={"qa": WALL + 900})
    assert [a.target for a in plan(known, at(5)).actions] == ["snapshots/old"]
    only_bad = facts(snapshots=(bad,), last_use={"qa": WALL + 900})
    assert actions(only_bad, at(1002)) == [DeleteSnapshot]


def test_what_belongs_to_no_deployment_of_ours_goes_and_what_was_never_ours_stays() -> None:
    strange = replace(instance(), report=Report("x", "", InstanceState.SERVING))
    known = facts(deployments={}, instances=(instance(), strange), snapshots=(snapshot(),))
    assert [a.target for a in plan(known, at(0)).actions] == ["instances/i1", "snapshots/s1"]


def test_a_deleted_deployment_is_emptied_then_forgotten() -> None:
    deleting = {"qa": deployment(deleting=True)}
    full = facts(deployments=deleting, instances=(instance(),), snapshots=(snapshot(),))
    assert actions(full, at(0)) == [Stop, DeleteSnapshot]
    in_use = facts(deployments=deleting, instances=(instance(in_flight=1),))
    assert actions(in_use, at(0)) == []
    assert actions(facts(deployments=deleting), at(0)) == [Forget]


def test_a_node_is_given_up_after_three_missing_heartbeats() -> None:
    quiet = Node("n1", "x:1", state=NodeState.READY, heartbeat_at=STEADY)
    known = facts(nodes={"n1": quiet})
    assert plan(known, at(14)).wake_in == pytest.approx(1.0)
    assert actions(known, at(15)) == [GiveUp]
    mute = replace(quiet, state=NodeState.CONNECTING, since=STEADY, heartbeat_at=STEADY + 14)
    assert actions(facts(nodes={"n1": mute}), at(15)) == [GiveUp]
    lost = replace(quiet, state=NodeState.UNREACHABLE)
    assert actions(facts(nodes={"n1": lost}), at(1e6)) == []


def test_a_failed_action_is_put_off() -> None:
    known = facts(instances=(instance(),), retry_at={"instances/i1": STEADY + 310})
    assert plan(known, at(305)).wake_in == pytest.approx(5.0)
    assert actions(known, at(310)) == [Park]


def test_a_wall_clock_that_jumps_moves_no_idle_timer() -> None:
    known = facts(instances=(instance(),))
    assert plan(known, Moment(WALL + 3600, STEADY + 10)).actions == ()
