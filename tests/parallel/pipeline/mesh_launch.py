"""Which cases run in which launch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from mesh_cases import Case
from ranks import ROOT

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", HERE)))
TIMEOUT_SECONDS = 300
CHECKS = [
    "generation",
    "evaluation",
    "packed_rows",
    "logits_loss",
    "frozen_first_stage",
    "refusals",
    "bubble",
    "checkpoint_tensors",
    "stages_differ_in_optimizer",
    "large_messages",
]
FSDP = {"dp_shard": 2, "micro_batches": 2}


@dataclass(frozen=True)
class Launch:
    """Processes that run cases one after the other, then checks."""

    num_ranks: int
    cases: list[Case]
    backend: str = "ring"
    checks: list[str] = field(default_factory=list)


LAUNCHES = {
    "ring of two": Launch(
        2,
        [
            Case("qwen3_5", "full", pp=2, num_steps=20),
            Case("llama", "full", pp=2, schedule="gpipe"),
            Case("qwen3_moe", "full", pp=2),
            Case("gemma3", "full", pp=2),
            Case("qwen2", "lora", pp=2),
            Case("phi3", "lora", pp=2, split=(1, 3)),
            Case("qwen3", "qlora", pp=2, micro_batches=1),
            Case("qwen3_5_moe", "lora", pp=2, wide=True),
            Case("qwen3", "full", **FSDP, num_steps=20),
            Case("llama", "full", **FSDP, reshard=False),
            Case("qwen3_5", "full", **FSDP),
            Case("qwen3_moe", "full", **FSDP),
            Case("gemma3", "lora", **FSDP),
            Case("deepseek_v3", "full", **FSDP),
            Case("falcon_h1", "full", **FSDP),
            Case("qwen3", "qlora", **FSDP),
        ],
        checks=CHECKS,
    ),
    "ring of three": Launch(
        3,
        [
            Case("qwen3_5", "full", pp=3, num_steps=20),
            Case("llama", "full", pp=3, split=(1, 1, 2), schedule="gpipe"),
        ],
        checks=["uneven_on_other_backends", "recomputed_layers"],
    ),
    "ring of four": Launch(
        4,
        [
            Case("qwen3", "full", pp=4, num_steps=20),
            Case("gemma3", "lora", pp=4),
            Case("qwen3", "full", dp_shard=4, micro_batches=1, num_steps=20),
            Case("qwen3", "full", dp_replicate=2, tp=2, micro_batches=1, num_steps=20),
            Case("llama", "full", dp_replicate=2, pp=2, micro_batches=1, num_steps=20),
            Case("qwen3", "full", pp=2, tp=2, num_steps=20),
            Case("qwen3", "full", dp_shard=2, tp=2, micro_batches=1, num_steps=20),
            Case("llama", "full", dp_shard=2, pp=2, micro_batches=2),
        ],
    ),
    "mpi of four": Launch(
        4,
        [
            Case("qwen3", "full", pp=2, tp=2, num_steps=20),
            Case("llama", "full", dp_replicate=2, pp=2, micro_batches=1, num_steps=20),
            Case("qwen2", "lora", dp_shard=2, tp=2, micro_batches=2),
            Case("qwen3_5", "lora", dp_shard=2, tp=2, micro_batches=2, wide=True),
            Case("llama", "lora", dp_replicate=2, dp_shard=2, micro_batches=2),
        ],
        backend="mpi",
        checks=["large_messages"],
    ),
}
