"""A picture: figures side by side, as bars in groups that each have a scale of their own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

LEFT, ROW, GAP, COLOURS = 200, 22, 34, ("#2166c2", "#9aa3ad")


def bars(
    groups: Mapping[str, Mapping[str, tuple[float, str]]], *, ours: str, wide: int = 640
) -> str:
    """SVG of ``groups``: what is measured, over names with a value and its text. Bars of ``ours`` stand out."""
    room = wide - LEFT - 150
    parts: list[str] = []
    top = 20
    for what, found in groups.items():
        parts.append(f'<text x="8" y="{top}" font-weight="bold">{escape(what)}</text>')
        most = max(value for value, _ in found.values()) or 1.0
        for name, (value, text) in found.items():
            top += ROW
            across = max(value / most * room, 1.0)
            colour = COLOURS[0] if name == ours else COLOURS[1]
            parts.append(
                f'<text x="{LEFT - 8}" y="{top}" text-anchor="end">{escape(name)}</text>'
                f'<rect x="{LEFT}" y="{top - 12}" width="{across:.1f}" height="15" fill="{colour}"/>'
                f'<text x="{LEFT + across + 6:.1f}" y="{top}">{escape(text)}</text>'
            )
        top += GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {top - GAP + 14}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"
