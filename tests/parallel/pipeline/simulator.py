"""Runs schedules on paper: sends that wait for their receiver, one clock per stage."""

from dataclasses import dataclass

from parallel.pipeline.schedule import Action, plan_actions

PARTNERS = {"send_activation": (1, "recv_activation"), "send_gradient": (-1, "recv_gradient")}


@dataclass
class Outcome:
    """What a simulated step came to.

    Attributes:
        seconds: length of the step.
        busy: seconds of computation per stage.
        live: largest number of micro-batches holding activations, per stage.
        left: actions that could not be done, per stage; all empty without a deadlock.
    """

    seconds: float
    busy: list[float]
    live: list[int]
    left: list[list[Action]]

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(schedule: str, num_stages: int, num_micro_batches: int, forward: float = 1.0, backward: float = 2.0) -> Outcome:
    """Run a schedule with blocking sends; messages take no time."""
    left = [plan_actions(schedule, rank, num_stages, num_micro_batches) for rank in range(num_stages)]
    return run_actions(left, forward, backward)


def run_actions(left: list[list[Action]], forward: float = 1.0, backward: float = 2.0) -> Outcome:
    """As `simulate`, for any lists of actions."""
    num_stages = len(left)
    left = [list(actions) for actions in left]
    clock, busy, now, live = ([0.0] * num_stages, [0.0] * num_stages, [0] * num_stages, [0] * num_stages)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(left):
            if not actions:
                continue
            kind, i = actions[0]
            if kind in ("forward", "backward"):
                seconds = forward if kind == "forward" else backward
                clock[rank] += seconds
                busy[rank] += seconds
                now[rank] += 1 if kind == "forward" else -1
                live[rank] = max(live[rank], now[rank])
            elif kind in PARTNERS:
                step, wanted = PARTNERS[kind]
                peer = rank + step
                if not left[peer] or left[peer][0] != Action(wanted, i):
                    continue
                clock[rank] = clock[peer] = max(clock[rank], clock[peer])
                left[peer].pop(0)
            else:
                continue
            actions.pop(0)
            moved = True
    return Outcome(max(clock), busy, live, left)
