"""Schedules without processes: order, messages, deadlocks, memory, idle time."""

import pytest
from simulator import run_actions, simulate

from parallel.pipeline.schedule import Action, plan_actions

SHAPES = [(stages, micro) for stages in (1, 2, 3, 4, 8) for micro in (1, 2, 3, 4, 7, 8, 16)]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("num_stages, num_micro_batches", SHAPES)
def test_every_schedule_ends(schedule: str, num_stages: int, num_micro_batches: int) -> None:
    """Catches an order of messages in which two stages wait for each other, also with fewer micro-batches than stages."""
    outcome = simulate(schedule, num_stages, num_micro_batches)
    assert not any(outcome.left), f"stuck before {[actions[:1] for actions in outcome.left]}"


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("num_stages, num_micro_batches", SHAPES)
def test_each_micro_batch_once_and_in_order(schedule: str, num_stages: int, num_micro_batches: int) -> None:
    """Catches lost or doubled work, a backward pass before its forward pass, and sums in another order than one device's."""
    for rank in range(num_stages):
        actions = plan_actions(schedule, rank, num_stages, num_micro_batches)
        for kind in ("forward", "backward"):
            done = [a.micro_batch for a in actions if a.kind == kind]
            assert done == list(range(num_micro_batches)), f"rank {rank} {kind}: {done}"
        for i in range(num_micro_batches):
            mine = [a.kind for a in actions if a.micro_batch == i]
            expected = ["recv_activation", "forward", "send_activation", "recv_gradient", "backward", "send_gradient"]
            missing = ["recv_activation", "send_gradient"] if rank == 0 else []
            missing += ["send_activation", "recv_gradient"] if rank == num_stages - 1 else []
            assert mine == [kind for kind in expected if kind not in missing], f"rank {rank}, micro-batch {i}: {mine}"


@pytest.mark.parametrize("num_stages, num_micro_batches", SHAPES)
def test_live_activations(num_stages: int, num_micro_batches: int) -> None:
    """Catches a 1F1B that runs further ahead than the stages after it: memory would grow with the micro-batches."""
    one_by_one = simulate("1f1b", num_stages, num_micro_batches)
    all_first = simulate("gpipe", num_stages, num_micro_batches)
    for rank in range(num_stages):
        assert one_by_one.live[rank] <= num_stages - rank, f"rank {rank} holds {one_by_one.live[rank]}"
        assert all_first.live[rank] == num_micro_batches, "GPipe holds all micro-batches"


@pytest.mark.parametrize("num_stages, num_micro_batches", [(2, 8), (4, 8), (4, 16)])
def test_idle_time_of_gpipe_is_the_theory(num_stages: int, num_micro_batches: int) -> None:
    """Catches an order that waits longer than (stages - 1) / (micro-batches + stages - 1)."""
    theory = (num_stages - 1) / (num_micro_batches + num_stages - 1)
    assert simulate("gpipe", num_stages, num_micro_batches).bubble == pytest.approx(theory)


def test_simulator_sees_the_textbook_deadlock() -> None:
    """Catches a simulator that lets everything through: gradients sent before the next activation is received."""
    actions = [plan_actions("1f1b", rank, 2, 4) for rank in range(2)]
    textbook = list(actions[1])
    for k, action in enumerate(textbook[:-1]):
        if action.kind == "recv_activation" and textbook[k + 1].kind == "send_gradient":
            textbook[k], textbook[k + 1] = textbook[k + 1], action
    assert any(run_actions([actions[0], textbook]).left), "the textbook order must get stuck"


def test_unknown_schedule() -> None:
    """Catches a misspelt schedule that would run as another one."""
    with pytest.raises(ValueError, match="'zb'; it must be one of 1f1b, gpipe"):
        plan_actions("zb", 0, 2, 2)


def test_first_actions_of_1f1b() -> None:
    """Catches a changed order that every other test would still accept."""
    kinds = [(a.kind, a.micro_batch) for a in plan_actions("1f1b", 1, 3, 3)]
    assert kinds[:6] == [
        ("recv_activation", 0),
        ("forward", 0),
        ("send_activation", 0),
        ("recv_activation", 1),
        ("forward", 1),
        ("send_activation", 1),
    ]
    assert kinds.index(Action("recv_activation", 2)) < kinds.index(Action("send_gradient", 0))
