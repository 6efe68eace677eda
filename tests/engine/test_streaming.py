"""A stream is what `sample` gives, in pieces that stay; leaving it stops the work and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tests import tiny
from tests.data import kit as data_kit
from tests.engine import kit
from trimtab.adapt.attach import attach
from trimtab.engine import Engine, SamplingParams, Stream
from trimtab.engine.sampling import decoded
from trimtab.engine.serve.request import Words
from trimtab.errors import ConfigError, DataError, UnknownNameError
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import Prefix
from trimtab.methods.spottune import SpotTune
from trimtab.models.load import Base
from trimtab.optim import AdamParams

PROMPTS = [[5, 9, 11], [70, 80, 90, 100, 110, 120], [33]]
METHODS = {
    "a": LoRA(rank=2),
    "b": "ia3",
    "prefix": Prefix(length=3),
    "gated": SpotTune(inner="lora(rank=2)", blocks=1),
}
WAYS = [
    SamplingParams(max_tokens=24, temperature=0),
    SamplingParams(max_tokens=24, temperature=1.3, seed=11),
    SamplingParams(max_tokens=24, temperature=0.8, top_k=40, top_p=0.9, seed=3),
]


@pytest.fixture(scope="module")
def base() -> Base:
    made = kit.base()
    engine = Engine(made)
    for name, method in METHODS.items():
        attach(made.model, method, name)
        for _ in range(3):
            engine.forward_backward(kit.datums(), name)
            engine.optim_step(name, AdamParams(lr=0.05))
    return made


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "drawn", "narrowed"])
@pytest.mark.parametrize("name", [None, *METHODS])
def test_a_stream_is_what_sample_gives(
    base: Base, name: str | None, params: SamplingParams
) -> None:
    engine = Engine(base)
    for prompt in PROMPTS:
        (whole,) = engine.sample([prompt], params, name)
        stream = engine.stream(prompt, params, name)
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert all(pieces)
        assert stream.completion == whole
    if params.temperature:  # greedy, this model may repeat a byte that is no character
        assert len(pieces) > 3


def windowed() -> MistralForCausalLM:
    """Keys and values of the last 8 tokens only."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.mixtral, windowed])
def test_caches_of_other_models(build: Callable[[], PreTrainedModel]) -> None:
    base = kit.base(build())
    attach(base.model, "lora(rank=2)", "a")
    engine = Engine(base)
    for params in WAYS:
        for name in ("a", None):
            (whole,) = engine.sample([[5, 9, 11, 40, 41]], params, name)
            stream = engine.stream([5, 9, 11, 40, 41], params, name)
            assert "".join(stream) == whole.text
            assert stream.completion == whole


def test_stop_strings_end_a_stream_where_they_end_a_sample(base: Base) -> None:
    engine = Engine(base)
    text = engine.sample(PROMPTS[:1], WAYS[0], "a")[0].text
    for stop in (
        {text[4:7]},
        {text[6:8], text[9:14]},
        {"no such text"},
        {text[3:9] + "?", text[5]},
    ):
        params = WAYS[0].replace(stop=tuple(stop))
        (whole,) = engine.sample(PROMPTS[:1], params, "a")
        stream = engine.stream(PROMPTS[0], params, "a")
        assert "".join(stream) == whole.text, stop
        assert stream.completion == whole


@contextmanager
def counted(base: Base) -> Iterator[list[int]]:
    """The lengths of the inputs of each forward."""
    lengths: list[int] = []
    handle = base.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield lengths
    finally:
        handle.remove()


def test_work_is_done_as_pieces_are_asked_for_and_stops_when_it_is_left(base: Base) -> None:
    engine = Engine(base)
    assert engine.answering.paged("a")  # asked of the model once
    with counted(base) as lengths:
        stream = engine.stream(PROMPTS[1], WAYS[2], "a")
        assert lengths == []
        first = next(stream)
        made = len(lengths)
        assert 0 < made < 8
        assert lengths[0] == 6 and set(lengths[1:]) <= {1}  # the prompt once, then the cache
        stream.close()
        assert list(stream) == []
        assert len(lengths) == made
        assert len(stream.completion.tokens) == made
        assert stream.completion.text.startswith(first)
        with engine.stream(PROMPTS[0], WAYS[2]) as other:
            next(other)
        made = len(lengths)
        assert list(other) == [] and len(lengths) == made


def test_between_pieces_nothing_of_a_stream_is_in_force(base: Base) -> None:
    engine = Engine(base)
    alone = [list(engine.stream(PROMPTS[0], way, name)) for way in WAYS for name in ("a", None)]
    base.model.train()
    try:
        streams = [engine.stream(PROMPTS[0], way, name) for way in WAYS for name in ("a", None)]
        together: list[list[str]] = [[] for _ in streams]
        open_ones = list(range(len(streams)))
        torch.manual_seed(5)
        want = torch.rand(3)
        torch.manual_seed(5)
        while open_ones:  # a piece of each in turn
            for number in list(open_ones):
                piece = next(streams[number], None)
                assert base.model.training
                if piece is None:
                    open_ones.remove(number)
                else:
                    together[number].append(piece)
        assert torch.equal(torch.rand(3), want)
    finally:
        base.model.eval()
    assert together == alone


def test_bad_requests(base: Base) -> None:
    engine = Engine(base)
    with pytest.raises(ConfigError, match="a stream is one completion; n = 2"):
        engine.stream([5], SamplingParams(n=2, max_tokens=4))
    with pytest.raises(DataError, match="136 tokens"):
        engine.stream([2] * 128, SamplingParams(max_tokens=8))
    with pytest.raises(DataError, match="is empty"):
        engine.stream([], WAYS[0])
    with pytest.raises(UnknownNameError, match="no adapter 'c'"):
        engine.stream([5], WAYS[0], "c")


def falling_back() -> PreTrainedTokenizerFast:
    """As Llama 2: what is no word of the vocabulary becomes a token for each byte."""
    words = ["</s>", "<unk>", "▁", *"abcdeé", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(
        models.BPE(
            {word: place for place, word in enumerate(words)},
            [],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "bytes": data_kit.byte_level(),
    "words": data_kit.metaspace(),
    "fallback": falling_back(),
}


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...]) -> Stream:
    """A stream of given tokens: the model's part is left out."""
    words = Words(tokenizer, frozenset([tokenizer.eos_token_id]))
    params = SamplingParams(max_tokens=len(ids) + 1, stop=stop)
    return Stream(words, params, lambda: iter(ids))


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_their_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    ids = [token for token in ids if token != tokenizer.eos_token_id]
    assert "".join(streamed(tokenizer, ids, ())) == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=12), stop=st.text(min_size=1, max_size=3))
def test_characters_of_several_tokens_come_whole(kind: str, text: str, stop: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = decoded(tokenizer, ids)
    pieces = list(streamed(tokenizer, ids, ()))
    assert "".join(pieces) == said
    assert "\ufffd" in said or not any("\ufffd" in piece for piece in pieces)
    assert "".join(streamed(tokenizer, ids, (stop,))) == said.partition(stop)[0]


def test_byte_tokens_wait_for_the_end_of_their_run() -> None:
    tokenizer = TOKENIZERS["fallback"]
    ids = tokenizer("a é€ 你b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 + 1 + 1 + 3 + 1 + 3 + 1
    assert list(streamed(tokenizer, ids, ())) == ["a", " ", "é", "€ ", "你b"]
    # One more byte makes the whole run undecodable: what was already said could not be taken back.
    broken = [*ids[:-1], tokenizer.convert_tokens_to_ids("<0xE4>")]
    assert "".join(streamed(tokenizer, broken, ())) == decoded(tokenizer, broken)
    assert "你" not in decoded(tokenizer, broken)
