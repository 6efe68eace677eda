"""An oracle for prompts that needs no library: real tokens.

A prompt that starts as the embeddings of tokens t1 … tn is those tokens in front of the text, whatever the
architecture, the padding, the cache or the neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import trimtab as tt
from tests import tiny as models
from tests.oracles import kit
from trimtab.adapt.bank import bank_of
from trimtab.adapt.route import Route, Span
from trimtab.errors import ConfigError, RouteError, TargetError, UnsupportedError

TEXT, REST, ROWS = 5, 6, 3
_SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def seeded(make: Callable[[], nn.Module]) -> kit.Make:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return kit.loud(made)


gemma = seeded(
    lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, sliding_window=4, attn_implementation="eager"))
)
mistral = seeded(lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=4)))
qwen = seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES)))
falcon = seeded(lambda: FalconForCausalLM(FalconConfig(
    vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
    new_decoder_architecture=True, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)))  # fmt: skip
bloom = seeded(lambda: BloomForCausalLM(BloomConfig(
    vocab_size=models.VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)))  # fmt: skip
GROWN = {"falcon": falcon, "bloom": bloom}
"""Their attention cannot be reached, so the prompts lengthen the rows."""
MAKES = {
    "llama": kit.llama, "gpt2": kit.gpt2, "mixtral": models.mixtral, "qwen3": qwen, "gemma2": gemma,
    "mistral-window": mistral, **GROWN,
}  # fmt: skip
READ = ("llama", "gpt2", "mixtral", "qwen3")
decoders = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, models.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def with_text_as_prompt(
    make: kit.Make, *texts: Tensor, kind: type[Any] = tt.Prompt
) -> tuple[nn.Module, nn.Module]:
    """The bare model, and one whose prompts (or prefixes) ``p0``, ``p1``, … are these texts; both in fp64."""
    bare, model = make().double(), make()
    for number, text in enumerate(texts):
        method = kind(length=len(text), text=tuple(text.tolist()))
        tt.attach(model, method, f"p{number}")
    if make is bloom:  # fully masked positions are NaN to it in fp64
        return bare.float(), model
    return bare, model.double()


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """To 1e-5: some models compute norms and softmax in fp32 whatever their dtype, and a prefix is kept in fp32."""
    kit.assert_close(ours.float(), theirs.float(), what)


def in_front(text: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([text.expand(len(rest), -1), rest], dim=1)


# -- decoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make, tt.Prompt) for make in MAKES.values()]
    + [(make, tt.Prefix) for name, make in MAKES.items() if name in READ],
    ids=[*MAKES, *(f"prefix-{name}" for name in READ)],
)
@torch.no_grad()
def test_what_follows_is_as_after_the_text(make: kit.Make, kind: type[Any]) -> None:
    """A prefix starts as the text's keys and values; where attention has a window, it is seen from beyond it."""
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prompt(make, text, kind=kind)
    expected = bare(in_front(text, rest)).logits[:, TEXT:]
    with tt.using(model, "p0"):
        same(model(rest).logits, expected, "logits")
    with tt.using(model, None):
        assert torch.equal(model(rest).logits, bare(rest).logits)


@decoders
@torch.no_grad()
def test_prompts_of_different_lengths_share_a_batch_with_the_base(make: kit.Make) -> None:
    texts = ids_of(TEXT), ids_of(2, seed=3)
    rest = ids_of(4, REST, seed=1)
    bare, model = with_text_as_prompt(make, *texts)
    with tt.rows(model, ["p1", None, "p0", "p1"]):
        found = model(rest).logits
    for row, text in enumerate((texts[1], texts[0][:0], texts[0], texts[1])):
        expected = bare(in_front(text, rest[[row]])).logits[0, len(text) :]
        same(found[row], expected, f"row {row}")


@decoders
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(make: kit.Make) -> None:
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prompt(make, text)
    lengths = [REST, REST - 2, 1]
    for left in (True, False):
        mask = torch.zeros(ROWS, REST, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, slice(REST - length, None) if left else slice(length)] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        given = {} if make is bloom else {"position_ids": positions}  # it has none
        found = model(rest, attention_mask=mask, **given).logits
        for row, length in enumerate(lengths):
            own = rest[row][mask[row].bool()]
            expected = bare(torch.cat([text, own])[None]).logits[0, TEXT:]
            same(found[row][mask[row].bool()], expected, f"row of {length}")


@decoders
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True},
                                     {"num_beams": 3}], ids=["dynamic", "static", "beams"])  # fmt: skip
def test_generation_goes_on_as_after_the_text(make: kit.Make, options: dict[str, Any]) -> None:
    if make in GROWN.values() and "cache_implementation" in options:
        pytest.skip("a static cache is as long as the text alone")
    text, rest = ids_of(TEXT), ids_of(2, REST, seed=1)
    bare, model = with_text_as_prompt(make, text)
    mask = torch.ones_like(rest)
    mask[0, :2] = 0
    common: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        **({"num_beams": 3} if "num_beams" in options else {}),
    }  # fmt: skip
    found = model.generate(rest, attention_mask=mask, **{**common, **options})[:, REST:]
    for row in range(2):
        own = torch.cat([text, rest[row][mask[row].bool()]])[None]
        expected = bare.generate(own, attention_mask=torch.ones_like(own), **common)
        assert torch.equal(found[row], expected[0, own.shape[1] :])


@decoders
def test_gradients_are_those_of_the_embeddings(make: kit.Make) -> None:
    """With and without checkpoints, in a batch with others, with the backward after the scope."""
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prompt(make, text, ids_of(3, seed=9))
    table = bank_of(model).adapters["p0"].tensors["prompt_encoder.embedding.weight"]
    embed = bare.get_input_embeddings()
    leaf = embed(text).detach().requires_grad_()
    inputs = torch.cat([leaf.expand(ROWS, -1, -1), embed(rest)], dim=1)
    kit.objective(bare(inputs_embeds=inputs).logits[:, TEXT:].flatten(0, 1)).backward()
    for checkpointing in (False, True):
        if checkpointing:
            with kit.quiet("`gradient_checkpointing_enable` is deprecated"):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with tt.rows(model, ["p0"] * ROWS + ["p1", None]):
            both = model(torch.cat([rest, rest[:2]]), use_cache=False).logits
        kit.objective(both[:ROWS].flatten(0, 1)).backward()
        same(table.grad, leaf.grad, f"gradient, checkpointing {checkpointing}")
        table.grad = None


@torch.no_grad()
def test_a_decoders_classifier_finds_the_last_token() -> None:
    """PEFT pools the last position, padding or not, because it hands the classifier no ids."""
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prompt(kit.llama_classifier, text)
    mask = torch.ones_like(rest)
    mask[0, -2:] = mask[1, :2] = 0
    rest = rest.masked_fill(mask == 0, bare.config.pad_token_id)
    found = model(rest, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for row in range(ROWS):
        own = torch.cat([text, rest[row][mask[row].bool()]])[None]
        same(found[row], bare(own).logits[0], f"row {row}")


def test_reentrant_checkpoints_are_refused() -> None:
    _, model = with_text_as_prompt(kit.llama, ids_of(TEXT))
    with kit.quiet("`gradient_checkpointing_enable` is deprecated"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        model.train()(ids_of(ROWS, REST), use_cache=False)


@torch.no_grad()
def test_packed_documents_have_their_own_prompts() -> None:
    texts = ids_of(TEXT), ids_of(2, seed=3)
    bare, model = with_text_as_prompt(kit.llama, *texts)
    documents = [ids_of(4, seed=5), ids_of(3, seed=6), ids_of(6, seed=7)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    spans = (Span(0, 0, 4), Span(0, 4, 7), Span(0, 7, 13))
    with bank_of(model).scope(Route((("p0",), ("p1",), ()), spans)):
        found = model(ids, position_ids=positions, use_cache=False).logits[0]
    for document, span, text in zip(documents, spans, (*texts, ids_of(0)), strict=True):
        expected = bare(torch.cat([text, document])[None]).logits[0, len(text) :]
        kit.assert_close(found[span.start : span.stop], expected, str(span))


@torch.no_grad()
def test_what_else_the_owner_has_acts_on_the_prompt_too() -> None:
    """LoRA and a prefix of the same rows: as if the tokens were read by the model that they edit."""
    text, front, rest = ids_of(TEXT), ids_of(3, seed=8), ids_of(ROWS, REST, seed=1)
    _, model = with_text_as_prompt(kit.llama, text)
    model.float()
    tt.attach(model, tt.Prefix(length=3, text=tuple(front.tolist())), "front")
    kit.stir(tt.attach(model, "lora(rank=4)", "lora"))
    model.double()
    with tt.using(model, ["lora", "p0"]):
        found = model(rest).logits
    with tt.using(model, "lora"):
        kit.assert_close(found, model(in_front(text, rest)).logits[:, TEXT:], "with LoRA")
    with tt.using(model, ["front", "p0"]):
        found = model(rest).logits
    with tt.using(model, None):
        expected = model(in_front(torch.cat([front, text]), rest)).logits[:, 3 + TEXT :]
    same(found, expected, "with a prefix")


def test_a_short_text_is_repeated_and_a_long_one_is_cut() -> None:
    model = kit.llama()
    weight = model.get_input_embeddings().weight.detach()
    for text, length in (((7, 8, 9), 5), ((7, 8, 9), 2)):
        adapter = tt.attach(model, tt.Prompt(length=length, text=text), f"p{length}")
        (table,) = adapter.tensors.values()
        assert torch.equal(table.detach(), weight[[7, 8, 9, 7, 8][:length]])
    with pytest.raises(ConfigError, match="token 97"):
        tt.attach(model, tt.Prompt(text=(97,)), "wrong")


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(TargetError, match="leave out targets"):
        tt.attach(kit.llama(), tt.Prompt(targets="q_proj"), "p")
    for inner in ("prompt", "ptuning", "prefix", "llama-adapter"):
        with pytest.raises(ConfigError, match="layer-wise"):
            tt.SpotTune(inner=inner)
    model = kit.llama()
    tt.attach(model, tt.Prompt(length=2), "p")
    with pytest.raises(TargetError, match="virtual tokens"):
        tt.scale(model, "p", 0.5)


@pytest.mark.parametrize(
    "method",
    [
        "prompt(length=3)",
        "ptuning(length=3, hidden=8)",
        "prefix(length=3, hidden=8)",
        "llama-adapter(length=3)",
    ],
)
@pytest.mark.parametrize(
    "make", [kit.llama, kit.bert, kit.t5, falcon], ids=["llama", "bert", "t5", "falcon"]
)
def test_a_base_in_bf16_computes_in_bf16(make: kit.Make, method: str) -> None:
    """The masters stay in fp32, and get gradients."""
    model = make().bfloat16()
    if make is falcon and method.startswith(("prefix", "llama-adapter")):
        pytest.skip("its attention cannot be reached")
    adapter = tt.attach(model, method, "a")
    kit.stir(adapter)
    batch = kit.batch_of(model)
    assert kit.acts(model, "a", batch) and tt.probe(model) == []
    out = kit.outputs(model, batch)
    assert out.dtype == torch.bfloat16
    out.float().sin().sum().backward()
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32 and bool(parameter.grad.any())


# -- encoders -------------------------------------------------------------------------------------------


def deberta() -> nn.Module:
    config = DebertaV2Config(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config)


ENCODERS = {"bert": kit.bert, "roberta": kit.roberta, "deberta": seeded(deberta)}
encoders = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)


@encoders
@torch.no_grad()
def test_an_encoder_reads_it_as_text(make: kit.Make) -> None:
    """What a head sees is as with the text in front, in mixed rows, with padding; base rows are the base's."""
    texts = ids_of(TEXT), ids_of(2, seed=3)
    rest = ids_of(4, REST, seed=1)
    bare, model = with_text_as_prompt(make, *texts)
    mask = torch.ones_like(rest)
    mask[0, -2:] = mask[3, -1:] = 0
    pad = bare.config.pad_token_id
    rest = rest.masked_fill(mask == 0, pad)
    with tt.rows(model, ["p0", None, "p1", None]):
        found = model(rest, attention_mask=mask).logits
    for row, text in enumerate((texts[0], texts[0][:0], texts[1], texts[1][:0])):
        own = torch.cat([text, rest[row][mask[row].bool()]])[None]
        kit.assert_close(found[row], bare(own).logits[0], f"row {row}")


@encoders
@torch.no_grad()
def test_the_backbone_gives_the_positions_of_the_text(make: kit.Make) -> None:
    text, rest = ids_of(TEXT), ids_of(ROWS, REST, seed=1)
    bare, model = with_text_as_prompt(lambda: make().base_model, text)
    out = model(rest, output_hidden_states=True)
    expected = bare(in_front(text, rest), output_hidden_states=True)
    assert len(out.hidden_states) == len(expected.hidden_states)
    kit.assert_close(out.last_hidden_state, expected.last_hidden_state[:, TEXT:], "last states")
    kit.assert_close(out.hidden_states[1], expected.hidden_states[1][:, TEXT:], "first states")


@pytest.mark.parametrize("make", [kit.t5, kit.gated_t5], ids=["relu", "gated"])
@torch.no_grad()
def test_a_t5_encoder_reads_it_as_text(make: kit.Make) -> None:
    """And the decoder sees it; rows with other lengths, padding on the left, and generation."""
    texts = ids_of(TEXT), ids_of(2, seed=3)
    rest, answer = ids_of(4, REST, seed=1), ids_of(4, 3, seed=2)
    bare, model = with_text_as_prompt(make, *texts)
    mask = torch.ones_like(rest)
    mask[0, :2] = 0
    names = ["p0", None, "p1", "p0"]
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with tt.rows(model, names):
        found = model(input_ids=rest, attention_mask=mask, decoder_input_ids=answer).logits
        made = model.generate(rest, attention_mask=mask, **options)
        beams = model.generate(rest, attention_mask=mask, num_beams=2, **options)
    for row, text in enumerate((texts[0], texts[0][:0], texts[1], texts[0])):
        own = torch.cat([text, rest[row][mask[row].bool()]])[None]
        expected = bare(input_ids=own, decoder_input_ids=answer[[row]]).logits[0]
        kit.assert_close(found[row], expected, f"row {row}")
        assert torch.equal(made[row], bare.generate(own, **options)[0])
        assert torch.equal(beams[row], bare.generate(own, num_beams=2, **options)[0])


def test_an_encoder_refuses_packed_documents() -> None:
    _, model = with_text_as_prompt(kit.bert, ids_of(TEXT))
    spans = (Span(0, 0, 2), Span(0, 2, 4))
    with (
        bank_of(model).scope(Route((("p0",), ()), spans)),
        pytest.raises(RouteError, match="one document per row"),
    ):
        model(ids_of(1, 4))


# -- in the text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [kit.llama, kit.bert, kit.t5, bloom], ids=["llama", "bert", "t5", "bloom"]
)
@torch.no_grad()
def test_placeholders_in_the_text_are_the_prompts_tokens(make: kit.Make) -> None:
    """As in P-tuning's templates: anywhere, each row its own, and begun anew after the last."""
    bare, model = make(), make()
    method = tt.Prompt(length=3, text=(7, 8, 9), placeholder=2)
    tt.attach(model, method, "a")
    tt.attach(model, method.replace(text=(17, 18, 19)), "b")
    batch = kit.batch_of(model)
    ids = batch["input_ids"]
    ids[0, [0, 3]] = ids[1, [1, 2, 4, 6]] = ids[2, 5] = 2
    real = ids.clone()
    real[0, [0, 3]] = torch.tensor([7, 8])
    real[1, [1, 2, 4, 6]] = torch.tensor([17, 18, 19, 17])
    with tt.rows(model, ["a", "b", None]):
        found = kit.outputs(model, batch)
    kit.assert_close(found, kit.outputs(bare, {**batch, "input_ids": real}), "outputs")


@torch.no_grad()
def test_placeholders_are_counted_in_each_packed_document() -> None:
    model = kit.llama()
    tt.attach(model, tt.Prompt(length=3, text=(7, 8, 9), placeholder=2), "a")
    ids, real = torch.tensor([[2, 5, 2, 2, 6, 2, 4]]), torch.tensor([[7, 5, 8, 7, 6, 8, 4]])
    spans, positions = (Span(0, 0, 3), Span(0, 3, 7)), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with bank_of(model).scope(Route((("a",), ("a",)), spans)):
        found = model(ids, position_ids=positions, use_cache=False).logits
    with tt.using(model, None):
        expected = model(real, position_ids=positions, use_cache=False).logits
    kit.assert_close(found, expected, "logits")
    other = torch.tensor([[2, 5, 2, 2, 6, 2, 4]]), torch.tensor([[7, 5, 8, 2, 6, 2, 4]])
    with bank_of(model).scope(Route((("a",), ()), spans)):
        found = model(other[0], position_ids=positions, use_cache=False).logits
    with tt.using(model, None):
        expected = model(other[1], position_ids=positions, use_cache=False).logits
    kit.assert_close(found, expected, "one document of the base")


# -- encoders of prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (kit.llama, tt.PTuning(length=4, hidden=6)),
        (kit.llama, tt.PTuning(length=4, hidden=6, placeholder=14)),
        (kit.bert, tt.PTuning(length=4, hidden=6, encoder="lstm")),
        (kit.t5, tt.PTuning(length=4, encoder="lstm")),
        (kit.llama, tt.Prefix(length=4, hidden=6, dropout=0.5)),
    ],
    ids=["mlp", "mlp-in-the-text", "lstm", "lstm-t5", "prefix"],
)
def test_the_shared_form_is_the_same_function_and_the_training_form_resumes(
    make: kit.Make, method: tt.Method, tmp_path: Any
) -> None:
    """PEFT saves what the encoder made, and can never train on."""
    model = make()
    adapter = tt.attach(model, method, "a")
    kit.stir(adapter)
    model.double()
    batch = kit.batch_of(model)
    assert kit.acts(model, "a", batch)
    adapter.save(tmp_path / "training")
    fresh = make().double()
    again = tt.attach(fresh, tt.Adapter.load(tmp_path / "training"))
    assert again == adapter
    shared = tt.exported(adapter)
    shared.save(tmp_path / "shared")
    light = make().double()
    tt.attach(light, tt.Adapter.load(tmp_path / "shared"))
    assert [name.slot for name in shared.named()] == ["prompt_encoder.embedding.weight"]
    with torch.no_grad():
        expected = kit.outputs(model, batch)
        assert torch.equal(kit.outputs(fresh, batch), expected)
        kit.assert_close(kit.outputs(light, batch), expected, "shared form")
    kit.objective(kit.outputs(model, batch)).backward()
    assert all(bool(p.grad.any()) for p in adapter.parameters())


def test_the_lstm_is_that_of_torch() -> None:
    model = kit.llama()
    adapter = tt.attach(model, tt.PTuning(length=4, hidden=6, encoder="lstm"), "a")
    kit.stir(adapter)
    named = {
        name.slot.removeprefix("prompt_encoder."): t.detach() for name, t in adapter.named().items()
    }
    lstm = nn.LSTM(32, 6, num_layers=2, bidirectional=True, batch_first=True)
    head = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 32))
    for module, root in ((lstm, "lstm_head."), (head, "mlp_head.")):
        module.load_state_dict(
            {k.removeprefix(root): v for k, v in named.items() if k.startswith(root)}
        )
    with torch.no_grad():
        expected = head(lstm(named["embedding.weight"][None])[0])[0]
    (found,) = tt.exported(adapter).tensors.values()
    kit.assert_close(found, expected, "prompt")
