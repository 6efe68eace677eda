"""Makes the golden files of `tests/oracles/test_golden.py`: what the library ``adapters`` computes.

It pins an older transformers, so it runs in an environment of its own, once:

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 "transformers~=4.57.6" adapters==1.3.0
    /tmp/golden/bin/python tests/oracles/golden/make_adapters.py

``FAMILY.base.safetensors`` holds the weights of a tiny model (fp32), ``FAMILY.CASE.safetensors`` inputs, the
adapter's tensors under our names (fp32), and the outputs and gradients that ``adapters`` computes from them in
fp64. Metadata: the model's config, our method, versions, and the case's own words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import AdapterConfig
from adapters.composition import Fuse
from adapters.methods.modeling import Adapter as Inner
from adapters.methods.modeling import BertFusion
from adapters.methods.reft import ReftModule
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
COMMON = {"vocab_size": 31, "pad_token_id": 0}
BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 24,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", BERT),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}),
    "llama": ("Llama", {**BERT, "num_key_value_heads": 1}),
    "t5": ("T5", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}),
    "bart": ("Bart", {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24,
    }),
}  # fmt: skip

AFTER = {  # where each of their adapters lies, and the layers of ours: attention, MLP, last norm or block, MLP's input
    "bert": [(r"(.*\.layer\.\d+)\.attention\.output", "{0}.attention.output.dropout"),
             (r"(.*\.layer\.\d+)\.output", "{0}.output.dropout", "{0}.output.LayerNorm", "{0}.intermediate.dense")],
    "gpt2": [(r"(.*h\.\d+)\.attention_adapters", "{0}.attn.resid_dropout"),
             (r"(.*h\.\d+)\.output_adapters", "{0}.mlp.dropout", "{0}", "{0}.mlp")],
    "llama": [(r"(.*layers\.\d+)\.attention_adapters", "{0}.self_attn.o_proj"),
              (r"(.*layers\.\d+)\.output_adapters", "{0}.mlp", "{0}", "{0}.mlp")],
    "t5": [(r"(.*\.block\.\d+)\.layer\.0", "{0}.layer.0.dropout"),
           (r"(encoder\.block\.\d+)\.layer\.1", "{0}.layer.1.dropout", "{0}"),
           (r"(decoder\.block\.\d+)\.layer\.2", "{0}.layer.2.dropout", "{0}")],
    "bart": [(r"(.*\.layers\.\d+)\.attention_adapters", "{0}.self_attn.out_proj"),
             (r"(.*\.layers\.\d+)\.output_adapters", "{0}.fc2", "{0}.final_layer_norm", "{0}.fc1")],
}  # fmt: skip
AFTER["roberta"] = AFTER["bert"]
SELF_ATTENTION = "targets=['re:.*layer\\\\.0\\\\.dropout', 'mlp_output']"

OURS = {
    "double_seq_bn": "bottleneck(size=4, activation='silu')",
    "seq_bn": "pfeiffer(size=4)",
    "par_bn": "parallel(size=4)",
    "scaled_par_bn": "parallel(size=4, scaling='learned')",
    "adapterplus": "adapterplus(size=4)",
    "compacter": "compacter(size=8)",
    "fusion": "fusion(parts=[pfeiffer(size=4), pfeiffer(size=2)])",
    "loreft": "loreft(rank=2, first=2, last=1)",
    "noreft": "noreft(rank=2, first=2, last=0)",
    "direft": "direft(rank=2, first=1, last=2, tied=True)",
}
CASES = {
    "bert": list(OURS),
    "roberta": ["double_seq_bn", "seq_bn", "loreft"],
    "gpt2": ["double_seq_bn", "seq_bn", "adapterplus", "loreft"],
    "llama": [
        "double_seq_bn",
        "seq_bn",
        "par_bn",
        "adapterplus",
        "compacter",
        "fusion",
        "loreft",
        "direft",
    ],
    "t5": ["double_seq_bn", "seq_bn", "compacter"],
    "bart": ["seq_bn", "par_bn"],
}
INNER = {
    "adapter_down.0.weight": "adapter_down.weight", "adapter_down.0.bias": "adapter_down.bias",
    "adapter_up.weight": "adapter_up.weight", "adapter_up.bias": "adapter_up.bias", "scaling": "adapter_scale",
    "adapter_down.0.W_left": "compacter_down_left", "adapter_down.0.W_right": "compacter_down_right",
    "adapter_down.0.b": "compacter_down_bias", "adapter_up.W_left": "compacter_up_left",
    "adapter_up.W_right": "compacter_up_right", "adapter_up.b": "compacter_up_bias",
}  # fmt: skip


def config_of(case: str) -> AdapterConfig:
    """Their config of a case."""
    reft = {"r": 2, "dropout": 0.0}
    if case == "loreft":
        return adapters.LoReftConfig(prefix_positions=2, suffix_positions=1, **reft)
    if case == "noreft":
        return adapters.NoReftConfig(prefix_positions=2, suffix_positions=0, **reft)
    if case == "direft":
        return adapters.DiReftConfig(
            prefix_positions=1, suffix_positions=2, tied_weights=True, **reft
        )
    if case == "adapterplus":
        return adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0)
    return AdapterConfig.load(case, reduction_factor=2 if case == "compacter" else 4)


def main() -> None:
    for family, cases in CASES.items():
        name, sizes = MODELS[family]
        config = getattr(transformers, f"{name}Config")(**COMMON, **sizes)
        torch.manual_seed(0)
        base = getattr(transformers, f"{name}Model")(config)
        with torch.no_grad():
            for parameter in base.parameters():
                noise = torch.randn_like(parameter) * 0.1
                loud = 8 if parameter.dim() > 1 and family != "t5" else 1  # T5's are loud already
                parameter.mul_(loud).add_(noise)
        state = {key: value.clone() for key, value in base.state_dict().items()}
        facts = {"model": name, "sizes": json.dumps({**COMMON, **sizes}), "versions": versions()}
        save_file(state, HERE / f"{family}.base.safetensors", metadata=facts)
        for case in cases:
            model = getattr(transformers, f"{name}Model")(config)
            model.load_state_dict(state)
            adapters.init(model)
            tensors = run(model, family, case)
            ours = OURS[case]
            if family == "t5" and case != "seq_bn":
                ours = ours[:-1] + f", {SELF_ATTENTION})"
            facts = {"method": ours, "versions": versions(), "theirs": case}
            save_file(tensors, HERE / f"{family}.{case}.safetensors", metadata=facts)


def versions() -> str:
    return f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"


def run(model: nn.Module, family: str, case: str) -> dict[str, Tensor]:
    """Add the adapter with random values, and read what it computes."""
    torch.manual_seed(1)
    setup: Any = "a"
    if case == "fusion":
        for name, factor in (("a", 4), ("b", 8)):
            model.add_adapter(name, config=AdapterConfig.load("seq_bn", reduction_factor=factor))
        setup = Fuse("a", "b")
        model.add_adapter_fusion(setup)
        model.train_adapter_fusion(setup)
    else:
        model.add_adapter("a", config=config_of(case))
        model.train_adapter("a")
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            added = re.search(r"adapters\.[ab]\.|fusion_layer|refts\.a|shared_parameters", key)
            if added and "parametrizations" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.double()
    inputs = batch(family)
    torch.set_default_dtype(torch.float64)  # their ReFT makes a tensor of the default dtype
    out = model(**inputs).last_hidden_state
    torch.set_default_dtype(torch.float32)
    mask = inputs["attention_mask"].bool()
    chosen = out if family in ("t5", "bart") else out[mask]
    direction = torch.linspace(-1, 1, chosen.numel(), dtype=chosen.dtype).view_as(chosen)
    (chosen.sin() * direction).sum().backward()
    found = {f"input.{key}": value for key, value in inputs.items()}
    found["output"] = chosen.detach().clone()
    if case == "fusion":
        found["regularisation"] = (
            torch.as_tensor(model.get_fusion_regularization_loss()).detach().clone()
        )
    for key, value in named(model, family, case):
        found[f"adapter.{key}"] = value.detach().float().clone().contiguous()
        assert torch.equal(found[f"adapter.{key}"].double(), value.detach()) or key.endswith(
            "basis"
        ), key
        if value.grad is not None:
            found[f"gradient.{key}"] = value.grad.clone().contiguous()
    return found


def batch(family: str) -> dict[str, Tensor]:
    """Three rows; the first is padded, on the left for decoders."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 31, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 2) if family in ("gpt2", "llama") else slice(-2, None)] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.randint(3, 31, (3, 5), generator=generator)
    return inputs


def named(model: nn.Module, family: str, case: str) -> Iterator[tuple[str, Tensor]]:
    """Their tensors under our keys."""
    for path, module in model.named_modules():
        if isinstance(module, Inner):
            where, _, name = path.partition(".adapters.")
            part = ("part0_" if name == "a" else "part1_") if case == "fusion" else ""
            for key, value in module.named_parameters():
                slot = INNER[key]
                yield f"{site(family, case, where, slot)}.{part}{slot}", value
        if isinstance(module, BertFusion):
            where = path.partition(".adapter_fusion_layer")[0]
            for key, value in module.named_parameters():
                yield f"{site(family, case, where, '')}.fusion_{key}", value
        if isinstance(module, ReftModule):
            where = path.partition(".reft_layer")[0]
            ends = ["both"] if module.tied_weights else ["first", "last"]
            sides = [module.prefix_positions, module.suffix_positions]
            for number, (end, unit) in enumerate(zip(ends, module.units, strict=True)):
                if module.tied_weights or sides[number]:
                    yield f"{where}.reft_{end}_source", unit.learned_source.weight
                    yield f"{where}.reft_{end}_b", unit.learned_source.bias
                    yield f"{where}.reft_{end}_basis", unit.projection.weight
    if case == "compacter":
        yield "compacter_rule", model.shared_parameters["a"]["phm_rule"]


def site(family: str, case: str, where: str, slot: str) -> str:
    """The path of our site for their adapter at ``where``."""
    for pattern, plain, *more in AFTER[family]:
        if match := re.fullmatch(pattern, where):
            chosen = plain
            if case in ("seq_bn", "fusion") and more:
                chosen = more[0]
            if case == "adapterplus":
                chosen = "{0}"
            whole = family in ("gpt2", "llama")
            if case in ("par_bn", "scaled_par_bn") and ("down" in slot or whole):
                chosen = more[1]
            return chosen.format(match.group(1))
    raise KeyError(where)


if __name__ == "__main__":
    main()
