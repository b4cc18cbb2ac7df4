"""The model card of an exported model: what it was made from, how to load it, what it reached."""

from dataclasses import replace
from pathlib import Path

from trainer.metrics.records import read_records
from trainer.metrics.table import METRICS
from trainer.recipe.config import Recipe
from trainer.recipe.load import to_yaml

USAGE = {
    "peft": """```python
from peft import PeftModel
from transformers import {model_class}

model = {model_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")
```""",
    "mlx-lm": """```shell
mlx_lm.generate --model PATH_OF_THIS_FOLDER --prompt "..."
```""",
}


def model_card(recipe: Recipe, library: str, metrics: Path, *, model_class: str, base: str, notes: list[str]) -> str:
    """The text of `README.md`, with the front matter that the Hugging Face hub reads.

    Args:
        recipe: The run's recipe.
        library: "peft" | "mlx-lm".
        metrics: The run's metrics.jsonl; may be missing.
        model_class: Transformers class that holds the model.
        base: The base model's repository or folder.
        notes: Sentences on what differs from base + adapter.
    """
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if not Path(base).exists():  # the hub refuses anything but repositories here
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- mlx-trainer", f"- {recipe.method}", "---", ""]
    lines += [f"# {Path(base).name}, fine-tuned ({recipe.method})", ""]
    lines += [f"Trained with mlx-trainer from {base} on {_data_names(recipe)}.", *notes, ""]
    lines += ["## Use", "", USAGE[library].format(model_class=model_class, base=base), ""]
    results = last_values(metrics)
    if results:
        lines += ["## Results", "", "| metric | last value |", "|---|---|"]
        lines += [f"| {key} | {value:g} |" for key, value in results.items()] + [""]
    portable = replace(recipe, output_dir=Path(recipe.output_dir).name)
    lines += ["## Recipe", "", "```yaml", to_yaml(portable).strip(), "```", ""]
    return "\n".join(lines)


def last_values(metrics: Path) -> dict[str, float]:
    """The last value of each key that a card tells and that the run logged."""
    told = [metric.key for metric in METRICS if metric.in_card]
    values = {key: record[key] for record in read_records(metrics) for key in told if record.get(key) is not None}
    return {key: values[key] for key in told if key in values}


def _data_names(recipe: Recipe) -> str:
    train = recipe.data.train
    return train if isinstance(train, str) else ", ".join(source.path for source in train)
