"""Memory that is found without values: against sums by hand, against a real step, and in its order."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from tests.data import kit as data_kit
from tests.engine import kit as engine_kit
from tests.engine.kit import noting
from tests.train import kit
from trimtab.adapt.acting import using
from trimtab.engine import Engine
from trimtab.errors import ConfigError, ModelError, UnknownNameError
from trimtab.models.load import load_hollow
from trimtab.train import facts
from trimtab.train.devices import GPUS, Device, named_gpu, this_device
from trimtab.train.footprint import Footprint, footprint
from trimtab.train.hollow import Hollow
from trimtab.train.ledger import LARGE, PARTS, Ledger
from trimtab.train.plan import plan
from trimtab.train.proposal import proposed
from trimtab.train.recipe_file import make_recipe
from trimtab.train.setup import opened_base, resolved
from trimtab.train.sources import read_sources

EXACT = Device("a device that adds nothing", None, 0, 0.0)


def config_folder(path: Path, **sizes: int) -> Path:
    """A model folder without weights."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=400, **sizes)  # type: ignore[arg-type]
    config.save_pretrained(path)
    data_kit.byte_level(data_kit.CHATML).save_pretrained(path)
    return path


def of(home: Path, **options: Any) -> Footprint:
    return footprint(kit.recipe(home, "run", **options))


def test_what_linear_layers_keep_is_the_sum_by_hand() -> None:
    rows, wide, inner, out = 32, 8, 16, 4
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Linear(wide, inner, bias=False), nn.ReLU(), nn.Linear(inner, out, bias=False)
        )
    account = Ledger(vocabulary=999)
    account.hold(net.parameters(), "weights")
    with Hollow(account):
        account.phase("step", rows)
        x = torch.empty(rows, wide, device="meta")
        loss = net(x).sum()
        loss.backward()
        account.hold([parameter.grad for parameter in net.parameters()], "gradients")
    found = account.moments()["step"]
    weights = wide * inner + inner * out
    # Each layer keeps its input, and ReLU its output, the next input; the loss and its gradient are a number each.
    assert found.parts["weights"] == 4 * weights
    assert found.parts["activations"] == 4 * (rows * wide + rows * inner + 2)
    # forward, and backward to all weights and to the inner activations
    assert found.flops == 2 * rows * (2 * weights + inner * out)
    assert set(found.parts) == set(PARTS)


def test_large_blocks_and_small_ones_do_not_take_each_others_room() -> None:
    account = Ledger(vocabulary=999)
    with Hollow(account):
        weight = torch.empty(100, device="meta")
        account.hold([weight], "weights")
        account.phase("step")
        small = [torch.empty(1000, device="meta") for _ in range(3)]
        del small
        large = torch.empty(LARGE // 4, device="meta")
        beside = torch.empty(10, device="meta")
        del large, beside, weight
    found = account.moments()["step"]
    assert found.total == 400 + LARGE + 40
    assert found.apart == 400 + 12_000 + LARGE
    assert found.moving == 12_000
    device = Device("", None, 1_000_000, 0.5)
    parts = device.parts(found)
    assert (parts["libraries"], parts["allocator"]) == (1_000_000, 12_000 - 40 + 6_000)
    assert device.needs(found) == 1_000_000 + found.apart + 6_000


def test_nothing_is_left_alive_but_what_is_held() -> None:
    account = Ledger(vocabulary=7)
    with Hollow(account):
        account.phase("one")
        kept = torch.empty(1000, device="meta")
        view = kept[10:20]
        logits = torch.empty(5, 7, device="meta")
        account.phase("other")
        del logits
        other = view * 2
    one, two = (account.moments()[name].parts for name in ("one", "other"))
    assert (one["logits"], one["temporary"]) == (4 * 35, 4000)
    assert two["temporary"] == 4000 + other.nbytes or two["logits"]  # whatever is heavier


def test_integers_are_real_and_floats_are_alike() -> None:
    with Hollow(lambda *_: None):
        ids = torch.arange(6, device="meta")
        x = torch.zeros(6, 3, device="meta")
        assert ids.tolist() == [0, 1, 2, 3, 4, 5] and ids.sum().item() == 15
        assert torch.equal(x, x + 1) and float(x.norm()) == 0.0
        assert x.cpu().tolist() == [[1.0] * 3] * 6
        assert x[x > 0].shape == (18,)
        assert x[ids].is_meta and x[ids].shape == (6, 3)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_a_real_step_keeps_what_the_hollow_one_does(home: Path, recompute: str) -> None:
    recipe = kit.recipe(home, "run", memory={"recompute": recompute}, method={"kind": "lora"})
    found = footprint(recipe).moments["training"].parts["activations"]
    _, base, adapter = opened_base(recipe)
    engine = Engine(base, memory=recipe.memory)
    most = 0
    sources = read_sources(resolved(recipe, base, adapter, None), base.tokenizer, None)
    for members, _ in sources.feed.steps(1):
        with noting(base.model) as kept, using(base.model, adapter.name):
            engine.forward_backward(members, adapter.name)
        engine.optim_step(adapter.name, recipe.optim.params(1e-3))
        most = max(most, sum(kept.values()))
    if recompute == "none":
        assert found == pytest.approx(most, rel=0.1)
    else:
        assert (
            found < 0.6 * of(home, method={"kind": "lora"}).moments["training"].parts["activations"]
        )


def test_micro_batches_are_planned_for_the_device_that_trains(home: Path) -> None:
    """A CPU reads rows of like length together, a GPU as many rows as fit."""
    model, tokenizer = engine_kit.bert(), data_kit.byte_level()
    engines = [Engine(model, tokenizer)]
    with Hollow(Ledger(engine_kit.VOCABULARY)):
        hollow = copy.deepcopy(model).to("meta")
        engines += [Engine(hollow, tokenizer, device=kind) for kind in ("cpu", "cuda")]
    here, for_cpu, for_cuda = (engine._layout.each for engine in engines)
    assert here == for_cpu < for_cuda / 1000


def test_parts_sum_to_the_peak(home: Path) -> None:
    found = of(home)
    device = this_device(torch.device("cpu"))
    phase, parts = found.peak(device)
    assert sum(parts.values()) == found.needs(device) == device.needs(found.moments[phase])
    assert {"training", "measuring", "answering"} <= set(found.moments)
    whole = plan(kit.recipe(home, "run"), dry=True)
    assert whole.peak == sum(whole.parts.values())
    assert whole.times is not None and "guess" in whole.times.how


def test_more_at_once_needs_more(home: Path) -> None:
    sizes = [
        of(home, batch={"size": 32, "micro_tokens": tokens}).needs(EXACT)
        for tokens in (64, 128, 256, 512)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize(
    "method",
    ["adalora", "bottleneck", "dora", "fourierft", "full", "prefix", "shira", "spottune", "vera"],
)
def test_methods_are_counted_as_they_are_trained(home: Path, method: str) -> None:
    more = {"full": {"targets": "all"}, "shira": {"rank": 4}}
    chosen = {"kind": method, **more.get(method, {})}
    recipe = kit.recipe(home, "run", method=chosen, data__held_out=None, eval={"forgetting": False})
    found = footprint(recipe)
    _, base, adapter = opened_base(recipe)
    parts = found.moments["training"].parts
    assert found.trained == adapter.count
    own = {id(t): t.nbytes for t in base.model.parameters() if t.requires_grad}
    assert parts["adapter"] >= sum(own.values())
    # two moments of each trained number, and a count of steps of each tensor
    assert parts["optimiser"] == pytest.approx(2 * 4 * adapter.count, rel=0.01, abs=16 * len(own))


@pytest.mark.parametrize("place", ["host", "paged"])
def test_moments_that_wait_on_the_host_take_nothing_of_a_gpu(home: Path, place: str) -> None:
    recipe = kit.recipe(home, "run", method={"kind": "full", "targets": "all"})
    away = recipe.replace(memory={"optimiser": place})
    before, after = (plan(one, gpu="24GB", dry=True) for one in (recipe, away))
    assert (
        before.phases["training"].parts["optimiser"]
        > 0
        == after.phases["training"].parts["optimiser"]
    )
    assert after.peak < before.peak
    if not torch.cuda.is_available():
        with pytest.raises(
            ConfigError, match=f"memory.optimiser: {place} moves it off a CUDA device"
        ):
            plan(away, dry=True)


def test_nf4_takes_its_bits(tmp_path: Path) -> None:
    folder = config_folder(
        tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    linear = 3 * (4 * 512 * 512 + 3 * 512 * 1536)
    kinds = (None, "nf4")
    models = [load_hollow(folder, dtype="bfloat16", storage=kind).model for kind in kinds]
    dense, packed = (sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in models)
    assert 8 * (packed - dense + 2 * linear) / linear == pytest.approx(4.127, abs=0.001)


def test_a_model_of_70_billion_takes_no_memory_here(home: Path, tmp_path: Path) -> None:
    folder = config_folder(
        tmp_path / "large", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    before = facts.peak_memory(torch.device("cpu"))
    found = plan(
        kit.recipe(
            home, "run", model=str(folder), dtype=None, storage="nf4", data__held_out=None, eval={"forgetting": False},
            method={"kind": "lora", "rank": 8, "layers": [79]}, batch={"size": 1},
        ),
        gpu="24GB",
    )  # fmt: skip
    assert facts.peak_memory(torch.device("cpu")) - before < 300 * 2**20
    billions = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 1e9
    assert found.parts["weights"] / 1e9 == pytest.approx(billions * 4.127 / 8, rel=0.01)
    assert not found.fits and found.proposal is None  # its weights alone are too many
    assert found.times is None  # a size has no rate


def test_what_is_proposed_fits(home: Path) -> None:
    plain = kit.recipe(home, "run", batch={"size": 12, "micro_tokens": 512}, data__held_out=None,
                       eval={"forgetting": False})  # fmt: skip
    now = footprint(plain)
    blocks = footprint(plain.replace(memory=plain.memory.replace(recompute="blocks"))).needs(EXACT)
    assert blocks < now.needs(EXACT)
    for room, wanted in (
        (blocks, ["memory.recompute"]),
        (blocks - 1, ["memory.recompute", "batch.micro_tokens"]),
    ):
        small = Device("small", room, 0, 0.0, maps=True)
        found = proposed(plain, small, now)
        assert found is not None and found.peak <= room
        assert [one.partition("=")[0] for one in found.overrides] == wanted
        pasted = make_recipe(plain.model_dump(), found.overrides)
        assert footprint(pasted, small).needs(EXACT) == found.peak
    assert proposed(plain, Device("tiny", 1000, 0, 0.0), now) is None


def test_gpus_by_name_and_size() -> None:
    assert named_gpu("24GB").memory == named_gpu("24 GiB").memory == named_gpu("RTX 4090").memory
    assert named_gpu("nvidia geforce rtx4090").name == "RTX 4090"
    assert named_gpu("h100").rate == 989e12 and named_gpu("A100-80GB").name == "A100 80GB"
    assert all(named_gpu(name).memory for name in GPUS)
    with pytest.raises(UnknownNameError, match="Did you mean 'RTX 4090'"):
        named_gpu("RTX 4900")
    with pytest.raises(UnknownNameError, match="Give its memory, as 24GB"):
        named_gpu("0GB")


def test_time_on_a_gpu_is_called_a_guess(home: Path) -> None:
    found = plan(kit.recipe(home, "run", dtype=None), gpu="H100")
    assert found.fits and found.proposal is None
    assert found.times is not None and found.times.training > 0
    assert "a guess" in found.times.how and "published 989" in found.times.how
    assert dict(found.rows)["model"].endswith("bfloat16, on H100")


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", hidden_size=64, num_hidden_layers=1)
    with pytest.raises(ModelError, match="cannot be planned"):
        load_hollow(folder, storage="gguf")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored as gptq"):
        load_hollow(folder)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_hollow(tmp_path)
