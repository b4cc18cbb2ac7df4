"""A job's whole life in small: meeting, steps, an evaluation, a checkpoint, the result. In one phase one rank meets its
fault: `life.py PHASE FAULT RANK FOLDER`. The rank says `FAULT` and the time before; a fault that comes from outside is
waited for. No model: what ends a job is `comm`.
"""

import ctypes
import os
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx

import comm

OUTSIDE_SECONDS = 3.0  # for a fault from outside to come
STEPS_OUTSIDE = 200  # of a tenth of a second, from a fault from outside to the next phase
LATE_SECONDS = 1.0  # the others come to the collective in which the fault is that much later
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}


def strike(fault: str) -> None:
    """Does to this process what `fault` says."""
    print(f"FAULT {time.monotonic()}", flush=True)
    if fault in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault])
    elif fault.startswith("exit"):
        sys.exit(int(fault.removeprefix("exit ")))
    elif fault == "raise":
        raise RuntimeError("the victim's own error")
    elif fault == "sleep":
        time.sleep(1000)
    elif fault == "block":
        ctypes.PyDLL(None).sleep(1000)  # in C, holding Python's lock: no other thread of this process goes on
    elif fault == "sockets":
        close_sockets()
    else:
        time.sleep(OUTSIDE_SECONDS)


def strike_in_collective(fault: str) -> None:
    """The same from another thread, while the main one is in a collective."""
    time.sleep(LATE_SECONDS / 3)
    if fault.startswith("exit"):
        print(f"FAULT {time.monotonic()}", flush=True)
        os._exit(int(fault.removeprefix("exit ")))
    strike(fault)


def close_sockets() -> None:
    """Ends every connection of this process; its files stay open."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the listing's own descriptor, or a socket without a connection


def live(phase: str, fault: str, is_victim: bool, folder: Path) -> None:
    """All phases, one after the other."""

    def reach(name: str) -> None:
        if is_victim and name == phase:
            strike(fault)
        if name == phase and fault == "outside" and name not in ("before init", "after result"):
            take_steps(world, STEPS_OUTSIDE, seconds=0.1)

    reach("before init")
    world = comm.init()
    reach("after init")
    take_steps(world, 3)
    if phase == "collective":
        if is_victim:
            threading.Thread(target=strike_in_collective, args=(fault,), daemon=True).start()
        time.sleep(0 if is_victim else LATE_SECONDS)
        take_steps(world, 1, seconds=0)
        if fault == "outside":
            take_steps(world, STEPS_OUTSIDE, seconds=0.1)
    reach("compute")
    take_steps(world, 3)
    with world.progress.long_phase("evaluation"):
        take_steps(world, 1)
        reach("evaluation")
        take_steps(world, 1)
    for name in ("saving", "final write"):
        take_steps(world, 1)
        with world.progress.long_phase("saving"):
            gathered = world.all_gather(mx.ones((1000,)))
            mx.eval(gathered)
            reach(name)
            if world.rank == 0:
                mx.save(str(folder / f"{name}.npy"), gathered)
            world.barrier()
    reach("after result")


def take_steps(world: comm.Group, count: int, seconds: float = 0.02) -> None:
    """`seconds` of one's own and one sum over the ranks, `count` times."""
    for _ in range(count):
        time.sleep(seconds)
        mx.eval(world.all_sum(mx.ones((1000,))))


if __name__ == "__main__":
    rank = os.environ.get("MLX_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
    live(sys.argv[1], sys.argv[2], rank == sys.argv[3], Path(sys.argv[4]))
