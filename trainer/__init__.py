"""LoRA and full fine-tuning from recipes: `python -m trainer RECIPE [key=value ...]`, or from Python.

    from trainer import train

    result = train("recipes/quickstart.yaml", ["optimizer.lr=2e-3"])
    print(result.path, result.metrics["eval/loss"])

Names are loaded on first use, so that `--help` and `validate` stay quick; each verb imports what it needs.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "Callbacks": "trainer.running.run",
    "Objective": "trainer.objectives.objective",
    "Recipe": "trainer.recipe.config",
    "RunResult": "trainer.running.run",
    "load_recipe": "trainer.recipe.load",
    "train": "trainer.running.run",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
