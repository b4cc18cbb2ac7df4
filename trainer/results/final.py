"""The end of a run: its final result, from the best weights where there is a patience, else from the last.

    result.json      {"run": number of the run, "step": steps done, "weights_step": step of the result's weights,
                      "eval_loss": the best one}

`result.json` is written last, so a result that it names is whole and belongs to that run and step; it goes
away when a run trains on.
"""

from pathlib import Path

import comm
from parallel import gather_tensors, model_layout
from trainer.agreement import Notice, together
from trainer.build import Run
from trainer.checkpoint.folder import RESULT_FILE, Checkpoint, CheckpointError, CheckpointFolder
from trainer.checkpoint.state import load_weights
from trainer.files.storage import atomic_file, explain, read_json, write_json
from trainer.model.loading import source_folder
from trainer.results.mlx_lm_format import (
    ADAPTERS_FILE,
    adapter_config,
    write_adapters,
    write_model,
)
from trainer.training.progress import Progress


def result_path(run: Run) -> Path:
    """The adapters' file, or the model's folder."""
    folder = Path(run.recipe.output_dir)
    return folder / ADAPTERS_FILE if run.adapter is not None else folder / "model"


def is_written(run: Run, progress: Progress) -> bool:
    """Whether the result of a run that has ended is there; a run may be killed before it is. Every rank calls it."""
    written = None
    if run.world.rank == 0 and result_path(run).exists():
        try:
            facts = read_json(Path(run.recipe.output_dir) / RESULT_FILE)
            written = [facts.get("run", 0), facts["step"]]
        except (FileNotFoundError, ValueError, KeyError, AttributeError):
            written = None
    return comm.broadcast_object(written, run.world) == [progress.run, progress.step]


def discard(output_dir: Path | None) -> None:
    """Take back `result.json`, as the run trains on; None on ranks without a disk."""
    if output_dir is not None:
        (output_dir / RESULT_FILE).unlink(missing_ok=True)


def finish(run: Run, folder: CheckpointFolder, progress: Progress, notice: Notice) -> int:
    """Write the result; returns the step of its weights. Every rank calls it.

    Raises:
        OSError: It cannot be written. The checkpoints are untouched; the same command writes it later.
    """
    world = run.world
    step = progress.step
    if run.recipe.eval.patience and progress.best_step not in (None, step):
        best = _open_best(folder, progress.best_step, notice) if world.rank == 0 else None
        if comm.broadcast_object(best is not None, world):
            load_weights(run, best)
            step = progress.best_step
    facts = {"run": progress.run, "step": progress.step, "weights_step": step, "eval_loss": progress.best_loss}
    # An error on rank 0 leaves out no gather, so that the ranks can agree about it afterwards.
    together(world, lambda: _write(run, Path(run.recipe.output_dir) if world.rank == 0 else None, facts))
    return step


def _open_best(folder: CheckpointFolder, step: int, notice: Notice) -> Checkpoint | None:
    try:
        return folder.open_step(step)
    except CheckpointError as error:
        notice(f"{error} The result holds the last weights instead of the best.")
        return None


def _write(run: Run, output_dir: Path | None, facts: dict[str, float | int | None]) -> None:
    try:
        write_result(run, output_dir)
        if output_dir is not None:
            with atomic_file(output_dir / RESULT_FILE) as file:
                write_json(file, facts)
    except OSError as error:
        assert output_dir is not None, "only a rank with a disk writes"
        raise OSError(
            f"The result could not be written to {output_dir}: {explain(error, output_dir)}. "
            f"The checkpoint of step {facts['step']} is there; the same command writes the result once this is mended."
        ) from error


def write_result(run: Run, output_dir: Path | None) -> None:
    """Write the final adapters, or the final model folder. Every rank calls it; None on ranks without a disk."""
    layout = model_layout(run.model)
    if run.adapter is not None:
        tensors = comm.named_arrays(run.model.trainable_parameters())
        spec = run.adapter
        config = adapter_config(
            [f"{path}.lora_a" for path in spec.paths],
            fine_tune_type=spec.method,
            rank=spec.rank,
            scale=spec.scale,
            dropout=spec.dropout,
        )
        write_adapters(output_dir, gather_tensors(layout, tensors, run.mesh.pp), config)
    else:
        whole = gather_tensors(layout, comm.named_arrays(run.model.parameters()), run.mesh.pp)
        folder = output_dir and output_dir / "model"
        write_model(folder, whole, run.opened.base.config, run.opened.tokenizer, source=source_folder(run.recipe.model))
