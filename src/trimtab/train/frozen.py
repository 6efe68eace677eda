"""Whether a run keeps the hidden states below its adapter (``memory.frozen``), and the disk that this takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import chain

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.tree import anatomy_of
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.engine.frozen import Frozen
from trimtab.errors import StorageError, UnsupportedError
from trimtab.train.page import sized
from trimtab.train.recipe import Recipe
from trimtab.train.setup import Rows
from trimtab.train.sources import Sources

NAME = "frozen blocks"


def kept_below(
    recipe: Recipe,
    engine: Engine,
    adapter: Adapter,
    sources: Sources,
    unrelated: Sequence[Datum],
    *,
    total: int,
    note: Callable[[str], None],
) -> tuple[Frozen | None, Rows]:
    """What keeps them, if anything does; and what the plan of the run says of it.

    Raises:
        UnsupportedError: the recipe asks for it where it cannot be.
        StorageError: the disk has no room for them.
    """
    if recipe.memory.frozen == "none":
        return None, []
    if recipe.memory.frozen == "cache":
        return _opened(engine, adapter, sources, unrelated, note)
    once = sources.feed.total(1)
    if once is not None and total <= once:
        return None, [(NAME, "computed each time: no example is seen twice")]
    try:
        return _opened(engine, adapter, sources, unrelated, note)
    except (StorageError, UnsupportedError) as error:
        return None, [(NAME, f"computed each time: {error}")]


def _opened(
    engine: Engine,
    adapter: Adapter,
    sources: Sources,
    unrelated: Sequence[Datum],
    note: Callable[[str], None],
) -> tuple[Frozen, Rows]:
    if not sources.whole:
        raise UnsupportedError(
            "memory.frozen keeps hidden states of each example, and how many a stream has is not known; "
            "leave it out, or data.stream."
        )
    try:
        frozen = Frozen(engine.model, adapter, note=note)
    except UnsupportedError as error:
        raise UnsupportedError(f"memory.frozen: {error}") from error
    texts = (datum.tokens for datum in chain(sources.sample, sources.held_out, unrelated))
    files, needed = frozen.files, frozen.files.missing(texts)
    free = shutil.disk_usage(files.folder).free
    if needed > free:
        frozen.close()
        raise StorageError(
            f"memory.frozen: the hidden states of this data take {sized(needed)}, and {sized(free)} are free where "
            f"{files.folder} lies; free space, point XDG_CACHE_HOME elsewhere, or leave the option out."
        )
    known = f"{len(files):,} texts are there already; " if len(files) else ""
    count, blocks = len(frozen.lower.blocks), len(anatomy_of(engine.model).blocks)
    return frozen, [
        (
            NAME,
            f"the first {count} of {blocks} are computed once for each text; {known}{sized(needed)} of "
            f"{sized(free)} free to be written to {files.folder}",
        )
    ]
