"""The HTML shell of a report: style sheet, script, and sections put together. One file, no network.

Light and dark follow the reader's system. The script only shows values under the pointer; without it the page is whole.
"""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { --back: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #6a6f76; --rule: #e4e4e1; --mark: #eef3fd; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --card: #1e2125; --ink: #e7e8ea; --soft: #9aa0a8; --rule: #31353a; --mark: #243149; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 0 0 4px; font-weight: 600; }
p.sub { margin: 0 0 18px; color: var(--soft); }
.grid-of-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 14px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.card.chart { position: relative; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .tick, svg .axis-title { fill: var(--soft); font-size: 11px; }
svg .strong { fill: var(--ink); font-size: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--soft); font-size: 12.5px; margin-bottom: 4px; }
.legend i { display: inline-block; width: 14px; height: 0; border-top: 3px solid; vertical-align: 4px;
  margin-right: 5px; }
.legend i.dashed { border-top-style: dashed; } .legend i.block { height: 10px; border: 0; vertical-align: -1px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { font-weight: 650; }
pre, code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 8px 0 0; overflow-x: auto; } td pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
td.right, td.wrong { padding-left: 8px; }
.right { background: color-mix(in srgb, #2b8a3e 16%, transparent); }
.wrong { background: color-mix(in srgb, #c2331f 13%, transparent); }
details { margin-bottom: 10px; } summary { cursor: pointer; font-weight: 600; }
.tip { position: absolute; pointer-events: none; background: var(--ink); color: var(--back); font-size: 12px;
  border-radius: 5px; padding: 4px 8px; display: none; white-space: nowrap; z-index: 2; }
.tip b { font-weight: 650; }
svg .bar { fill: #2f6fde; }
.card.row { margin-bottom: 8px; } .card.row h3 { color: var(--soft); font-weight: 500; }
pre.tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; color: var(--soft); }
.tokens span, .tokens mark { border-left: 1px solid color-mix(in srgb, var(--soft) 45%, transparent); }
mark { background: color-mix(in srgb, #2b8a3e 22%, transparent); color: var(--ink); }
@media print { .card { break-inside: avoid; } }
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { frame, series } = JSON.parse(svg.dataset.chart);
  const [x0, x1, left, right, top, bottom] = frame, pointer = svg.querySelector(".pointer");
  const tip = svg.parentElement.appendChild(document.createElement("div"));
  tip.className = "tip";
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; pointer.replaceChildren(); });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const wanted = x0 + ((event.clientX - box.left) * scale - left) / (right - left) * (x1 - x0);
    const near = points => points.reduce((best, p) =>
      p[1] !== null && (!best || Math.abs(p[0] - wanted) < Math.abs(best[0] - wanted)) ? p : best, null);
    const hits = series.map(s => [s, near(s.points)]).filter(hit => hit[1]);
    if (!hits.length) return;
    const step = hits.map(hit => hit[1][0]).reduce((a, b) => Math.abs(a - wanted) <= Math.abs(b - wanted) ? a : b);
    const at = left + (step - x0) / (x1 - x0) * (right - left);
    pointer.innerHTML = `<line class="axis" x1="${at}" x2="${at}" y1="${top}" y2="${bottom}" stroke-dasharray="2 3"/>` +
      hits.map(([s, p]) => `<circle cx="${left + (p[0] - x0) / (x1 - x0) * (right - left)}" cy="${p[2]}" r="3.5"
        fill="${s.color}"/>`).join("");
    tip.replaceChildren();
    tip.append(Object.assign(document.createElement("b"), { textContent: `step ${step}` }));
    for (const [s, p] of hits)
      tip.append(document.createElement("br"), `${s.name}: ${Number(p[1].toPrecision(5))}`);
    tip.style.display = "block";
    const inside = event.clientX - box.left, flip = inside > box.width / 2;
    tip.style.left = flip ? "" : `${inside + 30}px`;
    tip.style.right = flip ? `${box.width - inside + 30}px` : "";
    tip.style.top = `${event.clientY - box.top + 20}px`;
  });
}
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole document; sections are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p>\n'
        f"{chr(10).join(sections)}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A headed section; empty text where there is nothing to show."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def chart_card(title: str, legend: Sequence[tuple[str, str, str]], svg: str) -> str:
    """A chart with its title and legend of (name, colour, style: "line", "dashed" or "block")."""
    items = "".join(
        f'<span><i class="{style}" style="border-color:{color};'
        f'{f"background:{color}" if style == "block" else ""}"></i>{escape(name)}</span>'
        for name, color, style in legend
    )
    return f'<div class="card chart"><h3>{escape(title)}</h3><div class="legend">{items}</div>{svg}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; a cell may begin with `<td` to bring its own tag."""
    cells = [[cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    header = "".join(f"<th>{escape(word)}</th>" for word in head)
    return f'<div class="card table"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, text: str) -> str:
    """Text that opens on a click."""
    return f'<details class="card"><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>'
