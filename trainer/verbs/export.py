"""`python -m trainer export RUN --to peft | fused`: take a run's result elsewhere.

peft writes an adapter folder for transformers + PEFT and needs no base weights. fused writes a model folder that
`mlx_lm.load` opens; it is read back and compared with base + adapter before an older export is replaced.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model

import comm
from trainer.data import corpus
from trainer.files.storage import atomic_folder, explain, write_json
from trainer.files.tensor_files import write_tensor_file
from trainer.machine.blas import load_fast_blas
from trainer.model.architectures import architecture
from trainer.model.loading import (
    BaseModel,
    materialize,
    open_model,
    open_tokenizer,
    source_folder,
)
from trainer.model.lora import DropoutKeys, LoRASpec
from trainer.model.method import prepare_method
from trainer.recipe.config import Recipe
from trainer.recipe.problems import USER_ERRORS
from trainer.results.card import model_card
from trainer.results.mlx_lm_format import write_model
from trainer.results.opened import load_result, recipe_of
from trainer.results.peft_format import adapter_config, adapter_tensors

PROBE_SHAPE = (2, 32)  # rows and tokens on which a fused model is compared
FLOAT32_TOLERANCE = 1e-4  # of the logits' spread
HALF_TOLERANCE = 1e-1  # rounding the fused weights to 16 bits moves logits by 2e-2 in a small model
_NOTHING_TO_FUSE = "Full fine-tuning trains the weights themselves: this is the run's model, with nothing to fuse."


@dataclass
class OpenedRun:
    """A run's model with its trained values, lazily read; no training data is needed.

    Attributes:
        recipe: The run's recipe.
        world: This process alone.
        tokenizer: The base model's tokenizer.
        base: Model with the adapters in place, and its config.
        adapter: Modules and shape of the adapters, or None after full fine-tuning.
    """

    recipe: Recipe
    world: comm.Group
    tokenizer: TokenizerWrapper
    base: BaseModel
    adapter: LoRASpec | None

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.base.model

    @property
    def base_name(self) -> str:
        """Where the base model came from."""
        return self.recipe.model.path or f"a random {self.base.config['model_type']} model"


def main(arguments: argparse.Namespace) -> int:
    """Export `arguments.target`; returns the exit code."""
    recipe = recipe_of(arguments.target, [])
    folder = Path(arguments.output or Path(recipe.output_dir) / arguments.to)
    _check_replaceable(folder)
    load_fast_blas()
    run = open_run(arguments.target, recipe)
    try:
        if arguments.to == "peft":
            notes = export_peft(run, folder, base_model=arguments.base_model, multimodal=arguments.multimodal)
        else:
            notes = export_fused(run, folder, requantize=arguments.requantize)
    except OSError as error:
        if isinstance(error, USER_ERRORS):
            raise
        reason = explain(error, folder)
        raise OSError(f"{str(folder)!r} could not be written: {reason}. What was there before is untouched.") from error
    for note in notes:
        print(note)
    print(f"Done: {folder}")
    return 0


def open_run(target: str, recipe: Recipe) -> OpenedRun:
    """Open a run's result or checkpoint.

    Args:
        target: Output folder or checkpoint.
        recipe: What `recipe_of(target)` gave.

    Raises:
        ValueError: There is nothing to open, or what was trained is not whole or not finite.
    """
    tokenizer = open_tokenizer(recipe.model, partial(corpus, recipe.data, recipe.seed))
    base = open_model(recipe.model, len(tokenizer), recipe.seed)
    adapter = prepare_method(recipe, base, DropoutKeys())
    run = OpenedRun(recipe, comm.solo(), tokenizer, base, adapter)
    load_result(run, target, lambda line: print(line, file=sys.stderr))
    base.model.eval()
    return run


def export_peft(run: OpenedRun, folder: Path, *, base_model: str | None, multimodal: bool) -> list[str]:
    """Write a PEFT adapter folder.

    Args:
        run: A LoRA or DoRA run.
        folder: The folder to write; it is replaced as a whole.
        base_model: Name of the base model to write; None = the recipe's model.path.
        multimodal: Name modules as the class with the vision tower does.

    Returns:
        What the user should know, in sentences.

    Raises:
        ValueError: The run has no adapters, or one that PEFT cannot express, or no base model that PEFT could load.
    """
    if run.adapter is None:
        raise ValueError("--to peft needs adapters, and this run has method: full; its model/ is already complete.")
    base_model = base_model or run.recipe.model.path
    if base_model is None:
        raise ValueError("The base model was a random start, which PEFT cannot load; use --to fused, or --base-model.")
    config = run.base.config
    has_tower = any(path.startswith("language_model.") for path in run.adapter.paths)
    multimodal = has_tower and (multimodal or not architecture(config["model_type"]).has_text_class)
    notes = []
    if "quantization" in config:
        notes.append("The adapter was trained on a quantized base: on the unquantized one its logits differ a little.")
    card = model_card(
        run.recipe,
        "peft",
        Path(run.recipe.output_dir) / "metrics.jsonl",
        model_class="AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM",
        base=base_model,
        notes=notes,
    )
    with atomic_folder(folder) as staging:
        tensors = adapter_tensors(run.model, run.adapter, config, multimodal=multimodal)
        write_tensor_file(staging / "adapter_model.safetensors", tensors)
        settings = adapter_config(run.model, run.adapter, base_model=base_model, multimodal=multimodal)
        write_json(staging / "adapter_config.json", settings)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return notes


def export_fused(run: OpenedRun, folder: Path, *, requantize: bool) -> list[str]:
    """Write base and adapter as one model, compared with base + adapter before `folder` is replaced.

    Args:
        run: Any run; after full fine-tuning there is nothing to fuse and the model is written as it is.
        folder: The folder to write; it is replaced as a whole.
        requantize: Keep a quantized base quantized, adapted weights rounded anew; False = dequantize all.

    Returns:
        What the user should know, in sentences.

    Raises:
        ValueError: The written model's logits differ from base + adapter's by more than rounding.
    """
    materialize(run.model)
    probe = mx.random.randint(0, len(run.tokenizer), PROBE_SHAPE, key=mx.random.key(0))
    expected = _logits(run.model, probe)
    is_quantized = "quantization" in run.base.config
    rounds = is_quantized and requantize
    run.base = fuse(run.base, dequantize=not requantize)
    dtype = _dtype(run.model)
    with atomic_folder(folder) as staging:
        tensors = comm.named_arrays(run.model.parameters())
        write_model(staging, tensors, run.base.config, run.tokenizer, source=source_folder(run.recipe.model))
        written, _ = load_model(staging)
        difference = relative_difference(_logits(written, probe), expected)
        if not rounds:
            _check_difference(difference, dtype, folder)
        notes = [_comparison(difference, is_quantized, rounds, dtype) if run.adapter else _NOTHING_TO_FUSE]
        metrics = Path(run.recipe.output_dir) / "metrics.jsonl"
        card = model_card(run.recipe, "mlx-lm", metrics, model_class="", base=run.base_name, notes=notes)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return notes


def fuse(base: BaseModel, *, dequantize: bool) -> BaseModel:
    """Merge the adapters of a model into its weights, in place.

    Args:
        base: Model with or without adapters; and its config.
        dequantize: True = no weight stays quantized; False = those that were quantized are so again.
    """
    model = base.model
    fused = [(n, m.fuse(dequantize=dequantize)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    if fused:
        model.update_modules(tree_unflatten(fused))
    config = base.config
    if dequantize:
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    return replace(base, model=model, config=config)


def relative_difference(logits: mx.array, expected: mx.array) -> float:
    """Root mean square of the difference of two logit arrays `(B, L, V)`, over the spread of the second."""
    difference = (logits - expected).astype(mx.float32)
    relative = mx.sqrt(mx.mean(difference**2)) / mx.std(expected.astype(mx.float32))
    return cast(float, relative.item())  # of a float32; MLX annotates what any dtype gives


def _logits(model: nn.Module, tokens: mx.array) -> mx.array:
    logits = model(tokens)
    mx.eval(logits)
    return logits


def _check_difference(difference: float, dtype: mx.Dtype, folder: Path) -> None:
    tolerance = FLOAT32_TOLERANCE if dtype == mx.float32 else HALF_TOLERANCE
    if not difference <= tolerance:  # also when it is not a number
        raise ValueError(
            f"The fused model's logits differ from base + adapter's by {difference:.1e} of their spread, "
            f"more than {tolerance:g}; {str(folder)!r} is left as it was."
        )


def _comparison(difference: float, is_quantized: bool, rounds: bool, dtype: mx.Dtype) -> str:
    measured = f"Its logits differ from base + adapter's by {difference:.1e} of their spread."
    if rounds:
        return f"Adapted weights were quantized anew, which rounds away part of what was learned. {measured}"
    if is_quantized:
        name = str(dtype).removeprefix("mlx.core.")
        return f"The quantized base was dequantized to {name}: larger, but nothing learned is rounded away. {measured}"
    return measured


def _dtype(model: nn.Module) -> mx.Dtype:
    """The narrowest floating dtype of the parameters: it bounds how exact logits can be."""
    dtypes = {p.dtype for _, p in comm.named_arrays(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)}
    return min(dtypes, key=lambda dtype: dtype.size)


def _check_replaceable(folder: Path) -> None:
    """Replace nothing but an earlier export."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names and not ("README.md" in names and names & {"adapter_config.json", "config.json"}):
        raise ValueError(f"{str(folder)!r} exists and is no earlier export; give another folder with --output.")
