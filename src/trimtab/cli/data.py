"""``trimtab data``: look at data before training on it."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Look at data before training on it."""


@app.command("preview")
def preview(
    file: Path = typer.Argument(..., help="JSONL file."),
    model: str = typer.Option(
        ..., "--model", "-m", help="Whose tokenizer and chat template; no weights are needed."
    ),
    rows: int = typer.Option(3, "--rows", "-n", min=0, help="Examples to show."),
    train: str = typer.Option(
        "assistant", "--train", help="What is trained: assistant, last, completion or all."
    ),
    completions: str = typer.Option(
        "auto", "--completions", help="Prompt/completion records: auto, chat or plain."
    ),
    max_tokens: int = typer.Option(None, "--max-tokens", help="Longest example."),
    too_long: str = typer.Option("error", "--too-long", help="error, drop, left or right."),
) -> None:
    """Show examples as the model will see them, trained tokens marked, and count the rest."""
    from rich.console import Console

    from trimtab.data import ExampleConfig, RenderConfig, Renderer, TokenStats, load_examples
    from trimtab.data import preview as show
    from trimtab.models.load import load_tokenizer

    render = RenderConfig.parse({"train": train, "completions": completions})
    config = ExampleConfig.parse({"context": max_tokens, "too_long": too_long})
    tokenizer = load_tokenizer(model)
    examples = load_examples(file, Renderer(tokenizer, render), config)
    console = Console(highlight=False)
    for datum in examples[:rows]:
        console.print(show(datum, tokenizer))
        console.print()
    console.print(f"{examples.name}: {examples.outcomes}")
    console.print(str(TokenStats.of(examples)))
