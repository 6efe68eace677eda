"""A LoRA training step: all linear layers of a bf16 decoder, full batches, all tokens trained.

    Trimtab   Engine.forward_backward and Engine.optim_step
    peft      what its user writes: get_peft_model, autocast, model(ids, labels=ids).loss, backward, AdamW

Same weights, same tokens, same initial factors (B not zero, so that every factor has a gradient), same
AdamW, no clipping, no dropout. Both see rows of T tokens and learn the T − 1 that follow one.

    python -m benchmarks lora_step            measure, with both allocators
    python -m benchmarks lora_step --check    compare the gradients of the first step
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import core, steps
from benchmarks.core import Sample, Side, Spread

OURS, PEER, MACHINE = "trimtab", "peft", "matmul"
ADAPTER = "default"
LOSS_TOLERANCE = 0.02
"""How far two bf16 computations of one loss may lie apart, relative to it."""
COSINE = 0.99
NOTES = (
    "tokens/s counts the tokens the model sees; ratios are medians of the ratios within each round",
    "peak memory: high-water mark of the whole process's resident memory in a measured step "
    "(weights, adapter, optimiser, activations, libraries, what the allocator keeps)",
    "of peak: 4·P FLOPs per token, P = parameters without the input embedding + output head, against the "
    "best of the machine's bf16 products (n = 1024, 2048) in the same round",
    "allocator `default`: glibc as it comes, on both sides (`trimtab train` would tune its own; the engine "
    "does not, and nothing here does); `tuned`: MALLOC_MMAP_MAX_=0 and a MALLOC_TRIM_THRESHOLD_ never "
    "reached, on both sides",
)


@dataclass(frozen=True)
class Work:
    """What one step is."""

    model: str
    rows: int = 4
    tokens: int = 512
    rank: int = 16
    lr: float = 2e-4
    seed: int = 0
    storage: str | None = None
    """The format that the base is stored in, where not in bf16."""

    def batch(self, number: int, vocabulary: int) -> Tensor:
        """Random token ids (rows, tokens) of step ``number``."""
        generator = torch.Generator().manual_seed(self.seed * 10_000 + number)
        return torch.randint(vocabulary, (self.rows, self.tokens), generator=generator)


class _Lora:
    """What both sides share: names, initial factors, gradients on disk."""

    model: nn.Module
    work: Work

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name without the library's own prefix, parameter) of every trained tensor."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name.removeprefix("base_model.model."), parameter

    @torch.no_grad()
    def fill(self) -> None:
        """Initial values that depend on the seed and the name alone."""
        for name, parameter in self.factors():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.work.seed)
            width = parameter.shape[1]
            scale = 0.01 if ".lora_B." in name else width**-0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def facts(self) -> dict[str, Any]:
        """Sizes, to be equal on both sides."""
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        head = self.model.get_output_embeddings().weight  # type: ignore[operator]
        trained = {id(parameter) for _, parameter in self.factors()}
        base = [p for p in self.model.parameters() if id(p) not in trained]
        inner = sum(p.numel() for p in base if p is not embedding and p is not head)
        return {
            "trained": sum(parameter.numel() for _, parameter in self.factors()),
            "P": inner + head.numel(),
        }

    def store(self, path: str, divisor: float) -> None:
        """Write the gradients, and forget them."""
        grads = {n: p.grad.float() / divisor for n, p in self.factors() if p.grad is not None}
        save_file(grads, path)
        for _, parameter in self.factors():
            parameter.grad = None

    def result(self, loss: float) -> dict[str, Any]:
        return {"units": self.work.rows * self.work.tokens, "loss": loss}


class Trimtab(_Lora):
    """Our side: the engine's verbs."""

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.engine import Engine
        from trimtab.optim.params import AdamParams

        self.work = work = Work(**options)
        base = tt.load(work.model, dtype=torch.bfloat16, device="cpu", storage=work.storage)
        self.model = base.model
        tt.attach(base.model, tt.LoRA(rank=work.rank, alpha=2.0 * work.rank), name=ADAPTER)
        self.fill()
        self.engine = Engine(base)
        self.adam = AdamParams(lr=work.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=None)

    def _backward(self, number: int) -> Any:
        from trimtab.data import Datum

        ids = self.work.batch(number, self.model.config.vocab_size).tolist()
        # All T tokens go through the model, as on the other side; the last has nothing to learn.
        weights = (*(1.0,) * (self.work.tokens - 1), 0.0)
        data = [Datum(tuple(row), (*row[1:], 0), weights) for row in ids]
        return self.engine.forward_backward(data, ADAPTER)

    def step(self, number: int) -> dict[str, Any]:
        loss = self._backward(number).mean
        self.engine.optim_step(ADAPTER, self.adam)
        return self.result(loss)

    def gradients(self, path: str) -> None:
        """Those of step 0, of the mean over tokens."""
        found = self._backward(0)
        self.store(path, found.weight)


class Peft(_Lora):
    """The peer's side: the plain loop."""

    def __init__(self, **options: Any) -> None:
        from peft import LoraConfig, TaskType, get_peft_model
        from transformers import AutoModelForCausalLM

        self.work = work = Work(**options)
        given: dict[str, Any] = {"dtype": torch.bfloat16}
        if work.storage:
            given["quantization_config"] = _bitsandbytes(work.storage)
        base = AutoModelForCausalLM.from_pretrained(work.model, **given)
        base.config.use_cache = False
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=work.rank,
            lora_alpha=2 * work.rank,
            target_modules="all-linear",
        )
        self.model = get_peft_model(base, config, adapter_name=ADAPTER)
        self.model.train()
        self.fill()
        trained = [parameter for _, parameter in self.factors()]
        self.optimiser = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0)

    def _backward(self, number: int) -> float:
        ids = self.work.batch(number, self.model.config.vocab_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())

    def step(self, number: int) -> dict[str, Any]:
        loss = self._backward(number)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return self.result(loss)

    def gradients(self, path: str) -> None:
        """Those of step 0."""
        self._backward(0)
        self.store(path, 1.0)


def _bitsandbytes(kind: str) -> Any:
    """What QLoRA's user asks for: four bits, scales quantised too, products in bf16."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


# -- measuring ---------------------------------------------------------------------------------------


def sides(work: Work) -> list[Side]:
    """Ours and the peer's."""
    options = asdict(work)
    return [
        Side(OURS, "benchmarks.lora_step:Trimtab", options),
        Side(PEER, "benchmarks.lora_step:Peft", options),
    ]


def check(made: Sequence[Side], threads: int) -> dict[str, float]:
    """Cosine and ratio of norms of each tensor's gradient in the first step, at their worst.

    Raises `SideError` where the two libraries do not compute the same.
    """
    grads: dict[str, dict[str, Tensor]] = {}
    with (
        core.workers(made, "tuned", threads) as running,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, worker in running.items():
            file = Path(folder) / f"{name}.safetensors"
            worker.call("gradients", str(file))
            grads[name] = load_file(file)
    ours, peer = grads[OURS], grads[PEER]
    if ours.keys() != peer.keys():
        raise core.SideError(f"different tensors: {sorted(ours.keys() ^ peer.keys())[:4]} …")
    cosines = {
        k: float(torch.cosine_similarity(ours[k].flatten(), peer[k].flatten(), 0)) for k in ours
    }
    norms = [float(ours[k].norm() / peer[k].norm()) for k in ours]
    worst = min(cosines, key=lambda k: cosines[k])
    found = {
        "tensors": len(ours),
        "cosine_least": cosines[worst],
        "norm_ratio_least": min(norms),
        "norm_ratio_most": max(norms),
    }
    if not cosines[worst] > COSINE:
        raise core.SideError(f"gradients disagree: {worst}: cosine {cosines[worst]:.4f}. {found}")
    return found


def measure(made: Sequence[Side], allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. Raises `SideError` where the losses disagree."""
    machine = Side(MACHINE, "benchmarks.matmul:Matmul", {})
    with core.workers([*made, machine], allocator, options.threads) as running:
        facts = {name: running[name].call("facts") for name in (OURS, PEER)}
        if facts[OURS] != facts[PEER]:
            raise core.SideError(f"the sides differ in size: {facts}")
        samples = steps.take_turns(running, options, _say)
    return {"allocator": allocator, **facts[OURS], **_figures(samples, facts[OURS]["P"])}


def _figures(samples: Sequence[Sample], size: int) -> dict[str, Any]:
    losses = {name: [s.result["loss"] for s in samples if s.side == name] for name in (OURS, PEER)}
    apart = max(abs(a - b) / b for a, b in zip(losses[OURS], losses[PEER], strict=True))
    if not apart < LOSS_TOLERANCE:
        raise core.SideError(f"the losses disagree by {apart:.3f}: {losses}")
    machine = core.of_side(samples, MACHINE)
    best = [1e9 * max(sample.result["bf16"].values()) for sample in machine]
    found: dict[str, Any] = {"loss_apart": apart, "losses": losses, "sides": {}}
    for name in (OURS, PEER):
        own = core.of_side(samples, name)
        found["sides"][name] = {
            "rate": Spread.of(s.rate for s in own),
            "peak_gb": Spread.of(s.peak_bytes / 1e9 for s in own),
            "of_peak": Spread.of(4 * size * s.rate / p for s, p in zip(own, best, strict=True)),
            "cpu_share": Spread.of(s.cpu_seconds / s.seconds for s in own),
        }
    found["speed_ratio"] = core.ratio(samples, OURS, PEER, lambda s: s.rate)
    found["memory_ratio"] = core.ratio(samples, OURS, PEER, lambda s: s.peak_bytes)
    found["matmul_gflops"] = {
        dtype: {n: Spread.of(s.result[dtype][n] for s in machine) for n in sizes}
        for dtype, sizes in machine[0].result.items()
    }
    counted = [sample for sample in samples if sample.counted]
    found["others"] = Spread.of(sample.others for sample in counted)
    found["steps"] = 1 + max(sample.step for sample in samples)
    found["samples"] = list(samples)
    return found


def _say(sample: Sample) -> None:
    if "units" in sample.result:
        print(
            f"  step {sample.step:>2} {sample.side:<8} {sample.seconds:6.2f} s {sample.rate:7.1f} tok/s "
            f"{sample.peak_bytes / 1e9:5.2f} GB  loss {sample.result['loss']:.4f}  others {sample.others:4.0%}",
            flush=True,
        )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "| allocator | side | tokens/s | peak memory, GB | of bf16 matmul peak |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for name, side in row["sides"].items():
            lines.append(
                f"| {row['allocator']} | {name} | {side['rate'].text(0)} | {side['peak_gb'].text()} "
                f"| {side['of_peak'].text(0, 100)} % |"
            )
        lines.append(
            f"| {row['allocator']} | **ratio** | **{row['speed_ratio'].text()}** "
            f"| **{row['memory_ratio'].text()}** | |"
        )
    lines += ["", "The machine's products, GFLOP/s, in the same rounds:"]
    for row in rows:
        shown = ", ".join(
            f"{dtype} n = {n}: {spread.text(0)}"
            for dtype, sizes in row["matmul_gflops"].items()
            for n, spread in sizes.items()
        )
        lines.append(f"- {row['allocator']}: {shown}")
    apart = max(row["loss_apart"] for row in rows)
    for row in rows:
        lines.append(
            f"- {row['allocator']}: other processes took {row['others'].text(0, 100)} % of the CPU time in the "
            f"counted rounds; {row['steps']} steps of each side were done in all"
        )
    lines += ["", f"Losses of the two sides differ by at most {100 * apart:.2f} % in any step."]
    return lines


def main(argv: Sequence[str]) -> int:
    """Measure (or check) and write the report. Raises `SideError` where the sides compute different things."""
    parser = steps.parser("lora_step", __doc__)
    steps.add_model(parser)
    parser.add_argument("--check", action="store_true", help="only compare first gradients")
    options = parser.parse_args(argv)
    work = Work(steps.model_folder(options.model), options.rows, options.tokens, options.rank)
    if options.check:
        print(check(sides(work), options.threads))
        return 0
    rows = steps.measured("lora_step", options, lambda how: measure(sides(work), how, options))
    title = (
        f"LoRA r={work.rank} on all linear layers of {Path(work.model).name}, bf16, "
        f"{work.rows} × {work.tokens} random tokens, {options.threads} threads"
    )
    steps.write("lora_step", title, work, options, rows, table(rows), NOTES)
    return 0
