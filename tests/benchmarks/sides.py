"""Sides without a library: what the tests of the harness measure."""

from __future__ import annotations

import os
import time
from typing import Any


class Sleeper:
    """Does nothing for a while, and has ``fill`` bytes more memory during its step."""

    def __init__(self, seconds: float, fill: int = 0) -> None:
        self.seconds = seconds
        self.fill = fill

    def step(self, number: int) -> dict[str, Any]:
        os.write(1, b"a library prints\n")
        held = bytearray(self.fill)
        time.sleep(self.seconds)
        malloc = sorted(name for name in os.environ if name.startswith("MALLOC_"))
        return {"units": 10, "number": number, "held": len(held), "malloc": malloc}

    def fail(self) -> None:
        raise ValueError("on purpose")
