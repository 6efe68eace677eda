"""The sides of `benchmarks.face`: a class is made with the name of a package, and does there what its user does."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def llama_7b(**changes: int) -> nn.Module:
    """A model of the shape of Llama-2-7B (or with other sizes), without weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes}))
    return model


class Meta:
    """``get_peft_model`` with LoRA on all linear layers."""

    def __init__(self, package: str, sizes: Mapping[str, int]) -> None:
        warnings.simplefilter("ignore")
        self.face: Any = import_module(package)
        self.face.LoraConfig, self.face.get_peft_model  # noqa: B018 (imported before the clock starts)
        self.sizes = sizes

    def step(self, number: int) -> dict[str, Any]:
        model = llama_7b(**self.sizes)
        config = self.face.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        gc.collect()
        start = time.perf_counter()
        wrapped = self.face.get_peft_model(model, config)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "sizes": wrapped.get_nb_trainable_parameters()}


def smollm2_shaped(**changes: int) -> nn.Module:
    """A model of the shape of SmolLM2-135M with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, **changes}, tie_word_embeddings=True)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def save_adapters(folder: Path, count: int, sizes: Mapping[str, int]) -> None:
    """``peft/0`` … and ``own/0`` …: adapters with values of their own, as PEFT saves them and as Trimtab does."""
    import peft

    import trimtab.peft as ours

    config = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(smollm2_shaped(**sizes), peft.LoraConfig(**config))  # type: ignore[arg-type]
    model.save_pretrained(folder / "first")
    tensors = load_file(folder / "first" / "adapter_model.safetensors")
    own = ours.get_peft_model(smollm2_shaped(**sizes), ours.LoraConfig(**config))  # type: ignore[arg-type]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        values = {k: 0.05 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        shutil.copytree(folder / "first", folder / "peft" / str(number))
        save_file(
            values, folder / "peft" / str(number) / "adapter_model.safetensors", {"format": "pt"}
        )
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(values[name.replace(".default", "")])
        own.save_pretrained(folder / "own" / str(number))


class Load:
    """One step loads all adapters of a folder into a new model."""

    def __init__(self, package: str, folder: str, count: int, sizes: Mapping[str, int]) -> None:
        warnings.simplefilter("ignore")
        self.face: Any = import_module(package)
        self.folder = folder
        self.count = count
        self.sizes = sizes

    def step(self, number: int) -> dict[str, Any]:
        base = smollm2_shaped(**self.sizes)
        gc.collect()
        start = time.perf_counter()
        model = self.face.PeftModel.from_pretrained(base, f"{self.folder}/0", adapter_name="a0")
        each = [time.perf_counter() - start]
        for adapter in range(1, self.count):
            start = time.perf_counter()
            model.load_adapter(f"{self.folder}/{adapter}", adapter_name=f"a{adapter}")
            each.append(time.perf_counter() - start)
        model.set_adapter(f"a{self.count - 1}")
        with torch.no_grad():
            logits = model.eval()(torch.arange(8)[None]).logits.float()
        return {"units": self.count, "each": each, "said": logits.norm().item()}


class Train:
    """The script of a user of either package; one step is a ``Trainer`` run of a few optimiser steps."""

    def __init__(
        self, package: str, model: str, rows: int, tokens: int, steps: int, bf16: bool
    ) -> None:
        warnings.simplefilter("ignore")
        face: Any = import_module(package)
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16 if bf16 else torch.float32
        )
        base.config.use_cache = False
        config = face.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = face.get_peft_model(base, config)
        self.first = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad
        }
        self.tokens = rows * tokens * steps
        ids = torch.randint(
            base.config.vocab_size,
            (rows * steps, tokens),
            generator=torch.Generator().manual_seed(0),
        )
        self.folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self.folder.name, per_device_train_batch_size=rows, max_steps=steps, learning_rate=2e-4,
            bf16=bf16, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
            dataloader_drop_last=True, seed=0,
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in ids]
        self.trainer = Trainer(model=self.model, args=arguments, train_dataset=data)

    @torch.no_grad()
    def _again(self) -> None:
        """The values that both sides begin with."""
        for number, (name, parameter) in enumerate(sorted(self.model.named_parameters())):
            if name in self.first:
                generator = torch.Generator().manual_seed(number)
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    0.01 * draw if ".lora_B." in name else draw / parameter.shape[-1] ** 0.5
                )

    def step(self, number: int) -> dict[str, Any]:
        self._again()
        loss = self.trainer.train().training_loss
        return {
            "units": self.tokens,
            "loss": loss,
            "trained": sum(v.numel() for v in self.first.values()),
        }
