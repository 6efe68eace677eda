"""Examples as a person sees them: tokens with the trained ones marked, in colour and without."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from trimtab.data.datum import Datum

OPEN, CLOSE = "⟦", "⟧"
TRAINED, MASKED = "bold green", "dim"


def preview(
    datum: Datum,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] = (),
    *,
    brackets: bool = True,
) -> Text:
    """The text of ``datum``. Trained tokens are green and, with ``brackets``, between ⟦ and ⟧; with ``labels``
    (those of a classifier) that is the name of its class, on a line of its own.

    ``str(preview(…))`` is the same without colour. A run of tokens is decoded as one, so that
    characters of several tokens stay whole.
    """
    text = Text()
    if datum.origin:
        text.append(f"{datum.origin}\n", style="bold")
    ids = (datum.tokens[0], *datum.targets)
    for run, trained in _runs(ids, (0.0, *datum.weights)):
        if trained and labels:
            text.append("\n")
            piece = labels[run[-1]]
        else:
            piece = tokenizer.decode(
                run, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        shown = f"{OPEN}{piece}{CLOSE}" if trained and brackets else str(piece)
        text.append(shown, style=TRAINED if trained else MASKED)
    if labels:
        return text
    total = sum(1 for weight in datum.weights if weight)
    text.append(f"\n{total} of {len(ids)} tokens trained", style="italic")
    return text


def _runs(ids: tuple[int, ...], weights: tuple[float, ...]) -> list[tuple[list[int], bool]]:
    """Neighbours that are all trained, or all masked, together."""
    runs: list[tuple[list[int], bool]] = []
    for token, weight in zip(ids, weights, strict=True):
        trained = weight > 0
        if runs and runs[-1][1] == trained:
            runs[-1][0].append(token)
        else:
            runs.append(([token], trained))
    return runs
