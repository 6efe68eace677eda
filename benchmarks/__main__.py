"""``python -m benchmarks [NAME] [options]``: run one benchmark, or all of them."""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.core import SideError
from recipes import assets

NAMES = (
    "lora_step",
    "dora_step",
    "other_steps",
    "many_train",
    "full_vs_peft",
    "plan_accuracy",
    "stream",
    "methods",
    "face",
    "qlora_step",
    "qlora_quality",
    "big_base",
    "quantisers",
    "attention",
    "context",
    "growth",
    "sft",
    "classify",
    "scoring",
    "many_adapters",
    "serving",
    "registered",
    "compiled",
    "stacked",
    "soak",
)
APART = ("dequantise", "gpu", "side_by_side")
"""Those that are run by name alone: two that measure nothing without a GPU, and the table of what was measured."""


def main(argv: list[str]) -> int:
    """Run the named benchmark, or all with the same options."""
    chosen = NAMES
    if argv and not argv[0].startswith("-"):
        if argv[0] not in NAMES + APART:
            known = ", ".join(NAMES + APART)
            print(f"no benchmark {argv[0]!r}; there are: {known}", file=sys.stderr)
            return 2
        chosen, argv = (argv[0],), argv[1:]
    try:
        return max(import_module(f"benchmarks.{name}").main(argv) for name in chosen)
    except (SideError, assets.UnavailableError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
