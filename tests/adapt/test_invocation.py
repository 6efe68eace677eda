"""aLoRA: an adapter that acts from its invocation tokens on, and nowhere before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.laws.cells import shaken
from tests.tiny import CASES, VOCABULARY, output
from trimtab.adapt.bank import Plan, bank_of
from trimtab.adapt.route import Route, Span
from trimtab.errors import ConfigError, RouteError, UnsupportedError

CALL = (5, 9)
MODELS = ("llama", "gpt2", "mixtral", "bert")


def text(rows: int = 4, length: int = 9) -> Tensor:
    """Rows in which the tokens occur at 4; at 2 and at 6; not at all; at the end."""
    ids = torch.randint(10, VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(4))
    for row, start in ((0, 4), (1, 2), (1, 6), (3, 7)):
        ids[row, start : start + 2] = torch.tensor(CALL)
    return ids[:rows, :length]


STARTS = (4, 6, None, 7)


def built(
    name: str = "llama", method: str = f"lora(rank=3, invocation={CALL})", **options: Any
) -> nn.Module:
    model = CASES[name].model(torch.float64)
    shaken(tt.attach(model, method, "a", **options))
    return model.eval()


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return output(model, {"input_ids": ids, **options})


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_before_the_invocation_it_is_the_base_bitwise(name: str) -> None:
    model, ids = built(name), text()
    acting = logits(model, ids)
    with tt.using(model, None):
        bare = logits(model, ids)
    for row, start in enumerate(STARTS):
        end = start if start is not None else ids.shape[1]
        assert torch.equal(acting[row, :end], bare[row, :end]), row
        apart = (acting[row, end:] - bare[row, end:]).abs().amax(-1)
        assert bool((apart > 1e-4).all()), row


def test_it_is_an_ordinary_lora_where_it_acts() -> None:
    """Where a row begins with the tokens, it acts in all of it."""
    ids = torch.cat([torch.tensor([CALL]), text(1)[:, :4]], 1)
    plain = built(method="lora(rank=3)")
    torch.testing.assert_close(logits(built(), ids), logits(plain, ids))


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_mixed_batch_are_the_rows_alone(name: str) -> None:
    model, ids = built(name), text(6)
    shaken(tt.attach(model, "lora(rank=2, invocation=[9], targets='all-linear')", "b"), seed=2)
    shaken(tt.attach(model, "lora(rank=2)", "c"), seed=3)
    owners = ["a", "b", None, "c", "a", "b"]
    ids[4, 1:3] = torch.tensor(CALL)
    with tt.rows(model, owners):
        together = logits(model, ids)
    for row, owner in enumerate(owners):
        with tt.using(model, owner):
            torch.testing.assert_close(together[[row]], logits(model, ids[[row]]))


def test_documents_of_a_packed_row_are_the_documents_alone() -> None:
    model, ids = built(), text(3, 7)
    spans = tuple(Span(0, 7 * n, 7 * n + 7) for n in range(3))
    row = ids.reshape(1, -1).clone()
    row[0, 6], row[0, 7] = CALL  # across two documents: no invocation
    ids = row.view(3, 7).clone()
    positions = torch.arange(7).repeat(3)[None]
    for owners in ((("a",),) * 3, (("a",), (), ("a",))):
        route = Route(owners, spans)
        with bank_of(model).scope(route, Plan()), torch.no_grad():
            together = model(input_ids=row, position_ids=positions, use_cache=False).logits[0]
        for number, owner in enumerate(owners):
            with tt.using(model, owner[0] if owner else None):
                alone = logits(model, ids[[number]])[0]
            torch.testing.assert_close(together[7 * number : 7 * number + 7], alone)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_with_a_cache_is_generation_without(name: str, options: dict[str, Any]) -> None:
    model, ids = built(name), text()
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    with torch.no_grad():
        cached = model.generate(ids, **settings, **options)
        plain = model.generate(ids, **settings, **options, use_cache=False)
        with tt.using(model, None):
            bare = model.generate(ids, **settings, **options)
        for row in range(len(ids)):
            alone = model.generate(ids[[row]], **{**settings, "attention_mask": None}, **options)
            assert torch.equal(cached[row, : alone.shape[1]], alone[0]), row
    assert torch.equal(cached, plain)
    assert torch.equal(cached[2], bare[2]) and not torch.equal(cached, bare)


def test_left_padding_changes_nothing() -> None:
    model, ids = built(), text()
    zeros = torch.zeros(len(ids), 3, dtype=torch.long)
    padded = torch.cat([zeros, ids], 1)
    mask = torch.cat([zeros, torch.ones_like(ids)], 1)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        short = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        long = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(long[:, 3:], short)


def test_a_cache_that_the_base_read_is_shared() -> None:
    """A turn of the base is read once; the next turn invokes the adapter, and nothing has to be read again."""
    model, ids = built(), text(2)
    ids = ids[:1]
    whole = logits(model, ids)
    with torch.no_grad():
        with tt.using(model, None):
            first = model(ids[:, :4], use_cache=True)
        then = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
        nothing = model(ids[:, :4], use_cache=True)  # or the adapter itself, uninvoked
        later = model(ids[:, 4:], past_key_values=nothing.past_key_values, use_cache=True).logits
    torch.testing.assert_close(then, whole[:, 4:])
    torch.testing.assert_close(later, whole[:, 4:])


def test_only_the_last_logits_may_be_asked_for() -> None:
    model = built(method=f"lora(rank=3, invocation={CALL}, targets=['q_proj', 'lm_head'])")
    ids = text()
    with torch.no_grad():
        last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, logits(model, ids)[:, -2:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_come_from_where_it_acts(checkpointing: bool) -> None:
    model, ids = built(), text()
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    adapter = bank_of(model).adapters["a"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    mine = {key: t.grad.clone() for key, t in adapter.tensors.items() if t.grad is not None}
    assert all(bool(grad.any()) for grad in mine.values()) and len(mine) == len(adapter.tensors)
    other = built()
    other.train()
    reference = bank_of(other).adapters["a"]
    other(input_ids=ids, labels=ids).loss.backward()
    for key, tensor in reference.tensors.items():
        torch.testing.assert_close(mine[key], tensor.grad)
    for parameter in reference.parameters():
        parameter.grad = None
    other(input_ids=ids[[2]], labels=ids[[2]]).loss.backward()  # not invoked: nothing to learn
    assert not any(bool(t.grad.any()) for t in reference.parameters() if t.grad is not None)


def test_files_and_values(tmp_path: Path) -> None:
    model, ids = built(), text()
    adapter = bank_of(model).adapters["a"]
    adapter.save(tmp_path / "a")
    loaded = tt.Adapter.load(tmp_path / "a")
    assert loaded == adapter and dict(loaded.method)["invocation"] == CALL
    fresh = CASES["llama"].model(torch.float64)
    tt.attach(fresh, loaded)
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    double = tt.add([adapter, adapter.detached()], name="d", weights=[0.5, 0.5])
    tt.attach(model, double)
    with tt.using(model, "d"):
        torch.testing.assert_close(logits(model, ids), logits(fresh, ids))


def test_what_cannot_be_is_refused() -> None:
    model = built()
    with pytest.raises(UnsupportedError, match="a merged weight acts everywhere"):
        tt.merge(model, "a")
    with pytest.raises(ConfigError, match="a trained bias would act before it"):
        tt.LoRA(invocation=(3,), bias="all")
    with pytest.raises(RouteError, match="called without token ids"):
        embeddings = model.get_input_embeddings()(text())  # type: ignore[operator]
        model(inputs_embeds=embeddings)
    with pytest.raises(UnsupportedError, match="tells tokens apart"):
        tt.attach(CASES["mixed"].model(), "lora(rank=2, invocation=[3], targets='conv1')", "c")
    other = tt.attach(model, "lora(rank=2, invocation=[3])", "b")
    with pytest.raises(UnsupportedError, match="have no sum"):
        tt.add([bank_of(model).adapters["a"], other], name="s")
