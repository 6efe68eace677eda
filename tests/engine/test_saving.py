"""Less memory for the backward and the optimiser: what is kept is less, what is computed is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import trimtab as tt
from tests.engine import kit
from tests.laws.test_laws import recompute_blocks
from tests.tiny import CASES, mixtral
from trimtab.engine import Engine, saving
from trimtab.engine.saving import mlps, offloaded, recomputed
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.optim import adam as adam_file
from trimtab.optim import paged
from trimtab.optim.adam import Adam
from trimtab.optim.params import AdamParams, Memory, StatePlace

IDS = torch.arange(3, 259).view(2, 128) % 90
PARAMS = AdamParams(lr=1e-2, weight_decay=0.1, ema=0.9)
Saving = Callable[[nn.Module], AbstractContextManager[Any]]


def kept(model: nn.Module, around: Saving) -> int:
    """Bytes that a forward keeps for its backward, the model's own tensors apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), around(model):
        loss = model(input_ids=IDS).logits.sum()
    assert loss.requires_grad
    return sum(found.values())


def test_less_is_kept() -> None:
    model = CASES["llama"].model(torch.float32).train()
    tt.attach(model, tt.LoRA(rank=4, targets="all-linear"), "a")
    ways: dict[str, Saving] = {
        what: lambda m, what=what: recomputed(m, what)  # type: ignore[misc]
        for what in ("none", "mlp", "blocks")
    }
    found = {what: kept(model, around) for what, around in ways.items()}
    assert found["mlp"] < 0.75 * found["none"]
    assert found["blocks"] < 0.6 * found["mlp"]
    assert kept(model, ways["none"]) > 0.9 * found["none"]  # nothing stays switched on


def trained(memory: Memory, method: tt.Method, model: Any = None) -> tuple[list[Any], list[Tensor]]:
    """Losses and tensors of three steps."""
    base = kit.base(model() if model else None)
    adapter = tt.attach(base.model, method, "a", seed=1)
    engine = Engine(base, micro_tokens=64, memory=memory)
    losses = []
    torch.manual_seed(5)
    for step in range(3):
        losses.append(engine.forward_backward(kit.datums(6, seed=step), "a").sums)
        engine.optim_step("a", PARAMS)
    return losses, [p.detach().clone() for p in adapter.parameters()]


def wide_mixtral() -> Any:
    """With the vocabulary of the tokenizer."""
    model = mixtral()
    model.resize_token_embeddings(kit.VOCABULARY)
    return model


LORA = tt.LoRA(rank=4, targets="all-linear", dropout=0.3)


@pytest.mark.parametrize("what", ["mlp", "blocks"])
@pytest.mark.parametrize(
    ("model", "method"),
    [(None, LORA), (None, tt.Prefix(length=3)), (None, tt.IA3()), (wide_mixtral, LORA)],
    ids=["lora", "prefix", "ia3", "lora-mixtral"],
)
def test_recomputing_changes_no_bit(what: Any, model: Any, method: tt.Method) -> None:
    losses, tensors = trained(Memory(), method, model)
    others, again = trained(Memory(recompute=what), method, model)
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))


def test_mlps_that_are_no_modules_of_their_own_are_named() -> None:
    for name in ("bert", "roberta", "deberta", "bart"):
        with pytest.raises(UnsupportedError, match="no modules of their own.*recompute: blocks"):
            mlps(CASES[name].model())
    assert len(mlps(CASES["llama"].model())) == 3


def test_what_was_switched_on_before_stays_on() -> None:
    model = CASES["llama"].model(torch.float32).train()
    tt.attach(model, tt.LoRA(rank=2), "a")
    before = kept(model, lambda m: recomputed(m, "none"))
    recompute_blocks(model)
    on = kept(model, lambda m: recomputed(m, "none"))
    with recomputed(model, "blocks"):
        pass
    assert kept(model, lambda m: recomputed(m, "none")) == on < before


# -- in host memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["none", "mlp", "blocks"])
def test_activations_come_back_as_they_were(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SMALL", 0)
    found = []
    for away in (False, True):
        model = CASES["llama"].model(torch.float32).train()
        adapter = tt.attach(model, tt.LoRA(rank=4, targets="all-linear"), "a", seed=2)
        with recomputed(model, what):
            if away:
                with offloaded(model):
                    loss = model(input_ids=IDS, labels=IDS).loss
            else:
                loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_stay_and_a_shared_input_goes_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SMALL", 0)
    made: list[int] = []

    class Counted(saving._Waiting):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            made.append(tensor.data_ptr())

    monkeypatch.setattr(saving, "_Waiting", Counted)
    q, k = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False)
    model = nn.ModuleList([q, k])
    a, b = (torch.randn(8, 2, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 8, requires_grad=True) * 1.0
    with offloaded(model):
        y = (q(x) + x @ a @ b.T) * (k(x) + x @ a @ b.T)
    assert made.count(x.data_ptr()) == 1
    assert not {q.weight.data_ptr(), k.weight.data_ptr()} & set(made)
    y.sum().backward()
    assert a.grad is not None


def stepped(
    place: StatePlace, steps: int = 4, restart: bool = False, device: str = "cpu"
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = {"a": (6, 4), "b": (40, 7), "c": (5,), "d": (3, 3)}
    named = {key: nn.Parameter(torch.randn(shape).to(device)) for key, shape in shapes.items()}
    optimiser = Adam(named, {"b": 4.0}, place=place)
    for _ in range(steps):
        for key, parameter in named.items():
            parameter.grad = None if key == "d" else torch.randn(parameter.shape).to(device)
        optimiser.step(PARAMS)
        optimiser.clear()
        if restart:
            state = optimiser.state()
            optimiser = Adam(named, {"b": 4.0}, place=place)
            optimiser.restore(state)
    return [*named.values(), *(value for _, value in sorted(optimiser.state().items()))]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("piece", [1, 200, 10**9])
def test_moments_on_the_host_change_no_bit(
    piece: int, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stepped("device")
    monkeypatch.setattr(adam_file, "PIECE", piece)
    found = stepped("host", restart=restart)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("what", "place"), [("activations", "host"), ("optimiser", "host"), ("optimiser", "paged")]
)
def test_a_model_on_the_host_has_nowhere_to_put_them(what: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.{what}: {place} moves it off a CUDA device"):
        Engine(kit.base(), memory=Memory.model_validate({what: place}))


def test_paged_memory_without_cuda_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=r"paged needs CUDA's unified memory.* use host"):
        paged._runtime()


@pytest.mark.gpu
@pytest.mark.parametrize("restart", [False, True])
def test_on_a_gpu_paged_moments_change_no_bit(restart: bool) -> None:
    expected = stepped("device", device="cuda")
    found = stepped("paged", restart=restart, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_paged_memory_is_freed_and_is_none_of_torchs() -> None:
    like = torch.empty(1 << 26, device="cuda")
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(200):  # 50 GB, were it kept
        moment = paged.paged_zeros_like(like)
        assert moment.device == like.device and not bool(moment.any())
        moment.add_(1)
    assert float(moment.sum()) == like.numel()
    del moment
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before[0] + like.nbytes
    assert torch.cuda.mem_get_info()[0] > before[1] - 2 * like.nbytes


@pytest.mark.gpu
def test_on_a_gpu_they_wait_in_pinned_memory_and_change_nothing(tmp_path: Path) -> None:
    found = []
    for memory in (Memory(), Memory(activations="host", optimiser="host", recompute="mlp")):
        base = kit.base()
        base.model.to("cuda")
        adapter = tt.attach(base.model, tt.LoRA(rank=8, targets="all-linear"), "a", seed=1)
        engine = Engine(base, memory=memory)
        for step in range(3):
            engine.forward_backward(kit.datums(6, seed=step), "a")
            engine.optim_step("a", PARAMS)
        found.append([p.detach().cpu() for p in adapter.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    inner = engine._tenant("a").adam._inners[0]
    moments = [state["exp_avg"] for state in inner.state.values()]
    assert all(m.device.type == "cpu" and m.is_pinned() for m in moments)


@pytest.mark.gpu
def test_on_a_gpu_less_is_kept() -> None:
    peaks = []
    for memory in (Memory(), Memory(recompute="mlp"), Memory(activations="host")):
        base = kit.base(kit.llama(positions=4096))
        base.model.to("cuda")
        tt.attach(base.model, tt.LoRA(rank=8, targets="all-linear"), "a", seed=1)
        engine = Engine(base, micro_tokens=1 << 16, memory=memory)
        data = kit.datums(64, longest=2000)
        engine.forward_backward(data, "a")
        torch.cuda.reset_peak_memory_stats()
        engine.forward_backward(data, "a")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
    assert peaks[2] < peaks[0]


def test_recomputed_blocks_leave_the_embeddings_as_they_were() -> None:
    """transformers' switch lets them require gradients, so that each block below an adapter had a backward."""
    model = CASES["llama"].model(torch.float32).train()
    tt.attach(model, tt.LoRA(rank=2, layers=(-1,)), "a")
    embedding = model.get_input_embeddings()
    with recomputed(model, "blocks"):
        assert not embedding(IDS).requires_grad
    model.enable_input_require_grads()
    with recomputed(model, "blocks"):
        assert embedding(IDS).requires_grad, "which its user asked for"
    model.disable_input_require_grads()
    assert not embedding(IDS).requires_grad
