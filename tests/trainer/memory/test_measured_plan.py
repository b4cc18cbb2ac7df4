"""Plans of models of more than 200 MB against real training steps, on one process and on two ranks of each axis."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_footprint import LARGE

from ranks import ROOT, run_ranks

HERE = Path(__file__).parent
HYBRID = LARGE | {
    "model_type": "qwen3_5_text",
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}
MODELS = {"qwen3": LARGE, "qwen3_5": {"model_type": "qwen3_5", "text_config": HYBRID}}
# Architecture, method, checkpointed layers, packing.
WAYS = [
    ("qwen3", "lora", False, "auto"),
    ("qwen3", "lora", True, "auto"),
    ("qwen3", "lora", True, False),
    ("qwen3", "full", False, "auto"),
    ("qwen3", "full", True, "auto"),
    ("qwen3_5", "lora", True, "auto"),
    ("qwen3_5", "full", True, False),
]
AXES = {"one": None, "tp": "tp", "dp_shard": "dp_shard", "pp": "pp", "dp_replicate": "dp_replicate"}


def case(architecture: str, method: str, checkpointing: bool, packing: Any, axis: str | None) -> dict[str, Any]:
    """A recipe and its micro-batches, for the worker."""
    recipe = {
        "model": {"config": MODELS[architecture], "tokenizer": "bpe:16000", "dtype": "float32"},
        "method": method,
        "batch_size_per_device": 1,
        "data": {"train": "synthetic:sql", "max_seq_len": 384 if architecture == "qwen3" else 192, "packing": packing},
        "gradient_checkpointing": checkpointing,
        "parallel": {axis: 2} if axis else {},
    }
    name = f"{architecture} {method}{', checkpointed' * checkpointing}{'' if packing else ', not packed'}"
    return {"name": name, "recipe": recipe, "accumulation": 4 if axis == "pp" else 1}


@pytest.mark.parametrize("axis", AXES)
def test_plan_against_real_steps(exhaustive: None, axis: str) -> None:
    """Catches a plan that says a model fits which does not, or the other way round, on the ranks of a mesh."""
    cases = [case(*way, AXES[axis]) for way in WAYS]
    ranks = run_ranks(
        HERE / "workers" / "mesh.py",
        2 if AXES[axis] else 1,
        args=[json.dumps(cases)],
        timeout=540,
        env={"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", HERE)))},
    )
    for name in [case["name"] for case in cases]:
        measured = [rank.result[name] for rank in ranks]
        for rank in measured:
            for kind in ("weights", "gradients", "optimizer"):
                assert rank["plan"][kind] == rank[kind], f"{axis}, {name}: {kind}"
        planned, peak = (max(values) for values in zip(*((r["plan"]["peak"], r["peak"]) for r in measured)))
        print(f"{axis:12} {name:32} planned {planned / 2**20:6.0f} measured {peak / 2**20:6.0f} {planned / peak:.2f}")
        assert planned == pytest.approx(peak, rel=0.25), f"{axis}, {name}: planned {planned}, measured {peak}"
