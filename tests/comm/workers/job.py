"""A launched program: joins the world, then does what the first argument says."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

what = sys.argv[1]
if what == "environment":  # without MLX: what did the launcher set?
    names = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")
    files = {name: json.loads(Path(os.environ[name]).read_text()) for name in names if name in os.environ}
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("COMM_", "MLX_", "T_"))}
    print("RESULT", json.dumps({**kept, **files}))
    sys.exit(0)
if what == "read":  # without MLX: what does this rank's stdin hold?
    print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())
    sys.exit(0)
if what == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Path(sys.argv[2], f"{os.getpid()}.pid").touch()
    time.sleep(100)
if what == "once":  # fails on the first attempt only
    mark = Path(sys.argv[2], f"tried-{os.environ['MLX_RANK']}")
    if not mark.exists():
        mark.touch()
        sys.exit(9)
if what == "fail":
    sys.exit(int(sys.argv[2]) if os.environ["MLX_RANK"] == "1" else 0)

import mlx.core as mx

import comm

group = comm.init()
total = group.all_sum(mx.array([1.0])).item()
print(f"rank {group.rank} of {group.size} on {group.backend}: {total}", flush=True)
