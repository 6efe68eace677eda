"""State dicts of adapters and of the base: PEFT's keys and values, and errors where PEFT is silent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from tests import tiny
from tests.oracles import kit
from trimtab.errors import (
    AttachError,
    ConfigError,
    FileFormatError,
    UnknownNameError,
)
from trimtab.peft import LoraConfig, get_peft_model, inject_adapter_in_model
from trimtab.peft.state import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

CASES: dict[str, tuple[kit.Make, dict[str, Any]]] = {
    "lora": (kit.llama, {"target_modules": ["q_proj", "v_proj"]}),
    "dora": (kit.llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "bias": (kit.bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "head": (kit.bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "long-head": (kit.roberta, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "conv1d": (kit.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embedding": (kit.gpt2, {"target_modules": ["wte", "wpe"]}),
    "convolutions": (kit.convolutions, {"target_modules": ["line", "square", "head"]}),
}
EMBEDDINGS = ("Setting `save_embedding_layers`", "Could not identify embedding")


def stirred(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def ours(make: kit.Make, options: dict[str, Any], name: str = "default") -> Any:
    return get_peft_model(make(), LoraConfig(r=4, **options), name).eval()


def theirs(make: kit.Make, options: dict[str, Any], name: str = "default") -> Any:
    with kit.quiet():
        return peft.get_peft_model(make(), peft.LoraConfig(r=4, **options), name).eval()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["default", "lora", "layers", "self_attn", "model", "weight"])
@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_those_of_peft(case: str, name: str) -> None:
    """Both ways: ours into theirs and theirs into ours, whatever the adapter is called."""
    make, options = CASES[case]
    mine, other = ours(make, options, name), stirred(theirs(make, options, "default"))
    with kit.quiet(*EMBEDDINGS):
        state = peft.get_peft_model_state_dict(other, save_embedding_layers=False)
    assert set_peft_model_state_dict(mine, state, name) == ([], [])
    same(get_peft_model_state_dict(mine, adapter_name=name), state)
    fresh = theirs(make, options, "default")
    peft.set_peft_model_state_dict(fresh, get_peft_model_state_dict(mine, adapter_name=name))
    batch = kit.batch_of(make())
    with torch.no_grad():
        kit.assert_close(kit.outputs(mine, batch), kit.outputs(other, batch), "ours")
        kit.assert_close(kit.outputs(fresh, batch), kit.outputs(other, batch), "theirs")


@pytest.mark.parametrize("case", ["lora", "head", "bias", "convolutions"])
def test_of_a_model_that_an_adapter_was_injected_into(case: str) -> None:
    make, options = CASES[case]
    options = {key: value for key, value in options.items() if key != "task_type"}
    if case == "head":
        options["modules_to_save"] = ["classifier"]
    mine = inject_adapter_in_model(LoraConfig(r=4, **options), make())
    with kit.quiet():
        other = peft.inject_adapter_in_model(peft.LoraConfig(r=4, **options), make())
    stirred(other)
    with kit.quiet(*EMBEDDINGS):
        state = peft.get_peft_model_state_dict(other)
    set_peft_model_state_dict(mine, state)
    same(get_peft_model_state_dict(mine), state)


def test_keys_with_peft_s_prefix_are_understood_by_a_bare_model_and_the_other_way() -> None:
    make, options = CASES["lora"]
    wrapped, bare = (
        stirred(ours(make, options)),
        inject_adapter_in_model(LoraConfig(r=4, **options), make()),
    )
    set_peft_model_state_dict(bare, get_peft_model_state_dict(wrapped))
    again = ours(make, options)
    set_peft_model_state_dict(again, get_peft_model_state_dict(bare))
    same(get_peft_model_state_dict(again), get_peft_model_state_dict(wrapped))


def test_one_of_several_adapters_called_like_modules() -> None:
    """S8: PEFT leaves out every key in which another adapter's name occurs."""
    make, options = CASES["lora"]
    mine = ours(make, options)
    for name in ("layers", "self_attn", "model", "lora", "q_proj"):
        mine.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    state = get_peft_model_state_dict(mine)
    assert len(state) == 2 * 2 * 3
    same(state, get_peft_model_state_dict(mine, mine.state_dict()))
    assert len(get_peft_model_state_dict(mine, adapter_name="self_attn")) == 2 * 3
    stirred(mine)
    set_peft_model_state_dict(mine, {key: tensor * 0 for key, tensor in state.items()})
    assert not any(t.any() for t in get_peft_model_state_dict(mine).values())
    assert any(t.any() for t in get_peft_model_state_dict(mine, adapter_name="lora").values())


def test_values_come_from_a_state_dict_that_is_given() -> None:
    make, options = CASES["head"]
    mine = stirred(ours(make, options))
    state = {f"_orig_mod.{key}": tensor + 1 for key, tensor in mine.state_dict().items()}
    found = get_peft_model_state_dict(mine, state)
    live = get_peft_model_state_dict(mine)
    assert all(torch.equal(found[key], live[key] + 1) for key in live)
    inner = {key: tensor * 2 for key, tensor in mine.get_base_model().state_dict().items()}
    found = get_peft_model_state_dict(mine, inner)
    assert all(torch.equal(found[key], live[key] * 2) for key in live)
    key = next(key for key in mine.state_dict() if "lora_A" in key)
    with pytest.raises(FileFormatError, match=r"has no .*lora_A"):
        get_peft_model_state_dict(mine, {k: t for k, t in mine.state_dict().items() if k != key})
    with pytest.raises(FileFormatError, match=r"is a shard"):
        get_peft_model_state_dict(mine, {**mine.state_dict(), key: torch.zeros(0)})


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_model_has_the_same_keys() -> None:
    mine = ours(*CASES["lora"])
    compiled: Any = torch.compile(mine)
    same(
        get_peft_model_state_dict(compiled, unwrap_compiled=True),
        get_peft_model_state_dict(mine),
    )


def test_what_does_not_fit_raises_and_changes_nothing() -> None:
    """S5: PEFT drops unknown keys and says nothing of missing ones."""
    mine = stirred(ours(*CASES["lora"]))
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(mine).items()}
    new = {key: tensor * 2 for key, tensor in before.items()}
    key = next(iter(new))
    for state, message in (
        ({**new, "base_model.model.model.layers.9.q_proj.lora_A.weight": new[key]}, "1 unexpected"),
        ({**new, key.replace("lora_A", "lora_C"): new[key]}, "lora_C"),
        ({k: t for k, t in new.items() if k != key}, "1 missing"),
        ({**new, key: torch.zeros(3, 3)}, "another size"),
        ({}, "12 missing"),
        ({k.removeprefix("base_model.model."): t for k, t in new.items()} | new, "two keys mean"),
    ):
        with pytest.raises(FileFormatError, match=message):
            set_peft_model_state_dict(mine, state)
        same(get_peft_model_state_dict(mine), before)
    with pytest.raises(UnknownNameError, match="defualt"):
        set_peft_model_state_dict(mine, new, "defualt")
    with pytest.raises(AttachError, match="has no adapters"):
        get_peft_model_state_dict(tiny.llama())
    with pytest.raises(ConfigError, match="modules_to_save"):
        get_peft_model_state_dict(mine, save_embedding_layers=True)


def test_a_tensor_of_another_size_is_let_pass_on_request() -> None:
    mine = stirred(ours(*CASES["lora"]))
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(mine).items()}
    key, *rest = before
    state = {**{k: before[k] * 2 for k in rest}, key: torch.zeros(3, 3)}
    with pytest.warns(UserWarning, match=r"1 tensors have another size"):
        result = set_peft_model_state_dict(mine, state, ignore_mismatched_sizes=True)
    assert result == ([key], [])
    found = get_peft_model_state_dict(mine)
    assert torch.equal(found[key], before[key])
    assert all(torch.equal(found[k], before[k] * 2) for k in rest)


def test_copies_of_embeddings_and_drawn_tensors_that_peft_writes_are_known() -> None:
    make, options = CASES["embedding"]
    other = stirred(theirs(make, options))
    with kit.quiet(*EMBEDDINGS):
        state = peft.get_peft_model_state_dict(other, save_embedding_layers=True)
    assert any("base_layer" in key for key in state)
    mine = ours(make, options)
    set_peft_model_state_dict(mine, state)
    batch = kit.batch_of(make())
    with torch.no_grad():
        kit.assert_close(kit.outputs(mine, batch), kit.outputs(other, batch), "outputs")
    key = next(key for key in state if "base_layer" in key)
    with pytest.raises(FileFormatError, match="another tensor than this base's"):
        set_peft_model_state_dict(mine, {**state, key: state[key] + 1})


def test_prompts_and_drawn_projections() -> None:
    """Through the core's own models: keys of the whole adapter, and PEFT's shared random matrices."""
    for make, config, method in (
        (kit.llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), tt.Prompt(length=3)),
        (kit.llama, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), tt.Prefix(length=3)),
        (kit.llama, peft.VeraConfig(target_modules=["q_proj"], r=4), tt.VeRA(rank=4, targets=("q_proj",))),
    ):  # fmt: skip
        other = stirred(kit.peft_model(make, config))
        with kit.quiet(*EMBEDDINGS):
            state = peft.get_peft_model_state_dict(other)
        model = make()
        tt.attach(model, method, "default")
        set_peft_model_state_dict(model, state)
        for key, tensor in get_peft_model_state_dict(model).items():
            whole = next(t for k, t in state.items() if k.removeprefix("base_model.model.") == key)
            assert torch.equal(tensor, whole)
        batch = kit.batch_of(model)
        with torch.no_grad():
            kit.assert_close(kit.outputs(model, batch), kit.outputs(other, batch), "outputs")
    drawn = {k: t + (k.endswith("vera_A")) for k, t in state.items()}
    with pytest.raises(FileFormatError, match="other numbers than those drawn"):
        set_peft_model_state_dict(model, drawn)


def test_tensors_on_the_meta_device_are_replaced() -> None:
    mine = ours(*CASES["lora"])
    state = get_peft_model_state_dict(stirred(ours(*CASES["lora"]), seed=1))
    with torch.device("meta"):
        bare = tiny.llama()
    bare = inject_adapter_in_model(LoraConfig(r=4, **CASES["lora"][1]), bare)
    set_peft_model_state_dict(bare, state, low_cpu_mem_usage=True)
    set_peft_model_state_dict(mine, state)
    same(
        {f"base_model.model.{k}": t for k, t in get_peft_model_state_dict(bare).items()},
        get_peft_model_state_dict(mine),
    )
    assert all(p.requires_grad for name, p in bare.named_parameters() if "lora_" in name)


# -- files --------------------------------------------------------------------------------------------


def test_weights_of_a_folder(tmp_path: Path) -> None:
    mine = stirred(ours(*CASES["lora"]))
    mine.save_pretrained(tmp_path / "a")
    same(load_peft_weights(tmp_path / "a"), get_peft_model_state_dict(mine))
    same(load_peft_weights(tmp_path, device="cpu", subfolder="a"), get_peft_model_state_dict(mine))
    same(
        load_peft_weights(str(tmp_path / "a")),
        peft.utils.load_peft_weights(str(tmp_path / "a"), device="cpu"),
    )
    mapping = {r"^model\.layers\.": "decoder.", r"q_proj": "never.reached"}
    same(
        load_peft_weights(tmp_path / "a", key_mapping=mapping),
        peft.utils.load_peft_weights(str(tmp_path / "a"), device="cpu", key_mapping=mapping),
    )
    with pytest.raises(FileFormatError, match="two tensors"):
        load_peft_weights(tmp_path / "a", key_mapping={r"layers\.\d": "layers.0"})
    with pytest.raises(FileFormatError, match=r"no adapter_model.safetensors"):
        load_peft_weights(tmp_path)
    with pytest.raises(UnknownNameError, match="revison"):
        load_peft_weights(tmp_path / "a", revison="main")
    whole = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(whole[:100])
    with pytest.raises(FileFormatError, match="torn"):
        load_peft_weights(tmp_path / "a")


# -- the base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_base_s_tensors_by_their_own_names(case: str) -> None:
    make, options = CASES[case]
    mine, other, bare = stirred(ours(make, options)), theirs(make, options), make()
    mine.add_adapter("lora", LoraConfig(r=2, target_modules=options["target_modules"]))
    same(get_base_model_state_dict(mine), dict(bare.state_dict()))
    same(get_base_model_state_dict(mine), peft.utils.get_base_model_state_dict(other))
    injected = inject_adapter_in_model(
        LoraConfig(r=4, target_modules=options["target_modules"]), make()
    )
    same(get_base_model_state_dict(injected), dict(bare.state_dict()))


def test_the_functions_of_peft_itself_work_on_our_models() -> None:
    """Accelerate calls those with whatever model it is given."""
    mine = stirred(ours(*CASES["head"], name="layers"))
    state = peft.get_peft_model_state_dict(mine, adapter_name="layers")
    same(state, get_peft_model_state_dict(mine, adapter_name="layers"))
    again = ours(*CASES["head"])
    peft.set_peft_model_state_dict(again, state)
    same(state, get_peft_model_state_dict(again))
    with pytest.raises(FileFormatError, match="1 unexpected"):
        peft.set_peft_model_state_dict(again, {**state, "extra": torch.zeros(1)})


def test_a_prefix_and_shared_tensors_are_no_part_of_the_base() -> None:
    for method in (tt.Prefix(length=3), tt.Prompt(length=3), tt.VeRA(rank=4, targets="q_proj"),
                   tt.LlamaAdapter(length=3, top=1), tt.SpotTune(inner=tt.LoRA(rank=2))):  # fmt: skip
        model = kit.llama()
        tt.attach(model, method, "layers")
        same(get_base_model_state_dict(model), dict(kit.llama().state_dict()))
    for make in (tiny.mixtral, kit.t5, kit.gpt2):
        model = make()
        tt.attach(model, tt.LoRA(rank=2), "model")
        tt.attach(model, tt.Bottleneck(), "mlp")  # wraps sub-layers around wrapped layers
        same(get_base_model_state_dict(model), dict(make().state_dict()))
        set_base_model_state_dict(model, {k: t + 1 for k, t in make().state_dict().items()})
        same(get_base_model_state_dict(model), {k: t + 1 for k, t in make().state_dict().items()})


@pytest.mark.parametrize("case", ["lora", "head", "embedding"])
def test_other_weights_for_the_base(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    mine, other = stirred(ours(make, options)), theirs(make, options)
    adapter = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(mine).items()}
    with kit.quiet(*EMBEDDINGS):
        peft.set_peft_model_state_dict(other, copy.copy(adapter))
    new = stirred(make().requires_grad_(), seed=5).state_dict()
    assert set_base_model_state_dict(mine, new) == ([], [])
    peft.utils.set_base_model_state_dict(other, dict(new))
    same(get_base_model_state_dict(mine), dict(new))
    same(get_peft_model_state_dict(mine), adapter)
    batch = kit.batch_of(make())
    with torch.no_grad():
        kit.assert_close(kit.outputs(mine, batch), kit.outputs(other, batch), "outputs")
    mine.save_pretrained(tmp_path)  # it belongs to the new weights from now on
    fresh = make()
    fresh.load_state_dict(new)
    tt.attach(fresh, tt.Adapter.load(tmp_path), "x")


def test_base_weights_that_do_not_fit_raise() -> None:
    mine, bare = ours(*CASES["lora"]), kit.llama().state_dict()
    key = "model.layers.0.self_attn.q_proj.weight"
    for state, message in (
        ({k: t for k, t in bare.items() if k != key}, "Missing key"),
        ({**bare, "model.extra": torch.zeros(1)}, "Unexpected key"),
        ({**bare, key: torch.zeros(2, 2)}, "size mismatch"),
    ):
        with pytest.raises(RuntimeError, match=message):
            set_base_model_state_dict(mine, state)
    part = set_base_model_state_dict(mine, {key: bare[key], "model.extra": bare[key]}, strict=False)
    assert part.unexpected_keys == ["model.extra"]
    assert "lm_head.weight" in part.missing_keys
    assert not [k for k in part.missing_keys if "lora" in k or key in k]
    with pytest.raises(FileFormatError, match="an adapter's tensor"):
        set_base_model_state_dict(mine, mine.get_base_model().state_dict())
    mine.merge_adapter()
    with pytest.raises(AttachError, match="unmerge_adapter"):
        set_base_model_state_dict(mine, bare)


def test_extra_keys_in_a_file_raise(tmp_path: Path) -> None:
    """S5 again, from a folder of PEFT's."""
    with kit.quiet():
        theirs(*CASES["lora"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    save_file({**tensors, extra: torch.zeros(4, 32)}, file)
    mine = ours(*CASES["lora"])
    with pytest.raises(FileFormatError, match="1 unexpected"):
        set_peft_model_state_dict(mine, load_peft_weights(tmp_path))
    with pytest.raises(AttachError, match=r"k_proj.lora_B"):
        tt.attach(kit.llama(), tt.Adapter.load(tmp_path))
