"""What this machine can do at all: square matrix products through torch, as a side like any other."""

from __future__ import annotations

import time
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = (1024, 2048)


class Matmul:
    """``step`` multiplies n × n matrices and gives the best GFLOP/s of a few repetitions, by dtype and n."""

    def __init__(self, repeat: int = 5) -> None:
        self.repeat = repeat
        self.operands = {
            (name, n): [torch.randn(n, n, dtype=dtype) for _ in range(3)]
            for name, dtype in DTYPES.items()
            for n in SIZES
        }

    def step(self, number: int) -> dict[str, Any]:
        found: dict[str, dict[str, float]] = {name: {} for name in DTYPES}
        for (name, n), (a, b, out) in self.operands.items():
            times = []
            for _ in range(self.repeat):
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                times.append(time.perf_counter() - start)
            found[name][str(n)] = 2 * n**3 / min(times) / 1e9
        return found
