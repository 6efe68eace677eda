"""A picture: shares with their intervals over a count on a logarithmic axis, one named mark each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, BOTTOM, TOP, LINE = 60, 50, 24, 14


@dataclass(frozen=True)
class Mark:
    """``value`` with the ends of its interval at ``count``; ``area`` is that of the mark, in square pixels."""

    name: str
    count: int
    value: float
    low: float
    high: float
    area: float


def scatter(
    marks: Sequence[Mark], *, above: str, below: str, size: tuple[int, int] = (720, 380), room: int
) -> str:
    """SVG; ``above`` and ``below`` say what the axes are, ``room`` is kept for names on the right.

    Names stand beside their marks, or as near as others leave room, with a line to the mark.
    """
    wide, high = size
    powers = [math.log10(mark.count) for mark in marks]
    first, last = math.floor(min(powers)), math.ceil(max(powers))
    floor = math.floor(min(mark.low for mark in marks) * 20) / 20
    ceiling = min(math.ceil(max(mark.high for mark in marks) * 20) / 20, 1.0)

    def place(power: float, share: float) -> tuple[float, float]:
        x = LEFT + (power - first) / max(last - first, 1) * (wide - LEFT - room)
        return x, high - BOTTOM - (share - floor) / (ceiling - floor) * (high - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for power in range(first, last + 1):
        x, _ = place(power, floor)
        parts.append(
            f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{TOP}" y2="{high - BOTTOM}" stroke="#e3e6ea"/>'
            f'<text x="{x:.0f}" y="{high - BOTTOM + 18}" text-anchor="middle">{10**power:,}</text>'
        )
    steps = round((ceiling - floor) * 20)
    for step in range(0, steps + 1, 1 if steps <= 8 else 2):
        share = floor + step / 20
        _, y = place(first, share)
        parts.append(
            f'<line x1="{LEFT}" x2="{wide - room}" y1="{y:.0f}" y2="{y:.0f}" stroke="#e3e6ea"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{share:.2f}</text>'
        )
    places = [place(power, mark.value) for power, mark in zip(powers, marks, strict=True)]
    for mark, power, (x, y) in zip(marks, powers, places, strict=True):
        (_, top), (_, end) = place(power, mark.high), place(power, mark.low)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{end:.1f}" stroke="#2166c2" stroke-opacity="0.4"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_radius(mark):.1f}" fill="#2166c2" fill-opacity="0.55"/>'
        )
    parts += _names(marks, places, high)
    parts.append(f'<text x="{LEFT}" y="{high - 10}">{escape(below)}</text>')
    parts.append(f'<text x="{LEFT}" y="15">{escape(above)}</text></svg>')
    return "\n".join(parts) + "\n"


def _radius(mark: Mark) -> float:
    return math.sqrt(mark.area / math.pi)


def _names(marks: Sequence[Mark], places: Sequence[tuple[float, float]], high: int) -> list[str]:
    """The names, from the top down, each moved up or down as far as it takes to cover no other."""
    taken: list[tuple[float, float, float]] = []  # left, right, baseline
    parts = []
    lowest = high - BOTTOM - 2
    for mark, (x, y) in sorted(zip(marks, places, strict=True), key=lambda pair: pair[1][1]):
        left = x + _radius(mark) + 4
        right = left + 7 * len(mark.name)

        def free(line: float, left: float = left, right: float = right) -> bool:
            return TOP < line <= lowest and not any(
                left < other_right and other_left < right and abs(line - other) < LINE
                for other_left, other_right, other in taken
            )

        near = (y + 4 + step * sign for step in range(0, high, 2) for sign in (1, -1))
        line = next(filter(free, near), min(y + 4, lowest))
        taken.append((left, right, line))
        if abs(line - y) > LINE:
            parts.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{left - 2:.1f}" y2="{line - 4:.1f}" stroke="#b8c0c8"/>'
            )
        parts.append(f'<text x="{left:.1f}" y="{line:.1f}">{escape(mark.name)}</text>')
    return parts
