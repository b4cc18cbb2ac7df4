"""Charts as SVG text, without any package: lines over steps, and stacked bars.

Colours of axes and words come from the page's style sheet (classes `grid`, `tick`, `axis-title`). Each line chart
carries its points as JSON in `data-chart`, from which the page's script shows values under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 540, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
PALETTE = ("#2f6fde", "#d9730d", "#2b8a3e", "#b5306e", "#6f4bd8", "#0b7f8c", "#9a6700", "#c2331f")
MAX_POINTS = 800

Point = tuple[float, float | None]


@dataclass
class Series:
    """One line of a chart.

    Args:
        name: Its name in the legend.
        color: CSS colour.
        points: (x, y) in order of x; y None breaks the line.
        dashed: Drawn dashed.
        faint: Drawn thin and pale, left out of legend and tooltip (raw values behind a smoothed line).
        dots: Every point is marked.
    """

    name: str
    color: str
    points: Sequence[Point] = field(default_factory=list)
    dashed: bool = False
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """From values to pixels. `log` makes the y axis logarithmic (all y positive)."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float
    log: bool

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_min) / (self.x_max - self.x_min) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high, here = self.y_min, self.y_max, value
        if self.log:
            low, high, here = math.log10(low), math.log10(high), math.log10(value)
        return HEIGHT - BOTTOM - (here - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series], *, from_zero: bool = False, log: bool = False, steps: tuple[float, float] | None = None
) -> str:
    """An SVG of several lines over the step.

    Args:
        series: At least one point with a value among them.
        steps: First and last step of the x axis, so that charts can be compared; default: those of the series.
        from_zero: The y axis begins at 0.
        log: Logarithmic y axis where all values are positive.

    Returns:
        One `<svg>` element.
    """
    series = [Series(**{**vars(one), "points": thin(one.points)}) for one in series]
    frame = _frame(series, from_zero, log, steps)
    parts = [*_y_axis(frame), *_x_axis(frame)]
    for one in sorted(series, key=lambda one: not one.faint):
        parts.append(_line(one, frame))
    shown = [one for one in series if not one.faint]
    data = {
        "frame": [frame.x_min, frame.x_max, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "series": [
            {"name": one.name, "color": one.color, "points": [[x, y, _y_pixel(frame, y)] for x, y in one.points]}
            for one in shown
        ],
    }
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-chart="{escape(json.dumps(data))}">'
        f'{"".join(parts)}<g class="pointer"></g></svg>'
    )


def stacked_bars(bars: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], unit: str) -> str:
    """One horizontal bar per name, made of (part, value, colour) pieces; values are written behind it."""
    longest = max(sum(value for _, value, _ in pieces) for _, pieces in bars) or 1.0
    row, left, room = 44, 8, WIDTH - 90
    parts = []
    for index, (name, pieces) in enumerate(bars):
        top, x = index * row + 20, float(left)
        parts.append(f'<text class="tick strong" x="{left}" y="{top - 5}">{escape(name)}</text>')
        for part, value, color in pieces:
            width = value / longest * room
            title = f"<title>{escape(part)}: {number(value)} {unit}</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="16" fill="{color}">{title}</rect>'
            )
            x += width
        total = sum(value for _, value, _ in pieces)
        parts.append(f'<text class="tick" x="{x + 6:.1f}" y="{top + 12}">{number(total)} {unit}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {len(bars) * row + 8}" role="img">{"".join(parts)}</svg>'


def histogram(bins: Sequence[tuple[int, int, int]], title: str) -> str:
    """Vertical bars of (lowest, highest, count) bins over an axis with this title."""
    most = max(count for _, _, count in bins)
    frame = Frame(bins[0][0] - 1, bins[-1][1], 0, most * 1.06, False)
    parts = [*_y_axis(frame), *_x_axis(frame, title)]
    for low, high, count in bins:
        left, top = frame.x(low - 1), frame.y(count)
        label = f"<title>{low}-{high}: {count:,}</title>"
        parts.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{frame.x(high) - left - 2:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}">{label}</rect>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" style="max-width: 720px">{"".join(parts)}</svg>'


def smooth(points: Sequence[Point], radius: int) -> list[Point]:
    """Mean over `radius` points to each side, so that the curve does not lag; breaks stay breaks."""
    result: list[Point] = []
    for index, (x, y) in enumerate(points):
        near = [value for _, value in points[max(0, index - radius) : index + radius + 1] if value is not None]
        result.append((x, None if y is None else sum(near) / len(near)))
    return result


def thin(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most about `max_points` points; each stretch keeps its lowest and its highest, so spikes stay visible."""
    if len(points) <= max_points:
        return list(points)
    size = math.ceil(2 * len(points) / max_points)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [(x, y) for x, y in stretch if y is not None]
        if not known:
            kept.append(stretch[0])
            continue
        ends = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def number(value: float) -> str:
    """A number for people: 1,234 · 12.3 · 0.0123 · 1.2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.4g} M" if size < 1e9 else f"{value / 1e9:,.4g} G"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _frame(series: Sequence[Series], from_zero: bool, log: bool, steps: tuple[float, float] | None) -> Frame:
    xs = steps or [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points if y is not None]
    assert ys, "a chart needs at least one value"
    low, high = min(ys), max(ys)
    log = log and low > 0
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        low = min(0.0, low) if from_zero else low
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (low if from_zero else low - room), high + room
    x_min, x_max = min(xs), max(xs)
    return Frame(x_min, x_max if x_max > x_min else x_min + 1, low, high, log)


def _y_axis(frame: Frame) -> list[str]:
    ticks = _log_ticks(frame.y_min, frame.y_max) if frame.log else _ticks(frame.y_min, frame.y_max, 5)
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{number(tick)}</text>')
    return parts


def _x_axis(frame: Frame, title: str = "step") -> list[str]:
    y = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    for tick in _ticks(frame.x_min, frame.x_max, 6):
        if tick != int(tick):
            continue
        anchor = "end" if frame.x(tick) > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" text-anchor="{anchor}" x="{frame.x(tick):.1f}" y="{y + 16}">{number(tick)}</text>'
        )
    parts.append(f'<text class="axis-title" text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(title)}</text>')
    return parts


def _line(series: Series, frame: Frame) -> str:
    path, pen_down = [], False
    for x, y in series.points:
        if y is not None:
            path.append(f"{'L' if pen_down else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen_down = y is not None
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    look = 'stroke-width="1" opacity="0.3"' if series.faint else 'stroke-width="1.8"'
    line = f'<path d="{" ".join(path)}" fill="none" stroke="{series.color}" {look}{dash} stroke-linejoin="round"/>'
    known = [(x, y) for x, y in series.points if y is not None]
    if series.dots or len(known) == 1:
        line += "".join(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{series.color}"/>' for x, y in known
        )
    return line


def _y_pixel(frame: Frame, y: float | None) -> float | None:
    return None if y is None else round(frame.y(y), 1)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
