"""Experts in few bits: rounded as they are loaded, routers left alone, merged back into what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import trimtab as tt
from tests.engine import kit
from tests.tiny import SMALL_DECODER, mixtral, qwen3_moe
from trimtab.errors import ModelError, TargetError, UnsupportedError
from trimtab.frozen.experts import ExpertLayer
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.models.quantise import targets
from trimtab.models.saved import save_base
from trimtab.models.storage import STORAGES

IDS = torch.arange(3, 35).view(4, 8)


def gpt_oss() -> GptOssForCausalLM:
    """Transposed parameters with biases, gates and values interleaved."""
    torch.manual_seed(0)
    config = GptOssConfig(**SMALL_DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_bias" in name or "sinks" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def qwen2_moe() -> Qwen2MoeForCausalLM:
    """A dense expert beside the chosen ones, with a gate that is an ordinary linear layer."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SMALL_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, decoder_sparse_step=1,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return Qwen2MoeForCausalLM(config).eval()


MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral, "qwen3-moe": qwen3_moe, "gpt-oss": gpt_oss, "qwen2-moe": qwen2_moe,
}  # fmt: skip


@pytest.fixture(params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = MIXTURES[request.param]()
    model.save_pretrained(tmp_path / request.param)
    kit.base().tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def logits(base: tt.Base) -> Tensor:
    with torch.no_grad():
        out: Tensor = base.model(input_ids=IDS).logits
    return out


def load(folder: Path, **options: Any) -> tt.Base:
    base = tt.load(folder, dtype="float32", **options)
    base.model.config._experts_implementation = "eager"
    return base


@pytest.mark.parametrize("storage", STORAGES)
def test_experts_are_rounded_one_by_one_as_linear_layers_are(folder: Path, storage: Any) -> None:
    dense, base = load(folder), load(folder, storage=storage)
    assert base.storage == storage
    assert not torch.equal(logits(base), logits(dense))
    found = [(n, m) for n, m in base.model.named_modules() if isinstance(m, LowBitExperts)]
    assert found
    for path, module in found:
        assert not [n for n, p in module.named_parameters() if p.dim() == 3]
        for name in ("gate_up_proj", "down_proj"):
            for expert in (0, 3):
                old = ExpertLayer.of(dense.model.get_submodule(path), name, expert)
                new = ExpertLayer.of(module, name, expert)
                expected = FORMATS[storage](old.dense(), None).dense(torch.float32)
                assert torch.equal(new.dense(), expected)
                x = torch.randn(3, old.in_features)
                wanted = torch.nn.functional.linear(x, expected, old.bias())
                torch.testing.assert_close(new.call(x), wanted)


def test_the_dense_twin_computes_the_same(folder: Path) -> None:
    """Each experts module replaced by the one of transformers, with the weights that the codes stand for."""
    base = load(folder, storage="nf4")
    expected = logits(base)
    for path, module in list(base.model.named_modules()):
        if isinstance(module, LowBitExperts):
            new = {}
            for name in ("gate_up_proj", "down_proj"):
                each = [ExpertLayer.of(module, name, e).dense() for e in range(4)]
                new[name] = torch.stack([w.T if module.is_transposed else w for w in each])
            twin = module.with_dense(new)
            assert type(twin).__module__.startswith("transformers.")
            parent, _, child = path.rpartition(".")
            base.model.get_submodule(parent).add_module(child, twin)
    torch.testing.assert_close(logits(base), expected)


def test_routers_stay_as_they_are(folder: Path) -> None:
    base, dense = load(folder, storage="int8"), load(folder)
    chosen = targets(dense.model, ())
    assert any(name.endswith("gate_up_proj") for name in chosen)
    assert not [n for n in chosen if n.endswith(("gate.weight", "router.weight", "lm_head.weight"))]
    for name, value in dense.model.state_dict().items():
        if "router" in name or ".gate." in name or "shared_expert_gate" in name:
            assert torch.equal(base.model.state_dict()[name], value)


def test_adapters_are_the_same_sites_and_files(folder: Path, tmp_path: Path) -> None:
    dense, base = load(folder), load(folder, storage="fp8")
    method = tt.LoRA(rank=2, targets="all-linear")
    one, other = (tt.attach(each.model, method, "a") for each in (dense, base))
    assert [s.path for s in one.sites] == [s.path for s in other.sites]
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_(std=0.1)
    one.save(tmp_path / "adapter")
    with pytest.warns(
        UserWarning, match="in another storage: there all layers are dense, here .* in fp8"
    ):
        tt.attach(base.model, tt.Adapter.load(tmp_path / "adapter"), "b")
    tt.detach(base.model, "a")
    merged = tt.merge(base.model, "b")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits(base), atol=1e-4, rtol=1e-4)
    assert not [m for m in merged.modules() if isinstance(m, LowBitExperts)]


def test_one_parameter_of_two_may_be_exempt(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    kit.base().tokenizer.save_pretrained(tmp_path)
    base = load(tmp_path, storage="nf4", exempt=["down_proj", "q_proj"])
    layer = base.model.model.layers[0]
    assert layer.mlp.experts.down_proj.shape == (4, 32, 24)
    assert "gate_up_proj_codes" in dict(layer.mlp.experts.named_buffers())
    assert not isinstance(layer.self_attn.q_proj, LowBitLinear)
    tt.attach(base.model, tt.LoRA(rank=2, targets=["**.experts.down_proj"]), "a")
    merged = tt.merge(base.model, "a")
    assert not isinstance(merged.model.layers[0].mlp.experts, LowBitExperts)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits(base), atol=1e-5, rtol=1e-5)
    with pytest.raises(TargetError, match="'dwn_proj' matches no linear layer.*'down_proj'"):
        load(tmp_path, storage="nf4", exempt=["dwn_proj"])


def test_what_is_in_few_bits_is_not_trained_itself(folder: Path) -> None:
    base = load(folder, storage="nf4")
    with pytest.raises(UnsupportedError, match="cannot be trained itself"):
        tt.attach(base.model, tt.Full(targets="**.experts.down_proj"), "a")


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    kit.base().tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"intermediate_size": 24', '"intermediate_size": 40')
    )
    with pytest.raises(ModelError, match=r"experts\.\w+: the weight has shape \(4, .*, not \(4, "):
        load(tmp_path, storage="nf4")


def test_experts_that_cannot_be_run_in_few_bits_are_told_of() -> None:
    model = mixtral()
    model.model.layers[1].mlp.experts.has_post_expert_norm = True
    with pytest.warns(UserWarning, match=r"2 parameters of experts .* 'model.layers.1.mlp.experts"):
        names = targets(model, ())
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert "model.layers.1.mlp.experts.down_proj" not in names
    targets(model, ["experts"])  # whoever exempts them need not be told


def saved(base: tt.Base, folder: Path) -> Path:
    save_base(base.model, folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def same_tensors(one: tt.Base, other: tt.Base) -> None:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [n for n in ours if ours[n].dtype != theirs[n].dtype]
    assert not [n for n in ours if not torch.equal(ours[n], theirs[n])]


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_saved_is_what_loads(folder: Path, tmp_path: Path, storage: Any) -> None:
    base = load(folder, storage=storage)
    again = load(saved(base, tmp_path / "a"))
    assert again.storage == storage
    same_tensors(base, again)
    assert torch.equal(logits(base), logits(again))
    twice = load(saved(again, tmp_path / "b"))
    same_tensors(base, twice)
    tt.attach(again.model, tt.LoRA(rank=2, targets="all-linear"), "a")
    dense = tt.merge(again.model, "a")
    save_base(dense, tmp_path / "c")  # type: ignore[arg-type]
    base.tokenizer.save_pretrained(tmp_path / "c")
    plain = load(tmp_path / "c")
    assert not [m for m in plain.model.modules() if isinstance(m, LowBitExperts)]
    torch.testing.assert_close(logits(plain), logits(base), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "exempt",
    [
        ["experts.down_proj=int8", "q_proj=fp8"],
        ["experts.down_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ],
)
def test_mixed_formats_are_saved_each_as_it_is(folder: Path, tmp_path: Path, exempt: Any) -> None:
    base = load(folder, storage="nf4", exempt=exempt)
    again = load(saved(base, tmp_path / "a"))
    same_tensors(base, again)
    for path, module in base.model.named_modules():
        if isinstance(module, LowBitExperts):
            twin = again.model.get_submodule(path)
            assert isinstance(twin, LowBitExperts)
            assert twin.formats == module.formats


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("codes", r"experts\.down_proj: the checkpoint lacks its codes"),
        ("scales", r"experts\.down_proj: the checkpoint lacks .*scales"),
        ("outer", r"experts\.down_proj: the checkpoint lacks .*outer"),
    ],
)
def test_a_part_that_is_missing_is_named(tmp_path: Path, part: str, says: str) -> None:
    mixtral().save_pretrained(tmp_path / "dense")
    kit.base().tokenizer.save_pretrained(tmp_path / "dense")
    folder = saved(load(tmp_path / "dense", storage="nf4"), tmp_path / "a")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if "experts.down_proj" in n and n.endswith(part))
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=says):
        load(folder)


def test_stored_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "dense")
    kit.base().tokenizer.save_pretrained(tmp_path / "dense")
    folder = saved(load(tmp_path / "dense", storage="int8"), tmp_path / "a")
    config = (folder / "config.json").read_text()
    other = config.replace('"intermediate_size": 24', '"intermediate_size": 40')
    (folder / "config.json").write_text(other)
    with pytest.raises(ModelError, match=r"_proj: .* not those of 4 experts of \d+ × \d+"):
        load(folder)
    (folder / "config.json").write_text(config)
    (file,) = folder.glob("*.safetensors")
    fewer = {n: t[:3].clone() if "experts." in n else t for n, t in load_file(file).items()}
    save_file(fewer, file, {"format": "pt"})
    with pytest.raises(ModelError, match="_proj: .* not those of 4 experts"):
        load(folder)
