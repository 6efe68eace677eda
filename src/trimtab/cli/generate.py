"""``trimtab generate``: answers of a base, with or without an adapter."""

from __future__ import annotations

import sys

import typer


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
    seed: int = typer.Option(None, "--seed", help="Makes draws repeat."),
    stop: list[str] = typer.Option(
        [], "--stop", help="End an answer at this text (may be repeated)."
    ),
    n: int = typer.Option(1, "--n", help="Answers to each prompt."),
    plain: bool = typer.Option(
        False, "--plain", help="Continue the text; do not make it a chat turn."
    ),
) -> None:
    """Answer prompts, by the model's own chat template where it has one."""
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]

    from trimtab.adapt.adapter import Adapter
    from trimtab.adapt.attach import attach
    from trimtab.data import RenderConfig, Renderer
    from trimtab.engine import Engine, SamplingParams
    from trimtab.models.load import load

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop),
        n=n,
    )
    saved = None if adapter is None else Adapter.load(adapter)
    base = load(model)
    name = None if saved is None else attach(base.model, saved, trainable=False).name
    renderer = Renderer(base.tokenizer, RenderConfig(completions="plain" if plain else "auto"))
    answers = Engine(base).sample([renderer.prompt(text) for text in texts], params, name)
    several = len(answers) > 1
    for answer in answers:
        if several:
            typer.echo(f"--- {answer.prompt + 1}")
        typer.echo(answer.text.strip())
