"""LoRA whose start changes PEFT's base (LoftQ, CorDA, PiSSA by chance): here it is kept beside the base.

PEFT writes W' into the base; ours stays as it is, and the functions are the same, from the files of either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

import trimtab as tt
import trimtab.peft as ours
from tests import tiny
from tests.engine import kit as engine_kit
from tests.oracles import kit
from trimtab.errors import ConfigError, ModelError, UnsupportedError
from trimtab.frozen import view
from trimtab.peft.tuners.lora.config import CordaConfig as OurCordaConfig
from trimtab.peft.tuners.lora.corda import preprocess_corda as our_preprocess_corda

QD = ("q_proj", "down_proj")


def llama() -> nn.Module:
    """A model whose rows are whole blocks of 64: the CPU kernel of bitsandbytes takes wrong scales for others."""
    return kit.loud(lambda: tiny.llama(hidden_size=64, intermediate_size=64))()


@contextmanager
def on_cpu() -> Iterator[None]:
    """PEFT's LoftQ computes on CUDA alone; its own code, with that device taken for the CPU."""
    pytest.importorskip("bitsandbytes")
    whole = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        here = [torch.device("cpu") if str(one).startswith("cuda") else one for one in args]
        given = {k: "cpu" if str(v).startswith("cuda") else v for k, v in kwargs.items()}
        return whole(tensor, *here, **given)

    with pytest.MonkeyPatch.context() as patch, kit.quiet():
        patch.setattr(torch.Tensor, "to", to)
        yield


def loftq(iters: int = 1, **options: Any) -> LoraConfig:
    return LoraConfig(
        target_modules=list(QD), r=4, lora_alpha=options.pop("lora_alpha", 4), init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=iters), **options,
    )  # fmt: skip


def theirs(config: LoraConfig) -> PeftModel:
    with on_cpu():
        return get_peft_model(llama(), copy.deepcopy(config)).eval()  # type: ignore[arg-type]


def stirred(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def products(model: nn.Module) -> list[Tensor]:
    named = dict(model.named_parameters())
    return [
        (named[key.replace("lora_A", "lora_B")] @ named[key]).detach()
        for key in named
        if "lora_A" in key
    ]


@pytest.mark.filterwarnings("ignore:init_lora_weights='loftq' begins with B A")
@pytest.mark.parametrize(("iters", "alpha"), [(1, 4), (3, 4), (2, 6)])
def test_loftq_of_the_face_is_that_of_peft(iters: int, alpha: int) -> None:
    other = theirs(loftq(iters, lora_alpha=alpha))
    base = llama()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    config = ours.LoraConfig(
        target_modules=list(QD), r=4, lora_alpha=alpha, init_lora_weights="loftq",
        loftq_config=ours.LoftQConfig(loftq_iter=iters),
    )  # fmt: skip
    model = ours.get_peft_model(base, config).eval()
    for mine, peft in zip(products(model), products(other), strict=True):
        kit.assert_close(mine, peft, "B A")
    adapter = model.base_model.adapters["default"]
    kit.stir(adapter)
    pairs = kit.paired(adapter, other)
    kit.give(pairs)
    batch = kit.batch_of(base)
    kit.assert_same_function(base, other, pairs, batch)
    expected = kit.outputs(base, batch).detach()
    merged = tt.merge(base, "default")
    with torch.no_grad():
        kit.assert_close(kit.outputs(merged, batch), expected, "merged")
    model.unload()
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_the_face_warns_where_pefts_loftq_begins_away_from_the_base() -> None:
    config = ours.LoraConfig(
        target_modules=list(QD), r=4, lora_alpha=8, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the adapter adds 2 · B A"):
        ours.get_peft_model(llama(), config)


@pytest.mark.parametrize("iters", [1, 3])
def test_loftq_files_go_both_ways(iters: int, tmp_path: Path) -> None:
    other = stirred(theirs(loftq(iters)))
    batch = kit.batch_of(llama())
    with torch.no_grad():
        expected = kit.outputs(other, batch)
    with kit.quiet("The base model may have been changed", "You requested"):
        other.save_pretrained(tmp_path / "theirs")
    model = llama()
    adapter = tt.attach(model, tt.Adapter.load(tmp_path / "theirs"), "a")
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), expected, "theirs, read by ours")
    adapter.save(tmp_path / "ours")
    assert tt.Adapter.load(tmp_path / "ours") == adapter
    assert not any("change" in key for key in adapter.tensors)  # the base makes it again
    again = llama()
    tt.attach(again, tt.Adapter.load(tmp_path / "ours"), "a")
    with torch.no_grad():
        kit.assert_close(kit.outputs(again, batch), expected, "ours, read by ours")
    with on_cpu():
        read = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        kit.assert_close(kit.outputs(read, batch), expected, "ours, read by theirs")
    face = ours.PeftModel.from_pretrained(llama(), tmp_path / "theirs").eval()
    assert face.peft_config["default"].init_lora_weights == "loftq"
    with torch.no_grad():
        kit.assert_close(kit.outputs(face, batch), expected, "theirs, read by the face")


def test_the_cores_loftq_is_nearest_the_base_at_every_scale() -> None:
    """Divided by the scale, the product is what rounding lost, as far as its rank goes."""
    for bits in (4, 8):
        model = llama()
        layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
        adapter = tt.attach(
            model, tt.LoRA(rank=4, alpha=20, targets=QD, init=f"loftq(bits={bits})"), "a"
        )
        merged: Any = tt.merge(model, "a").get_submodule("model.layers.0.mlp.down_proj")
        tensors = adapter.at_site("model.layers.0.mlp.down_proj")
        product = 5 * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
        rounded = merged.weight - product
        rest = torch.linalg.svdvals(layer.weight - rounded)[4:].square().sum().sqrt()
        torch.testing.assert_close((merged.weight - layer.weight).norm(), rest)
        assert len(rounded[0].mul(1e4).round().unique()) <= (16 if bits == 4 else 255)
        assert 0 < rest < (layer.weight - rounded).norm()
    with pytest.raises(UnsupportedError, match="full rank"):
        tt.scaled(adapter, 0.5)
    with pytest.raises(ConfigError, match="whose norm DoRA would need"):
        tt.DoRA(rank=4, init="loftq")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = engine_kit.base()
    base.model.save_pretrained(tmp_path / "dense")
    base.tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_loftq_of_a_base_in_few_bits_begins_as_what_rounding_lost(
    storage: Any, folder: Path, tmp_path: Path
) -> None:
    dense = tt.load(folder, dtype="float32").model
    base = tt.load(folder, dtype="float32", storage=storage).model
    adapter = tt.attach(base, tt.LoRA(rank=4, alpha=12, init="loftq"), "a")
    for path in {site.path for site in adapter.sites}:
        weight: Any = dense.get_submodule(path).weight
        layer = view(base.get_submodule(path).base_layer)
        assert layer is not None and layer.rounded
        found = adapter.at_site(path)
        lost = weight - layer.dense()
        left = lost - 3 * found["lora_B.weight"] @ found["lora_A.weight"]
        best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), best, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"Load the base with storage='loftq\(rank=4, iters=2\)'"):
        tt.attach(base, tt.LoRA(rank=4, init="loftq(iters=2)"), "b")
    adapter.save(tmp_path / "a")
    plain = LoraConfig.from_pretrained(tmp_path / "a")  # nothing is left to be made again
    assert plain.init_lora_weights is True
    assert tt.Adapter.load(tmp_path / "a") == adapter
    ids = {"input_ids": torch.arange(3, 11)[None]}
    expected = kit.outputs(base, ids).detach()
    again = tt.load(folder, dtype="float32", storage=storage).model
    tt.attach(again, tt.Adapter.load(tmp_path / "a"), "a")
    assert torch.equal(kit.outputs(again, ids), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_is_loaded_in_several_steps_of_loftq(
    bits: int, folder: Path, tmp_path: Path
) -> None:
    """The base in few bits and its adapter compute what LoftQ gives on a dense base, where Q stands in W's place."""
    init = f"loftq(bits={bits}, iters=3)"
    storage = f"loftq(rank=4, iters=3, bits={bits})"
    dense = tt.load(folder, dtype="float32")
    weights = {
        n: p.detach().clone()
        for n, p in dense.model.named_parameters()
        if n.endswith("proj.weight")
    }
    base = tt.load(folder, dtype="float32", storage=storage)
    assert base.storage == storage
    lora = tt.LoRA(rank=4, alpha=12, init=init)
    tt.attach(dense.model, lora, "a")
    adapter = tt.attach(base.model, lora, "a")
    plain = tt.load(folder, dtype="float32", storage="nf4" if bits == 4 else "int8")
    tt.attach(plain.model, tt.LoRA(rank=4, alpha=12, init="loftq"), "a")

    def off(model: Any) -> float:
        merged = dict(tt.merge(model, "a").named_parameters())
        return sum(float((merged[n] - w).detach().square().sum()) for n, w in weights.items())

    # Scales of NF4 are in 8 bits there, and whole in the adapter's own rounding.
    assert off(base.model) == pytest.approx(off(dense.model), rel=0.03 if bits == 4 else 1e-3)
    assert off(base.model) < 0.95 * off(plain.model)
    ids = {"input_ids": torch.arange(3, 11)[None]}
    expected = kit.outputs(base.model, ids).detach()
    adapter.save(tmp_path / "a")
    saved = tt.Adapter.load(tmp_path / "a")
    assert saved.base is not None
    assert saved.base.storage == storage.replace(", bits=4", "")
    again = tt.load(folder, dtype="float32", storage=saved.base.storage, exempt=saved.base.exempt)
    tt.attach(again.model, saved, "a")
    assert torch.equal(kit.outputs(again.model, ids), expected)
    with pytest.warns(UserWarning, match="linear layers are in loftq"):
        tt.attach(plain.model, saved, "b")


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("loftq", "rank: Field required"),
        ("loftq(rank=0)", "rank: .*greater than or equal to 1"),
        ("loftq(rank=4, bits=3)", "bits: .*4 or 8"),
        ("loftq(rank=4, steps=2)", "unknown option 'steps'"),
        ("loftq(4)", "options are written name=value"),
        ("loftk(rank=4)", r"Did you mean 'loftq\(rank=16\)'"),
    ],
)
def test_a_storage_of_loftq_is_checked(storage: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tt.load(folder, storage=storage)


def test_loftq_for_some_layers_leaves_the_others_plain(folder: Path) -> None:
    others = ["*.[okv]_proj=nf4", "gate_proj=nf4", "up_proj=nf4", "q_proj=loftq(rank=2, iters=2)"]
    base = tt.load(folder, dtype="float32", storage="loftq(rank=4, iters=2)", exempt=others)
    tt.attach(
        base.model,
        tt.LoRA(targets=QD, rank=4, init="loftq(iters=2)", rank_pattern={"q_proj": 2}),
        "a",
    )
    with pytest.raises(ConfigError, match="it is stored as nf4"):
        tt.attach(base.model, tt.LoRA(targets="o_proj", rank=4, init="loftq(iters=2)"), "b")


def test_loftq_needs_the_dense_weights_of_a_base_in_few_bits(folder: Path, tmp_path: Path) -> None:
    base = tt.load(folder, dtype="float32", storage="nf4").model
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no safetensors files"):
        tt.attach(base, tt.LoRA(rank=4, init="loftq"), "a", weights=tmp_path / "empty")
    with pytest.raises(ModelError, match="no repository that was downloaded"):
        tt.attach(base, tt.LoRA(rank=4, init="loftq"), "a", weights="nobody/nothing")
    tt.attach(base, tt.LoRA(rank=4, init="loftq"), "a", weights=folder)


def test_replacing_weights_by_loftq_is_what_peft_does(folder: Path) -> None:
    """The formula is PEFT's own; its function takes layers of bitsandbytes on CUDA alone."""
    dense = tt.load(folder, dtype="float32").model
    base = tt.load(folder, dtype="float32", storage="nf4").model
    config = ours.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=4)
    model = ours.get_peft_model(base, config)
    ours.replace_lora_weights_loftq(model)
    adapter = model.base_model.adapters["default"]
    first = {key: value.clone() for key, value in adapter.tensors.items()}
    for path in {site.path for site in adapter.sites}:
        weight: Any = dense.get_submodule(path).weight
        layer = view(base.get_submodule(path).base_layer)
        assert layer is not None
        out = _low_rank_decomposition(weight.detach() - layer.dense(), reduced_rank=4)
        found = adapter.at_site(path)
        product = found["lora_B.weight"] @ found["lora_A.weight"]
        kit.assert_close(product, out["L"] @ out["R"], path)
    kit.stir(adapter)
    stirred_values = {key: value.clone() for key, value in adapter.tensors.items()}
    seen: list[str] = []

    def keep_first(model: nn.Module, name: str) -> bool:
        seen.append(name)
        return len(seen) == 1

    ours.replace_lora_weights_loftq(model, folder / "model.safetensors", callback=keep_first)
    for key, value in adapter.tensors.items():
        kept = first if key.startswith(f"{seen[0]}.") else stirred_values
        assert torch.equal(value, kept[key]), key
    with pytest.raises(ConfigError, match="no LoRA on a layer that is stored in few bits"):
        ours.replace_lora_weights_loftq(ours.get_peft_model(dense, config), folder)


# -- CorDA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("make", [kit.llama, kit.gpt2])
def test_corda_of_the_face_is_that_of_peft(mode: Any, make: kit.Make, tmp_path: Path) -> None:
    gpt2 = make is kit.gpt2
    options: dict[str, Any] = {
        "target_modules": ["c_attn", "c_fc"] if gpt2 else list(QD), "r": 4, "lora_alpha": 6, "fan_in_fan_out": gpt2,
        "init_lora_weights": "corda",
    }  # fmt: skip
    data = [kit.batch_of(make(), rows=1, length=40, seed=seed) for seed in range(3)]
    data = [{"input_ids": one["input_ids"].clamp_min(3)} for one in data]

    def run(model: nn.Module) -> Any:
        def step() -> None:
            with torch.no_grad():
                for batch in data:
                    model(**batch)

        return step

    config = LoraConfig(**options, corda_config=CordaConfig(corda_method=mode))
    base = make()
    with kit.quiet():
        preprocess_corda(base, config, run(base))
        other = get_peft_model(base, copy.deepcopy(config)).eval()  # type: ignore[arg-type]
    mine = make()
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    own = ours.LoraConfig(**options, corda_config=OurCordaConfig(corda_method=mode))
    with pytest.raises(ConfigError, match="preprocess_corda"):
        ours.get_peft_model(mine, own)
    our_preprocess_corda(mine, own, run(mine))
    model = ours.get_peft_model(mine, own).eval()
    for found, peft in zip(products(model), products(other), strict=True):
        torch.testing.assert_close(found, peft, atol=2e-4, rtol=2e-3)  # inverses lose digits
    batch = kit.batch_of(mine)
    adapter = model.base_model.adapters["default"]
    with torch.no_grad(), model.disable_adapter():
        bare = kit.outputs(mine, batch)
    with torch.no_grad():
        kit.assert_close(kit.outputs(mine, batch), bare, "it begins at the base")
    kit.stir(adapter)
    with torch.no_grad():
        expected = kit.outputs(mine, batch)
    tt.exported(adapter).save(tmp_path / "shared")
    with kit.quiet(), torch.no_grad():
        read = PeftModel.from_pretrained(make(), tmp_path / "shared").eval()
        kit.assert_close(kit.outputs(read, batch), expected, "shared")
    model.unload()
    assert all(torch.equal(before[key], value) for key, value in mine.state_dict().items())


def test_files_of_covariances_are_pickles_and_refused() -> None:
    config = ours.LoraConfig(
        init_lora_weights="corda", corda_config=OurCordaConfig(covariance_file="covariances.pt")
    )
    with pytest.raises(UnsupportedError, match="nothing is unpickled"):
        our_preprocess_corda(kit.llama(), config, lambda: None)


# -- PiSSA by chance ----------------------------------------------------------------------------------


def steep() -> nn.Module:
    """Weights with a few large directions, on which a random decomposition does not depend on chance."""
    model = kit.llama()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(QD):
                left = torch.randn(module.weight.shape[0], 4, generator=generator)
                right = torch.randn(4, module.weight.shape[1], generator=generator)
                module.weight.mul_(0.1).add_(left @ right * 0.05)
    return model


def test_files_of_pissa_by_chance_are_read_with_a_warning(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=list(QD), r=4, lora_alpha=6, init_lora_weights="pissa_niter_16"
    )
    other = stirred(kit.peft_model(steep, config))
    batch = kit.batch_of(steep())
    with torch.no_grad():
        expected = kit.outputs(other, batch)
    with kit.quiet("PiSSA changes the base weights"):
        other.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="PEFT draws others each time"):
        adapter = tt.Adapter.load(tmp_path / "theirs")
    model = steep()
    adapter = tt.attach(model, adapter, "a")
    with torch.no_grad():
        kit.assert_close(kit.outputs(model, batch), expected, "theirs, read by ours")
    tt.exported(adapter).save(tmp_path / "ours")
    with kit.quiet(), torch.no_grad():
        read = PeftModel.from_pretrained(steep(), tmp_path / "ours").eval()
        kit.assert_close(kit.outputs(read, batch), expected, "ours, read by theirs")
    with pytest.warns(UserWarning, match="PEFT draws others each time"):
        face = ours.PeftModel.from_pretrained(steep(), tmp_path / "theirs").eval()
    assert face.peft_config["default"].init_lora_weights == "pissa_niter_16"
    with torch.no_grad():
        kit.assert_close(kit.outputs(face, batch), expected, "theirs, read by the face")
