"""A preview of rows as one HTML file, in the shell of the reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trainer.reports.charts import histogram
from trainer.reports.page import page, section, table
from trainer.reports.preview import Document, Line, Piece, Preview, visible


def preview_page(shown: Preview) -> str:
    """The HTML document."""
    facts = table(["", ""], [[escape(name), f'<td class="n">{escape(value)}</td>'] for name, value in shown.facts])
    notices = "".join(f'<p class="sub">{escape(notice)}</p>' for notice in shown.notices)
    key = '<p class="sub"><mark>Marked tokens</mark> are learned; the others are read only. ↵ is a line break.</p>'
    lines = "".join(_line(number, line) for number, line in enumerate(shown.lines, start=1))
    chart = f'<div class="card chart">{histogram(shown.histogram, "tokens per row")}</div>'
    skipped = table(["row", "why"], [[escape(visible(part)) for part in line.split(": ", 1)] for line in shown.skipped])
    sections = [
        notices,
        section("Figures", facts),
        section("Lengths", chart),
        section("First batch of the run", key + lines),
        section("Longest rows", _documents(shown.longest)),
        section("Rows with the fewest learned tokens", _documents(shown.fewest)),
        section("Skipped rows", skipped if shown.skipped else ""),
    ]
    return page(shown.title, "What the model will see, from mlx-trainer", sections)


def _line(number: int, line: Line) -> str:
    head = f"line {number}: {line.length} positions, {line.num_padding} of padding, {len(line.documents)} rows shown"
    return f"<h3>{head}</h3>{_documents(line.documents)}"


def _documents(documents: Sequence[Document]) -> str:
    return "".join(
        f'<div class="card row"><h3>row {one.row}: {one.num_tokens} tokens, {one.num_targets} learned</h3>'
        f'<pre class="tokens">{"".join(map(_token, one.pieces))}</pre></div>'
        for one in documents
    )


def _token(piece: Piece) -> str:
    tag = "mark" if piece.is_target else "span"
    return f"<{tag}>{escape(visible(piece.text))}</{tag}>"
