"""Less work below the lowest block in which an adapter acts: no backward, and states that are computed once."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import trimtab as tt
from tests.engine import kit
from tests.tiny import CASES, SMALL_ENCODER, llama
from trimtab.engine import Engine, states
from trimtab.engine.frozen import Frozen
from trimtab.engine.rooms import Rooms
from trimtab.engine.states import StateFiles, forget_old, key_of
from trimtab.errors import FileFormatError, UnsupportedError
from trimtab.optim.params import AdamParams, Memory

PARAMS = AdamParams(lr=1e-2)
TOP = tt.LoRA(rank=4, layers=(-1,))


def deep(blocks: int) -> Any:
    return llama(num_hidden_layers=blocks, vocab_size=kit.VOCABULARY).float()


@contextmanager
def counted(modules: list[nn.Module]) -> Iterator[Counter[int]]:
    """How often the first linear layer of each module computes."""
    counts: Counter[int] = Counter()
    handles = []
    for number, module in enumerate(modules):
        inner = next(m for m in module.modules() if isinstance(m, nn.Linear))

        def note(*_: Any, number: int = number) -> None:
            counts[number] += 1

        handles.append(inner.register_forward_pre_hook(note))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# -- no backward below ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "mlp", "blocks"])
@pytest.mark.parametrize(
    "method",
    [TOP, tt.IA3(layers=(-1,)), tt.method("llama-adapter(length=3, top=1)"), tt.Bottleneck(size=4, layers=(-1,)),
     tt.method("gated(inner=lora(rank=4, layers=[-1]))"), tt.method("loreft(rank=2, first=1, last=1, layers=[-1])")],
    ids=lambda method: method.kind,
)  # fmt: skip
def test_nothing_is_kept_for_the_blocks_below(method: tt.Method, recompute: Any) -> None:
    model = deep(5)
    tt.attach(model, method, "a", seed=1)
    engine = Engine(model, micro_tokens=4096, memory=Memory(recompute=recompute))
    outputs: list[weakref.ref[Tensor]] = []
    inside = [m for layer in model.model.layers[:4] for m in layer.modules()]
    for module in inside:
        module.register_forward_hook(lambda m, given, out: outputs.extend(_tensors(out)))
    engine.rooms = living = _Living(outputs)
    engine.forward_backward(kit.datums(), "a")
    assert len(outputs) > 4 * 10
    assert {id(t) for t in living.found} <= {id(living.last)}, "but for what the last block hears"


def _tensors(out: Any) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(t) for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


class _Living(Rooms):
    """Of some tensors, those that are alive when the backward begins."""

    def __init__(self, refs: list[weakref.ref[Tensor]]) -> None:
        self.refs = refs
        self.found: list[Tensor] = []
        self.last: Tensor | None = None

    def inside(self, room: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, objective: Tensor) -> AbstractContextManager[None]:
        gc.collect()
        self.found = [tensor for ref in self.refs if (tensor := ref()) is not None]
        self.last = self.refs[-1]()
        return nullcontext()


@pytest.mark.parametrize("recompute", ["mlp", "blocks"])
def test_no_block_below_is_computed_again(recompute: Any) -> None:
    model = deep(4)
    tt.attach(model, TOP.replace(targets="mlp"), "a")
    engine = Engine(model, micro_tokens=4096, memory=Memory(recompute=recompute))
    with counted([layer.mlp for layer in model.model.layers]) as counts:
        engine.forward_backward(kit.datums(), "a")
    assert [counts[n] for n in range(4)] == [1, 1, 1, 2]


def test_the_input_of_the_lowest_block_wants_no_gradient() -> None:
    model = deep(3)
    tt.attach(model, TOP, "a")
    wants: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, given, out: wants.append(out.requires_grad))
    Engine(model).forward_backward(kit.datums(), "a")
    assert wants[-3:] == [False, False, True]


# -- states that are computed once ---------------------------------------------------------------------


def opened(folder: Path, method: tt.Method = TOP, model: Any = None) -> Engine:
    model = deep(3) if model is None else model
    adapter = tt.attach(model, method, "a", seed=1)
    engine = Engine(model, micro_tokens=128)
    engine.frozen = Frozen(model, adapter, folder=folder)
    return engine


def blocks_of(engine: Engine) -> list[nn.Module]:
    return list(engine.model.model.layers)


def close(engine: Engine) -> None:
    assert engine.frozen is not None
    engine.frozen.close()


def test_lower_blocks_compute_once_for_training_measuring_and_the_next_run(tmp_path: Path) -> None:
    engine, data = opened(tmp_path), kit.datums()
    with counted(blocks_of(engine)) as counts:
        first = engine.forward_backward(data, "a")
        assert counts[0] == counts[1] == counts[2] > 0
        before = counts.copy()
        again = engine.forward_backward(data, "a")
        held = engine.forward(data, "a"), engine.forward(data)
    assert counts[0] == before[0]
    assert counts[1] == before[1]
    assert counts[2] > before[2]
    assert first.sums == again.sums
    assert held[0].sums == pytest.approx(first.sums, rel=1e-5)
    close(engine)

    other = opened(tmp_path, TOP.replace(rank=2))
    with counted(blocks_of(other)) as counts:
        other.forward_backward(data, "a")
    assert (counts[0], counts[1]) == (0, 0)
    assert [p.name for p in tmp_path.iterdir()] == [other.frozen.files.folder.name]  # type: ignore[union-attr]
    close(other)


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    for _ in range(2):
        engine.forward_backward(kit.datums(), "a")
    assert all("forward" not in module.__dict__ for module in engine.model.modules())
    assert not any(layer._forward_hooks for layer in blocks_of(engine))
    close(engine)


def test_a_classifier_answers_above_the_blocks(tmp_path: Path) -> None:
    model = CASES["bert"].model(torch.float32)
    engine = opened(tmp_path, tt.LoRA(rank=4, layers=(-1,), train=("classifier",)), model)
    texts = [[5, 6, 7], [8, 9, 10, 11]]
    want = engine.classify(texts, "a")
    with counted(list(model.bert.encoder.layer)) as counts:
        assert engine.classify(texts, "a") == want
        assert engine.classify(texts) == want
    assert counts[0] == 0 < counts[1]
    close(engine)


def test_a_head_alone_needs_no_block(tmp_path: Path) -> None:
    model = CASES["bert"].model(torch.float32)
    engine = opened(tmp_path, tt.method("full(targets='head')"), model)
    texts = [[5, 6, 7], [8, 9, 10, 11]]
    want = engine.classify(texts, "a")
    with counted(list(model.bert.encoder.layer)) as counts:
        assert engine.classify(texts, "a") == want
    assert not counts
    close(engine)


def test_who_acts_lower_is_computed_as_ever(tmp_path: Path) -> None:
    engine, data = opened(tmp_path), kit.datums()
    low = tt.attach(engine.model, tt.LoRA(rank=2, init="gaussian"), "low", seed=2)
    with torch.no_grad():
        for tensor in low.parameters():
            tensor.normal_()
    owners = ["a", "low"] * 4
    alone = engine.forward(data, "low").sums
    want = engine.forward(data, "a").sums
    for _ in range(2):
        mixed = engine.forward(data, owners[: len(data)]).sums
    for number in range(len(data)):
        assert mixed[number] == pytest.approx((want, alone)[number % 2][number], rel=1e-4)
    assert alone != pytest.approx(want, rel=1e-3)
    close(engine)


def test_another_base_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = set()
    for change in (None, "model.layers.1.mlp.up_proj", "model.embed_tokens", "model.layers.2.mlp.up_proj"):  # fmt: skip
        model = deep(3)
        if change is not None:
            model.get_submodule(change).weight.data[3, 3] += 0.5
        engine = opened(tmp_path, model=model)
        names.add(engine.frozen.files.folder.name)  # type: ignore[union-attr]
        close(engine)
    assert len(names) == 3, (
        "what lies above does not matter, what lies below does, to the last value"
    )


def test_dropout_below_is_refused(tmp_path: Path) -> None:
    for change in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        model = BertForSequenceClassification(BertConfig(**{**SMALL_ENCODER, change: 0.1}))
        adapter = tt.attach(model, "lora(rank=2, layers=[-1])", "a")
        state = torch.get_rng_state()
        with pytest.raises(UnsupportedError, match="drops out at random"):
            Frozen(model, adapter, folder=tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        assert all("forward" not in module.__dict__ for module in model.modules())


def test_no_block_below_is_refused(tmp_path: Path) -> None:
    model = deep(2)
    adapter = tt.attach(model, "lora(rank=2)", "a")
    with pytest.raises(UnsupportedError, match="first block already.*layers"):
        Frozen(model, adapter, folder=tmp_path)


def test_a_model_whose_blocks_hear_of_each_other_is_refused(tmp_path: Path) -> None:
    model = deep(3)
    first, last = model.model.layers[0], model.model.layers[2]
    notes: list[Tensor] = []
    first.mlp.register_forward_hook(lambda m, given, out: notes.append(out))
    last.mlp.register_forward_hook(lambda m, given, out: out + notes.pop())
    adapter = tt.attach(model, TOP, "a")
    with pytest.raises(UnsupportedError, match="need more of its first 2"):
        Frozen(model, adapter, folder=tmp_path)


# -- on disk -------------------------------------------------------------------------------------------

TEXTS = [(1, 2, 3), (4, 5), (6,)]


def files(folder: Path, said: list[str] | None = None) -> StateFiles:
    return StateFiles(folder, 4, torch.bfloat16, (said if said is not None else []).append)


def state_of(tokens: tuple[int, ...]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.bfloat16)[:, None] * torch.ones(4, dtype=torch.bfloat16)


def filled(folder: Path) -> None:
    store = files(folder)
    for tokens in TEXTS:
        store.add(key_of(tokens), state_of(tokens))
    store.close()


def read(store: StateFiles, tokens: tuple[int, ...]) -> Tensor | None:
    found = store.get(key_of(tokens), len(tokens))
    return None if found is None else torch.tensor(found).view(torch.bfloat16)


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    store = files(tmp_path)
    assert store.missing([*TEXTS, TEXTS[0]]) == 6 * 4 * 2
    filled(tmp_path)
    store = files(tmp_path)
    for tokens in TEXTS:
        found = read(store, tokens)
        assert found is not None
        assert torch.equal(found, state_of(tokens))
    assert store.missing([*TEXTS, (7, 8)]) == 2 * 4 * 2
    assert store.get(key_of((9,)), 1) is None
    store.close()


@pytest.mark.parametrize("lost", [1, 8, 17])
@pytest.mark.parametrize("suffix", ["states", "index"])
def test_a_torn_end_is_noticed(suffix: str, lost: int, tmp_path: Path) -> None:
    filled(tmp_path)
    (file,) = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-lost])
    said: list[str] = []
    store = files(tmp_path, said)
    assert "torn" in said[0]
    assert read(store, TEXTS[0]) is not None
    assert read(store, TEXTS[2]) is None
    store.add(key_of(TEXTS[2]), state_of(TEXTS[2]))
    found = read(store, TEXTS[2])
    assert found is not None
    assert torch.equal(found, state_of(TEXTS[2]))
    store.close()


@pytest.mark.parametrize("suffix", ["states", "index"])
def test_damage_is_noticed(suffix: str, tmp_path: Path) -> None:
    filled(tmp_path)
    (file,) = tmp_path.glob(f"*.{suffix}")
    content = bytearray(file.read_bytes())
    content[3] ^= 8
    file.write_bytes(content)
    said: list[str] = []
    store = files(tmp_path, said)
    assert read(store, TEXTS[0]) is None
    assert len(said) == 1
    assert read(store, TEXTS[1]) is not None
    store.add(key_of(TEXTS[0]), state_of(TEXTS[0]))
    store.close()
    again = files(tmp_path)
    found = read(again, TEXTS[0])
    assert found is not None
    assert torch.equal(found, state_of(TEXTS[0]))


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    one, two = files(tmp_path), files(tmp_path)
    for number, tokens in enumerate(TEXTS * 2):
        (one, two)[number % 2].add(key_of(tokens), state_of(tokens))
    third = files(tmp_path)
    assert all(read(store, tokens) is not None for store in (one, two, third) for tokens in TEXTS)
    one.close()
    two.close()


def test_a_full_disk_stops_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = opened(tmp_path), []  # type: ignore[var-annotated]
    assert engine.frozen is not None
    monkeypatch.setattr(engine.frozen.files, "_note", said.append)
    plain = [engine.forward(kit.datums(), "a").sums]

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "_write", refuse)
    more = kit.datums(seed=5)
    plain = [engine.forward(more, "a").sums for _ in range(2)]
    assert plain[0] == plain[1]
    assert len(said) == 1
    assert "No space left" in said[0]
    assert len(engine.frozen.files) == len(kit.datums())
    close(engine)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(FileFormatError, match="no such hidden states"):
        StateFiles(tmp_path, 5, torch.bfloat16, print)


def test_what_nobody_used_for_a_month_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "old")
    forget_old(tmp_path)
    assert (tmp_path / "old").exists()
    monkeypatch.setattr(states, "MONTH", -1.0)
    forget_old(tmp_path)
    assert not (tmp_path / "old").exists()
