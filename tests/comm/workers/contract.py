"""Runs every check of the contract on one group; reports {check: "" or what went wrong}.

Arguments: the backend to pose as ("" = the launched one), then the number of rounds.
"""

import json
import sys
import traceback
from pathlib import Path

import mlx.core as mx

import comm

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "helpers")]
from checks import CHECKS, rounds

from fake import fake_group

group = comm.init()
if sys.argv[1]:
    group = fake_group(group, sys.argv[1])
report = {}
for check in CHECKS:
    try:
        check(group, int(sys.argv[2])) if check is rounds else check(group)
        report[check.__name__] = ""
    except Exception:
        report[check.__name__] = traceback.format_exc(limit=-3)
default = mx.distributed.init()
report["default"] = [default.rank(), default.size()]
report["backend"] = group.backend
print("RESULT", json.dumps(report), flush=True)
