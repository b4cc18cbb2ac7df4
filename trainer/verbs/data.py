"""`python -m trainer data`: what the model will see of a recipe's rows, in the terminal or as an HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.metrics.terminal import Output
from trainer.recipe.load import load_recipe
from trainer.recipe.paths import require_paths
from trainer.reports.preview import Document, Preview, preview, visible
from trainer.reports.preview_page import preview_page

LEARNED, OTHER, NOTE = "bold green", "dim", "cyan"
# Where there is no colour, learned tokens stand between these.
BRACKETS = ("⟦", "⟧")
MAX_PIECES = 400
BAR_WIDTH = 40


def main(arguments: argparse.Namespace) -> int:
    """Show the rows of `arguments.recipe`; returns 0."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_paths(recipe, ("model", "data"))
    title = Path(arguments.recipe).stem
    shown = preview(recipe, title, arguments.split, arguments.rows, arguments.world)
    if arguments.html is None:
        show(shown, Output())
        return 0
    target = Path(arguments.html)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(preview_page(shown), encoding="utf-8")
    print(f"Wrote {target} ({target.stat().st_size / 1024:.0f} KiB); open it in a browser.")
    return 0


def show(shown: Preview, console: Console) -> None:
    """Print a preview."""
    has_color = console.color_system is not None
    console.print(Text(shown.title, "bold"))
    for notice in shown.notices:
        console.print(Text(notice, "yellow"))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in shown.facts:
        facts.add_row(Text(name), Text(value))
    console.print(facts)
    console.print(_histogram(shown.histogram))
    key = Text("\nFirst batch of the run: ").append("learned", LEARNED).append(" and ").append("other", OTHER)
    console.print(key.append(" tokens" if has_color else f" tokens (learned ones in {' '.join(BRACKETS)})"))
    for number, line in enumerate(shown.lines, start=1):
        console.print(Text(f"\nline {number}: {line.length} positions, {line.num_padding} of padding", NOTE))
        _documents(console, line.documents, has_color)
    console.print(Text("\nLongest rows", "bold"))
    _documents(console, shown.longest, has_color)
    console.print(Text("\nRows with the fewest learned tokens", "bold"))
    _documents(console, shown.fewest, has_color)
    if shown.skipped:
        console.print(Text("\nSkipped rows", "bold"))
        console.print(Text("\n".join(f"  {visible(line)}" for line in shown.skipped)))


def _documents(console: Console, documents: Sequence[Document], has_color: bool) -> None:
    for document in documents:
        console.print(document_text(document, has_color), soft_wrap=not console.is_terminal)


def document_text(document: Document, has_color: bool) -> Text:
    """A row's first tokens, behind its number."""
    head = f"  row {document.row}, {document.num_tokens} tokens, {document.num_targets} learned: "
    text = Text().append(head, NOTE)
    inside = False
    for piece in document.pieces[:MAX_PIECES]:
        if piece.is_target != inside and not has_color:
            text.append(BRACKETS[inside])
        inside = piece.is_target
        text.append(visible(piece.text), LEARNED if inside else OTHER)
    if inside and not has_color:
        text.append(BRACKETS[1])
    if len(document.pieces) > MAX_PIECES:
        text.append(f" … {len(document.pieces) - MAX_PIECES} more; --html shows all", NOTE)
    return text


def _histogram(bins: Sequence[tuple[int, int, int]]) -> Text:
    most = max(count for _, _, count in bins)
    width = len(f"{bins[-1][0]}-{bins[-1][1]}")
    text = Text().append("\nTokens per row\n", "bold")
    for low, high, count in bins:
        bar = "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")
        text.append(f"  {f'{low}-{high}':>{width}}  ").append(bar, "blue").append(f" {count:,}\n")
    text.right_crop(1)
    return text
