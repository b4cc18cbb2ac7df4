"""From `model:` in a recipe to a tokenizer and a base model: files of either layout, or a random start.

Weights are lazy until `materialize`, so that wrappers can take their slices first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm import load
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import (
    MODEL_REMAPPING,
    hf_repo_to_path,
    load_model,
    load_tokenizer,
    quantize_model,
)

import comm
from trainer.data import build_tokenizer
from trainer.files.storage import read_json
from trainer.model.architectures import architecture
from trainer.recipe.config import ModelConfig
from trainer.recipe.paths import is_local
from trainer.recipe.problems import show

DEFAULT_INITIALIZER_RANGE = 0.02
# A random start's vocabulary is rounded up to this, so that tensor-parallel ranks can divide it.
VOCABULARY_STEP = 64
# Sizes of a config, and the largest that is believed: shapes are int32, and each layer is made before weights are read.
LARGEST_SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**31 - 1,
    "vocab_size": 2**31 - 1,
    "num_attention_heads": 2**31 - 1,
    "num_key_value_heads": 2**31 - 1,
    "head_dim": 2**31 - 1,
}


@dataclass
class BaseModel:
    """A model before anything is attached to it.

    Attributes:
        model: Lazy parameters, in the recipe's dtype and quantization.
        config: What `config.json` says or would say, quantization included.
    """

    model: nn.Module
    config: dict[str, Any]


def open_tokenizer(config: ModelConfig, texts: Any) -> TokenizerWrapper:
    """The tokenizer of the recipe, in mlx-lm's wrapper.

    Args:
        config: The recipe's `model:`.
        texts: Function that returns the training texts, for `tokenizer: bpe:SIZE`.

    Raises:
        ValueError: The files are missing or unreadable.
    """
    source = config.tokenizer or config.path
    assert source is not None, "a checked recipe has one of them"
    if source.startswith("bpe:"):
        tokenizer = build_tokenizer(texts(), int(source.removeprefix("bpe:")))
        return TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id])
    if source == config.path:
        _check_folder(source)
    try:
        tokenizer = load_tokenizer(source, {"trust_remote_code": config.trust_remote_code})
    except Exception as error:  # other packages read the user's files here, and fail in many ways
        raise ValueError(f"model: no tokenizer can be read from {source!r}: {_reason(error, source)}") from error
    # Where its files are missing, transformers makes one that knows its special tokens only.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ValueError(f"model: {source!r} holds no tokenizer files, such as tokenizer.json; give model.tokenizer.")
    return tokenizer


def open_model(config: ModelConfig, vocab_size: int, seed: int) -> BaseModel:
    """Read (lazily) or initialise the base model, in the recipe's dtype and quantization.

    All of that is the CPU's work, as a GPU that waits for a slow disk is ended after some seconds.

    Args:
        config: The recipe's `model:`.
        vocab_size: The tokenizer's size; a random start without `vocab_size` in its config takes it.
        seed: Decides the values of a random start.

    Raises:
        ValueError: No such model, an unknown architecture, or a vocabulary smaller than the tokenizer's.
    """
    if config.config is not None:
        base = _random_model(dict(config.config), vocab_size, seed)
    else:
        with mx.stream(mx.cpu):
            base = _read_model(config)
    _check_vocabulary(base, vocab_size)
    dtype = model_dtype(config.dtype)
    with mx.stream(mx.cpu):
        _cast(base.model, dtype)
        if config.quantize is not None:
            return BaseModel(*quantize_model(base.model, base.config, config.quantize.group_size, config.quantize.bits))
    return base


def source_folder(config: ModelConfig) -> Path | None:
    """Folder of the base model's files on this machine; None for a random start."""
    if config.path is None:
        return None
    local = Path(config.path)
    return local if local.exists() else hf_repo_to_path(config.path)


def materialize(model: nn.Module) -> None:
    """Evaluate the parameters one by one: the peak is the model and the largest tensor's source."""
    for _, value in comm.named_arrays(model.parameters()):
        mx.eval(value)


def _read_model(config: ModelConfig) -> BaseModel:
    assert config.path is not None, "a random model has no files"
    path = Path(config.path)
    _check_folder(config.path)
    try:
        if path.exists():
            config_values = read_json(path / "config.json")
            _check_sizes(config_values)
            renamed = architecture(config_values.get("model_type")).opened_as
            other = {"model_type": renamed} if renamed else None
            trust = config.trust_remote_code
            return BaseModel(*load_model(path, lazy=True, model_config=other, trust_remote_code=trust))
        loaded: Any = load(config.path, lazy=True, return_config=True, trust_remote_code=config.trust_remote_code)
        return BaseModel(loaded[0], loaded[2])
    except RuntimeError as error:  # MLX's word for a file that it cannot read
        reason = f"{_reason(error, config.path)}. A torn download, or a Git LFS pointer without its content"
        raise ValueError(f"model.path={config.path!r} cannot be opened: {reason}: download it again.") from error
    except Exception as error:  # other packages read the user's files here, and fail in many ways
        raise ValueError(f"model.path={config.path!r} cannot be opened: {_reason(error, config.path)}") from error


def _random_model(config: dict[str, Any], vocab_size: int, seed: int) -> BaseModel:
    """A model with Hugging Face's usual initial values: normal matrices, everything else as the layer starts."""
    _check_sizes(config)
    target = config["text_config"] if "text_config" in config else config
    padded = -(-vocab_size // VOCABULARY_STEP) * VOCABULARY_STEP
    vocab_size = target.setdefault("vocab_size", config.get("vocab_size", padded))
    config.setdefault("vocab_size", vocab_size)
    mx.random.seed(seed)
    model_class, args_class = _model_classes(config)
    try:
        model = model_class(args_class.from_dict(config))
    except Exception as error:  # other packages read the user's files here, and fail in many ways
        raise ValueError(f"model.config does not describe a {config['model_type']} model: {error}") from error
    spread = target.get("initializer_range", DEFAULT_INITIALIZER_RANGE)
    matrices = [(n, p) for n, p in comm.named_arrays(model.parameters()) if p.ndim == 2]
    keys = mx.random.split(mx.random.key(seed), len(matrices))
    drawn = [(n, spread * mx.random.normal(p.shape, key=key)) for (n, p), key in zip(matrices, keys)]
    model.update(tree_unflatten(drawn))
    return BaseModel(model, config)


def _check_sizes(config: dict[str, Any]) -> None:
    """Refuse sizes that no model has; a list, one for each layer, is left to the architecture."""
    values = config.get("text_config", config)
    for key, largest in LARGEST_SIZES.items():
        value = values.get(key) if isinstance(values, dict) else None
        if value is None or isinstance(value, (list, dict)):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
            raise ValueError(f"The model's config says {key}={show(value)}; it must be a whole number from 1 to {largest:,}.")


def _model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    from importlib import import_module

    given = config.get("model_type")
    if not isinstance(given, str):
        raise ValueError(f"model.config.model_type={given!r} must be the name of an architecture of mlx-lm.")
    name = architecture(given).opened_as or given
    try:
        module = import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}")
    except ImportError as error:
        raise ValueError(f"model.config.model_type={name!r} is not an architecture of mlx-lm.") from error
    return module.Model, module.ModelArgs


def _check_vocabulary(base: BaseModel, vocab_size: int) -> None:
    described = base.config.get("text_config", base.config).get("vocab_size", vocab_size)
    if not isinstance(described, int):
        raise ValueError(f"The model's config says vocab_size={described!r}; it must be a whole number.")
    if described < vocab_size:
        raise ValueError(f"The tokenizer has {vocab_size} tokens, but the model's vocabulary only {described}.")


def pad_token(tokenizer: TokenizerWrapper) -> int:
    """Id that fills rows up: the tokenizer's padding token, else its end of text, else 0. It is never a target."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def num_embeddings(model: nn.Module) -> int:
    """Rows of the model's largest embedding, beyond which no token id may lie; the largest int64 where it has none."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    sizes = [module.weight.shape[0] for module in model.modules() if isinstance(module, kinds)]
    return max(sizes, default=2**63 - 1)


def model_dtype(name: str) -> mx.Dtype:
    """The dtype that `model.dtype` means on this machine."""
    if name == "auto":
        return mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    return {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}[name]


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Set the dtype of floating parameters, but of those that the architecture keeps (`cast_predicate`)."""
    may_cast = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and may_cast(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _check_folder(path: str) -> None:
    """Refuse a local path that is no model folder, or whose config cannot be read."""
    if Path(path).exists() and not Path(path, "config.json").is_file():
        raise ValueError(f"model.path={path!r} has no config.json; give a model folder or a Hugging Face repo.")
    if Path(path).exists() and not isinstance(read_json(Path(path, "config.json")), dict):
        raise ValueError(f"{path}/config.json must hold an object.")


def _reason(error: Exception, source: str) -> str:
    """An error's first line; for a repository, what to do without network."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Some say only in their second line what is wrong.
    first = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    if is_local(source):
        return first
    return f"{first.rstrip('.')}. Without network, download it elsewhere (hf download {source}) and give the folder."
