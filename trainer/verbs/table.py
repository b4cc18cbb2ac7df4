"""The verbs of the command line: what each is for, its arguments, and the function that does it.

A new verb is one more entry of `VERBS`. The functions are named as text and imported when called, so
that `--help` needs none of them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb of `python -m trainer`.

    Args:
        function: `module:name` of a function from the parsed arguments to the exit code.
        summary: What it does, in one line.
        example: A command that shows it.
        add_arguments: Adds its arguments to a parser.
        rank_0_alone: It writes files and needs no other rank, so under a launcher the others have nothing to do.
    """

    function: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    rank_0_alone: bool = False

    def parser(self, name: str) -> argparse.ArgumentParser:
        """The parser of this verb's arguments."""
        parser = argparse.ArgumentParser(
            prog=f"python -m trainer {name}",
            description=self.summary,
            epilog=f"example: {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_arguments(parser)
        parser.add_argument("--traceback", action="store_true", help="on an error, show where it was raised")
        return parser

    def main(self, arguments: argparse.Namespace) -> int:
        """Import the verb's function and call it."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(arguments)


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file")
    _overrides(parser)


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings that replace the recipe's, such as optimizer.lr=2e-4",
    )


def _validate(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--world", metavar="N", type=_count, default=1, help="number of ranks (default: 1)")


def _data(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--split", choices=("train", "valid"), default="train", help="rows to show (default: train)")
    parser.add_argument(
        "--rows", metavar="N", type=_count, default=8, help="rows of the first batch to show (default: 8)"
    )
    parser.add_argument("--world", metavar="N", type=_count, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--html", metavar="FILE", help="write one HTML file, which opens without network")


def _plan(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--world", metavar="N", type=_count, default=1, help="number of ranks (default: 1)")
    parser.add_argument(
        "--memory-gib",
        metavar="G",
        type=_positive,
        help="memory a rank may use (default: 3/4 of this machine's)",
    )
    parser.add_argument(
        "--tflops",
        metavar="T",
        type=_positive,
        default=15.0,
        help="compute rate of a rank, to compare (default: 15)",
    )
    parser.add_argument(
        "--link-gb",
        metavar="B",
        type=_positive,
        default=1.0,
        help="GB/s between ranks, to compare (default: 1)",
    )


def _selftest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where to compute (default: as MLX chooses)")


def _bench(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--vs", choices=("mlx-lm",), help="measure mlx-lm's trainer too, and print the ratios")
    parser.add_argument("--steps", metavar="N", type=_count, default=5, help="timed steps (default: 5)")
    parser.add_argument(
        "--warmup", metavar="N", type=_count, default=2, help="steps before them (default: 2)"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=_count, default=1, help="with --vs: the best of N (default: 1)"
    )
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="random rows of exactly data.max_seq_len tokens, not the recipe's",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    # What --vs starts its processes with.
    parser.add_argument("--side", help=argparse.SUPPRESS)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="a run's output folder, or one of its checkpoints")
    _overrides(parser)
    parser.add_argument(
        "--split", choices=("valid", "train"), default="valid", help="rows to use (default: valid)"
    )


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="a run's output folder, or one of its checkpoints")
    _overrides(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this; without it, each line typed is answered"
    )
    parser.add_argument(
        "--rows", metavar="N", type=_count, help="answer N held-out rows, the base model's answer beside"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_count, help="longest answer (default: the recipe's)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 = likeliest (default: 0)"
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="a run's output folder, or one of its checkpoints")
    parser.add_argument(
        "--to",
        choices=("peft", "fused"),
        required=True,
        help="peft: adapter folder for transformers + PEFT; fused: base and adapter as one model for mlx-lm",
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to write (default: RUN/peft or RUN/fused)")
    parser.add_argument(
        "--base-model", metavar="NAME", help="peft: base model to name, where the run's was quantized"
    )
    parser.add_argument(
        "--multimodal",
        action="store_true",
        help="peft: for the transformers class that keeps the vision tower",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="fused: keep a quantized base quantized; the adapted weights lose precision (default: dequantize)",
    )


def _ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", metavar="TEXT", nargs="?", default="", help="only names that contain this")


def _cp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a recipe that `ls` names")
    parser.add_argument(
        "target", metavar="FILE", nargs="?", default=".", help="file or folder (default: here)"
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="output folders of runs; several share every chart"
    )
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="the HTML file (default: report.html)"
    )


def _dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entity", metavar="E", required=True, help="W&B user or team")
    parser.add_argument("--project", metavar="P", required=True, help="W&B project of the runs")
    parser.add_argument(
        "--dry-run",
        metavar="FILE",
        nargs="?",
        const="workspace.json",
        help="write the workspace's definition to a file (default: workspace.json), not to W&B",
    )


def _nothing(parser: argparse.ArgumentParser) -> None:
    """The verb takes no arguments."""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number > 0")
    return number


VERBS = {
    "run": Verb(
        "trainer.verbs.run:main",
        "Train as the recipe says; goes on where an earlier run stopped.",
        "python -m trainer run recipes/quickstart.yaml optimizer.lr=2e-4",
        _recipe,
    ),
    "validate": Verb(
        "trainer.verbs.validate:main",
        "Check a recipe and show what it means, without loading a model.",
        "python -m trainer validate recipes/qwen-9b-lora.yaml --world 4",
        _validate,
    ),
    "data": Verb(
        "trainer.verbs.data:main",
        "What the model will see: tokenised rows, learned tokens in colour, packing and padding, lengths.",
        "python -m trainer data recipes/quickstart.yaml --rows 4 --html data.html",
        _data,
        rank_0_alone=True,
    ),
    "plan": Verb(
        "trainer.verbs.plan:main",
        "Memory on each rank, whether it fits, and the cheapest mesh, from the model's config alone.",
        "python -m trainer plan recipes/qwen-9b-lora.yaml --world 4 --memory-gib 96",
        _plan,
    ),
    "bench": Verb(
        "trainer.verbs.bench:main",
        "Tokens per second, parts of a step, memory and MFU of a recipe on this machine.",
        "python -m trainer bench recipes/quickstart.yaml --vs mlx-lm",
        _bench,
    ),
    "selftest": Verb(
        "trainer.verbs.selftest:main",
        "Check on this machine that everything is computed as it should be; a table to paste into a report.",
        "python -m trainer selftest",
        _selftest,
    ),
    "eval": Verb(
        "trainer.verbs.eval:main",
        "Loss and perplexity of a run's result or of a checkpoint.",
        "python -m trainer eval runs/quickstart --split valid",
        _eval,
    ),
    "generate": Verb(
        "trainer.verbs.generate:main",
        "Answers of a run's result: to a prompt, for held-out rows, or to each line typed.",
        "python -m trainer generate runs/quickstart --rows 5",
        _generate,
    ),
    "export": Verb(
        "trainer.verbs.export:main",
        "Write a run's result as a PEFT adapter, or fused into one model.",
        "python -m trainer export runs/qwen-9b-lora --to peft",
        _export,
        rank_0_alone=True,
    ),
    "ls": Verb("trainer.verbs.shipped:ls", "List the recipes that come along.", "python -m trainer ls qwen", _ls),
    "cp": Verb(
        "trainer.verbs.shipped:cp",
        "Copy a recipe that comes along, to change it.",
        "python -m trainer cp qwen-9b-lora my-recipe.yaml",
        _cp,
        rank_0_alone=True,
    ),
    "report": Verb(
        "trainer.verbs.report:main",
        "Put runs into one HTML file: curves, speed, memory, answers, and what differs.",
        "python -m trainer report runs/quickstart --out report.html",
        _report,
        rank_0_alone=True,
    ),
    "dashboard": Verb(
        "trainer.verbs.dashboard:main",
        "Build a W&B workspace with panels for throughput, loss, communication and memory.",
        "python -m trainer dashboard --entity me --project my-runs --dry-run workspace.json",
        _dashboard,
        rank_0_alone=True,
    ),
    "schema": Verb(
        "trainer.verbs.schema:main",
        "Print the JSON Schema of recipes, with which editors complete and check them.",
        "python -m trainer schema > recipe.schema.json",
        _nothing,
    ),
}
