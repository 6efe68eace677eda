"""An oracle for prefix tuning that needs no library: real text.

A prefix whose table holds the keys and values that the model itself computes for tokens t1 … tn is those
tokens: whatever follows must come out as if they had been read. It proves positions, masks, caches, grouped
queries and padding at once.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import trimtab as tt
from tests import tiny as models
from tests.oracles import kit
from trimtab.adapt.attention import ROLE
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import At, Method, Params, Place, Spec, normal
from trimtab.adapt.parse import methods
from trimtab.adapt.route import Route, Span
from trimtab.errors import ConfigError

TEXT, REST, ROWS = 5, 6, 3
decoders = pytest.mark.parametrize("make", [kit.llama, kit.gpt2], ids=["llama", "gpt2"])


@kit.loud
def bart() -> nn.Module:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=models.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, models.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def table_of(layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(n, 2 · layers · C) of keys and values (G, n, D) per layer."""
    flat = [side.transpose(0, 1).flatten(1) for pair in layers for side in pair]
    return torch.stack(flat, dim=1).flatten(1)


@torch.no_grad()
def with_text_as_prefix(
    make: kit.Make, text_T: Tensor, **config: Any
) -> tuple[nn.Module, nn.Module]:
    """The bare model, and one whose prefix ``p`` is the text; both in fp64."""
    bare, model = make().double(), make()
    for each in (bare, model):
        for name, value in config.items():
            each.config.__setattr__(name, value)
    cache = bare(text_T[None], use_cache=True).past_key_values
    adapter = tt.attach(model, tt.Prefix(length=len(text_T)), "p")
    model.double()
    (table,) = adapter.tensors.values()
    table.copy_(table_of([(layer.keys[0], layer.values[0]) for layer in cache.layers]))
    return bare, model


@decoders
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_follows_is_as_after_the_text(make: kit.Make, attention: str) -> None:
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prefix(make, text, _attn_implementation=attention)
    whole = torch.cat([text.expand(ROWS, -1), rest], dim=1)
    with torch.no_grad():
        expected = bare(whole).logits[:, TEXT:]
        kit.assert_close(model(rest).logits, expected, "logits")
        with tt.using(model, None):
            assert (model(rest).logits - expected).abs().max() > 1e-3


@decoders
def test_padding_on_either_side_changes_nothing(make: kit.Make) -> None:
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prefix(make, text)
    lengths = [REST, REST - 2, 1]
    for left in (True, False):
        mask = torch.zeros(ROWS, REST, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, slice(REST - length, None) if left else slice(length)] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            found = model(rest, attention_mask=mask, position_ids=positions).logits
            for row, length in enumerate(lengths):
                own = rest[row][mask[row].bool()]
                expected = bare(torch.cat([text, own])[None]).logits[0, TEXT:]
                kit.assert_close(found[row][mask[row].bool()], expected, f"row of {length}")


@decoders
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_goes_on_as_after_the_text(
    make: kit.Make, cache: str | None, padded: bool
) -> None:
    text, rest = ids_of(TEXT), ids_of(2, REST, seed=1)
    bare, model = with_text_as_prefix(make, text)
    mask = torch.ones_like(rest)
    mask[0, : 2 * padded] = 0
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    more = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    found = model.generate(rest, attention_mask=mask, **options, **more)[:, REST:]
    for row in range(2):
        own = torch.cat([text, rest[row][mask[row].bool()]])[None]
        expected = bare.generate(own, attention_mask=torch.ones_like(own), **options)[
            0, own.shape[1] :
        ]
        assert torch.equal(found[row], expected)
    without = bare.generate(rest, attention_mask=mask, **options)[:, REST:]
    assert not torch.equal(found, without)


@decoders
def test_rows_with_and_without_it_share_a_batch(make: kit.Make) -> None:
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prefix(make, text)
    with torch.no_grad():
        with tt.rows(model, [None, "p", None]):
            found = model(rest).logits
        expected = bare(rest).logits
        expected[1] = bare(torch.cat([text, rest[1]])[None]).logits[0, TEXT:]
    kit.assert_close(found, expected, "logits")


@decoders
def test_gradients_of_the_text_reach_the_table(make: kit.Make) -> None:
    """With and without checkpoints, whose recomputation runs after the scope has ended."""
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prefix(make, text)
    (table,) = (p for p in model.parameters() if p.requires_grad)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            with kit.quiet("`gradient_checkpointing_enable` is deprecated"):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with tt.using(model, "p"):
            loss = kit.objective(model(rest, use_cache=False).logits.flatten(0, 1))
        with tt.using(model, None):
            loss.backward()
        grads.append(table.grad.clone())
        table.grad = None
    assert torch.equal(grads[0], grads[1])
    # The same derivative through the model's own cache, which PEFT's and everyone's prefix goes through.
    cache = bare(text[None], use_cache=True).past_key_values
    leaves = []
    for layer in cache.layers:
        layer.keys = layer.keys.detach().requires_grad_()
        layer.values = layer.values.detach().requires_grad_()
        leaves.append((layer.keys, layer.values))
    cache.batch_repeat_interleave(ROWS)
    kit.objective(bare(rest, past_key_values=cache).logits.flatten(0, 1)).backward()
    expected = table_of([(keys.grad[0], values.grad[0]) for keys, values in leaves])
    kit.assert_close(grads[0], expected, "gradient of the table")


def test_an_encoder_of_one_layer_reads_it_as_text() -> None:
    """One layer only: in deeper ones a bidirectional text's own keys would have seen what follows."""
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)

    def make() -> nn.Module:
        model = kit.bert()
        model.bert.encoder.layer = model.bert.encoder.layer[:1]
        return model.bert

    bare, model = make().double(), make()
    own = bare.encoder.layer[0].attention.self
    whole = torch.cat([text.expand(ROWS, -1), rest], dim=1)
    with torch.no_grad():
        hidden = bare.embeddings(text[None])
        keys, values = own.key(hidden)[0], own.value(hidden)[0]
        adapter = tt.attach(model, tt.Prefix(length=TEXT), "p")
        model.double()
        (table,) = adapter.tensors.values()
        table.copy_(torch.cat([keys, values], dim=1))
        expected = bare(whole).last_hidden_state[:, TEXT:]
        kit.assert_close(model(rest).last_hidden_state, expected, "hidden states")


@pytest.mark.parametrize("make", [kit.t5, kit.gated_t5], ids=["relu", "gated"])
def test_a_t5_decoder_reads_it_as_text(make: kit.Make) -> None:
    """The learned bias by distance counts from the prefix, too."""
    question, text, rest = ids_of(ROWS, 4, seed=2), ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = make().double(), make()
    whole = torch.cat([text.expand(ROWS, -1), rest], dim=1)
    with torch.no_grad():
        # its keys depend on the question through cross-attention, so each row has its own prefix
        expected = bare(input_ids=question, decoder_input_ids=whole)
        cache = expected.past_key_values.self_attention_cache
        method = tt.Prefix(length=TEXT, targets="re:decoder.*SelfAttention")
        names = [f"row{row}" for row in range(ROWS)]
        for row, name in enumerate(names):
            (table,) = tt.attach(model, method, name).tensors.values()
            layers = [
                (layer.keys[row, :, :TEXT], layer.values[row, :, :TEXT]) for layer in cache.layers
            ]
            table.data = table_of(layers)
        model.double()
        with tt.rows(model, names):
            found = model(input_ids=question, decoder_input_ids=rest).logits
    kit.assert_close(found, expected.logits[:, TEXT:], "logits")


@pytest.mark.parametrize("make", [kit.t5, bart], ids=["t5", "bart"])
@torch.no_grad()
def test_a_prefix_of_cross_attention_is_a_longer_question(make: kit.Make) -> None:
    """The decoder finds the states of a text that an encoder has read, beside those of its own question."""
    question, text, answer = ids_of(ROWS, 4, seed=2), ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = make().double(), make()
    method = tt.Prefix(length=TEXT, targets="cross_attention", text=tuple(text.tolist()))
    tt.attach(model, method, "p")
    model.double()
    read = bare.get_encoder()(text[None]).last_hidden_state.expand(ROWS, -1, -1)
    states = torch.cat([read, bare.get_encoder()(question).last_hidden_state], dim=1)
    expected = bare(encoder_outputs=(states,), decoder_input_ids=answer).logits
    found = model(input_ids=question, decoder_input_ids=answer).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with tt.rows(model, [None, "p", None]):
        mixed = model(input_ids=question, decoder_input_ids=answer).logits
    torch.testing.assert_close(mixed[1], expected[1], atol=1e-4, rtol=1e-4)
    alone = bare(input_ids=question, decoder_input_ids=answer).logits
    kit.assert_close(mixed[[0, 2]], alone[[0, 2]], "rows of the base")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    made = model.generate(question, **options)
    again = model.generate(question, use_cache=False, **options)
    assert torch.equal(made, again)


@torch.no_grad()
def test_a_prefix_is_seen_from_beyond_a_window() -> None:
    """Text scrolls out of sight; a prefix stays. (PEFT's lies in the cache, and scrolls out.)"""
    model = kit.mistral()
    adapter = tt.attach(model, tt.Prefix(length=2, layers=(1,)), "p")
    kit.stir(adapter)
    rest = ids_of(1, 12, seed=1)
    acting = model(rest).logits
    with tt.using(model, None):
        assert ((acting - model(rest).logits).abs().amax((0, 2)) > 1e-4).all()


def test_dropout_is_per_row_and_only_in_training() -> None:
    model = kit.llama()
    kit.stir(tt.attach(model, "p-tuning-v2(length=4)", "p"))
    rest = ids_of(1, REST).expand(2, -1)
    with torch.no_grad():
        calm = model(rest).logits
        assert torch.equal(calm, model(rest).logits)
        torch.manual_seed(0)
        first, second = model.train()(rest, use_cache=False).logits
    assert (first - second).abs().max() > 1e-3
    assert (first - calm[0]).abs().max() > 1e-3


def test_the_preset_of_p_tuning_v2() -> None:
    expected = tt.Prefix(length=128, init_std=1.0, dropout=0.1)
    assert tt.method("p-tuning-v2") == expected
    assert tt.method("p-tuning-v2(length=8)") == expected.replace(length=8)


def test_an_mlp_and_a_text_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="leave out one"):
        tt.Prefix(hidden=4, text=(1, 2))


# -- rows of their own ----------------------------------------------------------------------------------


@final
class Halved(Method):
    """A prefix whose values each unit scales by its number: what a gate around a prefix does."""

    kind: ClassVar[str] = "test-halved"
    affine: ClassVar[bool] = False
    targets: str | tuple[str, ...] = "self_attention"
    length: int = 3

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def place(self, anatomy: Any) -> list[Place]:
        return [Place(place.path, ROLE) for place in super().place(anatomy)]

    def tensors(self, layer: Any, role: str) -> dict[str, Spec]:
        return {"both": Spec("both", (2, self.length, 16), normal(1.0))}

    def keys_values(self, p: Params, at: At) -> tuple[Tensor, Tensor]:
        keys, values = p["both"]
        scale = 0.5 ** torch.arange(at.part.unit_count, dtype=keys.dtype)
        return keys.expand(len(scale), -1, -1), values * scale[:, None, None]


@torch.no_grad()
def test_each_row_or_document_may_have_its_own() -> None:
    methods.add(Halved.kind, Halved)
    try:
        model = kit.llama().double()
        adapter = tt.attach(model, Halved(), "p")
        ids = ids_of(4, REST, seed=1)
        with tt.rows(model, ["p", None, "p", "p"]):
            together = model(ids).logits
        documents = ids[2:, :4]
        spans = (Span(0, 0, 4), Span(0, 4, 8))
        positions = torch.arange(4).repeat(2)[None]
        with bank_of(model).scope(Route((("p",), ("p",)), spans)):
            packed = model(documents.reshape(1, 8), position_ids=positions, use_cache=False).logits
        for tensor in adapter.tensors.values():
            tensor[1] *= 0.5  # what its second row has
        with tt.using(model, "p"):
            second = model(documents[:1]).logits[0], model(documents[1:]).logits[0]
            for tensor in adapter.tensors.values():
                tensor[1] *= 0.5
            third = model(ids[2:3]).logits[0]
            for tensor in adapter.tensors.values():
                tensor[1] *= 4
            first = model(documents[:1]).logits[0]
    finally:
        methods.remove(Halved.kind)
    kit.assert_close(together[2], third, "third row")
    kit.assert_close(packed[0, :4], first, "first document")
    kit.assert_close(packed[0, 4:], second[1], "second document")
