"""Two good collectives on all ranks, then rank 1 does what the first argument says.

The others go on with collectives. Prints "joined" once all ranks are up, "finished" at the end.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx

import comm

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
from fake import fake_group


def download(seconds: float) -> None:
    """What a download costs of the processor: a part of the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(100_000))
        time.sleep(0.02)


kind, victim = sys.argv[1], int(sys.argv[2])
world = comm.init()
group = fake_group(world, "jaccl", hangs=True) if "fake" in sys.argv else world
mx.eval(group.all_sum(mx.ones((4,))), group.all_max(mx.ones((4,))))
group.barrier()
print("joined", flush=True)
if kind == "cable":
    if group.rank == victim:
        # Where the queue is full the system answers nothing, as over a cut cable.
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        world.watchdog.following = [full.getsockname()]
    group.progress.record("all_sum", (100_000,), mx.float32)
    time.sleep(1000)
if group.rank == victim:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exit":
        sys.exit(0)
    elif kind == "raise":
        raise RuntimeError("the victim's own error")
    elif kind in ("goodbye", "end"):
        comm.leave(0) if kind == "goodbye" else sys.exit(0)
    elif kind == "late":
        time.sleep(1000)
    elif kind == "phase":
        with group.progress.long_phase("tokenising"):
            time.sleep(6)
    elif kind == "reports":
        with group.progress.long_phase("tokenising"):
            for _ in group.progress.reporting(range(4)):
                time.sleep(2)
    elif kind in ("still", "still loading"):
        with group.progress.long_phase("loading" if "loading" in kind else "tokenising"):
            time.sleep(1000)
    elif kind == "downloads":
        with group.progress.long_phase("loading"):
            downloading = threading.Thread(target=download, args=(8.0,))
            downloading.start()
            downloading.join()
if kind == "end":
    with group.progress.long_phase("saving"):
        for _ in group.progress.reporting(range(8)):
            time.sleep(1)
    print("finished", flush=True)
    sys.exit(0)
if kind == "goodbye":
    time.sleep(6)  # longer than the grace of a death
    print("finished", flush=True)
    comm.leave(0)
if kind == "garbage":
    if group.rank == 1:
        endpoint = world.watchdog._hub.sock.getpeername()
        for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\0\0\0\2" + b"x" * 34, b""):
            with socket.create_connection(endpoint) as sock:
                sock.sendall(junk)
                time.sleep(0.3)
    time.sleep(1)
if kind == "crowd":
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = len(os.listdir("/dev/fd")) + (8 if group.rank == 0 else 400)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if group.rank == 1:
        endpoint = world.watchdog._hub.sock.getpeername()
        crowd = [socket.create_connection(endpoint, timeout=30) for _ in range(377)]
    for _ in range(10):  # longer than the time-out
        group.barrier()
        time.sleep(0.5)
    assert world.watchdog._thread.is_alive()
for _ in range(3):
    mx.eval(group.all_sum(mx.ones((100_000,))))
group.barrier()
print("finished", flush=True)
if kind == "stop last" and group.rank == victim:
    os.kill(os.getpid(), signal.SIGSTOP)
