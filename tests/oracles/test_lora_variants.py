"""What the variants of PEFT's LoRA do in training, and where only some layers of PEFT's have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, MontecloraConfig, PeftModel, VeloraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor, nn

import trimtab as tt
from tests.oracles import kit
from trimtab.adapt.bank import bank_of
from trimtab.adapt.variational import Draws
from trimtab.adapt.variational import drawn as drawn_here
from trimtab.errors import ConfigError
from trimtab.methods import monteclora

QV = ("q_proj", "v_proj")


def theirs(**options: Any) -> PeftModel:
    return kit.peft_model(
        kit.llama, LoraConfig(r=4, lora_alpha=6, target_modules=list(QV), **options)
    )


def paired(method: tt.Method, other: PeftModel) -> tuple[nn.Module, tt.Adapter, kit.Pairs]:
    """Our model beside PEFT's, with the same values."""
    model = kit.llama()
    adapter = tt.attach(model, method, "default")
    kit.stir(adapter)
    pairs = kit.paired(adapter, other)
    kit.give(pairs)
    return model, adapter, pairs


# -- QA-LoRA: in PEFT of GPTQ's layers alone ----------------------------------------------------------


@pytest.mark.parametrize("group", [2, 8, 16])
def test_qalora_is_that_of_peft_s_quantised_layers(group: int) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=group)
    plain = nn.Linear(16, 12)
    other = GPTQLoraLinear(plain, "default", config=config, r=4, lora_alpha=6)
    model = nn.Sequential(nn.Linear(16, 12))
    model.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()})
    method = tt.QALoRA(rank=4, alpha=6, group=group, targets="0")
    adapter = tt.attach(model, method, "default")
    kit.stir(adapter)
    named = dict(other.named_parameters())
    pairs = {
        key: (tensor, named[key.removeprefix("0.").replace(".weight", ".default.weight")])
        for key, tensor in adapter.tensors.items()
    }
    kit.give(pairs)
    x = torch.randn(2, 5, 16)
    left, right = model(x), other(x)
    kit.assert_close(left, right, "outputs")
    kit.objective(left).backward()
    kit.objective(right).backward()
    for key, (mine, peft) in pairs.items():
        kit.assert_close(mine.grad, peft.grad, key)
    kit.assert_close(tt.merge(model, "default")(x), left, "merged")
    assert method.to_peft(adapter.places())["qalora_group_size"] == group


class Packed(nn.Module):
    """A layer that shows its sizes and, as GPTQ's do, no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 12
        self.register_buffer("qweight", torch.randn(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.get_buffer("qweight"))


def test_qalora_is_for_peft_where_peft_has_it(tmp_path: Path) -> None:
    for layer, known in ((Packed(), True), (nn.Linear(16, 12), False)):
        adapter = tt.attach(nn.Sequential(layer), tt.QALoRA(rank=4, group=4, targets="0"), "a")
        assert adapter.origin.in_peft == known
        adapter.save(tmp_path / str(known))
        said = json.loads((tmp_path / str(known) / "adapter_config.json").read_text())
        assert said["peft_type"] == ("LORA" if known else "TRIMTAB_QALORA")
        assert (said["use_qalora"], said["qalora_group_size"]) == (True, 4)


def test_qalora_on_a_layer_that_has_no_whole_number_of_groups() -> None:
    with pytest.raises(ConfigError, match="16 inputs has no whole number of groups of 5"):
        tt.attach(nn.Sequential(nn.Linear(16, 12)), tt.QALoRA(group=5, targets="0"))


# -- KaSA ---------------------------------------------------------------------------------------------


def test_the_loss_of_kasa_is_that_of_peft() -> None:
    other = theirs(kasa_config=KasaConfig(beta=0.3, gamma=0.7))
    method = tt.KaSA(rank=4, alpha=6, beta=0.3, gamma=0.7, targets=QV)
    model, _, pairs = paired(method, other)
    kit.outputs(model.train(), kit.batch_of(model))
    ours = torch.stack([value for _, _, value in bank_of(model).take_losses()]).sum()
    loss = other.base_model._get_kasa_loss()
    kit.assert_close(ours, loss, "loss")
    ours.backward()
    loss.backward()
    for key, (mine, peft) in pairs.items():
        kit.assert_close(mine.grad, peft.grad, key)


def test_what_kasa_takes_out_of_the_base_is_kept() -> None:
    """Disabled it is the base as it was, which PEFT's is no more; detached, it may be merged anywhere."""
    model = kit.llama()
    batch = kit.batch_of(model)
    with torch.no_grad():
        before = kit.outputs(model, batch)
        adapter = tt.attach(model, tt.KaSA(rank=4, targets=QV), "a")
        acting = kit.outputs(model, batch)
        assert (acting - before).abs().max() > 1e-4
        with tt.using(model, None):
            assert torch.equal(kit.outputs(model, batch), before)
        other = kit.llama()
        tt.attach(other, tt.exported(adapter), "a")
        assert tt.exported(adapter).method.kind == "lora"
        kit.assert_close(kit.outputs(other, batch), acting, "as a LoRA")
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    p = adapter.at_site("model.layers.0.self_attn.q_proj")
    taken = p["lora_B_first.weight"] @ p["lora_A_first.weight"] * adapter.method.scaling
    values = torch.linalg.svdvals(weight - taken)
    assert values[-4:].max() < 1e-5 < values[-5]


def test_kasa_needs_a_rank_below_that_of_the_weight() -> None:
    with pytest.raises(
        ConfigError, match="least components gives a weight of 4 × 8 a rank of at most 3"
    ):
        tt.attach(nn.Sequential(nn.Linear(8, 4)), tt.KaSA(rank=4, targets="0"))


# -- VeLoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 5, 8, 64])
@pytest.mark.parametrize("direction", ["batch_average", "batch_average_once"])
def test_gradients_of_velora_are_those_of_peft(direction: Any, groups: int) -> None:
    """Over two batches: only one of the two settings looks at the second."""
    other = theirs(velora_config=VeloraConfig(num_groups=groups, scale=1.5, init_type=direction))
    method = tt.VeLoRA(
        rank=4, alpha=6, groups=groups, backward_scale=1.5, direction=direction, targets=QV
    )
    model, adapter, pairs = paired(method, other)
    plain, exact = kit.llama(), tt.LoRA(rank=4, alpha=6, targets=QV)
    lora = tt.attach(plain, exact, "default")
    with torch.no_grad():
        for key, tensor in lora.tensors.items():
            tensor.copy_(adapter.tensors[key])
    for seed in (1, 2):
        batch = kit.batch_of(model, seed=seed)
        kit.assert_same_function(model.train(), other.train(), pairs, batch)
        kit.objective(kit.outputs(plain.train(), batch)).backward()
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.allclose(adapter.tensors[key].grad, lora.tensors[key].grad, atol=1e-4)
    kit.assert_close(
        adapter.tensors[key.replace("A", "B")].grad, lora.tensors[key.replace("A", "B")].grad, "B"
    )
    embeds = dict(other.named_buffers())
    for name, tensor in adapter.named().items():
        if name.slot == "lora_velora_embed":
            peft = embeds[f"base_model.model.{name.path}.{name.slot}.default"]
            kit.assert_close(tensor, peft, name.key)


def test_velora_keeps_less_for_backward() -> None:
    kept: dict[str, int] = {}
    for kind in ("lora", "velora"):
        model = nn.Sequential(nn.Linear(256, 8))
        tt.attach(model, f"{kind}(rank=2, targets='0')", "a")
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() if not isinstance(tensor, nn.Parameter) else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(torch.randn(64, 256))
        kept[kind] = sum(sizes)
    assert kept["lora"] > 64 * 256 > 3 * kept["velora"]


# -- MonteCLoRA ---------------------------------------------------------------------------------------


def drawn(sampler: MontecloraSampler) -> Draws:
    """What PEFT's sampler takes next, as our method takes it."""
    found = sampler.sampler.buffer[sampler.sampler.index]
    return Draws(found["z_mvn"], found["z_wishart"].diag(), found["z_dirichlet"])


@pytest.mark.parametrize("entropy", [False, True])
def test_monteclora_with_the_same_draws_is_that_of_peft(entropy: bool, monkeypatch: Any) -> None:
    other = theirs(
        monteclora_config=MontecloraConfig(
            num_samples=3,
            sample_scaler=0.2,
            kl_loss_weight=0.01,
            use_entropy=entropy,
            buffer_size=2,
        )
    )
    method = tt.MonteCLoRA(
        rank=4, alpha=6, samples=3, noise=0.2, kl_weight=0.01, entropy=entropy, targets=QV
    )
    model, adapter, pairs = paired(method, other)
    samplers = [m for m in other.modules() if isinstance(m, MontecloraSampler)]
    for _ in range(3):  # beyond its buffer, too
        for sampler in samplers:
            if sampler.sampler.index >= sampler.sampler.buffer_size:
                sampler.sampler._refill_buffer()
        draws = iter([drawn(sampler) for sampler in samplers])
        monkeypatch.setattr(monteclora, "drawn", lambda a, n, _, draws=draws: next(draws))
        batch = kit.batch_of(model)
        left, right = kit.outputs(model.train(), batch), kit.outputs(other.train(), batch)
        own = torch.stack([value for _, _, value in bank_of(model).take_losses()]).sum()
        loss = other.base_model._get_monteclora_loss()
        kit.assert_close(left, right, "outputs")
        kit.assert_close(own, loss, "loss")
        (kit.objective(left) + own).backward()
        (kit.objective(right) + loss).backward()
        for key, (mine, peft) in pairs.items():
            kit.assert_close(mine.grad, peft.grad, key)
        with torch.no_grad():
            calm = kit.outputs(model.eval(), batch)
            kit.assert_close(calm, kit.outputs(other.eval(), batch), "evaluation")
            assert (left - calm).abs().max() > 1e-3
    last = {f"{name}.{slot}": getattr(m, slot) for name, m in other.named_modules()
            if isinstance(m, MontecloraSampler) for slot in ("expert_weights", "gaussian_var_prior")}  # fmt: skip
    for name, tensor in adapter.named().items():
        slot = name.slot.rpartition(".")[2]
        if name in adapter.fixed:
            key = f"base_model.model.{name.path}.lora_monteclora_sampler.default.{slot}"
            kit.assert_close(tensor, last[key], name.key)


def test_draws_of_monteclora_are_distributed_as_peft_s() -> None:
    torch.manual_seed(0)
    sampler = MontecloraSampler(6, 4, 3, buffer_size=4000, device="cpu")
    ours = [drawn_here(torch.zeros(4, 6), 3) for _ in range(4000)]
    theirs = [
        Draws(s["z_mvn"], s["z_wishart"].diag(), s["z_dirichlet"]) for s in sampler.sampler.buffer
    ]
    for part in range(3):
        mine, peft = (torch.stack([draw[part] for draw in draws]) for draws in (ours, theirs))
        torch.testing.assert_close(mine.mean(), peft.mean(), atol=0.12, rtol=0)
        torch.testing.assert_close(mine.std(), peft.std(), atol=0.12, rtol=0)
    chi = torch.stack([draw.chi for draw in ours])
    torch.testing.assert_close(chi.mean(0), torch.full((4,), 4.0), atol=0.2, rtol=0)
    torch.testing.assert_close(chi.var(0), torch.full((4,), 8.0), atol=1.0, rtol=0)
