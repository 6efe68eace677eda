"""The README of a folder of adapters: metadata by which the hub knows them, and facts about them.

What a user wrote, metadata and text, stays; our facts stand between two marks and are made anew. The network is
never asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab import __version__
from trimtab.adapt.disk import placing
from trimtab.errors import FileFormatError
from trimtab.peft.config import PeftConfig
from trimtab.peft.types import TaskType, on_disk

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from trimtab.peft.tuner import Tuner

README = "README.md"
BEGIN, END = "<!-- trimtab: made anew at each save -->", "<!-- trimtab: end -->"
PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}
"""What the hub calls a task."""


def write_card(folder: Path, tuner: Tuner, names: Sequence[str] | None = None) -> None:
    """Write or complete the README of a folder, about these adapters (by default all).

    A README that cannot be read is left as it is, with a warning: the adapters are saved whatever it says.

    Raises:
        StorageError: the disk refused.
    """
    chosen = list(tuner.peft_config) if names is None else list(names)
    try:
        text = _written(folder / README, tuner, chosen)
    except FileFormatError as error:
        warnings.warn(f"{error} It was left as it is.", stacklevel=3)
        return
    with placing(folder) as temporary:
        (temporary / README).write_text(text, encoding="utf-8")


def _written(file: Path, tuner: Tuner, names: Sequence[str]) -> str:
    card = _card(file)
    configs = [tuner.peft_config[name] for name in names]
    base = _base_name(tuner.model, configs)
    _describe(card, tuner.model, configs, base)
    before, _, rest = card.text.partition(BEGIN)
    _, _, after = rest.partition(END)
    facts = "\n".join([BEGIN, *_facts(tuner, names, base), END])
    title = "" if card.text.strip() else f"\n# {file.resolve().parent.name}\n"
    card.text = f"{(before or title).rstrip()}\n\n{facts}\n{after.lstrip()}"
    return str(card)


def _card(file: Path) -> ModelCard:
    from huggingface_hub import ModelCard

    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except Exception as error:  # yaml's errors have no class of their own
        raise FileFormatError(f"{file} is not a README with YAML metadata ({error}).") from error


def _describe(
    card: ModelCard, model: nn.Module, configs: Sequence[PeftConfig], base: str | None
) -> None:
    data: Any = card.data
    data["library_name"] = "peft"
    tags = {*(data.get("tags") or ()), *(getattr(model, "model_tags", None) or ())}
    tags |= {_method(config).lower() for config in configs if not _own(config)}
    if base is not None:
        data["base_model"] = base
        tags.add(f"base_model:adapter:{base}")
    if type(model).__module__.startswith("transformers."):
        tags.add("transformers")
    data["tags"] = sorted(tags)
    pipelines = [PIPELINES[c.task_type] for c in configs if c.task_type in PIPELINES]  # type: ignore[index]
    if pipelines and not data.get("pipeline_tag"):
        data["pipeline_tag"] = pipelines[0]


def _facts(tuner: Tuner, names: Sequence[str], base: str | None) -> list[str]:
    """What is known of the adapters, as Markdown."""
    rows = []
    for name in names:
        adapter, config = tuner.require(name), tuner.peft_config[name]
        readers = "Trimtab" if _own(config) or not _shared(tuner, name) else "PEFT, Trimtab"
        where = "." if name == "default" else name
        rows.append(
            f"| {name} | {where} | {_method(config)} | {adapter.count:,} | {len(adapter.sites)} | {readers} |"
        )
    versions = [f"- Trimtab {__version__}", *_versions()]
    return [
        "## Adapters",
        "",
        f"Base model: {base or type(tuner.model).__name__}",
        "",
        "| adapter | folder | method | trained parameters | places | read by |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "### Framework versions",
        "",
        *versions,
    ]


def _versions() -> list[str]:
    import torch
    import transformers

    return [f"- Transformers {transformers.__version__}", f"- PyTorch {torch.__version__}"]


def _method(config: PeftConfig) -> str:
    return on_disk(config.peft_type).removeprefix("TRIMTAB_")


def _own(config: PeftConfig) -> bool:
    """Whether PEFT has no such method."""
    return on_disk(config.peft_type).startswith("TRIMTAB_")


def _shared(tuner: Tuner, name: str) -> bool:
    adapter = tuner.require(name)
    return adapter.origin.in_peft and adapter.method.peft_reads


def _base_name(model: nn.Module, configs: Sequence[PeftConfig]) -> str | None:
    """The base's name on the hub; a folder of this machine is no such name."""
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    named = [own, *(config.base_model_name_or_path for config in configs)]
    return next((n for n in named if n and _on_hub(str(n))), None)


def _on_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
