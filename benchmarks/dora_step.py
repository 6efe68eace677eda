"""A DoRA training step: all linear layers of a wide bf16 decoder with random weights.

    Trimtab   ‖W + s B A‖² = ‖W‖² + 2 s ⟨W, B A⟩ + s² ‖B A‖², with ‖W‖² kept
    peft      builds B A and W + s B A in every forward

Otherwise as `benchmarks.lora_step`: same weights, tokens, factors and optimiser on both sides.

    python -m benchmarks dora_step            measure, with both allocators
    python -m benchmarks dora_step --check    compare the gradients of the first step
    python -m benchmarks dora_step --quick    a small model and few rounds, to see that it runs
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import lora_step, steps
from benchmarks.core import Side
from benchmarks.lora_step import ADAPTER, OURS, PEER

VOCABULARY = 2048


@dataclass(frozen=True)
class Work(lora_step.Work):
    """What one step is; the model is made from its sizes."""

    width: int = 1024
    layers: int = 4

    def decoder(self) -> LlamaForCausalLM:
        """The same random bf16 weights in every process."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 64,
            max_position_embeddings=self.tokens,
            use_cache=False,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)


class _Dora(lora_step._Lora):
    @torch.no_grad()
    def fill(self) -> None:
        """Initial factors that depend on the seed and the name alone; magnitudes stay the norms that they begin as."""
        for name, parameter in self.factors():
            if parameter.dim() == 2:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                scale = 0.01 if ".lora_B." in name else parameter.shape[1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


class Trimtab(_Dora, lora_step.Trimtab):
    """Our side: the engine's verbs."""

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.engine import Engine
        from trimtab.optim.params import AdamParams

        self.work = work = Work(**options)
        self.model = work.decoder()
        tt.attach(self.model, tt.DoRA(rank=work.rank, alpha=2.0 * work.rank), name=ADAPTER)
        self.fill()
        self.engine = Engine(self.model)
        self.adam = AdamParams(lr=work.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=None)


class Peft(_Dora, lora_step.Peft):
    """The peer's side: the plain loop."""

    def __init__(self, **options: Any) -> None:
        from peft import LoraConfig, TaskType, get_peft_model

        self.work = work = Work(**options)
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=work.rank,
            lora_alpha=2 * work.rank,
            target_modules="all-linear",
            use_dora=True,
        )
        self.model = get_peft_model(work.decoder(), config, adapter_name=ADAPTER)
        self.model.train()
        self.fill()
        trained = [parameter for _, parameter in self.factors()]
        self.optimiser = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0)


def sides(work: Work) -> list[Side]:
    """Ours and the peer's."""
    options = asdict(work)
    return [
        Side(OURS, "benchmarks.dora_step:Trimtab", options),
        Side(PEER, "benchmarks.dora_step:Peft", options),
    ]


def main(argv: Sequence[str]) -> int:
    """Measure (or check) and write the report. Raises `SideError` where the sides compute different things."""
    parser = steps.parser("dora_step", __doc__, rows=2, tokens=256)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--check", action="store_true", help="only compare first gradients")
    parser.add_argument("--quick", action="store_true", help="small and short; says nothing")
    options = parser.parse_args(argv)
    if options.quick:
        options.width, options.layers, options.tokens = min(options.width, 256), 2, 64
        options.warmup, options.rounds, options.patience = 1, 2, 0
    work = Work(
        "random", options.rows, options.tokens, options.rank, width=options.width, layers=options.layers
    )  # fmt: skip
    if options.check:
        print(lora_step.check(sides(work), options.threads))
        return 0
    rows = steps.measured(
        "dora_step", options, lambda how: lora_step.measure(sides(work), how, options)
    )
    title = (
        f"DoRA r={work.rank} on all linear layers of {work.layers} blocks of width {work.width}, bf16, "
        f"{work.rows} × {work.tokens} random tokens, {options.threads} threads"
    )
    steps.write("dora_step", title, work, options, rows, lora_step.table(rows), lora_step.NOTES)
    return 0
