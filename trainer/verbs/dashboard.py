"""`python -m trainer dashboard`: a W&B workspace whose panels show what these runs log.

Built with W&B's own wandb-workspaces (extra `report`). `--dry-run` writes the workspace's definition, as it would be
sent, to a file and needs no network.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.metrics.table import METRICS, SECTIONS, STEP_KEY

WORKSPACE_NAME = "Training throughput"


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
    """A wandb-workspaces `Workspace` with one section per group of metrics.

    Raises:
        ImportError: Wandb-workspaces is not installed; the text names the extra.
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
                panels.LinePlot(title=title, x=STEP_KEY, y=keys, log_y=log or None)
                for title, (keys, log) in panels_of(name).items()
            ],
        )
        for name in SECTIONS
    ]
    return workspaces.Workspace(
        entity=entity, project=project, name=WORKSPACE_NAME, sections=sections, auto_generate_panels=False
    )


def panels_of(section: str) -> dict[str, tuple[list[str], bool]]:
    """The panels of a section: title -> the keys that it shows, and whether it is logarithmic."""
    panels: dict[str, tuple[list[str], bool]] = {}
    for metric in METRICS:
        if metric.section == section:
            panels.setdefault(metric.panel, ([], metric.log_scale))[0].append(metric.key)
    return panels


def definition(workspace: Any) -> dict[str, Any]:
    """What would be sent to W&B, JSON-able."""
    view = workspace._to_model()
    return json.loads(view.model_dump_json(by_alias=True, exclude_none=True))
