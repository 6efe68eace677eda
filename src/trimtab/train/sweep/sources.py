"""What the variants of a sweep learn from: read once for all that read the same, and measured on the same examples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from transformers import PreTrainedTokenizerBase

from trimtab.data.tokenise import Progress
from trimtab.errors import ConfigError
from trimtab.train import facts
from trimtab.train.recipe import Recipe
from trimtab.train.sources import Sources, read_sources


class Library:
    """Sources by what they depend on.

    Args:
        reading: opened around each reading; gives what is told how far it came.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reading: Callable[[], AbstractContextManager[Progress]],
    ) -> None:
        self._tokenizer, self._reading = tokenizer, reading
        self._known: dict[tuple[object, ...], Sources] = {}
        self._held_out: str | None = None

    def read(self, recipe: Recipe, context: int | None) -> Sources:
        """The sources of a variant, ``context`` tokens long at most.

        Raises:
            ConfigError: its held-out examples are not those of the variants before.
        """
        batch = recipe.batch
        key = (
            recipe.data.model_dump_json(),
            recipe.task,
            batch.examples,
            batch.tokens,
            recipe.seed,
            context,
        )
        if key not in self._known:
            with self._reading() as progress:
                found = read_sources(recipe, self._tokenizer, context, progress=progress)
            self._check(found)
            self._known[key] = found
        return self._known[key]

    def _check(self, found: Sources) -> None:
        digest = facts.digest(found.held_out)
        if self._held_out not in (None, digest):
            raise ConfigError(
                "the variants would be measured on other held-out examples, or on the same ones in other tokens, and "
                "their losses could not be compared; vary only what leaves them as they are (a file as data.held_out "
                "rather than data.fraction, where data.path varies)."
            )
        self._held_out = digest
