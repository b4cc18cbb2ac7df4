"""Saving a run's state and resuming from it, on the same or on another number of ranks.

Rank 0 holds the files: it chooses the checkpoint and sends the state. A checkpoint of another model, data,
method, seed, batch or base weights is refused; after other changes of the recipe the run resumes with a notice.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

import comm
from parallel import ParameterLayout, gather_tensors, model_layout, slice_tensors
from trainer.agreement import Notice, broadcast_tensors, together
from trainer.build import Run
from trainer.checkpoint.folder import RESULT_FILE, Checkpoint, CheckpointError, CheckpointFolder
from trainer.checkpoint.weights_digest import weights_digest
from trainer.files.storage import atomic_file, read_json, write_json
from trainer.model.loading import model_dtype, source_folder
from trainer.recipe.config import Recipe
from trainer.recipe.load import flattened
from trainer.recipe.rules import resolve_batch
from trainer.training.progress import WATCHDOG_ROWS, Progress

FREE_SECTIONS = ("optimizer", "schedule", "epochs", "max_steps", "max_grad_norm", "gradient_checkpointing")
RUN_FILE = ".run"


@dataclass(frozen=True)
class Found:
    """What a run continues from.

    Attributes:
        checkpoint: The checkpoint on rank 0, where there is one; None elsewhere.
        state: Its state on every rank; None for a new run.
        run: Number of the run in its output folder, on every rank.
    """

    checkpoint: Checkpoint | None
    state: dict[str, Any] | None
    run: int = 0


def save_checkpoint(run: Run, folder: CheckpointFolder, progress: Progress) -> Path | None:
    """Write a checkpoint: trainable weights, optimizer state, and what continues the plan. Every rank calls it.

    Returns its folder; None on ranks without a disk.

    With a patience the best one stays beside the last ones. A run that is given up loses none: what it learned lately
    may be worth nothing.
    """
    layout = model_layout(run.model)
    weights = comm.named_arrays(run.model.trainable_parameters())
    files = {
        "weights": gather_tensors(layout, weights, run.mesh.pp),
        "optimizer": gather_tensors(_slot_layout(layout, run.optimizer), run.optimizer.tensors(), run.mesh.pp),
    }
    epoch, position = divmod(progress.step, run.batches.steps_per_epoch)
    state = {
        "progress": progress.as_dict(),
        "plan": {"epoch": epoch, "position": position},
        "num_updates": run.optimizer.num_updates,
        "identity": run.identity,
        "base": _base(run) if run.world.rank == 0 else None,
        "settings": _settings(run.recipe),
        "described": _described(run.recipe),
        "mesh": asdict(run.opened.sizes),
        "batch_dp": run.batch_dp,
        "seed": run.recipe.seed,
    }
    # A save that fails on rank 0 still takes part in every gather, so the ranks can agree about it afterwards.
    folder.pin(progress.best_step if run.recipe.eval.patience else None)
    given_up = progress.high_rows >= WATCHDOG_ROWS
    return together(run.world, lambda: folder.save(progress.step, files, state, keep_all=given_up))


def find_checkpoint(recipe: Recipe, folder: CheckpointFolder, world: comm.Group, notice: Notice) -> Found:
    """The checkpoint that `checkpoint.resume` means; rank 0 looks, every rank gets its state.

    Raises:
        ValueError: A checkpoint named by path is not whole.
    """

    def look() -> Checkpoint | None:
        if world.rank != 0:
            return None
        if recipe.checkpoint.resume == "none":
            return _own(folder, notice) if int(os.environ.get("COMM_RESTARTS", "0")) else None
        if recipe.checkpoint.resume == "auto":
            return folder.newest(notice)
        try:
            return folder.open(Path(recipe.checkpoint.resume))
        except CheckpointError as error:
            raise ValueError(f"checkpoint.resume: {error}") from error

    checkpoint = together(world, lambda: _of_a_run(look()))
    run = together(world, lambda: _number(folder, checkpoint) if world.rank == 0 else 0)
    return Found(checkpoint, *comm.broadcast_object([checkpoint.state if checkpoint else None, run], world))


def _of_a_run(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint, if a run has written it and not another program."""
    if checkpoint is not None and not ("identity" in checkpoint.state and isinstance(checkpoint.state.get("progress"), dict)):
        raise ValueError(f"{checkpoint.path} holds no state of a run; use another output_dir, or checkpoint.resume=none.")
    return checkpoint


def _own(folder: CheckpointFolder, notice: Notice) -> Checkpoint | None:
    """What a run that the launcher restarted has saved itself, beside what earlier runs left in the folder."""
    assert folder.folder is not None, "only a rank with a disk reads"
    try:
        number = read_json(folder.folder.parent / RUN_FILE)
    except (OSError, ValueError):
        return None  # it failed before it knew its number
    return folder.newest(notice, lambda state: _run_of(state) == number)


def _number(folder: CheckpointFolder, checkpoint: Checkpoint | None) -> int:
    """The run's number, kept in the folder for a restart."""
    assert folder.folder is not None, "only a rank with a disk writes"
    number = _run_number(folder, checkpoint)
    with atomic_file(folder.folder.parent / RUN_FILE) as file:
        write_json(file, number)
    return number


def _run_number(folder: CheckpointFolder, checkpoint: Checkpoint | None) -> int:
    """A run resumes under the number in its own folder's checkpoint; a new one counts on from what is there."""
    assert folder.folder is not None, "only a rank with a disk reads"
    if checkpoint is not None and checkpoint.path.parent.resolve() == folder.folder.resolve():
        return _run_of(checkpoint.state)
    earlier = [_run_of(state) for state in folder.states()]
    try:
        earlier.append(int(read_json(folder.folder.parent / RESULT_FILE).get("run", 0)))
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # no result, or a torn one, which `is_written` does not take either
    return max(earlier, default=0) + 1


def _run_of(state: dict[str, Any]) -> int:
    progress = state.get("progress")
    return progress.get("run", 0) if isinstance(progress, dict) else 0


def keep_global_batch(recipe: Recipe, found: Found, dp: int) -> tuple[Recipe, int]:
    """Hold a resumed run to its global batch when only the number of ranks has changed.

    Args:
        recipe: The recipe of the run to be resumed.
        found: Its checkpoint.
        dp: Data-parallel ranks now.

    Returns:
        The recipe, with `global_batch_size` set where the checkpoint decides it (accumulation follows), and the
        number of data-parallel ranks for which the recipe as written gives that batch.

    Raises:
        RecipeError: The global batch cannot be divided by the ranks there are now.
    """
    if found.state is None:
        return recipe, dp
    saved, batch_dp = found.state["identity"]["global_batch_size"], found.state["batch_dp"]
    if batch_dp == dp or resolve_batch(recipe, batch_dp).global_size != saved:
        return recipe, dp
    kept = replace(recipe, global_batch_size=saved, grad_accumulation_steps=1)
    resolve_batch(kept, dp)
    return kept, batch_dp


def restore(run: Run, folder: CheckpointFolder, found: Found, notice: Notice) -> Progress:
    """Load rank 0's checkpoint into every rank's model and optimizer.

    Args:
        run: The run, freshly built.
        folder: The folder of the run's checkpoints.
        found: What `find_checkpoint` gave.
        notice: Gets one line per change of settings.

    Returns:
        Where the run stands; a fresh `Progress` without a checkpoint.

    Raises:
        ValueError: The checkpoint belongs to another run; the text lists the keys.
    """
    world, checkpoint, state = run.world, found.checkpoint, found.state
    if state is None:
        return Progress(run=found.run)
    words = list(_differences(state.get("described", {}), _described(run.recipe)))
    together(world, lambda: _check_identity({"objective.name": "sft"} | state["identity"], run.identity, words))
    together(world, lambda: _check_base(state.get("base"), _base(run), notice) if world.rank == 0 else None)
    for difference in differences(found, run.recipe):
        notice(f"resuming with another {difference}")
    load_weights(run, checkpoint)
    layout = model_layout(run.model)
    moments = broadcast_tensors(world, checkpoint.tensors("optimizer") if checkpoint else None)
    own = {name for name, _ in run.optimizer.tensors()}
    slots = dict(slice_tensors(_slot_layout(layout, run.optimizer), moments, own))
    run.optimizer.load(slots, state["num_updates"])
    mx.eval(run.optimizer.state)
    progress = replace(Progress.resumed(state["progress"]), run=found.run)
    best = progress.best_step
    if run.recipe.eval.patience and best is not None and not _found_best(run.world, folder, best, notice):
        progress.forget_best()
    return progress


def differences(found: Found, recipe: Recipe) -> list[str]:
    """Settings that a run may change and that its checkpoint was made with otherwise, such as `max_steps: 6 then, 8 now`."""
    return list(_differences(found.state["settings"], _settings(recipe))) if found.state else []


def load_weights(run: Run, checkpoint: Checkpoint | None) -> None:
    """Load the trainable weights of rank 0's checkpoint into every rank's model; None on the other ranks."""
    weights = broadcast_tensors(run.world, checkpoint.tensors("weights") if checkpoint else None)
    own = {name for name, _ in comm.named_arrays(run.model.trainable_parameters())}
    run.model.update(tree_unflatten(list(slice_tensors(model_layout(run.model), weights, own))))
    mx.eval(run.model.trainable_parameters())


def _found_best(world: comm.Group, folder: CheckpointFolder, step: int, notice: Notice) -> bool:
    """Keep the best checkpoint; False where it is gone, or in another folder, and the best is to be chosen anew."""
    if not comm.broadcast_object(folder.holds(step), world):
        notice(f"the best checkpoint, of step {step}, is not in this folder: the best is chosen anew")
        return False
    folder.pin(step)
    together(world, folder.mark_best)
    return True


def _slot_layout(layout: dict[str, ParameterLayout], optimizer: Any) -> dict[str, ParameterLayout]:
    """The layout of optimizer tensors: a slot of its parameter's shape is split like the parameter."""
    names = (name for name, _ in optimizer.tensors())
    return {name: layout[name.rsplit(".", 1)[0]] for name in names if name.rsplit(".", 1)[0] in layout}


def _settings(recipe: Recipe) -> dict[str, Any]:
    sections = asdict(recipe)
    return {name: sections[name] for name in FREE_SECTIONS}


def _described(recipe: Recipe) -> dict[str, Any]:
    """The recipe's words for what a checkpoint's identity holds digests of."""
    sections = asdict(recipe)
    return {name: sections[name] for name in ("model", "lora", "data")}


def _check_identity(saved: dict[str, Any], current: dict[str, Any], words: Sequence[str] = ()) -> None:
    """Refuse a checkpoint of another run; `words`, how the recipes differ, explain what is a digest."""
    changed = [key for key in current if saved.get(key) != current[key]]
    if not changed:
        return
    pairs = []
    for key in changed:
        section = [text for text in words if text.split(".")[0] == key.split(".")[0]]
        pairs += section or [f"{key}: {saved.get(key)} then, {current[key]} now"]
    raise ValueError(
        f"The checkpoint belongs to another run ({'; '.join(dict.fromkeys(pairs))}). Use another output_dir, or "
        "checkpoint.resume=none."
    )


def _base(run: Run) -> dict[str, Any]:
    """What the adapters stand on: rank 0's weights, and how they are held. Full training keeps none of it."""
    recipe = run.recipe
    if recipe.method == "full":
        return {}
    folder = source_folder(recipe.model)
    return {
        "model weights": weights_digest(folder) if folder else "random",
        "model.dtype": str(model_dtype(recipe.model.dtype)).removeprefix("mlx.core."),
        "model.quantize": asdict(recipe.model)["quantize"],
    }


def _check_base(saved: dict[str, Any] | None, current: dict[str, Any], notice: Notice) -> None:
    if saved is None:
        notice("the checkpoint does not say on which base weights it was trained; they are taken to be the same")
        return
    _check_identity(saved, current)


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """Settings that differ, each in words; those that an older checkpoint does not have are left out."""
    before, now = flattened(saved), flattened(current)
    for key in now:
        if key in before and before[key] != now[key]:
            yield f"{key}: {before[key]} then, {now[key]} now"
