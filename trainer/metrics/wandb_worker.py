"""The process in which W&B lives: JSON lines on standard input become calls of the wandb package.

Lines: {"begin": …} first, then {"row": …} and {"samples": …}, then {"end": summary}. Input that ends without "end"
means that the trainer died, and the run is marked as failed. What a person should know is printed, a line each. Run as
a script: it imports nothing of this project.
"""

import json
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

INIT_SECONDS = 10.0


def main(lines: Iterable[str]) -> int:
    """Handle every line; returns the exit code."""
    lines = iter(lines)
    begin = json.loads(next(lines))["begin"]
    run = _start(begin)
    if run is None:
        return 1
    for line in lines:
        message = json.loads(line)
        if "row" in message:
            run.log(message["row"])
        elif "samples" in message:
            _log_samples(run, begin["step_key"], message["samples"])
        else:
            run.summary.update(message["end"])
            run.finish(exit_code=0)
            return 0
    run.finish(exit_code=1)
    return 0


def _start(begin: dict[str, Any]) -> Any:
    """The wandb run; falls back to offline when online cannot start. None when W&B cannot start at all."""
    try:
        import wandb
    except ImportError as error:
        print(f"W&B is off: {error}.", flush=True)
        return None
    folder = Path(begin["output_dir"]) / "wandb"
    run_id = _run_id(folder, begin["resumed"])
    modes: list[Literal["online", "offline"]] = ["offline"] if begin["mode"] == "offline" else ["online", "offline"]
    for mode in modes:
        try:
            run = wandb.init(
                project=begin["project"],
                name=begin["name"],
                id=run_id,
                dir=begin["output_dir"],
                config=begin["config"],
                mode=mode,
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
            )
        except Exception as error:  # wandb raises many kinds; none may reach the training run
            why = str(error).strip().split("\n")[0]
            print(f"W&B could not start {mode} ({type(error).__name__}: {why}).", flush=True)
            wandb.teardown(exit_code=1)  # its service still holds the run's id
            continue
        _define_metrics(run, begin["step_key"], begin["summaries"])
        if mode == "offline":
            print(f"W&B records offline; `wandb sync {Path(run.dir).parent}` uploads it.", flush=True)
        else:
            print(f"W&B: {run.url}", flush=True)
        return run
    return None


def _run_id(folder: Path, resumed: bool) -> str:
    file = folder / "run-id.txt"
    if resumed and file.is_file():
        return file.read_text().strip()
    run_id = secrets.token_hex(4)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(run_id + "\n")
    return run_id


def _define_metrics(run: Any, step_key: str, summaries: dict[str, str]) -> None:
    """W&B's summary keeps the last value of each key; those of `summaries` also keep their best."""
    run.define_metric("*", step_metric=step_key)
    for key, summary in summaries.items():
        run.define_metric(key, step_metric=step_key, summary=summary)


def _log_samples(run: Any, step_key: str, samples: dict[str, Any]) -> None:
    import wandb

    columns: list[str | int] = ["prompt", "expected", "generated"]
    table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in samples["rows"]])
    run.log({step_key: samples["step"], "eval/samples": table})


if __name__ == "__main__":
    # wandb writes to standard output as it pleases; what this script prints goes to the person alone.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(sys.stdin))
