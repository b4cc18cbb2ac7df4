"""Bytes of a step on every rank, case by case. Argument: cases as JSON."""

import json
import sys
import warnings
from dataclasses import asdict

from plan_measure import measure

import comm
from trainer.machine.blas import load_fast_blas
from trainer.recipe.load import recipe_from

load_fast_blas()
# A pipeline with few micro-batches says so.
warnings.simplefilter("ignore", UserWarning)
world = comm.init()
found = {}
for case in json.loads(sys.argv[1]):
    found[case["name"]] = asdict(measure(recipe_from(case["recipe"]), world, case["accumulation"]))
    print("CASE " + json.dumps({"name": case["name"], "rank": world.rank, "found": found[case["name"]]}), flush=True)
print("RESULT " + json.dumps(found), flush=True)
