"""The sides of `benchmarks.many_adapters`: one model, and more adapters than act at a time."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.face_sides import smollm2_shaped

CONFIG = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
"""Of every adapter, in PEFT's words."""
METHOD = "lora(rank=8, alpha=16, targets=['q_proj', 'v_proj'])"
"""The same in ours."""
DIFFERENT = 16
"""Folders with values of their own; the others are second names of their files."""


def save_adapters(folder: Path, count: int, sizes: Mapping[str, int]) -> None:
    """``0`` …: adapters as PEFT saves them."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(smollm2_shaped(**sizes), peft.LoraConfig(**CONFIG))  # type: ignore[arg-type]
        model.save_pretrained(folder / "first")
    weights = "adapter_model.safetensors"
    tensors = load_file(folder / "first" / weights)
    for number in range(count):
        here = folder / str(number)
        if number < DIFFERENT:
            shutil.copytree(folder / "first", here)
            generator = torch.Generator().manual_seed(number)
            values = {k: _drawn(t.shape, generator) for k, t in tensors.items()}
            save_file(values, here / weights, {"format": "pt"})
        else:
            here.mkdir()
            for file in (folder / str(number % DIFFERENT)).iterdir():
                os.link(file, here / file.name)


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 0.05 * torch.randn(shape, generator=generator)


def said(model: nn.Module) -> float:
    """What the acting adapter makes of some tokens, as one number."""
    with torch.no_grad():
        return float(model.eval()(torch.arange(8)[None]).logits.float().norm())


class Theirs:
    """PEFT: each step loads one more adapter beside those before it."""

    def __init__(self, folder: str, sizes: Mapping[str, int]) -> None:
        import peft

        warnings.simplefilter("ignore")
        self.folder = folder
        base: Any = smollm2_shaped(**sizes)
        self.model: Any = peft.PeftModel.from_pretrained(base, f"{folder}/0", adapter_name="a0")

    def step(self, number: int) -> dict[str, Any]:
        name = f"a{number + 1}"
        start = time.perf_counter()
        self.model.load_adapter(f"{self.folder}/{number + 1}", adapter_name=name)
        seconds = time.perf_counter() - start
        self.model.set_adapter(name)
        return {"load": seconds, "read": seconds, "said": said(self.model)}


class Ours:
    """Trimtab: step n registers adapter n and brings it up from disk, where ``active`` others act at most."""

    def __init__(self, folder: str, sizes: Mapping[str, int], active: int = 32) -> None:
        from trimtab.adapt.attached import Attached
        from trimtab.adapt.fit import Forms
        from trimtab.adapt.sources import AdapterFolder
        from trimtab.adapt.tiers import Budgets, Tiers

        self.folder = folder
        self.model = smollm2_shaped(**sizes)
        forms = Forms(self.model)
        one = AdapterFolder(f"{folder}/0").check(forms).nbytes
        budgets = Budgets(active=2 * active * one, host=2 * active * one)
        self.tiers = Tiers(forms, Attached(self.model, forms), budgets)
        self.grow(1)
        self.cold(0)

    def step(self, number: int) -> dict[str, Any]:
        self.grow(number + 2)
        return self.cold(number + 1)

    def grow(self, count: int) -> float:
        """Have so many registered; seconds for each that was not."""
        from trimtab.adapt.sources import AdapterFolder

        new = range(len(self.tiers), count)
        start = time.perf_counter()
        for number in new:
            self.tiers.register(f"a{number}", AdapterFolder(f"{self.folder}/{number}"))
        return (time.perf_counter() - start) / max(len(new), 1)

    def up(self, number: int) -> float:
        """Let an adapter act; seconds until its values were in host memory."""
        from trimtab.adapt.active import Waiting

        start = time.perf_counter()
        read = 0.0
        while isinstance(hold := self.tiers.hold(f"a{number}"), Waiting):
            self.tiers.wait()
            read = time.perf_counter() - start
        hold.release()
        return read

    def cold(self, number: int) -> dict[str, Any]:
        """Let one act that is on disk."""
        import trimtab as tt

        self.tiers.lower(f"a{number}", "disk")
        start = time.perf_counter()
        read = self.up(number)
        seconds = time.perf_counter() - start
        with tt.using(self.model, f"a{number}"):
            return {"load": seconds, "read": read, "said": said(self.model)}

    def decode(self, rows: int, past: int, steps: int) -> list[float]:
        """Seconds of forwards that add a token to each of so many rows, each with an adapter of its own."""
        from transformers import DynamicCache

        import trimtab as tt

        ids = torch.arange(rows)[:, None] % 64
        for number in range(rows):
            self.up(number)
        found = []
        with torch.no_grad(), tt.rows(self.model, [f"a{row}" for row in range(rows)]):
            cache = DynamicCache()
            self.model(ids.expand(rows, past), past_key_values=cache, use_cache=True)
            for _ in range(steps):
                start = time.perf_counter()
                self.model(ids, past_key_values=cache, use_cache=True)
                found.append(time.perf_counter() - start)
        return found


class Held:
    """Adapters in host memory, and nothing else but their model."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        import trimtab as tt
        from trimtab.adapt.attached import Attached
        from trimtab.adapt.fit import Forms
        from trimtab.adapt.tiers import Budgets, Tiers

        model = smollm2_shaped(**sizes)
        said(model)
        forms = Forms(model)
        tt.attach(model, METHOD, "first")
        self.first = tt.detach(model, "first")
        budgets = Budgets(active=2**40, host=2**40)
        self.tiers = Tiers(forms, Attached(model, forms), budgets)

    def put(self, count: int) -> dict[str, int]:
        """Resident bytes before and after so many more; and what their values take."""
        before, begun = resident(), len(self.tiers)
        for number in range(begun, begun + count):
            self.tiers.put(self.first.detached(name=f"a{number}"))
        return {"before": before, "after": resident(), "values": self.tiers.host_bytes}


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
