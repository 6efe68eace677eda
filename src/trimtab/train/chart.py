"""Line charts as inline SVG: no script, no external resource; colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its ``name``, its style class ``kind``, its points; ``marks`` draws a dot at each."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def line_chart(series: Sequence[Series], *, x_name: str, y_name: str) -> str:
    """An ``<svg>`` of the series over common axes; empty where no series has a point."""
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    x_low, x_high = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_name)} over {escape(x_name)}">'
    ]
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in nice_ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            x, _ = place(tick, low)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{tick:g}</text>'
            )
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_name)}</text>'
    )
    for one in shown:
        placed = [place(x, y) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line {one.kind}" points="{path}"/>')
        if one.marks or len(placed) == 1:
            for (x, y), (step, value) in zip(placed, one.points, strict=True):
                title = f"<title>{escape(one.name)}, {escape(x_name)} {step:g}: {value:.4g}</title>"
                parts.append(
                    f'<circle class="dot {one.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'
                )
    parts.append("</svg>")
    return "".join(parts)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span ``low`` to ``high``, about ``count`` of them."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= rough * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def smoothed(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """The mean over up to ``reach`` points on either side, as many on one as on the other: no lag."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for number, (x, _) in enumerate(points):
        side = min(reach, number, len(points) - 1 - number)
        first, last = number - side, number + side + 1
        found.append((x, (sums[last] - sums[first]) / (last - first)))
    return found
