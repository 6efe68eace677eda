"""Runs what the documentation shows."""

from __future__ import annotations

import re
import shlex

from typer.testing import CliRunner

from trimtab.cli import app


def shown(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_example(example: str, name: str) -> None:
    """Run Python."""
    scope: dict[str, object] = {}
    exec(compile(example, name, "exec"), scope)  # noqa: S102 (the documentation's own text)


def run_commands(block: str) -> None:
    """Run one command of ours a line; each must succeed."""
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]
    assert [command[0] for command in commands] == ["trimtab"] * len(commands)
    for command in commands:
        result = CliRunner().invoke(app, command[1:], catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
