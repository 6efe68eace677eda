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
)
ON_CUDA = ("dequantise", "gpu")
"""Those that measure nothing without a GPU; they are run by name alone."""


def main(argv: list[str]) -> int:
    """Run the named benchmark, or all with the same options."""
    chosen = NAMES
    if argv and not argv[0].startswith("-"):
        if argv[0] not in NAMES + ON_CUDA:
            known = ", ".join(NAMES + ON_CUDA)
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
