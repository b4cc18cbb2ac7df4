"""Open what a run left: its output folder, or one of its checkpoints."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

import comm
from parallel import model_layout, slice_tensors
from trainer.agreement import Notice, broadcast_tensors, together
from trainer.checkpoint.folder import (
    CheckpointError,
    CheckpointFolder,
    follow_best,
    open_checkpoint,
)
from trainer.files.storage import read_json
from trainer.files.tensor_files import read_tensor_file
from trainer.model.adapters import misfits, not_finite
from trainer.recipe.config import Recipe
from trainer.recipe.load import load_recipe, recipe_from
from trainer.recipe.problems import AgreedUserError
from trainer.results.mlx_lm_format import ADAPTER_CONFIG_FILE, ADAPTERS_FILE


def shared_recipe(world: comm.Group, target: str, overrides: list[str]) -> Recipe:
    """Rank 0's `recipe_of(target, overrides)` on every rank, as the run's folder need not be elsewhere.

    Raises:
        ValueError: There is no recipe, on all ranks.
    """
    found = together(world, lambda: recipe_of(target, overrides) if world.rank == 0 else None)
    return recipe_from(comm.broadcast_object(found and asdict(found), world))


def notice_on_stderr(world: comm.Group) -> Notice:
    """Prints rank 0's notices; the others' are the same."""
    return (lambda line: print(line, file=sys.stderr, flush=True)) if world.rank == 0 else (lambda line: None)


def recipe_of(target: str, overrides: list[str]) -> Recipe:
    """The resolved recipe that belongs to a run's folder or checkpoint.

    Raises:
        ValueError: There is no recipe.
    """
    path = _path(target)
    if not path.is_dir():
        raise ValueError(f"{target!r} is no folder; give a run's output folder or one of its checkpoints.")
    for folder in (path, path.parent.parent):
        if (folder / "recipe.yaml").is_file():
            recipe = replace(load_recipe(folder / "recipe.yaml", overrides), output_dir=str(folder))
            return _with_own_adapters(recipe, folder)
    raise ValueError(f"{target!r} holds no recipe.yaml; give a run's output folder or one of its checkpoints.")


def _with_own_adapters(recipe: Recipe, folder: Path) -> Recipe:
    """A finished run describes its adapters itself; the folder they started from may be gone."""
    if recipe.lora.init_from is None or not (folder / ADAPTER_CONFIG_FILE).is_file():
        return recipe
    return replace(recipe, lora=replace(recipe.lora, init_from=str(folder)))


class HasModel(Protocol):
    """What `load_result` needs to know of a run."""

    @property
    def world(self) -> comm.Group: ...

    @property
    def model(self) -> nn.Module: ...


def load_result(run: HasModel, target: str, notice: Notice) -> None:
    """Load a run's tensors into a model built from its recipe; rank 0 reads, the others receive.

    Args:
        run: The run, built from `recipe_of(target)`, such as `trainer.build.Run`.
        target: The output folder (its final result, else its newest checkpoint) or a checkpoint.
        notice: Gets one line for each checkpoint that is passed over.

    Raises:
        ValueError: There is nothing to load, or tensors are missing, unexpected, of another shape or not finite; on all
            ranks.
    """
    world = run.world
    tensors = together(world, lambda: _read(_path(target), notice) if world.rank == 0 else None)
    known = dict(comm.named_arrays(run.model.parameters()))
    _require_fit(run, target, {name: list(value.shape) for name, value in (tensors or {}).items()})
    loaded = list(slice_tensors(model_layout(run.model), broadcast_tensors(world, tensors), known))
    # A rank has its slices only, and a pipeline's stage its own layers.
    if broken := sorted({name for names in comm.all_gather_object(not_finite(loaded), world) for name in names}):
        raise AgreedUserError(f"{target!r} holds numbers that are not finite: {', '.join(broken)}.")
    run.model.update(tree_unflatten([(name, value.astype(known[name].dtype)) for name, value in loaded]))


def _require_fit(run: HasModel, target: str, shapes: dict[str, list[int]]) -> None:
    """Refuse tensors, by rank 0's names and shapes, that are not all of what was trained."""
    layout, trained = model_layout(run.model), dict(comm.named_arrays(run.model.trainable_parameters()))
    own = {
        name: (list(layout[name].full_shape(value.shape) if name in layout else value.shape), name in trained)
        for name, value in comm.named_arrays(run.model.parameters())
    }
    # A pipeline's stage has only its own layers' tensors, so a name is known where any rank has it.
    everyone = {n: s for ranks in comm.all_gather_object(own, run.world) for n, s in ranks.items()}
    expected = {name: shape for name, (shape, _) in everyone.items()}
    required = [name for name, (_, is_trained) in everyone.items() if is_trained]
    if wrong := misfits(comm.broadcast_object(shapes, run.world), expected, required):
        raise AgreedUserError(f"{target!r} does not hold the weights that its recipe trains: {wrong}.")


def _path(target: str) -> Path:
    try:
        return follow_best(Path(target))
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _read(path: Path, notice: Notice) -> dict[str, mx.array]:
    if (path / "state.json").is_file():
        return _checkpoint(path)
    if (path / ADAPTERS_FILE).is_file():
        return read_tensor_file(path / ADAPTERS_FILE)
    if (path / "model").is_dir():
        shards = _shards(path / "model")
        return {name: value for shard in shards for name, value in read_tensor_file(shard).items()}
    newest = CheckpointFolder(path / "checkpoints", None).newest(notice)
    if newest is None:
        raise ValueError(f"{str(path)!r} holds no result and no whole checkpoint yet.")
    notice(f"{path} has no final result; using its checkpoint of step {newest.step}.")
    return newest.tensors("weights")


def _shards(folder: Path) -> list[Path]:
    """The model's files: those that its index names, where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} names no files.") from None


def _checkpoint(path: Path) -> dict[str, mx.array]:
    try:
        return open_checkpoint(path).tensors("weights")
    except CheckpointError as error:
        raise ValueError(str(error)) from error

