"""What a run leaves behind, in the formats mlx-lm's own tools open.

    adapters.safetensors  adapter_config.json      mlx_lm.generate --adapter-path OUTPUT_DIR, mlx_lm.fuse
    model/                                         mlx_lm.load("OUTPUT_DIR/model")

Everything is written beside its final name and renamed, so a crash leaves the old output or the new one. On ranks
other than 0 `output_dir` is None: the tensors are evaluated in the same order, and nothing is written.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from mlx_lm.utils import save_config

from trainer.files.storage import atomic_file, atomic_folder, sync_files, write_json
from trainer.files.tensor_files import (
    MAX_SHARD_BYTES,
    NamedTensors,
    consume,
    consuming,
    tensor_sizes,
    write_tensor_file,
    write_tensors,
)

ADAPTER_LEAVES = ("lora_a", "lora_b", "m")
ADAPTERS_FILE = "adapters.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"


class Tokenizer(Protocol):
    """A transformers tokenizer, or mlx-lm's wrapper of one."""

    def save_pretrained(self, save_directory: str) -> object: ...


def adapter_config(
    names: Iterable[str], *, fine_tune_type: str, rank: int, scale: float, dropout: float
) -> dict[str, object]:
    """The `adapter_config.json` from which mlx-lm rebuilds exactly the adapted modules.

    mlx-lm looks its `keys` up twice: by a module's name inside a layer, in the last `num_layers` layers, and by
    its full name, anywhere. Full names are given, so adapters on some layers, or on different modules in different
    layers (hybrid attention), come back as they were.

    Args:
        names: Names of the adapter tensors, as `model.layers.3.self_attn.q_proj.lora_a`.
        fine_tune_type: "lora" or "dora".
        rank: Columns of `lora_a`.
        scale: Factor of the low-rank product (alpha / rank).
        dropout: Probability of the adapters' input dropout.

    Raises:
        ValueError: A name is not that of an adapter tensor.
    """
    if fine_tune_type not in ("lora", "dora"):
        raise ValueError(f"fine_tune_type is {fine_tune_type!r}; it must be lora or dora.")
    keys = set()
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in ADAPTER_LEAVES:
            raise ValueError(f"{name} is not an adapter tensor; its last part must be one of {ADAPTER_LEAVES}.")
        keys.add(module)
    return {
        "fine_tune_type": fine_tune_type,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": sorted(keys)},
    }


def write_adapters(output_dir: Path | None, tensors: NamedTensors, config: dict[str, object]) -> None:
    """Write `adapters.safetensors` (one file, as mlx-lm reads it) and `adapter_config.json` into `output_dir`.

    Args:
        output_dir: The run's folder; None on ranks without a disk.
        tensors: Full (unsharded) adapter tensors under mlx-lm's names.
        config: What `adapter_config` gave; further JSON-able keys are kept.

    Raises:
        OSError: The folder cannot be written; the former adapters are untouched.
    """
    tensors = list(tensors)
    consume(tensors)
    if output_dir is None:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(output_dir / ADAPTERS_FILE) as tensors_file, atomic_file(output_dir / ADAPTER_CONFIG_FILE) as file:
        write_tensor_file(tensors_file, tensors)
        write_json(file, config)


def write_model(
    folder: Path | None,
    tensors: NamedTensors,
    config: dict[str, object],
    tokenizer: Tokenizer,
    *,
    source: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder that `mlx_lm.load` opens: config, tokenizer, safetensors in shards with their index.

    Args:
        folder: The model folder, replaced as a whole; None on ranks without a disk.
        tensors: Full (unsharded) parameters under mlx-lm's names, asked for one at a time.
        config: The model's config as `mlx_lm` loaded it; a `quantization` entry is kept.
        tokenizer: Saved beside the weights.
        source: Folder of the base model. Its `generation_config.json` and Python files (custom architectures) are
            copied; None copies nothing.
        max_shard_bytes: Upper limit of one file. Default 5 GB.

    Raises:
        OSError: The folder cannot be written; an older one is untouched.
    """
    if folder is None:
        consume(tensors)
        return
    with consuming(tensors) as tensors, atomic_folder(folder) as tmp:
        shards = write_tensors(tmp, "model", tensors, max_shard_bytes=max_shard_bytes)
        write_json(tmp / "model.safetensors.index.json", _index(tmp, shards))
        tokenizer.save_pretrained(str(tmp))
        if source is not None:
            for file in sorted([*source.glob("*.py"), *source.glob("generation_config.json")]):
                shutil.copyfile(file, tmp / file.name)
        save_config(dict(config), tmp / "config.json")
        sync_files(tmp)


def _index(folder: Path, shards: Iterable[str]) -> dict[str, object]:
    """Hugging Face's index: which file holds which tensor."""
    weight_map, total_bytes = {}, 0
    for shard in shards:
        for name, num_bytes in tensor_sizes(folder / shard).items():
            weight_map[name] = shard
            total_bytes += num_bytes
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
