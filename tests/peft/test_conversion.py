"""Adapters as plain LoRAs: exact where the rank allows, PEFT's decomposition otherwise, and files PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
import trimtab.peft as face
import trimtab.peft.tuners.lora.conversion as by_path
from tests import tiny
from tests.laws.cells import SMALL, shaken
from tests.peft.kit import IDS, both, logits, made, quiet
from trimtab.errors import ConfigError, NotMergeableError, UnknownNameError, UnsupportedError
from trimtab.peft import convert_to_lora, save_as_lora
from trimtab.peft.conversion import converted

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TARGETS = "targets=['q_proj', 'down_proj']"


@torch.no_grad()
def acting(model: nn.Module, who: str | None) -> Tensor:
    with tt.using(model, who):
        out: Tensor = model(input_ids=IDS).logits
    return out


def loaded(config: Any, state: dict[str, Tensor], base: nn.Module) -> Tensor:
    """What PEFT's model computes with a configuration and tensors of ours."""
    options = {
        k: v for k, v in config.to_dict().items() if k not in ("peft_type", "task_type") and v is not None
    }  # fmt: skip
    with quiet():
        model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()  # type: ignore[arg-type]
        named = {
            k if k.startswith("base_model") else f"base_model.model.{k}": v
            for k, v in state.items()
        }
        found = peft.set_peft_model_state_dict(model, named)
    assert not found.unexpected_keys
    return logits(model)


@pytest.mark.parametrize("rank", [2, 4, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("option", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}])
def test_a_lora_is_converted_as_peft_converts_it(rank: float, option: dict[str, Any]) -> None:
    theirs, ours = both({"default": {**PLAIN, **option}})
    with quiet("Converting a PEFT adapter to LoRA that is already"):
        expected, theirs_state = peft.convert_to_lora(theirs, rank)
    config, state = convert_to_lora(ours, rank)
    assert state.keys() == theirs_state.keys()
    for key in state:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            if rank != 1.0:  # all of it: a rank of rounding
                assert state[key].shape == theirs_state[key].shape
            torch.testing.assert_close(
                state[other] @ state[key], theirs_state[other] @ theirs_state[key], **CLOSE
            )
    if rank != 1.0:
        assert (config.r, config.lora_alpha) == (expected.r, expected.lora_alpha) or rank < 1
    base = tiny.llama(num_hidden_layers=2)
    with quiet():
        want = loaded(config, state, base)
    if rank in (4, 1.0):
        torch.testing.assert_close(want, logits(ours), **CLOSE)


@pytest.mark.parametrize(
    "method",
    ["lora(rank=3, init='pissa')", "lora(rank=3, init='olora', rslora=True)", "lora(rank=8, bits=8)"],
)  # fmt: skip
def test_what_began_elsewhere_is_exact_at_twice_the_rank(method: str) -> None:
    model = tiny.llama(num_hidden_layers=2)
    shaken(tt.attach(model, method.replace(")", f", {TARGETS})"), "a"))
    rank = 8 if "bits" in method else 6
    config, state = convert_to_lora(model, rank, "a")
    torch.testing.assert_close(
        loaded(config, state, tiny.llama(num_hidden_layers=2)), acting(model, "a"), **CLOSE
    )
    assert config.r == config.lora_alpha == rank


@pytest.mark.parametrize(
    "kind", ["dora", "loha", "lokr", "oft", "boft", "hra", "ia3", "vera", "randlora", "fourierft", "miss", "shira",
             "hira", "mora", "diff", "adalora", "lora", "kasa", "qalora", "bdlora", "velora", "monteclora"],
)  # fmt: skip
def test_any_change_of_weight_is_a_lora(kind: str, tmp_path: Path) -> None:
    method = SMALL.get(kind, kind)
    aimed = f"{method[:-1]}, {TARGETS})" if "(" in method else f"{method}({TARGETS})"
    model = tiny.llama(num_hidden_layers=1)
    shaken(tt.attach(model, aimed, "a"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = acting(model, "a")
    assert float((expected - acting(model, None)).abs().max()) > 1e-3
    save_as_lora(tmp_path / "lora", model, 32, "a")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=1), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    ours = tiny.llama(num_hidden_layers=1)
    tt.attach(ours, tt.Adapter.load(tmp_path / "lora"), "b")
    torch.testing.assert_close(acting(ours, "b"), expected, **CLOSE)


@pytest.mark.parametrize(
    ("base", "targets"),
    [(tiny.llama, ["q_proj", "down_proj"]), (tiny.gpt2, ["c_attn", "c_proj"])],
    ids=["llama", "gpt2"],
)
def test_a_bias_of_b_comes_along(base: Any, targets: list[str]) -> None:
    """As the layers' own, where they have one; else as that of B."""
    model = base()
    shaken(tt.attach(model, f"lora(rank=4, lora_bias=True, targets={targets})", "a"))
    for rank in (4, 6, 1.0):
        made = converted(model, rank, "a")
        assert made.method.lora_bias == (base is tiny.llama)
        fresh = base()
        tt.attach(fresh, made, "b")
        torch.testing.assert_close(acting(fresh, "b"), acting(model, "a"), **CLOSE)


def test_a_share_gives_each_layer_its_rank() -> None:
    model = tiny.llama(num_hidden_layers=1)
    shaken(tt.attach(model, "loha(rank=4, targets=['q_proj', 'down_proj'])", "a"))
    ranks = []
    for share in (0.3, 0.6, 0.9):
        _, state = convert_to_lora(model, share, "a")
        ranks.append([t.shape[0] for key, t in state.items() if "lora_A" in key])
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


@pytest.mark.parametrize("case", ["gpt2", "embedding", "head", "bias", "conv"])
def test_other_layers(case: str, tmp_path: Path) -> None:
    make: Any = {"gpt2": tiny.gpt2, "head": tiny.llama_classifier, "conv": tiny.mixed}.get(
        case, tiny.bert
    )
    method = {
        "gpt2": "loha(rank=2, targets=['c_attn', 'c_proj'])",
        "embedding": "loha(rank=2, targets=['word_embeddings', 'query'])",
        "head": "loha(rank=2, targets=['q_proj'], train=['score'])",
        "bias": "lora(rank=2, targets=['query', 'value'], bias='lora_only')",
        "conv": "loha(rank=2, targets=['conv1', 'conv2', 'grouped', 'head'])",
    }[case]
    model = make()
    shaken(tt.attach(model, method, "a"))
    save_as_lora(tmp_path / "lora", model, 0.9999999, "a")
    other = make()
    tt.attach(other, tt.Adapter.load(tmp_path / "lora"), "b")
    key = "x" if case == "conv" else "input_ids"
    outputs = []
    for one, name in ((model, "a"), (other, "b")):
        with torch.no_grad(), tt.using(one, name):
            out = one(**{key: IDS})
            outputs.append(out if isinstance(out, Tensor) else out.logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-3, rtol=2e-3)


def test_experts() -> None:
    model = tiny.mixtral()
    method = "lora(rank=2, init='pissa', targets=['gate_up_proj', 'down_proj'])"
    shaken(tt.attach(model, method, "a"))
    expected = acting(model, "a")
    for rank in (4, 5, 24):  # 24 is all of the smaller side
        tt.attach(model, converted(model, rank, "a").detached(name="b"))
        torch.testing.assert_close(acting(model, "b"), expected, **CLOSE)
        tt.detach(model, "b")
    tt.attach(model, converted(model, 3, "a").detached(name="b"))
    assert not torch.allclose(acting(model, "b"), expected, **CLOSE)


def test_scales_count() -> None:
    model = made(face, {"default": PLAIN})
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    for rank in (4, 2, 6):
        config, state = convert_to_lora(model, rank)
        if rank != 2:
            got = loaded(config, state, tiny.llama(num_hidden_layers=2))
            torch.testing.assert_close(got, logits(model), **CLOSE)


def test_what_the_folder_says(tmp_path: Path) -> None:
    assert by_path.save_as_lora is save_as_lora
    config = {**PLAIN, "task_type": "CAUSAL_LM"}
    model = made(face, {"default": config})
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path / "lora", model, 6, progressbar=False)
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["task_type"]) == (6, 6, "CAUSAL_LM")
    assert said["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"rank": 0}, ConfigError, "above 0"),
        ({"rank": 0.0}, ConfigError, "above 0"),
        ({"rank": 2.0}, ConfigError, "write 2"),
        ({"rank": float("nan")}, ConfigError, "above 0"),
        ({"rank": 4, "compile_kwargs": {}}, ConfigError, "compile_kwargs"),
        ({"rank": 4, "adapter_name": "x"}, UnknownNameError, "'x'"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        convert_to_lora(made(face, {"default": PLAIN}), **given)


def test_more_than_a_layer_has() -> None:
    model = tiny.llama(num_hidden_layers=1)
    shaken(tt.attach(model, "loha(rank=2, targets=['q_proj'])", "a"))
    with pytest.raises(ConfigError, match="no more than rank 32"):
        convert_to_lora(model, 33, "a")


@pytest.mark.parametrize("method", ["bottleneck(size=4)", "prefix(length=2)", "norms"])
def test_what_is_no_change_of_matrices(method: str) -> None:
    model = tiny.llama(num_hidden_layers=1)
    tt.attach(model, method, "a")
    with pytest.raises((NotMergeableError, UnsupportedError)):
        convert_to_lora(model, 4, "a")
