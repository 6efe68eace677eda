"""The sides of `benchmarks.gpu`: a decoder made on the device from its config, and its steps on both sides."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import lora_step
from benchmarks.core import hide_bitsandbytes
from benchmarks.lora_step import ADAPTER
from benchmarks.worker import peak_bytes, reset_peak

LLAMA = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
"""Llama-3-8B's."""
TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


class Place:
    """Where a side computes, abstract: what differs between devices."""

    name: str
    square: int
    """n of the product that rates are compared with."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all that was asked of the device is done."""

    @abstractmethod
    def begin(self) -> None:
        """Start the high-water marks of memory anew."""

    @abstractmethod
    def peaks(self) -> dict[str, int]:
        """Bytes allocated and reserved at most since then."""

    def seconds(self, work: Any) -> float:
        """Of one call."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def best_product(self) -> float:
        """Operations a second of the best of some bf16 products."""
        n = self.square
        one, other, out = (torch.randn(n, n, device=self.name).bfloat16() for _ in range(3))

        def multiply() -> None:
            for _ in range(5):
                torch.mm(one, other, out=out)

        return 5 * 2 * n**3 / min(self.seconds(multiply) for _ in range(6))


class Cuda(Place):
    """The first CUDA device."""

    name, square = "cuda", 8192

    def __init__(self) -> None:
        torch.backends.cuda.enable_math_sdp(False)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def begin(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int]:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated": allocated, "reserved": reserved}


class Cpu(Place):
    """This machine; its memory is that of the process."""

    name, square = "cpu", 256

    def wait(self) -> None:
        pass

    def begin(self) -> None:
        reset_peak()

    def peaks(self) -> dict[str, int]:
        return {"allocated": peak_bytes(), "reserved": peak_bytes()}


PLACES = {"cuda": Cuda, "cpu": Cpu}


@dataclass(frozen=True)
class Work(lora_step.Work):
    """What one step is; the model is made from its shape."""

    shape: Mapping[str, int] | None = None
    device: str = "cuda"

    def decoder(self) -> Any:
        """The same random bf16 weights in every process, made on the device."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            **(self.shape or LLAMA), max_position_embeddings=8192, rope_theta=500_000.0, use_cache=False
        )  # fmt: skip
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        return model.requires_grad_(False)


class _Made:
    """What both sides share: a side is made when it runs, so that what does not fit is found there.

    Args:
        recompute: blocks in the backward.
        storage: of the base, where not in bf16; ``plain`` hides bitsandbytes.
    """

    step: Callable[[int], dict[str, Any]]
    """Forward, backward and the optimiser; of the class beside this one."""
    factors: Callable[[], Iterable[tuple[str, nn.Parameter]]]

    def __init__(
        self,
        *,
        recompute: bool = False,
        storage: str | None = None,
        plain: bool = False,
        **options: Any,
    ) -> None:
        if plain:
            hide_bitsandbytes()
        self.recompute, self.storage = recompute, storage
        self.work = Work(model="random", **options)
        self.place = PLACES[self.work.device]()
        self.size = 0

    @abstractmethod
    def build(self) -> None:
        """Make the model, the adapter and the optimiser."""

    @property
    def units(self) -> int:
        """Tokens of a step."""
        return self.work.rows * self.work.tokens

    def facts(self) -> dict[str, Any]:
        """Sizes, to be equal on all sides."""
        return {"trained": sum(p.numel() for _, p in self.factors()), "P": self.size}

    def run(self, warmup: int, steps: int) -> dict[str, Any]:
        """All of a side; where the device's memory does not suffice, that."""
        try:
            return self._run(warmup, steps)
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).split(". ")[0][:200]}

    def _run(self, warmup: int, steps: int) -> dict[str, Any]:
        self.build()
        losses = [self.step(number)["loss"] for number in range(warmup)]
        self.place.begin()
        seconds = []

        def step() -> None:
            losses.append(self.step(len(losses))["loss"])

        for _ in range(steps):
            seconds.append(self.place.seconds(step))
        found = {"seconds": seconds, "losses": losses, **self.place.peaks(), **self.facts()}
        self.place.begin()
        return {**found, "units": self.units, "peak_operations": self.place.best_product()}


class Trimtab(_Made, lora_step.Trimtab):
    """Our side: the engine's verbs."""

    def build(self) -> None:
        import trimtab as tt
        from trimtab.engine import Engine
        from trimtab.models.quantise import rounded
        from trimtab.optim.params import AdamParams, Memory

        work = self.work
        self.model = work.decoder()
        self.size = head_and_blocks(self.model)
        if self.storage:
            rounded(self.model, self.storage, ())
        tt.attach(self.model, tt.LoRA(rank=work.rank, alpha=2.0 * work.rank), name=ADAPTER)
        self.fill()
        memory = Memory(recompute="blocks" if self.recompute else "none")
        self.engine = Engine(self.model, micro_tokens=self.units, memory=memory)
        self.adam = AdamParams(lr=work.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, clip=None)


class Peft(_Made, lora_step.Peft):
    """The peer's side: the plain loop."""

    def build(self) -> None:
        from peft import LoraConfig, TaskType, get_peft_model

        work = self.work
        base = work.decoder()
        self.size = head_and_blocks(base)
        if self.storage:
            in_four_bits(base, self.storage)
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear"
        )  # fmt: skip
        self.model = get_peft_model(base, config, adapter_name=ADAPTER)
        if self.recompute:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.fill()
        trained = [parameter for _, parameter in self.factors()]
        self.optimiser = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0)

    def _backward(self, number: int) -> float:
        ids = self.work.batch(number, self.model.config.vocab_size).to(self.place.name)
        with torch.autocast(self.place.name, dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())


def head_and_blocks(model: Any) -> int:
    """P: the parameters without the input embedding."""
    embedding = model.get_input_embeddings().weight.numel()
    return sum(p.numel() for p in model.parameters()) - embedding


def in_four_bits(model: Any, kind: str) -> None:
    """What from_pretrained does for bitsandbytes, to a model that is there: linear layers but the head, one by one."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        with torch.device("meta"):
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type=kind,
            )  # fmt: skip
        weight = layer.weight.data
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type=kind
        ).to(weight.device)
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, new)
    model.is_loaded_in_4bit = True  # by which peft knows
