"""What the pages that Trimtab writes have in common: templates, filters, and the way to disk.

A page stands alone: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from trimtab.data.preview import CLOSE, OPEN
from trimtab.errors import StorageError


def write_page(path: Path, template: str, facts: Mapping[str, Any]) -> Path:
    """Render a template of ours and write it whole or not at all. Raises `StorageError`."""
    page = _templates().get_template(template).render(facts)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


@cache
def _templates() -> Environment:
    """Our templates, each compiled once."""
    environment = Environment(
        loader=PackageLoader("trimtab.train", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "tokens": marked, "size": sized, "duration": timed, "number": numbered
    }  # fmt: skip
    return environment


def numbered(value: float) -> str:
    """About four digits that count, without an exponent where it can be helped."""
    size = abs(value)
    if size >= 1e6 or (size and size < 1e-4):
        return f"{value:.3g}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 4
    return f"{value:,.{digits}f}"


def sized(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return (
                f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
            )
        count /= 1024
    return f"{count:.2f} GiB"


def timed(seconds: float) -> str:
    """A duration in hours, minutes or seconds."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def marked(text: str) -> Markup:
    """A preview with its brackets turned into marks."""
    pieces = re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(piece) if number % 2 else escape(piece)
        for number, piece in enumerate(pieces)
    )
