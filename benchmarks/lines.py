"""A picture: how figures grow, as lines through points on two logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

LEFT, BOTTOM, TOP, LINE = 60, 50, 24, 15
COLOURS = ("#2166c2", "#c2402a", "#2f8f5b", "#8a5fbf", "#b07a1e", "#444b54")


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    above: str,
    below: str,
    size: tuple[int, int] = (640, 380),
    room: int = 170,
) -> str:
    """SVG of (x, y) points by name; ``above`` and ``below`` say what the axes are, ``room`` is kept for the names."""
    wide, high = size
    points = [point for found in series.values() for point in found]
    xs, ys = ([math.log2(point[axis]) for point in points] for axis in (0, 1))
    (left, right), (floor, ceiling) = ((math.floor(min(v)), math.ceil(max(v))) for v in (xs, ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - left) / max(right - left, 1) * (wide - LEFT - room)
        up = (math.log2(y) - floor) / max(ceiling - floor, 1) * (high - BOTTOM - TOP)
        return LEFT + across, high - BOTTOM - up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for power in range(left, right + 1):
        x, _ = place(2.0**power, 2.0**floor)
        parts.append(
            f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{TOP}" y2="{high - BOTTOM}" stroke="#e3e6ea"/>'
            f'<text x="{x:.0f}" y="{high - BOTTOM + 18}" text-anchor="middle">{2.0**power:,.4g}</text>'
        )
    for power in range(floor, ceiling + 1):
        _, y = place(2.0**left, 2.0**power)
        parts.append(
            f'<line x1="{LEFT}" x2="{wide - room}" y1="{y:.0f}" y2="{y:.0f}" stroke="#e3e6ea"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{2.0**power:,.4g}</text>'
        )
    taken: list[float] = []
    for (name, found), colour in zip(series.items(), COLOURS, strict=False):
        places = [place(*point) for point in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        x, y = places[-1]
        while any(abs(y - other) < LINE for other in taken):
            y += 1
        taken.append(y)
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT}" y="{high - 10}">{escape(below)}</text>')
    parts.append(f'<text x="{LEFT}" y="15">{escape(above)}</text></svg>')
    return "\n".join(parts) + "\n"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of a straight line through points on two logarithmic axes, by least squares."""
    xs, ys = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    return _slope(xs, ys)


def each(points: Sequence[tuple[float, float]]) -> float:
    """What one more of x adds to y, by least squares."""
    return _slope(*([point[axis] for point in points] for axis in (0, 1)))


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return products / sum((a - x) ** 2 for a in xs)
