"""The vocabulary of a tokenizer as bytes, and xgrammar's compilers for it.

Control tokens, which no text shows, are in none of them: an answer is what its text says. xgrammar lets control
characters into strings whose length is bounded, which JSON forbids; as JSON in one line has none anywhere, its
vocabulary is without the tokens that have one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.errors import MissingPackageError, ModelError

CACHE = 256 * 2**20
"""Bytes of compiled grammars that a compiler keeps, the ones used last."""
PROBE = '{"key": [1, -2.5, true, null, "a b"]}'


@dataclass(frozen=True)
class Compilers:
    """``json`` is for JSON in one line, ``text`` for anything; both may be used by several threads."""

    json: Any
    text: Any


def xgrammar() -> ModuleType:
    """The package; raises `MissingPackageError`."""
    try:
        import xgrammar
    except ImportError as error:
        raise MissingPackageError(
            f"grammars of answers need a package that is not installed ({error}): pip install 'trimtab[constrained]'."
        ) from error
    return xgrammar


def compilers(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], width: int | None = None
) -> Compilers:
    """Those of a tokenizer; a model that gives ``width`` logits says no token from there on.

    Raises:
        ModelError: xgrammar reads its tokens otherwise than the tokenizer writes them.
        MissingPackageError: xgrammar is not installed.
    """
    package = xgrammar()
    if not ends:
        raise ModelError("an answer by a grammar needs an end token, and the tokenizer has none.")
    try:
        info = package.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=list(ends))
        tokens = list(info.decoded_vocab)[:width]
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"xgrammar cannot read {type(tokenizer).__name__}: {error}") from error
    _check(tokens, tokenizer)
    controls = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    controls.update(tokenizer.all_special_ids)
    tokens = [b"" if number in controls else token for number, token in enumerate(tokens)]
    tokens += [b""] * (
        -len(tokens) % 32
    )  # the bits of a mask that stand for no token are undefined

    def compiler(vocabulary: list[bytes]) -> Any:
        known = package.TokenizerInfo(
            vocabulary, stop_token_ids=list(ends), add_prefix_space=info.add_prefix_space
        )
        threads = max(1, (os.cpu_count() or 1) // 2)
        return package.GrammarCompiler(known, max_threads=threads, cache_limit_bytes=CACHE)

    written = [b"" if any(byte < 32 for byte in token) else token for token in tokens]
    return Compilers(json=compiler(written), text=compiler(tokens))


def _check(tokens: Sequence[bytes], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where a text of JSON is not its tokens, one after another."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    spelt = b"".join(tokens[number] for number in ids if number < len(tokens))
    if spelt.strip() != PROBE.encode():
        raise ModelError(
            f"xgrammar cannot read {type(tokenizer).__name__}: the tokens of {PROBE!r} are {spelt!r} to it."
        )
