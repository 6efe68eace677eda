"""Adapters in slots: what they make of a batch is what the parts make of it; and the model is left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import SMALL, registered, shaken
from tests.tiny import CASES, VOCABULARY
from trimtab.adapt import pool as pools
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.route import Route, Span
from trimtab.adapt.stack import Stack
from trimtab.adapt.tree import sites_of
from trimtab.errors import AttachError, BaseMismatchError, RouteError, UnsupportedError
from trimtab.kernels.stacked import Rows

METHODS = {
    "a": "lora(rank=4, targets='attention')",
    "b": "lora(rank=3, targets='attention', rslora=True)",
    "c": "lora(rank=4, alpha=7, targets='re:.*(q_proj|o_proj|c_attn|mlp.c_proj|mlp.up_proj)$')",
    "d": "lora(rank=12, targets='re:.*(q_proj|v_proj|c_attn)$')",
}
ROWS = ["a", None, "d", "b", "a", "c", None, "d"]
MODELS = ("llama", "gpt2", "qwen3", "mixtral", "qwen3-moe", "llama-nf4")


def ids(rows: int, length: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def slotted(
    model: nn.Module, slots: Sequence[int], owners: Sequence[str | None] = ()
) -> AbstractContextManager[None]:
    """Rows in these slots; where one is -1, by the owner of that place."""
    named = [(name,) if name else () for name in owners] or [()] * len(slots)
    return bank_of(model).scope(Route(tuple(named), slots=tuple(slots)))


def with_all(name: str, dtype: torch.dtype) -> nn.Module:
    """A model with all `METHODS` attached."""
    model = CASES[name].model(dtype)
    for seed, (adapter, method) in enumerate(METHODS.items()):
        shaken(tt.attach(model, method, adapter), seed=seed)
    return model


def put_all(model: nn.Module) -> dict[str | None, int]:
    stack, bank = Stack.of(model), bank_of(model)
    return {None: -1} | {name: stack.put(bank.adapters[name].detached()) for name in METHODS}


def step_by_step(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt and of single tokens after it, by a cache."""
    out = model(tokens[:, :prompt], use_cache=True)
    found = [out.logits]
    for n in range(prompt, tokens.shape[1]):
        out = model(tokens[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_in_slots_are_what_the_parts_make_of_them(name: str) -> None:
    """Mixed forms and ranks, rows in any order, prompts and single tokens; rows of the base are bitwise the base's."""
    model, tokens = with_all(name, torch.float32), ids(len(ROWS), 9)
    with tt.rows(model, ROWS):
        by_parts = step_by_step(model, tokens, 6)
    with tt.using(model, None):
        bare = step_by_step(model, tokens, 6)
    slots = put_all(model)
    with slotted(model, [slots[name] for name in ROWS]):
        found = step_by_step(model, tokens, 6)
    assert error(found, by_parts) < 1e-6 < error(bare, by_parts)
    alone = [row for row, owner in enumerate(ROWS) if owner is None]
    assert torch.equal(found[alone], bare[alone])


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-nf4"])
@torch.no_grad()
def test_in_bf16_slots_are_no_less_exact_than_parts(name: str) -> None:
    """Both against the same bf16 values, computed in fp64."""
    tokens = ids(len(ROWS), 9)
    exact = with_all(name, torch.float64)
    for tensor in exact.parameters():
        tensor.copy_(tensor.bfloat16())
    with tt.rows(exact, ROWS):
        right = step_by_step(exact, tokens, 6)
    model = with_all(name, torch.bfloat16)
    with tt.rows(model, ROWS):
        by_parts = step_by_step(model, tokens, 6)
    slots = put_all(model)
    with slotted(model, [slots[name] for name in ROWS]):
        found = step_by_step(model, tokens, 6)
    assert error(found, right) < 1.1 * error(by_parts, right)


@torch.no_grad()
def test_other_methods_and_the_base_go_on_by_their_names() -> None:
    model, tokens = with_all("llama", torch.float32), ids(5)
    shaken(tt.attach(model, "ia3", "other"))
    shaken(tt.attach(model, "prefix(length=3, init_std=1.0)", "before"))
    names = ["other", "a", None, "before", "b"]
    with tt.rows(model, names):
        by_parts = step_by_step(model, tokens, 4)
    slots = put_all(model)
    owners = [None if name in METHODS else name for name in names]
    with slotted(model, [slots.get(name, -1) for name in names], owners):
        assert error(step_by_step(model, tokens, 4), by_parts) < 1e-6


@torch.no_grad()
def test_tied_embeddings_and_a_head() -> None:
    model = tiny.llama(tie_word_embeddings=True).float()
    adapter = shaken(tt.attach(model, "lora(rank=4, targets=['lm_head', 'q_proj'])", "a"))
    with tt.rows(model, ["a", None, "a"]):
        by_parts = model(ids(3)).logits
    slot = Stack.of(model).put(adapter)
    with slotted(model, [slot, -1, slot]):
        assert error(model(ids(3)).logits, by_parts) < 1e-6


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_mixed_rows_generate_as_each_alone(beams: int) -> None:
    model, tokens = with_all("llama", torch.float32), ids(len(ROWS), 5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    mask = torch.ones_like(tokens)
    alone = []
    for row, name in enumerate(ROWS):
        with tt.using(model, name):
            one = tokens[row : row + 1]
            alone.append(model.generate(one, attention_mask=mask[:1], **options))
    slots = put_all(model)
    with slotted(model, [slots[name] for name in ROWS]):
        assert torch.equal(model.generate(tokens, attention_mask=mask, **options), torch.cat(alone))


@torch.no_grad()
def test_an_adapter_can_go_on_from_another_slot() -> None:
    """In the middle of a generation with a cache, while others come and go and the slots' memory grows."""
    model, tokens = with_all("llama", torch.float32), ids(3, 10)
    adapters = {name: tt.detach(model, name) for name in METHODS}
    stack = Stack.of(model)
    slots = [stack.put(adapters[name]) for name in "abd"]
    with slotted(model, slots):
        unmoved = step_by_step(model, tokens, 5)
        out = model(tokens[:, :5], use_cache=True)
    found = [out.logits]
    for n in range(5, 10):
        row = n % 3
        held = slots[row]
        slots[row] = stack.put(adapters["abd"[row]])
        stack.drop(held)
        others = [stack.put(adapters[name]) for name in "aabbcc"]
        with slotted(model, slots):
            out = model(tokens[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
        for slot in others:
            stack.drop(slot)
    assert torch.equal(torch.cat(found, 1), unmoved)


@torch.no_grad()
def test_new_values_are_copied_in_and_old_ones_stay_in_another_slot() -> None:
    model = with_all("llama", torch.float32)
    old = tt.detach(model, "a")
    new = shaken(tt.attach(model, METHODS["a"], "a"), seed=9)
    stack = Stack.of(model)
    first, second = stack.put(old), stack.put(new)
    with slotted(model, [first, second]):
        before = model(ids(1).expand(2, -1)).logits
    assert not torch.equal(before[0], before[1])
    stack.replace(first, new)
    with slotted(model, [first, second]):
        after = model(ids(1).expand(2, -1)).logits
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[1])
    with pytest.raises(AttachError, match="another form|other places or ranks"):
        stack.replace(first, bank_of(model).adapters["d"])


@torch.no_grad()
def test_an_attached_adapter_acts_from_its_slot_as_it_does_by_its_name() -> None:
    model = with_all("llama", torch.float32)
    tt.scale(model, "a", 0.3)
    tt.drop_layers(model, "a", 2)
    with tt.using(model, "a"):
        by_parts = model(ids(2)).logits
    slot = Stack.of(model).put(bank_of(model).adapters["a"])
    with slotted(model, [slot, slot]):
        assert error(model(ids(2)).logits, by_parts) < 1e-6


@pytest.mark.parametrize("every", [False, True])
@torch.no_grad()
def test_documents_of_packed_rows(every: bool) -> None:
    """Cells at the end belong to nobody; attention hides them from all."""
    model, tokens = with_all("llama", torch.float32), ids(1, 20)
    spans = (Span(0, 0, 4), Span(0, 4, 7), Span(0, 7, 18))
    places = torch.tensor([[*range(4), *range(3), *range(11), 0, 0]])
    names = ("a", "b", "d") if every else ("a", None, "d")
    with bank_of(model).scope(Route(tuple((n,) if n else () for n in names), spans)):
        by_parts = model(tokens, position_ids=places, use_cache=False).logits[:, :18]
    slots = put_all(model)
    route = Route(((),) * 3, spans, slots=tuple(slots[name] for name in names))
    with bank_of(model).scope(route):
        found = model(tokens, position_ids=places, use_cache=False).logits[:, :18]
    assert error(found, by_parts) < 1e-6
    for name, span in zip(names, spans, strict=True):
        with tt.using(model, name):
            alone = model(tokens[:, span.start : span.stop]).logits
        assert error(found[:, span.start : span.stop], alone) < 1e-6


class Flat(nn.Module):
    """Its layer is given tokens, not rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x.flatten(0, 1))
        return y.view_as(x)


@pytest.mark.parametrize("names", [("a", None, "b"), ("a", "b", "a"), ("b", "b", "b")])
@torch.no_grad()
def test_a_layer_that_is_given_tokens_instead_of_rows(names: tuple[str | None, ...]) -> None:
    torch.manual_seed(0)
    model = Flat()
    for seed, name in enumerate("ab"):
        shaken(tt.attach(model, "lora(rank=2)", name), seed=seed)
    x = torch.randn(3, 4, 8)
    with tt.rows(model, names):
        by_parts = model(x)
    stack, bank = Stack.of(model), bank_of(model)
    slots = {name: stack.put(bank.adapters[name]) for name in "ab"}
    with slotted(model, [-1 if name is None else slots[name] for name in names]):
        assert error(model(x), by_parts) < 1e-6


@torch.no_grad()
def test_x_is_read_once_for_layers_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, ...]] = []
    product = pools.stacked_product

    def counting(x: Tensor, matrices: Tensor, rows: Rows) -> Tensor:
        reads.append(tuple(matrices.shape[1:]))
        return product(x, matrices, rows)

    monkeypatch.setattr(pools, "stacked_product", counting)
    model = tiny.llama().float()
    adapter = shaken(tt.attach(model, "lora(rank=4)"))
    slot = Stack.of(model).put(tt.detach(model, adapter.name))
    for slots in ([slot, slot], [slot, -1]):  # views of the rows are made for each layer
        reads.clear()
        with slotted(model, slots):
            model(ids(2))
        assert reads.count((32, 24)) == 3 and reads.count((32, 16)) == 3  # q, k, v; gate, up
        assert len(reads) == 3 * (4 + 7)  # of each block four x, seven layers


@torch.no_grad()
def test_an_x_that_was_written_into_is_read_anew() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            q: Tensor = self.q_proj(x)
            return q + self.k_proj(x.mul_(2))

    torch.manual_seed(0)
    model, x = Moves(), torch.randn(2, 8)
    adapter = shaken(tt.attach(model, "lora(rank=2)"))
    with tt.using(model, "default"):
        by_parts = model(x.clone())
    slot = Stack.of(model).put(adapter)
    with slotted(model, [slot, slot]):
        assert error(model(x.clone()), by_parts) < 1e-6


def state_of(model: nn.Module) -> Any:
    """What somebody can see of a module tree."""
    modules = {name: type(module) for name, module in model.named_modules()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, hooks, asked, list(model.state_dict())


def test_the_last_one_to_go_leaves_the_model_as_it_was() -> None:
    model = tiny.llama()
    adapter = tt.detach(model, shaken(tt.attach(model, METHODS["a"])).name)
    bare = state_of(model)
    stack = Stack.of(model)
    slots = [stack.put(adapter) for _ in range(6)]
    assert Stack.of(model) is stack and stack.slots == slots == sorted(slots)
    for slot in slots:
        stack.drop(slot)
    assert state_of(model) == bare and find_bank(model) is None
    assert stack.slots == [] and stack.nbytes == 0
    assert stack.put(adapter) == slots[0]  # and it can begin again


def test_attached_adapters_and_slots_come_and_go_apart() -> None:
    model = tiny.llama()
    other = shaken(tt.attach(model, METHODS["c"], "other"))
    before, sites = state_of(model), set(sites_of(model))
    adapter = shaken(tt.attach(model, METHODS["a"], "a"))
    stack = Stack.of(model)
    slot = stack.put(adapter)
    tt.detach(model, "a")
    assert set(sites_of(model)) > sites  # those of the slot
    stack.drop(slot)
    assert state_of(model) == before
    slot = stack.put(adapter)
    tt.detach(model, "other")
    with torch.no_grad(), slotted(model, [slot, -1]):
        model(ids(2))
    stack.drop(slot)
    assert sites_of(model) == {} and not other.attached


def test_a_description_tells_of_slots() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, METHODS["a"], "a")
    stack = Stack.of(model)
    slot = stack.put(adapter)
    with slotted(model, [slot, -1, -1], [None, "a", None]):
        told = tt.describe(model)
    assert f"in slots: 1 adapters, {stack.nbytes:,} bytes" in told
    assert "acting now: *slots*, a, base" in told
    stack.drop(slot)
    assert "in slots" not in tt.describe(model)


REFUSED = {
    "a bias of B": "lora(rank=4, lora_bias=True)",
    "invoked": "lora(rank=4, invocation=[5, 6])",
    "a head of its own": "lora(rank=4, train=['lm_head'])",
    "an embedding": "lora(rank=4, targets=['embed_tokens', 'q_proj'])",
    "tied": "lora(rank=4, targets=['embed_tokens', 'q_proj'], tie=True)",
    "two methods": "lora(rank=4)|ia3",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_lie_in_a_slot_is_refused(what: str) -> None:
    model = tiny.llama(tie_word_embeddings=what == "tied")
    adapter = tt.attach(model, REFUSED[what])
    before, stack = state_of(model), Stack.of(model)
    assert not stack.takes(adapter)
    for refusing in (stack.read, stack.put):
        with pytest.raises(UnsupportedError, match="cannot lie in a slot|can lie in a slot"):
            refusing(adapter)
    assert state_of(model) == before and stack.slots == []


def test_biases_are_refused() -> None:
    model = CASES["gpt2"].model()
    adapter = tt.attach(model, "lora(rank=4, bias='lora_only')")
    with pytest.raises(UnsupportedError, match="is not just to add a product"):
        Stack.of(model).read(adapter)


def test_experts_are_refused() -> None:
    model = CASES["mixtral"].model()
    adapter = tt.attach(model, "lora(rank=4, targets='re:.*experts.(gate_up|down)_proj')")
    with pytest.raises(UnsupportedError, match=r"at 'model\.layers\.0\.mlp\.experts"):
        Stack.of(model).read(adapter)


def test_modules_that_are_called_once_for_each_adapter_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="once for each adapter"):
        Stack.of(CASES["deberta"].model())


def test_another_base_is_refused() -> None:
    adapter = tt.attach(tiny.llama(), METHODS["a"])
    for other in (tiny.llama(hidden_size=64), CASES["qwen3"].make()):
        assert not Stack.of(other).takes(adapter)
        with pytest.raises(BaseMismatchError, match="another base"):
            Stack.of(other).put(adapter)


def test_slots_stay_within_the_budget() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, METHODS["a"])
    a, b = 3 * 32 + 32, 32 + 16 + 16 + 32  # queries, keys, values; outputs
    one = 3 * 4 * 8 * (a + b)  # blocks, bytes, room for ranks
    stack = Stack(model, budget=7 * one + 5)
    slots = []
    while stack.takes(adapter):
        slots.append(stack.put(adapter))
        assert stack.nbytes <= stack.budget
    assert len(slots) == 7 and stack.nbytes == 7 * one
    with pytest.raises(AttachError, match="does not fit: slots take"):
        stack.put(adapter)
    stack.drop(slots[2])
    assert stack.put(adapter) == slots[2]


def test_routes_that_make_no_sense_are_refused() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, METHODS["a"])
    stack = Stack.of(model)
    slot = stack.put(adapter)
    with pytest.raises(RouteError, match="2 units have 1 slots"):
        Route(((), ()), slots=(slot,))
    with pytest.raises(RouteError, match="an owner and a slot"):
        Route((("default",),), slots=(slot,))
    with torch.no_grad(), slotted(model, [slot + 1]), pytest.raises(RouteError, match="no adapter"):
        model(ids(1))
    with pytest.raises(RouteError, match="no adapter lies in slot"):
        stack.drop(slot + 1)


@pytest.mark.parametrize("name", registered())
@torch.no_grad()
def test_every_method_lies_in_slots_as_it_is_or_is_refused(name: str) -> None:
    model, tokens = tiny.llama().float(), ids(3)
    adapter = shaken(tt.attach(model, SMALL.get(name, name), "a"))
    stack = Stack.of(model)
    if not stack.takes(adapter):
        with pytest.raises(UnsupportedError, match="in a slot"):
            stack.put(adapter)
        return
    with tt.rows(model, ["a", None, "a"]):
        by_parts = model(tokens).logits
    slot = stack.put(adapter)
    with slotted(model, [slot, -1, slot]):
        assert error(model(tokens).logits, by_parts) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        "init=pissa, dropout=0.5",
        "init=olora, frozen_a=True",
        "init=gaussian, rslora=True",
        "bits=8",
    ],
)
@torch.no_grad()
def test_options_of_training_and_kept_starts(options: str) -> None:
    model, tokens = tiny.llama().float(), ids(3)
    adapter = shaken(tt.attach(model, f"lora(rank=8, {options})", "a"))
    with tt.rows(model, ["a", None, "a"]):
        by_parts = model(tokens).logits
    slot = Stack.of(model).put(adapter)
    with slotted(model, [slot, -1, slot]):
        assert (
            error(model(tokens).logits, by_parts) < 3e-6
        )  # a kept start is taken off what is large beside it
