"""Cases of one launch against the saved reference, then checks. Arguments: reference folder, cases as JSON, checks."""

import json
import sys
import time
from pathlib import Path

import pipeline_checks

import comm
from mesh_cases import from_json, run_cases
from trainer.machine.blas import load_fast_blas

load_fast_blas()
world = comm.init()
result = {"cases": run_cases(from_json(sys.argv[2]), Path(sys.argv[1]), world), "checks": {}}
for name in [name for name in sys.argv[3].split(",") if name != "-"]:
    started = time.monotonic()
    result["checks"][name] = getattr(pipeline_checks, name)(world)
    print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
print("RESULT " + json.dumps(result), flush=True)
