"""``trimtab train``: from a recipe, or from a few options."""

from __future__ import annotations

import typer

from trimtab.cli import given
from trimtab.errors import ConfigError

INTERRUPTED = 130


def train(
    arguments: list[str] = given.ARGUMENTS,
    model: str = given.MODEL,
    data: str = given.DATA,
    held_out: str = given.HELD_OUT,
    method: str = given.METHOD,
    name: str = given.NAME,
    epochs: int = given.EPOCHS,
    storage: str = given.STORAGE,
    exempt: list[str] = given.EXEMPT,
    average_bits: float = given.AVERAGE_BITS,
    out: str = given.OUT,
    resume: bool = typer.Option(
        False, "--resume", help="Go on from the last checkpoint of the run's folder."
    ),
    track: list[str] = typer.Option(
        None, "--track", help="tensorboard, mlflow, wandb or trackio; may be repeated."
    ),
    profile: bool = typer.Option(
        False, "--profile", help="Watch a few steps; say where time and memory went, by room."
    ),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing but errors."),
) -> None:
    """Fine-tune an adapter.

    trimtab train recipe.yaml optim.lr=1e-4

    trimtab train --model M --data F --method "lora(rank=16)" --held-out G

    trimtab train runs/first --resume
    """
    arguments = arguments or []
    folder = given.run_folder_of(arguments)
    if folder is not None:
        if not resume:
            raise ConfigError(
                f"{folder} is a folder; name a recipe file, or add --resume to go on with that run."
            )
        out = out or folder
    options = {
        "model": model, "data.path": data, "data.held_out": held_out, "method": method, "name": name,
        "epochs": epochs, "out": out, "storage": storage, "exempt": exempt or None, "average_bits": average_bits,
    }  # fmt: skip
    recipe = given.given_recipe(arguments, {**options, "track": track or None})

    from trimtab.train.api import train_recipe

    outcome = train_recipe(recipe, resume=resume, quiet=quiet, profile=profile)
    if outcome.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
