"""What a run may use: this machine, or a GPU by its name or its memory.

A device adds to what the operations of a run need (`trimtab.train.footprint`) what none of them shows:

    peak = bytes of the tensors, small and large ones each at their heaviest + libraries + loss · small ones that move

``libraries`` are the process before the model: the context of CUDA on a GPU; on a CPU Python, its packages, the
tokenizer and the data, which the process that plans holds itself, and what they take when they compute. ``loss`` is
what the allocator cannot use because freed memory lies in pieces of other sizes, as a share of the most that small
blocks other than weights took. On a CPU both constants are fitted to other runs than those that the benchmark
`plan_accuracy` then checks. On a GPU both are guesses.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

import torch

from trimtab.errors import UnknownNameError, suggest
from trimtab.train import facts
from trimtab.train.ledger import Moment

CPU_LIBRARIES, CPU_LOSS = 182 * 2**20, 0.41
"""Beside what the process holds when it plans. Fitted; see benchmarks/results/plan_accuracy.md."""
CPU_PROCESS = 340 * 2**20
"""What it holds, where the system does not tell."""
GPU_LIBRARIES, GPU_LOSS = 600 * 2**20, 0.08
"""Guessed."""
USABLE = 0.98
"""Of a GPU's memory; the driver keeps the rest."""
GPU_SHARE, CPU_SHARE = 0.35, 0.5
"""Which part of the rate of large products a training step reaches. Guessed."""

GPUS: dict[str, tuple[int, float]] = {
    "T4": (16, 65), "V100 16GB": (16, 125), "V100 32GB": (32, 125),
    "RTX 3060": (12, 25), "RTX 3080": (10, 60), "RTX 3090": (24, 71), "RTX A6000": (48, 155),
    "RTX 4060": (8, 30), "RTX 4060 Ti 16GB": (16, 44), "RTX 4070": (12, 58), "RTX 4080": (16, 97),
    "RTX 4090": (24, 165), "RTX 5080": (16, 113), "RTX 5090": (32, 210), "RTX 6000 Ada": (48, 364),
    "A10": (24, 125), "L4": (24, 121), "L40S": (48, 362), "A100 40GB": (40, 312), "A100 80GB": (80, 312),
    "H100": (80, 989), "H100 PCIe": (80, 756), "H200": (141, 989), "B200": (180, 2250),
    "MI300X": (192, 1307),
}  # fmt: skip
"""Name -> gigabytes of memory, and the published rate of dense products in 16 bits with sums in 32, in TFLOP/s."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """``memory`` in bytes; ``rate`` is the published one, in FLOP/s, where it is known; ``maps``: files that were read
    stay in the same memory, until the system wants it back."""

    name: str
    memory: int | None
    libraries: int
    loss: float
    rate: float | None = None
    maps: bool = False

    @property
    def kind(self) -> str:
        """As torch calls such devices."""
        return "cpu" if self.maps else "cuda"

    def settled(self) -> Device:
        """The same, when all of a run but the model has been made ready in this process."""
        if not self.maps:
            return self
        return replace(self, libraries=CPU_LIBRARIES + (facts.own_memory() or CPU_PROCESS))

    def parts(self, moment: Moment) -> dict[str, int]:
        """The bytes of a moment by part, those of the libraries and of the allocator among them."""
        lost = moment.apart - moment.total + round(self.loss * moment.moving)
        return {**moment.parts, "libraries": self.libraries, "allocator": lost}

    def needs(self, moment: Moment) -> int:
        """Bytes that a moment takes here."""
        return sum(self.parts(moment).values())


def named_gpu(text: str) -> Device:
    """A GPU by its name (``RTX 4090``) or its memory (``24GB``).

    Raises:
        UnknownNameError: no such GPU is known, and it is no size.
    """
    size = _SIZE.fullmatch(text.strip())
    if size is not None and float(size[1]) > 0:
        return _gpu(f"a GPU of {size[1]} GB", float(size[1]), None)
    known = {_plain(name): name for name in GPUS}
    name = known.get(_plain(text))
    if name is None:
        hint = suggest(text, GPUS)
        raise UnknownNameError(
            f"unknown GPU {text!r}.{hint} Give its memory, as 24GB, or one of: {', '.join(GPUS)}."
        )
    gigabytes, rate = GPUS[name]
    return _gpu(name, gigabytes, rate * 1e12)


def this_device(device: torch.device) -> Device:
    """The CPU or GPU of this machine."""
    memory = facts.whole_memory(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Device(name, memory, GPU_LIBRARIES, GPU_LOSS)
    return Device("this machine", memory, CPU_LIBRARIES + CPU_PROCESS, CPU_LOSS, maps=True)


@torch.no_grad()
def reached(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """FLOP/s of products of square matrices here, the best of a few."""
    draw = torch.Generator(device).manual_seed(0)  # the process's own is a run's
    one = torch.randn(size, size, dtype=torch.float32, device=device, generator=draw).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((one @ one)[0, 0])  # waits for it
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _gpu(name: str, gigabytes: float, rate: float | None) -> Device:
    memory = int(USABLE * gigabytes * 2**30)
    return Device(name, memory, GPU_LIBRARIES, GPU_LOSS, rate)


def _plain(name: str) -> str:
    """Without what people leave out or add."""
    text = re.sub(r"nvidia|geforce|amd|instinct|tesla|[\s_-]", "", name.lower())
    return re.sub(r"(\d)gb?$", r"\1gb", text)
