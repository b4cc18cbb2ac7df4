"""Trains cases on one device and saves what the ranks compare with. Arguments: folder, cases as JSON."""

import sys
from pathlib import Path

from mesh_cases import from_json, save_reference
from trainer.machine.blas import load_fast_blas

load_fast_blas()
for case in from_json(sys.argv[2]):
    save_reference(case, Path(sys.argv[1]))
