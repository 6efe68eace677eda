"""A profile of a run: each room's time in that room and nowhere else, what is kept, and the sums."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

import trimtab as tt
from tests.engine.kit import noting
from tests.tiny import mixtral
from tests.train import kit, test_classes
from tests.train.kit import at_step, go, steps_of
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attend import OURS
from trimtab.data import Corpus
from trimtab.engine import head
from trimtab.engine.rooms import Unwatched
from trimtab.frozen.experts import DenseExpert
from trimtab.kernels import lowrank
from trimtab.models.load import Base
from trimtab.optim.adam import Adam
from trimtab.train import clock, profile, profiler
from trimtab.train.api import train_recipe
from trimtab.train.clock import Clock
from trimtab.train.events import read_events
from trimtab.train.profile import ROOMS, Profile, multiplied
from trimtab.train.profiler import window
from trimtab.train.recipe import Recipe
from trimtab.train.run import Run
from trimtab.train.setup import opened_base

NAP = 0.15
LORA = {"kind": "lora", "rank": 2}


@pytest.fixture(autouse=True)
def short_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "LASTS", 0.0)


def recipe(home: Path, **options: Any) -> Recipe:
    few = {
        "steps": 3, "data__held_out": None, "eval__every": None, "eval__samples": 0, "eval__forgetting": False,
    }  # fmt: skip
    return kit.recipe(home, "run", **{**few, **options})


def profiled(recipe: Recipe) -> Profile:
    """The profile that a run leaves in its events."""
    outcome = train_recipe(recipe, quiet=True, profile=True)
    (event,) = [e for e in read_events(outcome.folder / "events.jsonl") if e["event"] == "profile"]
    return Profile.of(event)


# -- the clock ---------------------------------------------------------------------------------------


def test_each_moment_belongs_to_the_room_entered_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    watch = Clock(torch.device("cpu"))

    def lasts(seconds: float) -> None:
        now[0] += seconds

    watch.enter("base")  # it does not run yet
    watch.start()
    lasts(1)
    with watch.inside("base"):
        lasts(2)
        with pytest.raises(ValueError), watch.inside("adapter"):
            lasts(4)
            raise ValueError
        lasts(8)
        with watch.paused():
            lasts(16)
    watch.backward = True
    with watch.inside("other"):
        watch.go("head", 1)
        lasts(32)
        watch.enter("base")  # left open by what is recomputed
        watch.go("adapter", 1)
        lasts(64)
    watch.backward = False
    assert watch.stop() == {
        ("other", False): 1, ("base", False): 10, ("adapter", False): 4,
        ("head", True): 32, ("adapter", True): 64, ("other", True): 0, ("base", True): 0,
    }  # fmt: skip


def test_which_steps_are_profiled() -> None:
    found = {left: list(window(left)) for left in (0, 1, 2, 3, 6, 100)}
    assert found == {
        0: [], 1: [0], 2: [1], 3: [2], 6: [2, 3, 4, 5], 100: [2, 3, 4, 5, 6],
    }  # fmt: skip


# -- time, by room -----------------------------------------------------------------------------------


class Slow(torch.autograd.Function):
    """The identity, with a slow backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return grads[0]


def slowed(patch: pytest.MonkeyPatch, kind: Any, name: str) -> None:
    """Every call of that function takes a nap first."""
    function = getattr(kind, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(NAP)
        return function(*args, **kwargs)

    patch.setattr(kind, name, slow)


def slow_reading(patch: pytest.MonkeyPatch, run: Run) -> None:
    slowed(patch, Corpus, "__getitem__")


def slow_collating(patch: pytest.MonkeyPatch, run: Run) -> None:
    slowed(patch, head.Kept, "of")


def slow_attention(patch: pytest.MonkeyPatch, run: Run) -> None:
    function = AttentionInterface()[OURS["sdpa"]]

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(NAP)
        return function(*args, **kwargs)

    patch.setitem(AttentionInterface._global_mapping, OURS["sdpa"], slow)


def slow_attention_backward(patch: pytest.MonkeyPatch, run: Run) -> None:
    function = AttentionInterface()[OURS["sdpa"]]

    def slow(*args: Any, **kwargs: Any) -> Any:
        out, rest = function(*args, **kwargs)
        return Slow.apply(out), rest

    patch.setitem(AttentionInterface._global_mapping, OURS["sdpa"], slow)


def slow_adapter(patch: pytest.MonkeyPatch, run: Run) -> None:
    slowed(patch, tt.LoRA, "lowrank")


def slow_adapter_backward(patch: pytest.MonkeyPatch, run: Run) -> None:
    slowed(patch, lowrank, "_backward")


def slow_norm(patch: pytest.MonkeyPatch, run: Run) -> None:
    norm = run.base.model.model.norm
    norm.register_forward_pre_hook(lambda *_: time.sleep(NAP))


def slow_norm_backward(patch: pytest.MonkeyPatch, run: Run) -> None:
    run.base.model.model.norm.register_forward_hook(lambda module, args, out: Slow.apply(out))


def slow_layer(patch: pytest.MonkeyPatch, run: Run) -> None:
    """The frozen layer inside a site."""
    layer = run.base.model.model.layers[0].self_attn.q_proj.base_layer
    slowed(patch, layer, "forward")


def slow_loss(patch: pytest.MonkeyPatch, run: Run) -> None:
    slowed(patch, head, "linear_cross_entropy")


def slow_loss_backward(patch: pytest.MonkeyPatch, run: Run) -> None:
    loss = head.linear_cross_entropy
    patch.setattr(head, "linear_cross_entropy", lambda x, *rest: loss(Slow.apply(x), *rest))


def slow_optimiser(patch: pytest.MonkeyPatch, run: Run) -> None:
    slowed(patch, Adam, "step")


Slowing = Callable[[pytest.MonkeyPatch, Run], None]
SLOW: list[tuple[Slowing, str, bool]] = [
    (slow_reading, "data", False), (slow_collating, "data", False), (slow_norm, "base", False),
    (slow_norm_backward, "base", True), (slow_layer, "base", False), (slow_adapter, "adapter", False),
    (slow_adapter_backward, "adapter", True), (slow_attention, "attention", False),
    (slow_attention_backward, "attention", True), (slow_loss, "head", False),
    (slow_loss_backward, "head", True), (slow_optimiser, "optimiser", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("slowing", "room", "backward"), SLOW, ids=[slowing.__name__ for slowing, _, _ in SLOW]
)
def test_what_is_slow_shows_in_its_room_and_only_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, slowing: Slowing, room: str, backward: bool
) -> None:
    method = {**LORA, "targets": "q_proj", "layers": [0]}

    def slow(run: Run) -> None:
        slowing(monkeypatch, run)

    with at_step(2, slow):  # reading for the third step comes after it
        found = profiled(recipe(home, method=method))
    assert found.rooms[room].seconds >= NAP
    way = found.rooms[room].backward
    assert way >= NAP if backward else found.rooms[room].seconds - way >= NAP
    assert found.seconds - found.rooms[room].seconds < NAP
    others = {name: use for name, use in found.rooms.items() if name != room}
    assert all(use.seconds < NAP / 2 for use in others.values())


@pytest.mark.parametrize("what", ["mlp", "blocks"])
def test_what_is_computed_again_is_time_of_the_backward(home: Path, what: str) -> None:
    def slow(run: Run) -> None:
        gate = run.base.model.model.layers[1].mlp.gate_proj
        gate.base_layer.register_forward_pre_hook(lambda *_: time.sleep(NAP))
        gate.register_forward_pre_hook(lambda *_: time.sleep(NAP))

    with at_step(2, slow):
        method = {**LORA, "targets": "gate_proj"}
        found = profiled(recipe(home, method=method, memory__recompute=what)).rooms
    for room in ("base", "adapter"):
        assert found[room].backward >= NAP and found[room].seconds - found[room].backward >= NAP


@pytest.mark.parametrize("what", ["mlp", "blocks"])
def test_what_is_computed_again_of_the_base_is_its_time(home: Path, what: str) -> None:
    """Where no module of its own says so."""

    def slow(run: Run) -> None:
        activation = run.base.model.model.layers[1].mlp.act_fn
        activation.register_forward_pre_hook(lambda *_: time.sleep(NAP))

    with at_step(2, slow):
        found = profiled(recipe(home, method=LORA, memory__recompute=what)).rooms["base"]
    assert found.backward >= NAP and found.seconds >= 2 * NAP


def test_the_rooms_of_a_step_are_all_of_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a clock of one's own, less what the look at the graph took."""
    looks, steps = [], []
    look, begin, done = (getattr(profiler.Profiler, n) for n in ("_look_at", "_begin", "done"))

    def timed_look(self: Any, objective: Any) -> None:
        began = time.perf_counter()
        look(self, objective)
        looks.append(time.perf_counter() - began)

    def timed_begin(self: Any) -> None:
        begin(self)
        steps.append(-time.perf_counter())

    def timed_done(self: Any, *args: Any) -> None:
        if self._open is not None:
            steps[-1] += time.perf_counter()
        done(self, *args)

    monkeypatch.setattr(profiler.Profiler, "_look_at", timed_look)
    monkeypatch.setattr(profiler.Profiler, "_begin", timed_begin)
    monkeypatch.setattr(profiler.Profiler, "done", timed_done)
    found = profiled(recipe(home, steps=8))
    assert (found.first, found.last, len(steps)) == (3, 7, 5)
    assert sum(steps) - sum(looks) == pytest.approx(found.seconds * 5, rel=0.02)


# -- memory ------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_the_forward_kept(home: Path) -> None:
    kept: list[int] = []

    class Stop(Exception):
        pass

    def count(run: Run) -> None:
        members, _ = next(run.sources.feed.steps(1, run.progress.cursor))
        with noting(run.base.model) as found:
            run.engine.forward_backward(members, run.adapter.name)
        run.engine._tenant(run.adapter.name).discard()
        kept.append(sum(found.values()))

    with at_step(3, count):
        found = profiled(recipe(home, method=LORA))
    inside = found.whole.kept - found.rooms["head"].kept
    numbers = 8 * len(run_sites(home))  # the scale of each, which no hook is told of
    assert 0 < kept[0] <= inside <= kept[0] + numbers
    assert all(found.rooms[room].kept for room in ("base", "adapter", "attention", "head"))
    assert not any(found.rooms[room].kept for room in ("data", "optimiser", "other"))


def run_sites(home: Path) -> list[str]:
    saved = Adapter.load(home / "run" / "adapter")
    return [site.path for site in saved.sites]


def test_recomputed_blocks_keep_their_inputs(home: Path) -> None:
    found = profiled(recipe(home, method=LORA, memory__recompute="blocks"))
    tokens, width, blocks, size = found.tokens, 64, 2, 4
    assert found.rooms["adapter"].kept < found.rooms["base"].kept
    assert found.rooms["base"].kept >= blocks * tokens * width * size
    assert found.rooms["base"].kept < 2 * blocks * tokens * width * size


def test_what_is_held(home: Path) -> None:
    options = recipe(home, method=LORA)
    found = profiled(options)
    _, base, adapter = opened_base(options.replace(out=str(home / "other")))
    own = {id(t) for t in adapter.tensors.values()}
    bare = {id(p): p.nbytes for p in base.model.parameters() if id(p) not in own}
    assert found.memory.adapter == found.memory.gradients == adapter.nbytes
    assert found.memory.base == pytest.approx(sum(bare.values()), rel=0.01)  # and a few buffers
    assert found.memory.optimiser == pytest.approx(2 * adapter.nbytes, rel=0.1)
    assert found.memory.peak > found.memory.base


# -- the work ----------------------------------------------------------------------------------------


def test_of_peak_by_hand(home: Path) -> None:
    found = profiled(recipe(home, method=LORA))
    width, inner, heads = 64, 96, 64 + 2 * 32 + 64
    norms = 2 * 2 * width + width
    assert found.parameters == 2 * width * (heads + 3 * inner) + norms
    assert found.head == 400 * width
    assert 0 < found.trained < found.tokens
    work = 4 * (found.parameters * found.tokens + found.head * found.trained)
    assert found.of_peak == pytest.approx(work / found.seconds / found.rate)
    few = profiled(recipe(home, method=LORA, storage="nf4", out=str(home / "few")))
    assert (few.parameters, few.head) == (found.parameters, found.head)
    assert few.memory.base < found.memory.base


def test_a_token_meets_some_of_the_experts() -> None:
    model = mixtral().requires_grad_(False)
    whole = sum(p.numel() for p in model.parameters())
    layers = model.model.layers
    experts = sum(p.numel() for layer in layers for p in layer.mlp.experts.parameters())
    share = model.config.num_experts_per_tok / model.config.num_local_experts
    tt.attach(model, tt.LoRA(rank=2), "a")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    body = whole - embedding.numel() - head.numel() - experts * (1 - share)
    assert multiplied(Base(model, None, "tiny")) == (body, head.numel())


# -- runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"method": {"kind": "prefix", "length": 3}},
        {"method": {"kind": "prompt", "length": 3}},
        {"method": {"kind": "spottune", "inner": LORA}},
        {"method": {"kind": "full", "targets": "all"}},
        {"method": {"kind": "bottleneck"}},
        {"method": [LORA, {"kind": "prefix", "length": 3}]},
        {"method": LORA, "memory__recompute": "mlp"},
        {"method": LORA, "memory__recompute": "blocks"},
        {"method": LORA, "storage": "nf4"},
        {"method": {**LORA, "targets": ["all-linear", "head"]}},
    ],
    ids=str,
)
def test_any_method_and_memory(home: Path, options: dict[str, Any]) -> None:
    if isinstance(options["method"], list):
        options = {"method": {"kind": "union", "parts": options["method"]}}
    found = profiled(recipe(home, **options))
    assert all(found.rooms[room].seconds > 0 for room in ROOMS)
    assert all(found.rooms[room].backward > 0 for room in ("base", "adapter", "attention", "head"))
    assert found.rooms["base"].kept > 0
    assert found.seconds == pytest.approx(sum(use.seconds for use in found.rooms.values()))


def test_a_classifier(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    test_classes.encoder(folder / "bert")
    test_classes.write_jsonl(folder / "train.jsonl", test_classes.rows(40))
    test_classes.write_jsonl(folder / "held.jsonl", test_classes.rows(12, seed=1))
    found = profiled(test_classes.recipe(folder, tmp_path / "run").replace(steps=3))
    assert all(found.rooms[room].seconds > 0 for room in ROOMS)
    assert found.of_peak > 0


def test_experts_that_are_edited(home: Path, tmp_path: Path) -> None:
    model, call = mixtral(), DenseExpert.call
    model.resize_token_embeddings(400)
    model.save_pretrained(home / "experts")
    Base(model, kit.kit.base().tokenizer, "x").tokenizer.save_pretrained(home / "experts")
    found = profiled(recipe(home, method=LORA, model=str(home / "experts")))
    assert DenseExpert.call is call
    assert all(found.rooms[room].seconds > 0 for room in ROOMS)


def test_a_profiled_run_ends_as_any_other(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = go(kit.recipe(home, "plain"))
    functions = dict(AttentionInterface._global_mapping)
    runs: list[Run] = []
    with at_step(12, runs.append):
        found = train_recipe(kit.recipe(home, "watched"), profile=True)
    assert Adapter.load(found.folder / "adapter") == Adapter.load(plain.folder / "adapter")
    assert steps_of(found.folder) == steps_of(plain.folder)
    (run,) = runs
    assert isinstance(run.engine.rooms, Unwatched)
    assert dict(AttentionInterface._global_mapping) == functions
    assert not _hooks(run.base.model, "trimtab.train")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Profile of steps 3 to 7" in shown and "of peak" in shown
    assert all(f"{room} 0." in shown for room in ROOMS)
    page = (found.folder / "report.html").read_text()
    assert 'id="profile"' in page and "of it backward" in page
    assert 'id="profile"' not in (plain.folder / "report.html").read_text()


def _hooks(model: nn.Module, where: str) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if getattr(hook, "__module__", "").startswith(where)
    ]


def test_an_error_leaves_no_hook(home: Path) -> None:
    runs: list[Run] = []

    def fail(run: Run) -> None:
        runs.append(run)
        raise RuntimeError("a test's")

    with at_step(3, fail), pytest.raises(RuntimeError, match="a test's"):
        profiled(recipe(home))
    assert not _hooks(runs[0].base.model, "trimtab.train")
    assert isinstance(runs[0].engine.rooms, Unwatched)


def test_few_steps_and_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = recipe(home, steps=1)
    found = profiled(one)
    assert (found.first, found.last) == (1, 1)
    assert any("the first step" in text for _, text in found.sentences)
    train_recipe(one, resume=True, profile=True)
    assert "no step was left to profile" in capsys.readouterr().out
    both = recipe(home, steps=2, out=str(home / "two"))
    assert [profiled(both).first, profiled(both.replace(out=str(home / "again"))).last] == [2, 2]


def test_a_resumed_run_is_profiled_where_it_goes_on(home: Path) -> None:
    options = kit.recipe(home, "run", eval__every=None)
    with at_step(4, lambda run: signal.raise_signal(signal.SIGINT)):
        first = profiled(options)
    assert (first.first, first.last) == (3, 4)  # those that there were
    train_recipe(options, resume=True, quiet=True, profile=True)
    events = [
        e for e in read_events(Path(str(options.out)) / "events.jsonl") if e["event"] == "profile"
    ]
    assert [(e["first"], e["last"]) for e in events] == [(3, 4), (7, 11)]
