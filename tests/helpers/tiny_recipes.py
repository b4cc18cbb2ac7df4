"""Tiny recipes for tests of whole runs: real checkpoints and tokenizers from tests/reference, seconds to train."""

import json
import random
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ranks import RankResult, run_ranks
from trainer.recipe.config import Recipe
from trainer.recipe.load import recipe_from

MODELS = Path(__file__).parent.parent / "reference" / "data"
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()

# Architectures without a reference checkpoint: random starts of the same size.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-6,
            "sliding_window": 32,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 8,
        },
    },
}


def model_section(name: str) -> dict[str, Any]:
    """`model:` for an architecture: a reference checkpoint, or a random start with a reference tokenizer."""
    if name in CONFIGS:
        return {"config": json.loads(json.dumps(CONFIGS[name])), "tokenizer": str(MODELS / "llama")}
    return {"path": str(MODELS / name)}


def write_rows(folder: Path, num_rows: int = 48) -> Path:
    """A JSONL file of text rows of very different lengths."""
    chooser = random.Random(0)
    path = folder / "rows.jsonl"
    rows = [" ".join(chooser.choices(WORDS, k=chooser.randint(2, 20))) for _ in range(num_rows)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def tiny_recipe(rows: Path, output_dir: Path, architecture: str = "qwen3", **changes: Any) -> Recipe:
    """A checked recipe of a few small steps; `changes` are top-level keys (sections are merged)."""
    values: dict[str, Any] = {
        "model": model_section(architecture),
        "data": {"train": str(rows), "max_seq_len": 64},
        "batch_size_per_device": 4,
        "max_steps": 6,
        "optimizer": {"lr": 1e-2},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "logging": {"every": 1},
        "output_dir": str(output_dir),
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return recipe_from(values)


def run_apart(
    settings: Recipe,
    num_ranks: int,
    step: int = 0,
    *,
    sent: int = signal.SIGKILL,
    ranks: Sequence[int] | None = None,
    folder: Path | None = None,
    backend: str = "ring",
    full_after: int = 0,
    check: bool | None = None,
) -> list[RankResult]:
    """Train in real processes.

    Args:
        settings: the recipe.
        num_ranks: processes.
        step: at which ranks send themselves a signal; 0 = never.
        sent: that signal.
        ranks: which of them; None = all.
        folder: where each rank gets a working folder of its own; None = all run here.
        backend: of the group.
        full_after: step from which no rank has room for a checkpoint; 0 = never.
        check: fail when a rank fails; None = unless a signal is sent.
    """
    arguments = {
        "recipe": asdict(settings),
        "step": step,
        "signal": int(sent),
        "ranks": ranks,
        "folder": str(folder) if folder else None,
        "full_after": full_after,
    }
    worker = Path(__file__).parents[1] / "trainer" / "running" / "workers" / "run_recipe.py"
    return run_ranks(
        worker, num_ranks, backend=backend, args=[json.dumps(arguments)], timeout=120, check=step == 0 if check is None else check
    )
