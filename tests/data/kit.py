"""Small tokenizers, chat templates and models for the tests of the data room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trimtab.data import ChatRecord, Datum, Message

CORPUS = [
    "You are a helpful assistant named Tab.",
    "Hello there, how are you today? I am fine, thank you.",
    "Question: is the sea deep? Answer: yes. Assistant: User: no, it is not.",
    "one two three four five six seven eight nine ten, and a ship turns",
    "  two spaces\n\nand two lines\n",
]
CONTROLS = ["<|end|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]

# As SmolLM2: a default system turn, no generation marks.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MARKED = (
    "{%% for m in messages %%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%% if m['role'] == 'assistant' %%}%s{%% else %%}{{ m['content'] + '<|im_end|>' }}{%% endif %%}"
    "{{ '\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
MARKED = _MARKED % "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
# Marks that leave the end of turn outside: it must be trained nevertheless.
MARKED_CONTENT = _MARKED % "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
# The line break after the end of turn inside: it need not be.
MARKED_BREAK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% else %}{{ raise_exception('no system turn here') }}{% endif %}{% endfor %}"
)
STRIPPING = CHATML.replace("m['content']", "(m['content'] | trim)")
# The text before a turn depends on how many turns follow.
COUNTING = "{{ messages | length }}{{ ' turns\n' }}" + CHATML
# Thoughts are kept in the last answer only (as Qwen3 and DeepSeek-R1 do), and an empty one is added.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Earlier answers are not rendered at all.
DROPPING = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No control tokens; the space before an answer belongs to the generation prompt.
PLAIN = (
    "{% for m in messages %}{{ m['role'] | title + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def byte_level(
    template: str | None = None, *, eos: str = "<|im_end|>", controls: Sequence[str] = CONTROLS
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; padding is the end-of-sequence token, as in SmolLM2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(controls),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrap(core, template, eos=eos)


def metaspace(
    template: str | None = None, *, eos: str = "</s>", controls: Sequence[str] = CONTROLS
) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: a space is the first character of the word that follows it."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", *controls], show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return _wrap(core, template, eos=eos)


def _wrap(core: Tokenizer, template: str | None, *, eos: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, system: str | None = None, origin: str = "chat.jsonl:1") -> ChatRecord:
    """A conversation whose turns alternate, the user first."""
    opening = [] if system is None else [Message("system", system)]
    turns = [
        Message("user" if place % 2 == 0 else "assistant", content)
        for place, content in enumerate(contents)
    ]
    return ChatRecord((*opening, *turns), origin)


def trained(datum: Datum, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    open_run = False
    for target, weight in zip(datum.targets, datum.weights, strict=True):
        if weight:
            if not open_run:
                runs.append([])
            runs[-1].append(target)
        open_run = bool(weight)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Rows as JSON (a str is written as it is)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(attention: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config).eval()
