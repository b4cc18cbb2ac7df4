"""The W&B workspace that is built for these runs."""

import json
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.metrics.table import METRIC_KEYS, SECTIONS, STEP_KEY
from trainer.verbs.dashboard import build_workspace, panels_of


def test_every_metric_has_a_panel() -> None:
    """A key that is logged and shown nowhere, or a panel that stays empty because of a typing error."""
    shown = {key for section in SECTIONS for keys, _ in panels_of(section).values() for key in keys}
    assert shown == METRIC_KEYS - {STEP_KEY}


# wandb-workspaces itself uses what pydantic has deprecated.
@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_dry_run_writes_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A definition without panels or on W&B's own step axis, that W&B would refuse; a dry run that talks to W&B."""
    workspaces = pytest.importorskip("wandb_workspaces.workspaces", reason="the extra 'report' is not installed")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    target = tmp_path / "new" / "workspace.json"
    assert main(["dashboard", "--entity", "me", "--project", "runs", "--dry-run", str(target)]) == 0
    written = json.loads(target.read_text())
    assert (written["entity"], written["project"]) == ("me", "runs")
    sections = written["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    model = type(build_workspace("me", "runs")._to_model())
    read_back = workspaces.Workspace._from_model(model.model_validate(written))
    titles = {section.name: [panel.title for panel in section.panels] for section in read_back.sections}
    assert titles == {name: list(panels_of(name)) for name in SECTIONS}
    configs = [panel["config"] for section in sections for panel in section["panels"]]
    assert {config["xAxis"] for config in configs} == {STEP_KEY}
    assert ["memory/peak_gib", "memory/active_gib", "memory/cache_gib"] in [config["metrics"] for config in configs]


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A traceback that does not say what to install."""
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "--entity", "me", "--project", "runs", "--dry-run", "unused.json"]) == 1
    assert "pip install 'mlx-trainer[report]'" in capsys.readouterr().err
