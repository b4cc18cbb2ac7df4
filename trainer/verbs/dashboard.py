"""`python -m trainer dashboard`: a W&B workspace whose panels show what these runs log.

Built with W&B's own wandb-workspaces (extra ``report``). ``--dry-run`` writes the workspace's definition, as it would be
sent, to a file and needs no network.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.metrics.rows import STEP_KEY

WORKSPACE_NAME = "Training throughput"
# section -> panels of (title, keys, logarithmic)
SECTIONS: dict[str, tuple[tuple[str, tuple[str, ...], bool], ...]] = {
    "Throughput": (
        ("Tokens per second", ("throughput/tokens_per_sec",), False),
        ("Tokens per second and device", ("throughput/tokens_per_sec_per_device",), False),
        ("Scaling efficiency, %", ("throughput/scaling_efficiency_pct",), False),
        ("Model FLOPs utilisation, %", ("throughput/mfu_pct",), False),
        ("TFLOP/s per device", ("throughput/tflops_per_device",), False),
        ("Rows per second", ("throughput/samples_per_sec",), False),
        ("Padding, % of positions", ("throughput/padding_pct",), False),
        ("Step time, s", ("time/step_s", "time/data_s", "time/compute_s", "time/optimizer_s"), False),
    ),
    "Loss": (
        ("Loss", ("train/loss", "eval/loss"), False),
        ("Exact match", ("eval/exact_match",), False),
        ("Perplexity", ("eval/ppl",), True),
        ("Gradient norm before clipping", ("train/grad_norm",), True),
        ("Learning rate", ("train/learning_rate",), False),
        ("Skipped steps", ("train/skipped_steps",), False),
        ("Tokens seen", ("train/num_tokens",), False),
        ("Epoch", ("train/epoch",), False),
    ),
    "Communication": (
        ("Not hidden behind compute, % of the step", ("comm/exposed_pct",), False),
        ("Gradient reduction, s", ("comm/allreduce_s",), False),
        ("Bus bandwidth, GB/s", ("comm/bus_gb_per_s",), False),
        ("Bytes per step", ("comm/bytes_per_step",), False),
        ("Slowest rank behind the fastest, s", ("comm/rank_skew_s",), False),
    ),
    "Memory": (("Memory, GiB", ("memory/peak_gib", "memory/active_gib", "memory/cache_gib"), False),),
    "Pipeline": (("Bubble, %", ("pp/bubble_pct",), False),),
}


def main(arguments: argparse.Namespace) -> int:
    """Save the workspace to W&B, or its definition to a file; returns 0."""
    workspace = build_workspace(arguments.entity, arguments.project)
    if arguments.dry_run is not None:
        target = Path(arguments.dry_run)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(definition(workspace), indent=2) + "\n", encoding="utf-8")
        print(f"Wrote {target}; nothing was sent to W&B.")
        return 0
    workspace.save()
    print(f"Saved: {workspace.url}")
    return 0


def build_workspace(entity: str, project: str) -> Any:
    """A wandb-workspaces ``Workspace`` with one section per group of metrics.

    Raises:
        ImportError: wandb-workspaces is not installed; the text names the extra.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError("The dashboard needs wandb-workspaces: pip install 'mlx-trainer[report]'.") from error
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[
                panels.LinePlot(title=title, x=STEP_KEY, y=list(keys), log_y=log or None) for title, keys, log in plots
            ],
        )
        for name, plots in SECTIONS.items()
    ]
    return workspaces.Workspace(
        entity=entity, project=project, name=WORKSPACE_NAME, sections=sections, auto_generate_panels=False
    )


def definition(workspace: Any) -> dict[str, Any]:
    """What would be sent to W&B, JSON-able."""
    view = workspace._to_model()
    return json.loads(view.model_dump_json(by_alias=True, exclude_none=True))
