"""Trains every case on one device and saves losses, norms and first gradients for the ranks to compare with."""

import json
import sys
from pathlib import Path

import mlx.core as mx

from tensor_cases import Case, first_gradients, train

folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    case = Case(name)
    loss, grads = first_gradients(case.model())
    losses, norms = train(case.model(), case.num_steps)
    stem = name.replace(":", "-")
    mx.save_safetensors(str(folder / f"{stem}.safetensors"), grads)
    (folder / f"{stem}.json").write_text(json.dumps({"loss": loss.item(), "losses": losses, "norms": norms}))
