"""``trimtab generate``: answers of a base, with or without an adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.cli.bases import AVERAGE_BITS, EXEMPT, STORAGE, open_base
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.engine.grammars import JsonSchema


def generate(
    prompts: list[str] = typer.Argument(
        ..., metavar="PROMPT...", help="What to answer; - reads standard input."
    ),
    model: str = typer.Option(..., "--model", "-m", help="Folder, hub id or .gguf of the base."),
    adapter: str = typer.Option(
        None, "--adapter", "-a", help="Adapter folder; without one the bare base answers."
    ),
    max_tokens: int = typer.Option(128, "--max-tokens", help="Most tokens of an answer."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 is greedy."),
    top_p: float = typer.Option(
        1.0, "--top-p", help="Keep the likeliest tokens up to this probability."
    ),
    top_k: int = typer.Option(0, "--top-k", help="Keep so many tokens; 0 keeps all."),
    min_p: float = typer.Option(
        0.0, "--min-p", help="Keep tokens at least so likely, as a share of the likeliest."
    ),
    repetition_penalty: float = typer.Option(
        1.0, "--repetition-penalty", help="Above 1, tokens that were said are less likely."
    ),
    seed: int = typer.Option(None, "--seed", help="Makes draws repeat."),
    stop: list[str] = typer.Option(
        [], "--stop", help="End an answer at this text (may be repeated)."
    ),
    schema: str = typer.Option(
        None, "--schema", metavar="FILE", help="A JSON Schema; answers are JSON that fits it."
    ),
    n: int = typer.Option(1, "--n", help="Answers to each prompt."),
    plain: bool = typer.Option(
        False, "--plain", help="Continue the text; do not make it a chat turn."
    ),
    storage: str = STORAGE,
    exempt: list[str] = EXEMPT,
    average_bits: float = AVERAGE_BITS,
) -> None:
    """Answer prompts, by the model's own chat template where it has one."""
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]

    from trimtab.cli.adapters import attach_adapters, read_adapters
    from trimtab.data import RenderConfig, Renderer
    from trimtab.engine import Engine, SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        grammar=None if schema is None else _schema(Path(schema)),
        seed=seed,
        stop=tuple(stop),
        n=n,
    )
    saved = read_adapters([] if adapter is None else [adapter])
    base = open_base(model, saved.values(), storage, exempt, average_bits)
    name = next(iter(attach_adapters(base, saved)), None)
    renderer = Renderer(base.tokenizer, RenderConfig(completions="plain" if plain else "auto"))
    answers = Engine(base).sample([renderer.prompt(text) for text in texts], params, name)
    several = len(answers) > 1
    for answer in answers:
        if several:
            typer.echo(f"--- {answer.prompt + 1}")
        typer.echo(answer.text.strip())


def _schema(file: Path) -> JsonSchema:
    from trimtab.engine.grammars import JsonSchema

    try:
        return JsonSchema(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the schema {str(file)!r}: {error}.") from error
