"""Line charts without script or external resource; colours come from the page's style.

The curves are an SVG that is stretched to the room there is, with lines and dots that keep their width; the labels
are text beside it, so that they can be read on a telephone as on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SIZE = 1000  # both sides of the plot, in its own units
COLOURS = 8
MOST = 600  # stretches of a long line, each drawn by its lowest and its highest point


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its ``name``, its style class ``kind``, its points; ``marks`` draws a dot at each."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def line_chart(series: Sequence[Series], *, x_name: str, y_name: str, tall: bool = True) -> str:
    """The series over common axes, as HTML; empty where no series has a point."""
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    x_low, x_high = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys), 5 if tall else 3)
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> float:
        return (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5

    def down(y: float) -> float:
        return (high - y) / (high - low)

    parts = [
        f'<div class="chart{"" if tall else " low"}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">',
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none">',
    ]
    for tick in ticks:
        y = down(tick) * SIZE
        parts.append(f'<line class="grid" x1="0" x2="{SIZE}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for one in shown:
        points = one.points if one.marks else thinned(one.points, MOST)
        placed = [(across(x) * SIZE, down(y) * SIZE) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line {one.kind}" points="{path}"/>')
        if one.marks or len(placed) == 1:
            for (x, y), (step, value) in zip(placed, points, strict=True):
                title = f"<title>{escape(one.name)}, {escape(x_name)} {step:g}: {value:.4g}</title>"
                # A line of no length with round ends is a dot that stays round when stretched.
                parts.append(
                    f'<path class="dot {one.kind}" d="M{x:.1f} {y:.1f}h.01">{title}</path>'
                )
    parts.append('</svg><div class="labels">')
    parts += [
        f'<span class="y" style="top:{down(tick):.2%}">{_short(tick)}</span>' for tick in ticks
    ]
    for tick in nice_ticks(x_low, x_high, 5 if tall else 3):
        if x_low <= tick <= x_high:
            parts.append(f'<span class="x" style="left:{across(tick):.2%}">{_short(tick)}</span>')
    parts.append(f'<span class="axis">{escape(x_name)}</span></div></div>')
    return "".join(parts)


def legend(series: Sequence[tuple[str, str]]) -> str:
    """Names beside samples of their lines, of (name, kind)."""
    keys = (f'<span><i class="key {kind}"></i>{escape(name)}</span>' for name, kind in series)
    return f'<p class="legend">{"".join(keys)}</p>'


def kind_of(number: int) -> str:
    """The style of the line of that number: eight colours, then the same ones dashed."""
    colour = f"c{number % COLOURS + 1}"
    return colour if number // COLOURS % 2 == 0 else f"{colour} dashed"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span ``low`` to ``high``, about ``count`` of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # but for rounding, one value
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= rough * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """At most two points of each of ``count`` stretches, the lowest and the highest: no peak is lost."""
    if len(points) <= 2 * count:
        return list(points)
    found: list[tuple[float, float]] = []
    for number in range(count):
        first, last = (n * len(points) // count for n in (number, number + 1))
        stretch = points[first:last]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def reach_of(points: Sequence[tuple[float, float]]) -> int:
    """How far to smooth a curve of that many points; 0 where there are few."""
    return min(max(10, len(points) // 50), len(points) // 20)


def smoothed(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """The mean over up to ``reach`` points on either side, as many on one as on the other: no lag."""
    if reach == 0:
        return list(points)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for number, (x, _) in enumerate(points):
        side = min(reach, number, len(points) - 1 - number)
        first, last = number - side, number + side + 1
        found.append((x, (sums[last] - sums[first]) / (last - first)))
    return found


def _short(value: float) -> str:
    """A tick in few characters: 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if unit == "k" else size
            return f"{value / scale:g}{unit}"
    return f"{value:g}"
