"""Rules between the keys of a recipe, and the arithmetic of batches and meshes.

All are pure functions of the recipe (and of the number of ranks). `check` and `warnings` need no ranks;
`resolve_mesh` and `resolve_batch` do, and raise a `RecipeError` that names the sizes that work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from operator import attrgetter

from comm.mesh_shape import MeshShape  # its own file, also where another `comm` has replaced our front
from trainer.recipe.config import ParallelConfig, Recipe
from trainer.recipe.paths import named_paths
from trainer.recipe.problems import Problem, RecipeError, listing, show

AXES = tuple(MeshShape.__dataclass_fields__)


@dataclass(frozen=True)
class BatchSizes:
    """Rows of one optimizer step: global_size = per_device * dp * accumulation."""

    per_device: int
    dp: int
    accumulation: int

    @property
    def global_size(self) -> int:
        return self.per_device * self.dp * self.accumulation


def resolve_mesh(parallel: ParallelConfig, world: int) -> MeshShape:
    """The size of every axis for a number of ranks; -1 takes the ranks that are left.

    Raises:
        RecipeError: The sizes do not multiply to `world`; the whole equation is shown.
    """
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    for axis, size in sizes.items():
        if size == -1 and world % fixed == 0:
            sizes[axis] = world // fixed
    if -1 not in sizes.values() and math.prod(sizes.values()) == world:
        return MeshShape(**sizes)
    equation = " * ".join(f"{axis}({size})" for axis, size in sizes.items())
    product = f"{equation} = {fixed}" if -1 not in sizes.values() else f"{equation} is a multiple of {fixed}"
    divisors = listing(str(n) for n in range(1, world + 1) if world % n == 0)
    wrong = f"{product}, but the world has {world} rank{'s' if world != 1 else ''}"
    raise RecipeError(
        [Problem("", None, f"parallel: {wrong}", f"sizes that multiply to {world}; each of them {divisors}")]
    )


def resolve_batch(recipe: Recipe, dp: int) -> BatchSizes:
    """Batch and accumulation for `dp` data-parallel ranks.

    With `global_batch_size` the accumulation follows, without it the global batch does.

    Raises:
        RecipeError: The global batch cannot be divided; the sizes that work are named.
    """
    per_device, wanted = recipe.batch_size_per_device, recipe.global_batch_size
    if wanted is None:
        return BatchSizes(per_device, dp, recipe.grad_accumulation_steps)
    unit = per_device * dp
    if wanted % unit == 0:
        return BatchSizes(per_device, dp, wanted // unit)
    around = sorted({max(unit, wanted // unit * unit), (wanted // unit + 1) * unit})
    allowed = f"{listing(map(str, around))} (multiples of {unit})"
    if wanted % dp == 0:
        rows = wanted // dp
        fitting = listing(str(n) for n in range(1, rows + 1) if rows % n == 0)
        allowed += f", or batch_size_per_device {fitting}"
    ranks = f"{dp} data-parallel rank{'s' if dp != 1 else ''}"
    wrong = f"not divisible by batch_size_per_device({per_device}) * {ranks} = {unit}"
    raise RecipeError([Problem("global_batch_size", wanted, wrong, allowed)])

LARGEST_VOCABULARY = 1 << 20  # of a tokenizer that is built: more than any has


def check(recipe: Recipe) -> list[Problem]:
    """Combinations that cannot run, whatever the number of ranks."""
    return [*_check_paths(recipe), *_check_model(recipe), *_check_data(recipe), *_check_sizes(recipe), *_check_mesh(recipe)]


def _is_vocabulary_size(text: str) -> bool:
    return text.isdecimal() and len(text) <= 7 and 0 < int(text) <= LARGEST_VOCABULARY


def _check_paths(recipe: Recipe) -> Iterator[Problem]:
    for key, path in [*named_paths(recipe), ("output_dir", recipe.output_dir)]:
        if "\0" in path or any(len(part.encode(errors="replace")) > 255 for part in path.split("/")) or len(path) > 4000:
            yield Problem(key, path, "no path of a file system", "names of at most 255 bytes, without NUL")


def _check_model(recipe: Recipe) -> Iterator[Problem]:
    model, tokenizer = recipe.model, recipe.model.tokenizer or ""
    if (model.path is None) == (model.config is None):
        wrong = "no model is given" if model.path is None else "two models are given"
        yield Problem(
            "model.path",
            model.path,
            wrong,
            "either model.path, or model.config with model.tokenizer",
            about=("model", "model.config"),
        )
    if model.config is not None and model.tokenizer is None:
        yield Problem(
            "model.tokenizer",
            None,
            "a random start needs a tokenizer",
            "a tokenizer's folder or repository, or bpe:SIZE",
            about=("model", "model.config"),
        )
    if model.path is not None and tokenizer.startswith("bpe:"):
        yield Problem(
            "model.tokenizer",
            model.tokenizer,
            "model.path brings its own tokenizer",
            "null",
            about=("model", "model.path"),
        )
    elif tokenizer.startswith("bpe:") and not _is_vocabulary_size(tokenizer[4:]):
        allowed = f"bpe:SIZE, such as bpe:1024, up to {LARGEST_VOCABULARY}"
        yield Problem("model.tokenizer", model.tokenizer, "no vocabulary size", allowed)
    if model.quantize is not None and recipe.method == "full":
        yield Problem(
            "model.quantize",
            asdict(model.quantize),
            "quantized weights cannot be trained with method: full",
            "null, or method: lora or dora",
            about=("model", "method"),
        )


def _check_data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if not data.train:
        yield Problem(
            "data.train",
            data.train,
            "no training rows are given",
            "a Hugging Face repository, folder, file or synthetic:NAME",
            about=("data",),
        )
    for key in ("train", "valid"):
        sources = getattr(data, key)
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if not source.path:
                yield Problem(
                    f"data.{key}[{index}].path",
                    source.path,
                    "no rows are given",
                    "a repository, folder or file",
                    about=(f"data.{key}",),
                )
    if data.format == "text" and data.loss_on in ("completion", "assistant"):
        yield Problem(
            "data.loss_on", data.loss_on, "text rows have no such part", "auto or all", about=("data.format",)
        )


def _check_sizes(recipe: Recipe) -> Iterator[Problem]:
    if recipe.global_batch_size is not None and recipe.grad_accumulation_steps != 1:
        yield Problem(
            "grad_accumulation_steps",
            recipe.grad_accumulation_steps,
            f"follows from global_batch_size({recipe.global_batch_size})",
            "1, or leave global_batch_size out",
            about=("global_batch_size",),
        )
    divided = [axis for axis in ("dp_shard", "tp") if getattr(recipe.parallel, axis) != 1]
    if recipe.optimizer.name in ("muon", "adafactor") and divided:
        yield Problem(
            "optimizer.name",
            recipe.optimizer.name,
            f"needs whole matrices, but parallel.{divided[0]} divides them",
            "adamw, adam, sgd or lion, or parallel.dp_replicate and pp",
            about=(f"parallel.{divided[0]}",),
        )
    if len(recipe.optimizer.betas) != 2:
        yield Problem(
            "optimizer.betas",
            recipe.optimizer.betas,
            f"has {len(recipe.optimizer.betas)} numbers",
            "two, such as [0.9, 0.999]",
        )


def _check_mesh(recipe: Recipe) -> Iterator[Problem]:
    sizes = {axis: getattr(recipe.parallel, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    for axis in [axis for axis, size in sizes.items() if size == 0]:
        yield Problem(f"parallel.{axis}", 0, "not allowed", "-1 or a whole number >= 1")
    if len(open_axes) > 1:
        yield Problem(
            f"parallel.{open_axes[-1]}",
            -1,
            f"{' and '.join(open_axes)} cannot all be the ranks that are left",
            "-1 for one axis",
        )
    split = recipe.parallel.split
    if isinstance(split, list) and sizes["pp"] > 0 and len(split) != sizes["pp"]:
        yield Problem(
            "parallel.split",
            split,
            f"names {len(split)} stages, but pp is {sizes['pp']}",
            f"{sizes['pp']} counts",
            about=("parallel.pp",),
        )
    backend = recipe.parallel.backend
    carrier = backend.get("pp", backend.get("default", "any")) if isinstance(backend, dict) else backend
    if sizes["pp"] > 1 and carrier == "nccl":
        yield Problem(
            "parallel.backend",
            backend,
            f"a pipeline of {sizes['pp']} stages sends from rank to rank, which nccl cannot",
            "ring, jaccl, mpi or any for the axis pp, such as {pp: ring, default: nccl}",
            about=("parallel.pp",),
        )


def warnings(recipe: Recipe) -> list[str]:
    """Settings that have no effect in this recipe, one sentence each."""
    found = _without_effect(recipe, _ignored(recipe))
    steps, warmup = recipe.max_steps, recipe.schedule.warmup_steps
    if steps is not None and warmup >= steps:
        found.append(
            f"schedule.warmup_steps = {warmup} leaves no step at the full learning rate: max_steps is {steps}"
        )
    if steps is not None and recipe.profile is not None and recipe.profile.start > steps:
        found.append(f"profile.start = {recipe.profile.start} traces nothing: max_steps is {steps}")
    return found


def validation_warnings(recipe: Recipe) -> list[str]:
    """Settings that have no effect in this recipe as there turn out to be no validation rows, one sentence each."""
    names = ("every", "batches", "generate", "exact_match", "max_new_tokens", "patience")
    why = "without validation rows; give data.valid or data.val_fraction"
    return _without_effect(recipe, [(tuple(f"eval.{name}" for name in names), why)])


def _without_effect(recipe: Recipe, ignored: Iterable[tuple[tuple[str, ...], str]]) -> list[str]:
    """One sentence for each of the keys that was set to something."""
    found, defaults = [], Recipe()
    for keys, why in ignored:
        for key in keys:
            value = attrgetter(key)(recipe)
            if value != attrgetter(key)(defaults):
                found.append(f"{key} = {show(value)} has no effect {why}")
    return found


def _ignored(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that nothing reads in this recipe, and why."""
    if recipe.max_steps is not None:
        yield ("epochs",), "because max_steps is set"
    if recipe.method == "full":
        names = ("rank", "alpha", "dropout", "targets", "num_layers", "init_from")
        yield tuple(f"lora.{name}" for name in names), "with method: full"
    elif recipe.lora.init_from:
        yield ("lora.rank", "lora.alpha", "lora.targets"), "because lora.init_from decides it"
    if recipe.data.valid is not None:
        yield ("data.val_fraction",), "because data.valid is set"
    if recipe.eval.every == 0:
        yield ("eval.patience",), "with eval.every: 0"
    if recipe.eval.generate == 0 and not recipe.eval.exact_match:
        yield ("eval.max_new_tokens",), "without eval.generate or eval.exact_match"
    if recipe.logging.wandb.project is None:
        yield ("logging.wandb.name", "logging.wandb.mode"), "without logging.wandb.project"
    if recipe.schedule.name == "constant":
        yield ("schedule.min_lr_ratio",), "with schedule.name: constant"
    if recipe.parallel.pp == 1:
        yield ("parallel.schedule", "parallel.split"), "with parallel.pp: 1"
    ignored = {
        "adam": ("weight_decay",),
        "sgd": ("betas", "eps", "bias_correction"),
        "lion": ("eps", "bias_correction"),
        "adafactor": ("betas", "eps", "bias_correction"),
    }.get(recipe.optimizer.name, ())
    yield tuple(f"optimizer.{name}" for name in ignored), f"with optimizer.name: {recipe.optimizer.name}"
