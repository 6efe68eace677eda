"""What is settled before a run: its folder, its resolved recipe, and the plan that is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.adapt.acting import using
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach
from trimtab.adapt.contract import Method
from trimtab.adapt.parse import method_from
from trimtab.adapt.probe import probe
from trimtab.adapt.tree import anatomy_of
from trimtab.data import TokenStats
from trimtab.engine import keep_memory
from trimtab.errors import ConfigError, TargetError
from trimtab.frozen.lowbit import LowBit
from trimtab.models.anatomy import Anatomy
from trimtab.models.load import Base, load
from trimtab.train import facts
from trimtab.train.recipe import Recipe, differences
from trimtab.train.recipe_file import read_recipe
from trimtab.train.shown import shown_batches
from trimtab.train.sources import Sources, with_labels

Rows = list[tuple[str, str]]
MOST_SHOWN = 12


def opened_base(recipe: Recipe, loader: Callable[..., Base] = load) -> tuple[Recipe, Base, Adapter]:
    """The base of a recipe with its method attached; and the recipe, with the labels of a classifier. ``loader`` is
    called as `load`."""
    method_from(recipe.method)  # it is read before anything is loaded
    recipe = with_labels(recipe)
    base = loaded(recipe, loader)
    return recipe, base, attached(recipe, base)


def loaded(recipe: Recipe, loader: Callable[..., Base] = load) -> Base:
    """The base of a recipe, which names its labels if it classifies."""
    keep_memory()
    return loader(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        task=recipe.task,
        labels=recipe.data.labels if recipe.task == "sequence-classification" else None,
        storage=recipe.storage,
        exempt=recipe.exempt,
        average_bits=recipe.average_bits,
    )


def attached(recipe: Recipe, base: Base) -> Adapter:
    """A new adapter of a recipe's method, on its base."""
    method = method_from(recipe.method)
    if recipe.task == "sequence-classification":
        method = with_head(method, anatomy_of(base.model))
    batches = shown_batches(recipe, base)  # read only if the method asks
    return attach(base.model, method, recipe.name, seed=recipe.seed, batches=batches)


def with_head(method: Method, anatomy: Anatomy) -> Method:
    """A method that trains the classification head too, in full, unless it acts there or trains it already."""
    places = {place.path for place in method.place(anatomy)}
    inside = tuple(f"{path}." for path in anatomy.select(method.train)) if method.train else ()
    trained = [path for path in anatomy.head if f"{path}.".startswith(inside)] if inside else []
    if trained or places.intersection(anatomy.head):
        return method
    return method.replace(train=(*method.train, "head"))


def run_folder(recipe: Recipe, adapter: Adapter, *, resume: bool) -> Path:
    """The run's folder; a new one below ``runs`` where none is named."""
    stem = f"{Path(recipe.data.path).stem}-{adapter.method.kind}"
    return folder_of(recipe.out, stem, resume=resume)


def folder_of(out: str | None, stem: str, *, resume: bool) -> Path:
    """The folder ``out``; or a new one below ``runs``, whose name begins with ``stem``."""
    if out is not None:
        folder = Path(out)
        taken = folder.is_dir() and any(folder.iterdir())
        if taken and not resume:
            raise ConfigError(
                f"{folder} holds a run or something else already; choose another 'out', or resume that run."
            )
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose a folder as 'out'.")
        return folder
    if resume:
        raise ConfigError("to resume a run, name its folder as 'out'.")
    return next(
        folder for n in range(1, 10**6) if not (folder := Path("runs") / f"{stem}-{n}").exists()
    )


def resolved(recipe: Recipe, base: Base, adapter: Adapter, folder: Path | None) -> Recipe:
    """The recipe with everything filled in that has a default elsewhere."""
    method, optim = adapter.method, recipe.optim
    optim = optim.replace(
        lr=method.default_lr if optim.lr is None else optim.lr,
        weight_decay=method.weight_decay if optim.weight_decay is None else optim.weight_decay,
    )
    return recipe.replace(
        method=method.to_dict(),
        name=adapter.name,
        optim=optim,
        batch=recipe.batch
        if recipe.batch.tokens
        else recipe.batch.replace(size=recipe.batch.examples),
        dtype=str(base.model.dtype).removeprefix("torch."),
        out=None if folder is None else str(folder),
    )


def check_same(path: Path, recipe: Recipe) -> None:
    """Raise `ConfigError` where the recipe of a run differs in what would change its result."""
    changed = differences(read_recipe(path), recipe)
    if changed:
        raise ConfigError(
            f"cannot resume {path.parent}: {', '.join(changed)} differ from its recipe. Resume with the same recipe, "
            "or start a new run."
        )


def total_steps(recipe: Recipe, sources: Sources) -> int:
    """Steps of the whole run; with ``steps`` given, epochs go on for as long as it takes."""
    total = recipe.steps or sources.feed.total(recipe.epochs)
    assert total is not None  # the recipe of a stream has steps
    return total


def saves_every(recipe: Recipe, total: int) -> int:
    """Steps between checkpoints."""
    return recipe.checkpoint.every or -(-total // 10)


def saves(recipe: Recipe, total: int, *, measured: bool) -> int:
    """How many checkpoints a run writes: those that are due, one after each measurement (``measured``:
    there are held-out data), and the last."""
    every = {saves_every(recipe, total)}
    if recipe.eval.every is not None and measured:
        every.add(recipe.eval.every)
    return 1 + sum(any(step % one == 0 for one in every) for step in range(1, total))


def size_of_step(recipe: Recipe) -> str:
    """How much data an optimiser step sees, in words."""
    if recipe.batch.tokens is not None:
        return f"at most {recipe.batch.tokens} tokens"
    return f"{recipe.batch.examples} examples"


def plan_rows(
    recipe: Recipe,
    base: Base,
    adapter: Adapter,
    sources: Sources,
    *,
    total: int,
    place: str | None = None,
) -> Rows:
    """The facts of a run, name by name, as they are shown before it starts; ``place`` is what stands for the device
    of a base without values."""
    method, whole = adapter.method, base_parameters(base, adapter)
    sites = Counter(site.path.rpartition(".")[2] for site in adapter.sites)
    rows = [
        (
            "model",
            f"{base.name}: {whole:,} parameters, {recipe.dtype}, on {place or base.model.device}",
        ),
        ("method", shown_method(method)),
        ("sites", f"{len(adapter.sites)}: " + ", ".join(f"{n} × {k}" for k, n in sites.items())),
        ("trained", f"{adapter.count:,} parameters ({adapter.count / whole:.2%} of the model)"),
        *(("data", note) for note in sources.notes),
        *([("classes", _shown_labels(recipe))] if recipe.task == "sequence-classification" else []),
        (
            "tokens",
            ("" if sources.whole else "of the first: ") + str(TokenStats.of(sources.sample)),
        ),
        (
            "steps",
            f"{total}, of {size_of_step(recipe)}; computed in micro-batches of at most "
            f"{recipe.batch.micro_tokens} tokens",
        ),
        ("optimiser", f"AdamW, learning rate {recipe.optim.lr:g}, {recipe.optim.schedule}"),
        ("precision", f"{_shown_storage(recipe)} in the base, float32 in what is trained"),
        *([("kept", str(base.mixed))] if base.mixed else []),
        *([("folder", recipe.out)] if recipe.out else []),
    ]
    if sources.overlap:
        rows.append(("careful", f"{sources.overlap} held-out examples are trained on as well"))
    return rows


def _shown_storage(recipe: Recipe) -> str:
    """How the base is stored and computed with."""
    stored = f"linear layers in {recipe.storage}, computed in " if recipe.storage else ""
    return f"{stored}{recipe.dtype}"


def _shown_labels(recipe: Recipe) -> str:
    """How many labels a classifier has, and the first of them."""
    labels = recipe.data.labels or ()
    more = ", …" if len(labels) > MOST_SHOWN else ""
    return f"{len(labels)}: {', '.join(labels[:MOST_SHOWN])}{more}"


def shown_method(method: Method) -> str:
    """A method with the options that were chosen, and its sizes."""
    if len(method.members) > 1:
        return " | ".join(shown_method(part) for part in method.members)
    chosen = method.model_dump(exclude_defaults=True)
    shown = []
    for key, value in method:
        if isinstance(value, Method):
            shown.append(f"{key}={shown_method(value)}")
        elif isinstance(value, Mapping) and len(value) > 3:
            shown.append(f"{key} of {len(value)} modules")
        elif type(value) in (int, float) and (value not in (0, 1) or key in chosen):
            shown.append(f"{key}={value:g}")
        elif key in chosen:
            shown.append(f"{key}={value!r}")
    return f"{method.kind}({', '.join(shown)})"


def base_parameters(base: Base, adapter: Adapter) -> int:
    """Parameters of the model without this adapter's; of a weight in few bits, the values that it stands for."""
    stored = sum(m.weights for m in base.model.modules() if isinstance(m, LowBit))
    return sum(p.numel() for p in base.model.parameters()) + stored - adapter.count


def check_sites(base: Base, adapter: Adapter) -> None:
    """Raise `TargetError` for a site that no forward reaches: it would never be trained."""
    with using(base.model, adapter.name):
        silent = set(probe(base.model)) & {site.path for site in adapter.sites}
    if silent:
        raise TargetError(
            f"{len(silent)} of {len(adapter.sites)} sites of adapter {adapter.name!r} are never reached "
            f"by the model, e.g. {min(silent)!r}; leave them out of the method's targets."
        )


def start_facts(base: Base, adapter: Adapter, sources: Sources) -> dict[str, Any]:
    """What a run notes at its start, beside its plan."""
    return {
        "parameters": adapter.count,
        "bytes": adapter.nbytes,
        "model_parameters": base_parameters(base, adapter),
        "data": {
            "name": sources.name,
            "sha256": sources.contents[0][1],
            "sources": [list(content) for content in sources.contents],
            "examples": len(sources.sample) if sources.whole else None,
            "notes": list(sources.notes),
        },
        "held_out": len(sources.held_out),
        "held_out_sha256": facts.digest(sources.held_out),
        "versions": facts.versions(),
        "machine": facts.machine(base.model.device),
    }


def provenance(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """Where an adapter comes from."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": {"name": sources.name, "sha256": sources.contents[0][1]},
        "versions": facts.versions(),
    }
