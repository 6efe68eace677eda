"""``sweep.json``: what was asked, which variants there are, and what was decided on them; written whole each time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import ConfigError, FileFormatError, StorageError
from trimtab.train.sweep.config import SweepConfig
from trimtab.train.sweep.space import Choice

SCHEMA = 1
FILE = "sweep.json"
Status = Literal["running", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class Asked:
    """What a user gave: a recipe's values, options in their order, and how to go about it. ``where`` names the
    recipe's source."""

    recipe: Mapping[str, Any]
    options: Mapping[str, Any]
    config: SweepConfig
    where: str = "recipe"

    def fields(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "recipe": dict(self.recipe),
            "options": list(map(list, self.options.items())),
            "config": self.config.model_dump(),
            "where": self.where,
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Asked:
        """What `fields` gave."""
        config = SweepConfig.parse(fields["config"], where=FILE)
        return cls(fields["recipe"], dict(fields["options"]), config, fields["where"])


@dataclass
class Entry:
    """One variant: its ``loss`` on held-out data at ``step`` (of ``total``), where it was last judged; ``why`` it
    stopped."""

    number: int
    choice: Choice
    round: int
    status: Status = "running"
    step: int = 0
    total: int = 0
    loss: float | None = None
    why: str = ""


@dataclass
class Record:
    """A sweep so far. ``decided`` counts the decisions of the round that is running, ``rounds`` those that are over;
    ``winner`` is the best variant that was trained to its end."""

    folder: Path
    asked: Asked
    entries: list[Entry] = field(default_factory=list)
    decided: int = 0
    rounds: int = 0
    winner: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record in a sweep's folder.

        Raises:
            FileFormatError: there is none, or it is not whole.
        """
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise FileFormatError(
                    f"{folder / FILE}: schema {found['schema']!r}; this version reads {SCHEMA}."
                )
            return cls(
                folder,
                Asked.of(found["asked"]),
                [Entry(**entry) for entry in found["entries"]],
                found["decided"],
                found["rounds"],
                found["winner"],
            )
        except FileNotFoundError:
            raise FileFormatError(f"{folder} holds no sweep (no {FILE}).") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{folder / FILE} cannot be read: {error!r}.") from error

    def write(self) -> None:
        """Write it. Raises `StorageError`; the one before is then intact."""
        fields = {
            "schema": SCHEMA,
            "asked": self.asked.fields(),
            "entries": [asdict(entry) for entry in self.entries],
            "decided": self.decided,
            "rounds": self.rounds,
            "winner": self.winner,
        }
        path = self.folder / FILE
        temporary = path.with_name(f".{FILE}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}.") from error

    def check_same(self, asked: Asked) -> None:
        """Raise `ConfigError` where something else is asked for."""
        before, now = (json.loads(json.dumps(one.fields())) for one in (self.asked, asked))
        changed = [key for key in ("recipe", "options", "config") if before[key] != now[key]]
        if changed:
            raise ConfigError(
                f"cannot resume {self.folder}: {', '.join(changed)} differ from those it began with. Resume with the "
                "same command, or start a new sweep."
            )

    def round(self, number: int, choices: Sequence[Choice]) -> list[Entry]:
        """The entries of a round, which are made if there are none.

        Raises:
            FileFormatError: there are others.
        """
        found = [entry for entry in self.entries if entry.round == number]
        if not found:
            first = len(self.entries)
            found = [Entry(first + n, choice, number) for n, choice in enumerate(choices)]
            self.entries += found
        elif json.dumps([entry.choice for entry in found]) != json.dumps(list(choices)):
            raise FileFormatError(
                f"{self.folder / FILE}: other variants than this version of the sampler chooses."
            )
        return found
