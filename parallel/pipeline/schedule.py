"""Pipeline schedules as data: what one stage does, in which order. Pure lists, no arrays, no messages.

A send may block until its receiver asks for it, so the order of messages is part of a schedule. Sources:
GPipe, Huang et al., arXiv 1811.06965; 1F1B, Narayanan et al., arXiv 2104.04473.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Action(NamedTuple):
    """One thing that a stage does for one micro-batch.

    Attributes:
        kind: "recv_activation" | "forward" | "send_activation" | "recv_gradient" | "backward" | "send_gradient".
        micro_batch: Its number, from 0.
    """

    kind: str
    micro_batch: int


def plan_actions(schedule: str, rank: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """The actions of one stage, in order.

    Args:
        schedule: "1f1b": at most `num_stages - rank` micro-batches hold activations at a time. "gpipe": all
            forward passes, then all backward passes; every micro-batch holds activations.
        rank: The stage, 0 = the one with the embedding.
        num_stages: Stages of the pipeline.
        num_micro_batches: Micro-batches of a step.

    Raises:
        ValueError: An unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(sorted(SCHEDULES))}.")
    last = num_stages - 1
    ends = {"recv_activation": 0, "send_gradient": 0, "send_activation": last, "recv_gradient": last}
    actions = SCHEDULES[schedule](rank, num_stages, num_micro_batches)
    # The ends of the pipeline have nobody to talk to.
    return [action for action in actions if ends.get(action.kind) != rank]


def _gpipe(rank: int, num_stages: int, num_micro_batches: int) -> Iterator[Action]:
    for i in range(num_micro_batches):
        yield from _forward(i)
    for i in range(num_micro_batches):
        yield from _backward(i)


def _one_forward_one_backward(rank: int, num_stages: int, num_micro_batches: int) -> Iterator[Action]:
    ahead = min(num_stages - 1 - rank, num_micro_batches)
    for i in range(ahead):
        yield from _forward(i)
    for i in range(ahead, num_micro_batches):
        if i == ahead:
            yield Action("recv_activation", i)
        yield from (Action("forward", i), Action("send_activation", i))
        yield from (Action("recv_gradient", i - ahead), Action("backward", i - ahead))
        if i + 1 < num_micro_batches:
            # Before the gradient leaves: the stage before sends this activation first, and both would wait.
            yield Action("recv_activation", i + 1)
        yield Action("send_gradient", i - ahead)
    for i in range(num_micro_batches - ahead, num_micro_batches):
        yield from _backward(i)


def _forward(i: int) -> tuple[Action, ...]:
    return Action("recv_activation", i), Action("forward", i), Action("send_activation", i)


def _backward(i: int) -> tuple[Action, ...]:
    return Action("recv_gradient", i), Action("backward", i), Action("send_gradient", i)


SCHEDULES: dict[str, Callable[[int, int, int], Iterator[Action]]] = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _gpipe,
}
