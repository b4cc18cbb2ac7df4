"""Writes the reference curves that test_pytorch_parity.py compares the trainer with.

Each run trains a tiny random model with transformers (and PEFT) on the CPU in float32 and records the loss and the
gradient norm of every step. Checkpoints and initial adapters are saved by `save_pretrained`, so the test reads what
users have. It needs packages that the tests do not:

    pip install torch transformers peft accelerate safetensors && python tests/reference/make_reference.py

The rows are made here; nothing is downloaded. The same library versions on the same machine give the same files.
"""

import argparse
import json
import platform
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import peft
import tokenizers
import torch
import transformers

NUM_STEPS = 40
BATCH_SIZE = 4
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
EOS = "<|endoftext|>"
VOCAB_SIZE = 320


@dataclass
class Case:
    """One architecture: how to build it and which linears PEFT adapts.

    Attributes:
        name: folder name under the data folder.
        config: transformers configuration of the tiny model.
        target_modules: PEFT's own forms differ per case: a list of suffixes, `all-linear`, a regular expression.
        zero_lora_b: PEFT's standard start; False starts from non-zero factors, so that a wrong import shows in step 1.
    """

    name: str
    config: transformers.PretrainedConfig
    target_modules: list[str] | str
    zero_lora_b: bool


def cases() -> list[Case]:
    """The three architectures, each with what sets it apart: llama untied, qwen3 tied, qwen3_5 with a vision tower."""
    shared = dict(vocab_size=VOCAB_SIZE, max_position_embeddings=256, initializer_range=0.1)
    llama = transformers.LlamaConfig(
        **shared, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    qwen3 = transformers.Qwen3Config(
        **shared, hidden_size=40, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    # The gated norm divides the delta rule's output by its own size, which a random model brings close to 0: with the
    # usual eps of 1e-6 rounding alone moves gradients by 1e-3, and two PyTorch precisions disagree. 1e-3 bounds that.
    text = transformers.Qwen3_5TextConfig(
        **shared, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=8, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.5,
                         "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    )
    vision = transformers.models.qwen3_5.Qwen3_5VisionConfig(
        depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, temporal_patch_size=1,
        spatial_merge_size=1, out_hidden_size=32, num_position_embeddings=4,
    )
    qwen3_5 = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    suffixes = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return [
        Case("llama", llama, suffixes, zero_lora_b=True),
        Case("qwen3", qwen3, "all-linear", zero_lora_b=False),
        Case("qwen3_5", qwen3_5, r"model\.language_model\.layers\.\d+\..*_proj(_[a-z]+)?", zero_lora_b=False),
    ]


def make_rows(num_rows: int) -> list[str]:
    """Short stock-keeping notes; one in 32 is long enough to cross a chunk of 64 tokens."""
    rng = random.Random(7)
    people = ["Ana", "Bram", "Chidi", "Dóra", "Emil", "Farah"]
    things = ["bolts", "lamps", "maps", "ropes", "tins", "wheels", "crates", "gears"]
    places = ["the shed", "bay four", "the north shelf", "the yard", "room 12"]

    def note() -> str:
        who, what, where = rng.choice(people), rng.choice(things), rng.choice(places)
        count, rest = rng.randint(2, 99), rng.randint(1, 40)
        return rng.choice([
            f"{who} put {count} {what} in {where}.",
            f"{count} {what} left {where}; {rest} remain.",
            f"Does {who} still need {count} {what}?",
            f"{who} counted the {what} in {where}: {count}, not {rest}.",
        ])

    return [" ".join(note() for _ in range(8 if i % 32 == 3 else 1 + i % 2)) for i in range(num_rows)]


def train_tokenizer(rows: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens with an end-of-text token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(rows, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def build_model(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """A random float32 model; norms are moved off their start so that a lost `1 + w` changes the first loss."""
    torch.manual_seed(11)
    if isinstance(config, transformers.Qwen3_5Config):
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.float().train()


def make_batches(rows: list[str], tokenizer: transformers.PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """File-order batches, padded on the right; every token but a row's first is a target (-100 elsewhere)."""
    batches = []
    for start in range(0, NUM_STEPS * BATCH_SIZE, BATCH_SIZE):
        encoded = [tokenizer.encode(row) + [tokenizer.eos_token_id] for row in rows[start : start + BATCH_SIZE]]
        length = max(map(len, encoded))
        tokens = torch.full((BATCH_SIZE, length), tokenizer.pad_token_id)
        mask = torch.zeros((BATCH_SIZE, length), dtype=torch.long)
        for i, row in enumerate(encoded):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        batches.append({"tokens": tokens, "mask": mask, "targets": targets})
    return batches


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What a run updates; the vision tower never takes part."""
    for name, parameter in model.named_parameters():
        if ".visual." in name:
            parameter.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[float]]:
    """NUM_STEPS AdamW updates; returns the loss, the norm before clipping and the target count of every step."""
    parameters = trainable(model)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)
    curve: dict[str, list[float]] = {"loss": [], "grad_norm": [], "num_tokens": []}
    for batch in batches:
        logits = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve["loss"].append(loss.item())
        curve["grad_norm"].append(norm.item())
        curve["num_tokens"].append(int((batch["targets"] != -100).sum()))
    return curve


def add_adapter(model: torch.nn.Module, case: Case, folder: Path) -> peft.PeftModel:
    """Puts LoRA on the model and saves the adapter as it is before the first step."""
    torch.manual_seed(13)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=case.target_modules,
        init_lora_weights=case.zero_lora_b, task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    saved = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(saved["target_modules"], list):  # PEFT writes a set, in an order that differs from run to run
        saved["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n")
    return model


def settings() -> dict[str, object]:
    """What the curves depend on, saved beside them."""
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft, tokenizers)}
    return {
        "versions": versions | {"python": platform.python_version()},
        "optimizer": {"name": "AdamW", "lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8,
                      "weight_decay": WEIGHT_DECAY, "weight_decay_min_dims": 2},
        "max_grad_norm": MAX_GRAD_NORM, "num_steps": NUM_STEPS, "batch_size": BATCH_SIZE, "dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    output = parser.parse_args().output
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)

    rows = make_rows(NUM_STEPS * BATCH_SIZE)
    with open(output / "train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    tokenizer = train_tokenizer(rows)

    runs = {}
    for case in cases():
        case.config.eos_token_id = tokenizer.eos_token_id
        model = build_model(case.config)
        model.save_pretrained(output / case.name)
        tokenizer.save_pretrained(output / case.name)
        # Read back as a user would: for qwen3_5, AutoTokenizer keeps the vocabulary but splits words its own way.
        batches = make_batches(rows, transformers.AutoTokenizer.from_pretrained(output / case.name))
        runs[f"{case.name}-full"] = train(model, batches)
        model = add_adapter(build_model(case.config), case, output / f"{case.name}-adapter")
        runs[f"{case.name}-lora"] = train(model, batches)
    for name, curve in runs.items():
        print(f"{name}: loss {curve['loss'][0]:.4f} -> {curve['loss'][-1]:.4f}")
    (output / "curves.json").write_text(json.dumps(settings() | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
