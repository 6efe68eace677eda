"""The same trainable parameters as PEFT's: how many, and by what names, for every shared method and eight models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import trimtab.peft as ours
from tests import tiny

MODELS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "llama": (tiny.llama, "CAUSAL_LM"),
    "gpt2": (tiny.gpt2, "CAUSAL_LM"),
    "bert": (tiny.bert, "SEQ_CLS"),
    "t5": (tiny.t5, "SEQ_2_SEQ_LM"),
    "falcon": (tiny.falcon, "CAUSAL_LM"),
    "mistral": (tiny.mistral, "CAUSAL_LM"),
    "bloom": (tiny.bloom, "CAUSAL_LM"),
    "vit": (tiny.vit, None),
}
LAYERWISE: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {}),
    ("LoraConfig", {"r": 4, "rank_pattern": {r".*\.0\..*": 2}, "use_rslora": True}),
    ("LoraConfig", {"use_dora": True}),
    ("LoraConfig", {"init_lora_weights": "pissa", "r": 4}),
    ("LoraConfig", {"init_lora_weights": False}),
    ("LoraConfig", {"target_modules": "all-linear"}),
    (
        "LoraConfig",
        {"target_modules": "ALL-linear", "exclude_modules": ".*(classifier|lm_head|wo)"},
    ),
    ("AdaLoraConfig", {"total_step": 10}),
    ("IA3Config", {}),
    ("IA3Config", {"feedforward_modules": []}),
    ("LoHaConfig", {}),
    ("LoHaConfig", {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 4}}),
    ("LoKrConfig", {}),
    ("LoKrConfig", {"rank_pattern": {r".*\.0\..*": 2}}),
    ("LoKrConfig", {"decompose_both": True, "r": 2}),
    ("OFTConfig", {"oft_block_size": 8}),
    ("OFTConfig", {"oft_block_size": 0, "r": 4, "block_share": True}),
    ("BOFTConfig", {}),
    ("VeraConfig", {}),
    ("FourierFTConfig", {"n_frequency": 50}),
    ("LNTuningConfig", {}),
    ("HRAConfig", {}),
    ("MissConfig", {"r": 8}),
    ("MissConfig", {"r": 8, "init_weights": "bat"}),
    ("MissConfig", {"r": 8, "mini_r": 2, "init_weights": "mini"}),
    ("RandLoraConfig", {"r": 4}),
    ("ShiraConfig", {"r": 4}),
    ("FourierFTConfig", {"n_frequency": 50, "n_frequency_pattern": {r".*\.0\..*": 20}}),
    ("HiraConfig", {"r": 4}),
    ("TrainableTokensConfig", {"token_indices": [3, 4]}),
]
TARGETS = {"vit": {"IA3Config": ["k_proj", "v_proj"], "LNTuningConfig": ["layernorm_before"]}}
"""Where PEFT has no default for a model, targets are named."""
NOT_IN_PEFT = (
    "not supported", "is not implemented", "Please specify `target_modules`", "Unsupported layer",
    "Please specify `feedforward",
)  # fmt: skip
"""What PEFT says where it lacks a method for a model: Trimtab does more there."""
KINDS = ["task", "none"]


def both(name: str, make: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any]:
    """Our model and PEFT's, of the same configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), getattr(peft, name)(**options))
        mine = ours.get_peft_model(make(), getattr(ours, name)(**options))
    return mine, theirs


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_layerwise_methods(model: str, kind: str) -> None:
    make, task = MODELS[model]
    compared = 0
    for name, options in LAYERWISE:
        given = {**options, **({"task_type": task} if kind == "task" else {})}
        if model == "vit" and "target_modules" not in given:
            given["target_modules"] = TARGETS["vit"].get(name, ["q_proj", "v_proj"])
        try:
            mine, theirs = both(name, make, **given)
        except (ValueError, TypeError, NotImplementedError, KeyError) as error:
            assert any(text in str(error) for text in NOT_IN_PEFT), (name, options, error)
            continue
        compared += 1
        found, wanted = mine.get_nb_trainable_parameters(), theirs.get_nb_trainable_parameters()
        if not (name == "TrainableTokensConfig" and model == "t5"):
            # there PEFT names `shared`, which nothing calls; what reads tokens is the encoder's own embedding
            assert trained(mine) == trained(theirs), (name, options)
        assert found[0] == wanted[0], (name, options)
        # PEFT keeps a frozen number of ranks, one value, at each site of AdaLoRA
        adapted = [s for s in mine.base_model.adapters["default"].sites if s.method == 0]
        extra = len(adapted) if name == "AdaLoraConfig" else 0
        assert found[1] + extra == wanted[1], (name, options)
    assert compared >= 15


PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("PromptTuningConfig", {}),
    ("PromptEncoderConfig", {}),
    ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    ("PrefixTuningConfig", {}),
    ("PrefixTuningConfig", {"prefix_projection": True}),
    ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
]


@pytest.mark.parametrize(("name", "options"), PROMPTS)
def test_prompts_count_alike_and_have_pefts_names(name: str, options: dict[str, Any]) -> None:
    """PEFT's state dicts name the embedding once more, as ``word_embeddings``."""
    for model, (make, task) in MODELS.items():
        if model == "vit" or (name == "PrefixTuningConfig" and model in ("falcon", "bloom")):
            continue  # no tokens; and attentions that Trimtab cannot reach, which is a typed error
        mine, theirs = both(name, make, num_virtual_tokens=5, task_type=task, **options)
        found, wanted = mine.get_nb_trainable_parameters(), theirs.get_nb_trainable_parameters()
        if model == "t5" and name != "PrefixTuningConfig":
            # PEFT trains as many rows again for the decoder, and never uses them
            wanted = wanted[0] - 5 * 32, wanted[1] - 5 * 32
        assert found == wanted, (model, options)
        assert trained(mine) == trained(theirs)
        named, wanted_names = ([n for n, _ in m.named_parameters()] for m in (mine, theirs))
        assert set(named) == set(wanted_names)
        keys, wanted_keys = (m.state_dict() for m in (mine, theirs))
        assert set(keys) == {k for k in wanted_keys if not k.startswith("word_embeddings.")}


def test_a_prompt_beside_the_model_is_saved_loaded_and_taken_out() -> None:
    config = ours.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model, other = (ours.get_peft_model(tiny.llama(), config) for _ in range(2))
    assert type(model.base_model).__name__ == "LlamaForCausalLM"
    for one in (model, other):
        one.add_adapter("more", ours.LoraConfig(r=2, init_lora_weights=False))
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    for one in (model, other):
        one.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    found = ours.get_peft_model_state_dict(model, state, "default")
    assert torch.equal(found["prompt_embeddings"], state["prompt_encoder.default.embedding.weight"])
    more = ours.get_peft_model_state_dict(model, state, "more")
    same = ours.get_peft_model_state_dict(other, None, "more")
    assert more and all(torch.equal(more[key], same[key]) for key in more)
    ids = torch.tensor([[5, 6, 7]])
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, other(input_ids=ids).logits)
    assert torch.equal(logits, deepcopy(model)(input_ids=ids).logits)
    bare = model.unload()
    assert not any("prompt_encoder" in name for name, _ in model.named_parameters())
    assert type(bare).__name__ == "LlamaForCausalLM" and "trimtab" not in bare._modules


def test_llama_adapters_count_alike_and_lie_in_the_bank() -> None:
    for make in (tiny.llama, tiny.mistral, tiny.gpt2):
        mine, theirs = both("AdaptionPromptConfig", make, adapter_len=4, adapter_layers=2)
        assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        assert {_block(n).removesuffix(".default") for n in trained(mine)} == {
            _block(n) for n in trained(theirs)
        }


def _block(name: str) -> str:
    """A name from the number of its block on."""
    return name.partition(".h.")[2] or name.partition("layers.")[2]


def test_biases_count_alike_and_are_the_adapters_own() -> None:
    """PEFT trains the base's own biases; here each adapter has copies, so all parameters are more by those."""
    for bias in ("all", "lora_only"):
        for model, (make, task) in MODELS.items():
            if model != "vit":
                mine, theirs = both("LoraConfig", make, bias=bias, task_type=task)
                assert (
                    mine.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
                )


SNIPPETS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05, "task_type": "CAUSAL_LM"},
    {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none"},
    {"lora_alpha": 32, "lora_dropout": 0.1},
    {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "modules_to_save": ["classifier"]},
]  # fmt: skip
QUERY_VALUE = {
    "llama": ["q_proj", "v_proj"], "mistral": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"],
    "t5": ["q", "v"], "falcon": ["query_key_value"], "bloom": ["query_key_value"], "vit": ["q_proj", "v_proj"],
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_published_snippets_print_the_same_line(model: str, capsys: Any) -> None:
    make, task = MODELS[model]
    for snippet in SNIPPETS:
        options = dict(snippet)
        if "classifier" in options.get("modules_to_save", ()) and model not in ("bert", "vit"):
            continue
        if "target_modules" in options or model == "vit":
            options["target_modules"] = QUERY_VALUE[model]
        if "task_type" in options:
            options["task_type"] = task
        for one in both("LoraConfig", make, **options):
            one.print_trainable_parameters()
        mine, theirs = capsys.readouterr().out.strip().split("\n")
        assert mine == theirs and mine.startswith("trainable params: ")


def test_layers_are_counted_as_peft_counts_them() -> None:
    """In an encoder-decoder, a number means that block in both stacks."""
    for make, options in (
        (tiny.t5, {"layers_to_transform": [1]}),
        (tiny.t5, {"layers_to_transform": 0, "layers_pattern": "block"}),
        (tiny.llama, {"layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
        (tiny.gpt2, {"layers_to_transform": [1], "layers_pattern": "h"}),
    ):
        mine, theirs = both("LoraConfig", make, **options)
        assert trained(mine) == trained(theirs)


def test_targets_by_regular_expression_exclusion_and_whole_path() -> None:
    for options in (
        {"target_modules": r".*\.(0|2)\..*(q|k)_proj"},
        {
            "target_modules": ["q_proj", "mlp.down_proj"],
            "exclude_modules": ["layers.1.mlp.down_proj"],
        },
        {"target_modules": ["model.layers.0.self_attn.o_proj"]},
        {
            "target_modules": "all-linear",
            "exclude_modules": r".*mlp.*",
            "modules_to_save": ["lm_head"],
        },
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["layers.0"]},
        {"target_modules": {"embed_tokens", "v_proj"}},
    ):
        mine, theirs = both("LoraConfig", tiny.llama, **options)
        left, right = trained(mine), trained(theirs)
        saved = "modules_to_save"
        assert {n for n in left if saved not in n} == {n for n in right if saved not in n}, options


def test_the_feedforwards_of_ia3_are_those_of_peft() -> None:
    """Of the model's default where none are given, and only where they are targets."""
    for options in (
        {"target_modules": ["k_proj", "down_proj"]},
        {"target_modules": ["k_proj", "v_proj"]},
        {"target_modules": r".*\.(v|up)_proj", "feedforward_modules": r".*up_proj"},
        {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"],
         "exclude_modules": ["layers.0.mlp.up_proj"]},
    ):  # fmt: skip
        mine, theirs = both("IA3Config", tiny.llama, **options)
        shapes = [
            {name: p.shape for name, p in one.named_parameters() if p.requires_grad}
            for one in (mine, theirs)
        ]
        assert shapes[0] == shapes[1], options
