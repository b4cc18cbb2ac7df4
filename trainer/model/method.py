"""What of a model is trained: adapters on some of its modules, or everything."""

import mlx.nn as nn
from mlx.utils import tree_flatten

from trainer.layers.lora_matmul import use_fast_lora
from trainer.layers.prepare import extend_layers
from trainer.model.adapters import load_into, read_adapter
from trainer.model.architectures import packing_supported
from trainer.model.loading import BaseModel
from trainer.model.lora import DropoutKeys, LoRASpec, attach, find_targets
from trainer.recipe.config import Recipe


def prepare_model(recipe: Recipe, base: BaseModel, keys: DropoutKeys) -> LoRASpec | None:
    """Layers made for training, and the recipe's parameters trainable; returns the adapters' spec, if any.

    Raises:
        ValueError: See `prepare_method`.
    """
    prepare_for_training(base.model)
    spec = prepare_method(recipe, base, keys)
    use_fast_lora(base.model)
    return spec


def prepare_for_training(model: nn.Module) -> nn.Module:
    """Give the layers of an mlx-lm model this package's functions, as its row of the architecture table allows; the
    same object. Once, before adapters and parallel wrappers.
    """
    return extend_layers(model, packs=packing_supported(model) is None)


def prepare_method(recipe: Recipe, base: BaseModel, keys: DropoutKeys) -> LoRASpec | None:
    """Make the recipe's parameters trainable and all others frozen; returns the adapters' spec, if any.

    Raises:
        ValueError: Nothing would be trainable, or the adapters do not fit the model.
    """
    model = base.model
    if recipe.method == "full":
        if "quantization" in base.config:
            raise ValueError("method: full cannot train quantized weights; use method: lora, or an unquantized model.")
        model.unfreeze()
        _require_trainable(model, "method: full")
        return None
    model.freeze()
    lora = recipe.lora
    if lora.init_from is not None:
        adapter = read_adapter(lora.init_from, model, lora.dropout)
        attach(model, adapter.spec, keys, recipe.seed)
        load_into(model, adapter)
        spec = adapter.spec
    else:
        paths = find_targets(model, lora.targets, lora.num_layers, recipe.method)
        spec = LoRASpec(paths, lora.rank, lora.alpha / lora.rank, lora.dropout, recipe.method)
        attach(model, spec, keys, recipe.seed)
    outside = [path for path in spec.paths if "layers." not in path]
    if spec.dropout > 0 and outside:
        raise ValueError(f"lora.dropout={spec.dropout} works inside the layers only; {outside[0]} needs lora.dropout=0.")
    _require_trainable(model, f"method: {recipe.method}")
    return spec


def _require_trainable(model: nn.Module, setting: str) -> None:
    if not tree_flatten(model.trainable_parameters()):
        raise ValueError(f"{setting} leaves no trainable parameter in this model.")
