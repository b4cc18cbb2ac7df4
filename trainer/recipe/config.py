"""The recipe as one tree of typed dataclasses: every key, its type, its default and its meaning.

This file is the only place where a default is written. `trainer.recipe.load` fills the tree from YAML and
`key=value` overrides, `trainer.verbs.schema` turns it into a JSON Schema. Types say what is allowed
(`Literal` lists words), the metadata of a field adds its range and one sentence of help.
It imports the standard library only, so that `--help` and `validate` answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["any", "ring", "jaccl", "jaccl-ring", "mpi", "nccl"]
DataFormat = Literal["auto", "text", "completion", "chat", "alpaca"]


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    words: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> Any:
    """One key of the recipe.

    Args:
        default: The value when the key is not written. A dataclass stands for that section with
            its own defaults; a list is copied for each recipe.
        help: One sentence: what turning the knob does.
        minimum, above, maximum, below: The allowed range of a number; `above` and `below`
            exclude the bound itself.
        words: Words with a special meaning in a field that also takes any other text.
        also: What other trainers call it: such a key is refused and pointed to this one.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata: dict[str, object] = {"help": help, "words": words, "also": also}
    metadata |= {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class QuantizeConfig:
    """How the frozen base model is quantized (QLoRA)."""

    bits: Literal[2, 3, 4, 5, 6, 8] = setting(4, "Bits per weight: fewer save memory and cost accuracy.")
    group_size: Literal[32, 64, 128] = setting(
        64, "Weights that share a scale: smaller is more accurate and larger on disk."
    )


@dataclass
class ModelConfig:
    """Which model is trained: `path`, or `config` and `tokenizer` for a random start."""

    path: str | None = setting(None, "Hugging Face repository or local folder with safetensors.")
    config: dict[str, Any] | None = setting(
        None, "A model config (as in config.json) for a random start; needs `tokenizer`."
    )
    tokenizer: str | None = setting(
        None, "Tokenizer folder or repository, or bpe:SIZE to build one from the training rows."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Type of the weights: auto is bfloat16 on a GPU and float32 on a CPU."
    )
    quantize: QuantizeConfig | None = setting(
        None, "Quantize the frozen weights: {bits: 4, group_size: 64}; only with LoRA and DoRA."
    )
    trust_remote_code: bool = setting(False, "Run Python code that the tokenizer's repository brings along.")


@dataclass
class LoraConfig:
    """The low-rank adapters of `method: lora` and `method: dora`; their scale is alpha / rank."""

    rank: int = setting(
        8,
        "Width of the adapters: more can learn more and costs memory.",
        minimum=1,
        also=("lora_r", "lora_rank", "r"),
    )
    alpha: float = setting(
        16.0, "Strength of the adapters: they are scaled by alpha / rank.", above=0, also=("lora_alpha",)
    )
    dropout: float = setting(
        0.0, "Share of the adapter inputs dropped in training.", minimum=0, below=1, also=("lora_dropout",)
    )
    targets: str | list[str] = setting(
        "all-linear",
        "Which layers get adapters: all-linear, or a list of names such as self_attn.q_proj; "
        "embeddings, routers and lm_head only by name.",
        words=("all-linear",),
        also=("target_modules", "lora_target", "keys"),
    )
    num_layers: Literal["all"] | int = setting("all", "Adapt only the last so many layers.", minimum=1)
    init_from: str | None = setting(
        None, "Start from this mlx-lm or PEFT adapter folder, which also decides targets, rank and alpha."
    )


@dataclass
class DataSource:
    """One of several data sources that are mixed."""

    path: str = setting("", "Hugging Face repository, folder, .jsonl/.parquet/.csv file or synthetic:NAME.")
    split: str | None = setting(None, "Name of the split; null = train (or the validation split in `data.valid`).")
    weight: float = setting(1.0, "Rows are repeated or left out to this multiple of their number.", above=0)
    format: DataFormat | None = setting(None, "Format of these rows; null = data.format.")
    columns: dict[str, str] | None = setting(None, "Rename columns: {prompt: question, completion: sql}.")


@dataclass
class DataConfig:
    """Where the rows come from and what the model sees of them."""

    train: str | list[DataSource] = setting(
        "",
        "Hugging Face repository, folder, .jsonl/.parquet/.csv file, synthetic:NAME, or a list of "
        "{path, split, weight, format, columns}.",
    )
    valid: str | list[DataSource] | None = setting(
        None, "Validation rows; null = the split of that name where `train` is a folder or a repository."
    )
    val_fraction: float = setting(
        0.0,
        "When there is no validation split: the last fraction of the rows, in file order.",
        minimum=0,
        below=1,
        also=("val_set_size", "val_size"),
    )
    format: DataFormat = setting(
        "auto", "How a row reads: auto looks for messages, prompt + completion, instruction or text columns."
    )
    max_seq_len: int = setting(
        2048, "Longer rows are cut: less memory, less context.", minimum=2, maximum=2**24,
        also=("max_seq_length", "max_length", "sequence_len", "cutoff_len"),
    )
    packing: Literal["auto"] | bool = setting(
        "auto",
        "Put several short rows into one sequence: auto = where proven exact for the model.",
        also=("sample_packing",),
    )
    group_by_length: bool = setting(True, "Batch rows of similar length when not packing: less padding.")
    loss_on: Literal["auto", "all", "completion", "assistant"] = setting(
        "auto",
        "Which tokens are learned: auto = the completion, the assistant's turns of a chat, all of a text.",
        also=("mask_prompt", "train_on_inputs"),
    )
    shuffle: bool = setting(True, "Draw the rows in a new order each epoch.")
    on_bad_row: Literal["stop", "skip"] = setting("stop", "A malformed row stops the run, or is skipped and counted.")


@dataclass
class ObjectiveConfig:
    """What a step minimises."""

    name: Literal["sft"] = setting("sft", "sft: cross-entropy of the tokens that are learned.")


@dataclass
class OptimizerConfig:
    """The update rule."""

    name: Literal["adamw", "adam", "sgd", "lion", "muon", "adafactor"] = setting("adamw", "The optimizer.")
    lr: float = setting(
        1e-5,
        "Peak learning rate: LoRA wants about ten times that of full fine-tuning.",
        minimum=0,
        also=("learning_rate",),
    )
    weight_decay: float = setting(0.01, "Pull towards zero, on tensors of two or more dimensions only.", minimum=0)
    betas: list[float] = setting([0.9, 0.999], "Averaging of the first and second moment.", minimum=0, below=1)
    eps: float = setting(1e-8, "Added to the denominator of Adam.", above=0)
    bias_correction: bool = setting(True, "Correct the moments' start at 0, as published; false = mlx-lm's default.")
    master_weights: bool = setting(True, "Keep float32 copies of 16-bit trainable weights: small updates are not lost.")


@dataclass
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine"] = setting("cosine", "How the rate falls after the warmup.")
    warmup_steps: int = setting(
        0, "Steps in which the rate rises from 0 to its peak.", minimum=0, also=("num_warmup_steps", "warmup")
    )
    min_lr_ratio: float = setting(0.0, "The rate ends at this share of its peak.", minimum=0, maximum=1)


@dataclass
class ParallelConfig:
    """How the ranks divide the work: dp_replicate * dp_shard * pp * tp = world size."""

    dp_replicate: int = setting(
        -1, "Copies of the model that each see other rows; -1 = the ranks that are left.", minimum=-1
    )
    dp_shard: int = setting(1, "Ranks that share one copy of weights and optimizer (FSDP).", minimum=-1)
    pp: int = setting(1, "Pipeline stages: each rank holds some of the layers.", minimum=-1)
    tp: int = setting(1, "Ranks that share each layer: needs fast links.", minimum=-1)
    backend: Backend | dict[Literal["default", "dp_replicate", "dp_shard", "pp", "tp"], Backend] = setting(
        "any", "What carries the messages; a map such as {tp: jaccl, default: ring} gives each axis its own."
    )
    schedule: Literal["1f1b", "gpipe"] = setting(
        "1f1b", "Order of the micro-batches in a pipeline: 1f1b keeps fewer activations."
    )
    split: Literal["even", "memory"] | list[int] = setting(
        "even", "Layers per pipeline stage: even, by each host's memory, or a list of counts.", minimum=1
    )
    bucket_mib: Literal["auto"] | float = setting(
        "auto", "Size of the gradient messages: larger has less overhead and less overlap.", above=0, maximum=1e6
    )
    wire_dtype: Literal["float32", "bfloat16"] | None = setting(
        "float32",
        "Type in which gradients travel: bfloat16 halves the bytes and rounds; null = the gradient's own.",
    )


@dataclass
class EvalConfig:
    """Validation during the run."""

    every: int = setting(200, "Steps between validations; 0 = only at the end.", minimum=0)
    batches: int = setting(-1, "Batches of each validation; -1 = the whole split.", minimum=-1)
    generate: int = setting(0, "Held-out rows to answer (or texts to go on with), the same each time.", minimum=0)
    exact_match: bool = setting(False, "Answer the held-out rows and report the share that is exactly right.")
    max_new_tokens: int = setting(64, "Longest answer to generate.", minimum=1)
    patience: int | None = setting(
        None,
        "Stop after so many validations without a better loss. The best checkpoint is kept, as checkpoints/best, and "
        "its weights are the result; null = never, the last weights are.",
        minimum=1,
    )


@dataclass
class CheckpointConfig:
    """What is kept of an unfinished run."""

    every: int = setting(100, "Steps between checkpoints; 0 = only at the end.", minimum=0)
    keep_last: int = setting(3, "Older ones are deleted, but for the best.", minimum=1, also=("save_total_limit",))
    resume: str = setting(
        "auto",
        "auto = the newest whole checkpoint, if any; none = start anew; or a checkpoint folder.",
        words=("auto", "none"),
        also=("resume_from_checkpoint",),
    )


@dataclass
class WandbConfig:
    """Weights & Biases; off while `project` is null."""

    project: str | None = setting(None, "Project that gets the run; null = no W&B.")
    name: str | None = setting(None, "Name of the run; null = that of the output folder.")
    mode: Literal["online", "offline", "disabled"] = setting("online", "offline = to disk, for `wandb sync`.")


@dataclass
class LoggingConfig:
    """How often and where metrics go."""

    every: int = setting(10, "Steps between rows of metrics.", minimum=1)
    wandb: WandbConfig = setting(WandbConfig, "Weights & Biases.")


@dataclass
class LimitsConfig:
    """Bounds that protect the machine and the run; null = MLX's own."""

    memory_gib: float | None = setting(None, "MLX waits for memory to come free above this.", above=0, maximum=1e9)
    cache_gib: float | None = setting(None, "Freed memory that MLX keeps for later.", minimum=0, maximum=1e9)
    wired_gib: float | None = setting(
        None, "Memory that macOS may not page out; null = what macOS recommends.", minimum=0, maximum=1e9
    )
    loss_watchdog: float | None = setting(
        None, "Give up (exit code 1) when the training loss of 3 rows of metrics in a row is above this.", above=0
    )


@dataclass
class ProfileConfig:
    """A trace of some steps in output_dir/profile: Chrome's format, and a Metal capture where that is switched on."""

    start: int = setting(10, "First traced step.", minimum=1)
    steps: int = setting(3, "How many steps are traced.", minimum=1)


@dataclass
class Recipe:
    """Everything a run depends on."""

    model: ModelConfig = setting(ModelConfig, "Which model is trained.")
    method: Literal["lora", "dora", "full"] = setting(
        "lora",
        "Train low-rank adapters, adapters with magnitudes, or every weight.",
        also=("fine_tune_type",),
    )
    lora: LoraConfig = setting(LoraConfig, "The adapters of lora and dora.")
    data: DataConfig = setting(DataConfig, "Rows and what is learned of them.")
    batch_size_per_device: int = setting(
        4,
        "Rows in one micro-batch of one data-parallel rank: memory grows with it.",
        minimum=1,
        also=("per_device_train_batch_size", "micro_batch_size", "batch_size"),
    )
    global_batch_size: int | None = setting(
        None, "Rows per step over all ranks; grad_accumulation_steps then follows.", minimum=1
    )
    grad_accumulation_steps: int = setting(
        1,
        "Micro-batches per step: a larger batch without more memory.",
        minimum=1,
        also=("gradient_accumulation_steps",),
    )
    epochs: int = setting(1, "Passes over the training rows.", minimum=1, also=("num_train_epochs", "num_epochs"))
    max_steps: int | None = setting(None, "Optimizer updates; decides instead of epochs.", minimum=1, also=("iters",))
    objective: ObjectiveConfig = setting(ObjectiveConfig, "What a step minimises.")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "The update rule.")
    schedule: ScheduleConfig = setting(ScheduleConfig, "The learning rate over the run.")
    max_grad_norm: float | None = setting(
        1.0,
        "Gradients are scaled down to this norm; null = never, the norm is still logged.",
        above=0,
        also=("clip_grad_norm", "max_norm"),
    )
    gradient_checkpointing: bool | int = setting(
        False,
        "Recompute layers in the backward pass: true = all, k = every k-th; less memory, more time.",
        minimum=1,
        also=("grad_checkpoint",),
    )
    parallel: ParallelConfig = setting(ParallelConfig, "How the ranks divide the work.")
    eval: EvalConfig = setting(EvalConfig, "Validation during the run.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "What is kept of an unfinished run.")
    logging: LoggingConfig = setting(LoggingConfig, "How often and where metrics go.")
    limits: LimitsConfig = setting(LimitsConfig, "Bounds that protect the machine and the run.")
    profile: ProfileConfig | None = setting(None, "Trace some steps: {start: 10, steps: 3}.")
    output_dir: str = setting(
        "runs/{recipe}", "Folder of the run's files; {recipe} stands for the recipe file's name."
    )
    seed: int = setting(0, "Decides initial values, order of rows and dropout.", minimum=0)
