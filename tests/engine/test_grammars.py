"""Answers by a grammar: each fits, and nobody else's is another one for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.data import kit as data_kit
from tests.engine import kit
from trimtab.adapt.acting import using
from trimtab.adapt.attach import attach
from trimtab.engine import Engine, SamplingParams, vocabulary
from trimtab.engine.desk import Desk
from trimtab.engine.grammars import Ebnf, Grammar, JsonSchema, Regex
from trimtab.engine.guide import Guide, Guides
from trimtab.errors import AnswerError, ConfigError, ModelError
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import Prefix
from trimtab.methods.spottune import SpotTune
from trimtab.models.load import Base, load
from trimtab.optim import AdamParams

pytest.importorskip("xgrammar")

METHODS = {
    "a": LoRA(rank=2),
    "b": "ia3",
    "prefix": Prefix(length=3),
    "gated": SpotTune(inner="lora(rank=2)", blocks=1),
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["admin", "gäst", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-d]{1,2}$"}, "maxItems": 2},
    },
    "required": ["name", "role"],
}  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "two": {"type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2, "$defs": {"p": PERSON}},
    "numbers": {
        "type": "array", "minItems": 1, "maxItems": 3,
        "items": {"type": "number", "minimum": -2, "exclusiveMaximum": 10.5},
    },
    "choice": {"anyOf": [{"type": "boolean"}, {"const": {"x": [1, "é\"\n"]}}, {"type": "null"}]},
    "nested": {
        "$defs": {"n": {"anyOf": [
            {"type": "null"},
            {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]},
        ]}},
        "$ref": "#/$defs/n",
    },
    "open": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"],
             "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
}  # fmt: skip
DRAWN = SamplingParams(max_tokens=100, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def base() -> Base:
    made = kit.base(kit.llama(positions=256))
    engine = Engine(made)
    for name, method in METHODS.items():
        attach(made.model, method, name)
        engine.forward_backward(kit.datums(), name)
        engine.optim_step(name, AdamParams(lr=0.05))
    return made


def by(name: str, params: SamplingParams = DRAWN) -> SamplingParams:
    return params.replace(grammar=JsonSchema(SCHEMAS[name]))


def fits(text: str, schema: Any) -> None:
    # xgrammar counts half a surrogate pair as a character, and decoders write three for it
    value = json.loads(text.replace("\ufffd" * 3, "?"))
    jsonschema.Draft202012Validator(schema).validate(value)


# -- schemas -------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b c", "é", "x-1", "long_key"])
LEAVES = st.one_of(
    st.sampled_from(["null", "boolean"]).map(lambda name: {"type": name}),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3), st.integers(0, 3),
    ),
    st.sampled_from(["^[a-f]{1,3}$", "ab?c*|d", "[^x]{2}", r"^\d{2}\.[a-z]$", "(?:yes|no)!", ".{0,3}"])
    .map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(["uuid", "date-time", "duration"])
    .map(lambda form: {"type": "string", "format": form}),
    st.builds(
        lambda kind, low, high: {"type": kind, low: -7, high: 44},
        st.sampled_from(["integer", "number"]),
        st.sampled_from(["minimum", "exclusiveMinimum"]),
        st.sampled_from(["maximum", "exclusiveMaximum"]),
    ),
    st.integers(2, 9).map(lambda step: {"type": "integer", "multipleOf": step}),
    st.just({"type": ["string", "integer", "null"], "maxLength": 3, "maximum": 99}),
    st.lists(
        st.sampled_from(["a", "é\"\n", 1, -2.5, None, True, {"x": [1, {}]}, "</s>"]),
        min_size=1, max_size=3,
    ).map(lambda values: {"enum": values}),
)  # fmt: skip


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    @st.composite
    def objects(draw: st.DrawFn) -> Any:
        properties = draw(st.dictionaries(NAMES, inner, max_size=3))
        required = [name for name in properties if draw(st.booleans())]
        made = {"type": "object", "properties": properties, "required": required}
        more = draw(st.sampled_from([None, False, {"type": "boolean"}]))
        return made if more is None else {**made, "additionalProperties": more}

    arrays = st.builds(
        lambda items, least, more: {
            "type": "array", "items": items, "minItems": least, "maxItems": least + more
        },
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    return objects() | arrays | st.lists(inner, min_size=1, max_size=2).map(lambda s: {"anyOf": s})


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, _grown, max_leaves=5), st.booleans(), st.randoms(use_true_random=False))
def test_whatever_is_drawn_fits(schema: Any, closed: bool, random: Any) -> None:
    tokenizer, guides = data_kit.byte_level(), BYTES
    end = tokenizer.eos_token_id
    closing = {tokenizer.convert_tokens_to_ids(sign) for sign in '"}]'}
    jsonschema.Draft202012Validator.check_schema(schema)
    for _ in range(3):
        guide = guides.of(JsonSchema(schema, closed=closed))
        assert guide is not None
        tokens: list[int] = []
        while len(tokens) < 300:
            allowed = guide.allowed(len(tokenizer)).nonzero().flatten().tolist()
            near = sorted(closing.union([end]).intersection(allowed))
            token = random.choice(near if near and random.random() < 0.6 else allowed)
            if token == end:
                break
            guide.take(token)
            tokens.append(token)
        else:
            continue
        fits(tokenizer.decode(tokens), schema)


BYTES = Guides(data_kit.byte_level(), {data_kit.byte_level().eos_token_id})


@pytest.mark.parametrize(
    ("schema", "closed", "text"),
    [
        (PERSON, True, '{"name": "Jörg", "age": 7, "role": null}'),
        ({"type": "object"}, False, '{"any": {"thing": [1, "\\"", true]}}'),
        (True, True, "-1.5e7"),
        (SCHEMAS["nested"], True, '{"next": {"next": null}}'),
    ],
)
def test_what_json_dumps_writes_is_allowed(schema: Any, closed: bool, text: str) -> None:
    tokenizer = data_kit.byte_level()
    guide = BYTES.of(JsonSchema(schema, closed=closed))
    assert guide is not None
    for token in tokenizer(text)["input_ids"]:
        assert guide.allowed(kit.VOCABULARY)[token]
        guide.take(token)
    assert guide.allowed(kit.VOCABULARY)[tokenizer.eos_token_id]


# -- in a batch ----------------------------------------------------------------------------------------


def test_two_hundred_answers_fit(base: Base) -> None:
    engine = Engine(base, sample_tokens=8192)
    prompts = [[5 + n, 9, 11] for n in range(5)]
    owners = [None, *METHODS]
    count = whole = 0
    for number, name in enumerate(SCHEMAS):
        params = by(name).replace(n=7, seed=number)
        for answer in engine.sample(prompts, params, owners):
            count += 1
            if answer.finish == "stop":
                fits(answer.text, SCHEMAS[name])
                whole += 1
            else:  # it could have gone on
                guide = follow(engine, params, answer.tokens)
                assert len(answer.tokens) == params.max_tokens and not guide.stuck
    assert count >= 200 and whole > 0.8 * count


def follow(engine: Engine, params: SamplingParams, tokens: tuple[int, ...]) -> Guide:
    guide = engine.answering.words.guides.of(params.grammar)
    assert guide is not None
    guide.follow(tokens)
    return guide


WAYS = [
    DRAWN,
    DRAWN.replace(temperature=0.0, max_tokens=12),
    DRAWN.replace(temperature=0.7, top_k=3),
    DRAWN.replace(temperature=1.5, top_p=0.5, min_p=0.1, repetition_penalty=1.3),
    DRAWN.replace(seed=9, stop=(", ",)),
    DRAWN.replace(logprobs=2),
]


@pytest.mark.parametrize("tokens", [2048, 192], ids=["room", "read-again"])
def test_neighbours_with_and_without_change_nothing(base: Base, tokens: int) -> None:
    engine = Engine(base, sample_tokens=tokens)
    loop = engine.answering.loop
    assert loop is not None
    asked = []
    for number, way in enumerate(WAYS):
        for turn, params in enumerate((way, by("person", way), by("numbers", way))):
            name = (None, *METHODS)[(number + turn) % 5]
            asked.append(([5 + number, 9, 11], params, name))
    requests = [engine.answering.requests(*one)[0] for one in asked]
    vacated: list[int] = []
    real = loop._vacate
    loop._vacate = lambda request: (vacated.append(not request.done), real(request))[1]  # type: ignore[method-assign,func-returns-value]
    for request in requests:
        loop.submit(request)
    loop.finish(requests)
    assert any(vacated) == (tokens == 192)
    apart = Engine(base)
    for (prompt, params, name), request in zip(asked, requests, strict=True):
        (alone,) = apart.sample([prompt], params, name)
        found = request.completion()
        assert (found.tokens, found.text, found.finish) == (
            alone.tokens,
            alone.text,
            alone.finish,
        )
        if params.logprobs is not None:
            assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_log_probabilities_are_the_models_own(base: Base) -> None:
    params = by("person", DRAWN.replace(logprobs=3, temperature=0, max_tokens=8))
    (answer,) = Engine(base).sample([[5, 9, 11]], params)
    ids = torch.tensor([[5, 9, 11, *answer.tokens]])
    with torch.no_grad(), using(base.model, None):
        logs = base.model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
    wanted = [float(logs[n, token]) for n, token in enumerate(answer.tokens)]
    assert answer.logprobs == pytest.approx(wanted, abs=1e-4)
    assert answer.likeliest is not None
    assert list(answer.likeliest[0]) == logs[0].topk(3).indices.tolist()


def test_greedy_is_the_likeliest_of_what_is_allowed(base: Base) -> None:
    params = SamplingParams(max_tokens=10, temperature=0, grammar=Regex("[a-z ]+"))
    engine = Engine(base)
    (answer,) = engine.sample([[5, 9, 11]], params)
    guide = follow(engine, params, ())
    ids = [5, 9, 11]
    for token in answer.tokens:
        with torch.no_grad(), using(base.model, None):
            logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert int(logits.masked_fill(~guide.allowed(len(logits)), -1e9).argmax()) == token
        guide.take(token)
        ids.append(token)


def test_no_control_token_and_an_end_where_the_text_is_whole(base: Base) -> None:
    engine, end = Engine(base), base.tokenizer.eos_token_id
    params = DRAWN.replace(grammar=Regex("(.|\n)*x"), n=20, max_tokens=40)
    special = set(base.tokenizer.all_special_ids)
    for answer in engine.sample([[5, 9, 11]], params, "a"):
        assert not special.intersection(answer.tokens[:-1])
        assert (answer.tokens[-1] == end) == (answer.finish == "stop")
        if answer.finish == "stop":
            assert answer.text.endswith("x")


def test_out_of_tokens_in_the_middle(base: Base) -> None:
    (answer,) = Engine(base).sample([[5]], by("person").replace(max_tokens=4))
    assert answer.finish == "length" and answer.text.startswith('{"')
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


def test_other_grammars(base: Base) -> None:
    rules = 'root ::= "(" root ")" | [xy]'
    for answer in Engine(base).sample([[5]], DRAWN.replace(grammar=Ebnf(rules), n=8), "b"):
        depth = answer.text.count("(")
        if answer.finish == "stop":
            assert answer.text in ("(" * depth + sign + ")" * depth for sign in "xy")


@pytest.mark.parametrize("name", [None, *METHODS])
def test_a_stream_is_what_sample_gives(base: Base, name: str | None) -> None:
    engine = Engine(base)
    (whole,) = engine.sample([[5, 9]], by("person"), name)
    stream = engine.stream([5, 9], by("person"), name)
    assert "".join(stream) == whole.text
    assert stream.completion == whole


def test_from_a_desk(base: Base) -> None:
    engine = Engine(base)
    with Desk(engine) as desk:
        with pytest.raises(ConfigError, match="parenthesis"):  # at once, in whose thread it is
            desk.sample([[5, 9]], DRAWN.replace(grammar=Regex("(a")), "a")
        with pytest.raises(ConfigError, match="parenthesis"):
            desk.stream([5, 9], DRAWN.replace(grammar=Regex("(a")), "a")
        free = desk.sample([[5, 9]], DRAWN, "b")
        pieces = list(desk.stream([5, 9], by("person"), "a"))
        whole = desk.sample([[5, 9]], by("person"), "a")
        assert "".join(pieces) == whole.result(timeout=60)[0].text
        assert free.result(timeout=60) == engine.sample([[5, 9]], DRAWN, "b")


def test_models_that_are_answered_in_batches() -> None:
    engine = Engine(kit.base(tiny.falcon(vocab_size=kit.VOCABULARY).eval()))
    assert not engine.answering.paged(None)
    schema = {"type": "array", "items": {"enum": ["a", "é", 12]}, "maxItems": 3}
    for way in (DRAWN, DRAWN.replace(temperature=0.8, top_k=2, repetition_penalty=1.2)):
        params = way.replace(grammar=JsonSchema(schema), max_tokens=40)
        answers = engine.sample([[5, 9], [7], [3, 4, 5]], params.replace(n=4))
        assert len(answers) == 12 and any(answer.finish == "stop" for answer in answers)
        for answer in answers:
            if answer.finish == "stop":
                fits(answer.text, schema)
        (whole,) = engine.sample([[5, 9]], params)
        assert "".join(engine.stream([5, 9], params)) == whole.text


# -- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Regex("(a"), r"regular expression '\(a' cannot be kept: .*parenthesis"),
        (Regex("a(?=b)"), "Lookahead"),
        (Ebnf("root := 3"), "line 1, column 6"),
        (JsonSchema({"$ref": "#"}), "no text of the vocabulary fits"),
        (JsonSchema({"$ref": "#/$defs/x"}), r"Cannot find field \$defs"),
        (JsonSchema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum greater"),
        (JsonSchema(False), "cannot accept any value"),
    ],
    ids=str,
)
def test_what_xgrammar_refuses_is_said_before_anything_begins(
    base: Base, grammar: Grammar, said: str
) -> None:
    engine = Engine(base)
    for ask in (engine.sample, engine.requests):
        with pytest.raises(ConfigError, match=said) as caught:
            ask([[5]], DRAWN.replace(grammar=grammar))
        assert "/project" not in str(caught.value)
    assert engine.answering.loop is not None and not engine.answering.loop.busy


def test_a_vocabulary_that_cannot_go_on_ends_that_answer_alone(base: Base) -> None:
    engine = Engine(base)
    guide = follow(engine, DRAWN.replace(grammar=Regex("ab")), ())
    guide.take(base.tokenizer.convert_tokens_to_ids("x"))
    assert guide.stuck
    one, other = engine.requests([[5], [6]], by("person").replace(max_tokens=30))
    assert one.guide is not None
    one.guide._matcher.reset()
    one.guide.take(base.tokenizer.convert_tokens_to_ids("x"))
    one.guide._mask.fill_(-1)  # so that a token is drawn, which the grammar does not go on with
    assert engine.answering.loop is not None
    engine.answering.loop.finish([one, other])
    assert other.completion().text.startswith("{")
    with pytest.raises(AnswerError, match="can go on with the answer"):
        one.completion()


def test_a_tokenizer_that_cannot_be_read() -> None:
    tokenizer = data_kit.metaspace()  # it has no braces
    with pytest.raises(ModelError, match="xgrammar cannot read"):
        Guides(tokenizer, {tokenizer.eos_token_id}).learn(JsonSchema(True))
    with pytest.raises(ModelError, match="xgrammar cannot read"):  # the model says fewer tokens
        Engine(kit.base(tiny.falcon().eval())).sample([[5]], by("person"))
    with pytest.raises(ModelError, match="needs an end token"):
        Guides(data_kit.byte_level(), ()).learn(JsonSchema(True))


def test_grammars_are_compiled_once_and_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 300_000
    monkeypatch.setattr(vocabulary, "CACHE", limit)
    tokenizer = data_kit.byte_level()
    guides = Guides(tokenizer, {tokenizer.eos_token_id})
    guides.learn(JsonSchema(PERSON))
    assert guides._compilers is not None
    kept = guides._compilers.json.get_cache_size_bytes()
    guides.learn(JsonSchema(json.dumps(PERSON)))
    assert guides._compilers.json.get_cache_size_bytes() == kept > 0
    for number in range(40):
        guides.learn(JsonSchema({"type": "string", "maxLength": number}))
    assert guides._compilers.json.get_cache_size_bytes() < 2 * limit


def test_a_real_model(smollm2: Path) -> None:
    base = load(smollm2)
    engine = Engine(base)
    chat = [{"role": "user", "content": "Describe Ada, a 36 year old admin, as JSON."}]
    text = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = base.tokenizer(text)["input_ids"]
    params = SamplingParams(max_tokens=60, temperature=0, grammar=JsonSchema(PERSON))
    drawn = params.replace(temperature=1.0, seed=1, n=2)
    for answer in (*engine.sample([prompt], params), *engine.sample([prompt], drawn)):
        assert answer.finish == "stop"
        fits(answer.text, PERSON)
