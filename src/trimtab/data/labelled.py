"""Labelled texts as questions to a generator, and which records a configuration can render."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.data.records import (
    ChatRecord,
    CompletionRecord,
    LabelledRecord,
    PreferenceRecord,
    Record,
    TextRecord,
    UnpairedRecord,
)
from trimtab.data.render_config import RenderConfig
from trimtab.errors import ConfigError, DataError

EXAMPLE = "instruction='Is this review positive? Answer yes or no.'"


def check_kind(record: Record, config: RenderConfig) -> None:
    """Raise `ConfigError` if records of this kind cannot be trained on by ``config``."""
    origin = record.origin
    if (
        config.train == "completion"
        and isinstance(record, ChatRecord | PreferenceRecord)
        and record.shape != "prompt/completion"
    ):
        raise ConfigError(
            f"{origin}: train='completion' is for prompt/completion records, and this "
            "is a conversation; use train='last' or train='assistant'."
        )
    if isinstance(record, PreferenceRecord) and config.preference != "chosen":
        raise ConfigError(
            f"{origin}: this is a preference record (chosen, rejected), and tuning by preference is "
            "not here yet; preference='chosen' trains on the chosen answers."
        )
    if isinstance(record, UnpairedRecord):
        raise ConfigError(
            f"{origin}: this is a conversation with a label (desired or not), and tuning by preference "
            "is not here yet; ignore the column 'label' to train on all, or filter by it."
        )
    if isinstance(record, TextRecord) and config.train in ("last", "completion"):
        raise ConfigError(
            f"{origin}: train={config.train!r} is for answers, and this is plain text, of which every "
            "token is trained; leave 'train' out."
        )
    if isinstance(record, LabelledRecord):
        if record.label is None:
            raise ConfigError(f"{origin}: a pair of texts without a label has nothing to learn.")
        if config.instruction is None:
            raise ConfigError(
                f"{origin}: a labelled text needs an instruction that asks for its label, for example "
                f"{EXAMPLE}."
            )
        if not isinstance(record.label, str) and config.labels is None:
            raise ConfigError(
                f"{origin}: the label is a number ({record.label!r}); say what the numbers mean, for "
                "example labels=('no', 'yes')."
            )


def as_question(record: LabelledRecord, config: RenderConfig) -> CompletionRecord:
    """The instruction with the text as prompt, the name of the label as completion."""
    prompt = question(record.text, record.text_pair, config)
    answer = label_name(record, config)
    return CompletionRecord(prompt, answer, record.origin, record.shape)


def question(text: str, text_pair: str, config: RenderConfig) -> str:
    """The prompt for a text. Raises `ConfigError` where the instruction has no place for the pair."""
    instruction = config.instruction
    if instruction is None:
        raise ConfigError(f"a labelled text needs an instruction, for example {EXAMPLE}.")
    if "{text}" not in instruction:
        if "{text_pair}" in instruction:
            raise ConfigError("the instruction has a place for {text_pair} and none for {text}.")
        return "\n\n".join(part for part in (instruction, text, text_pair) if part)
    before, *between = instruction.split("{text}")
    parts = [before, *between]
    if bool(text_pair) != ("{text_pair}" in instruction):
        have = "has a" if text_pair else "has no"
        raise ConfigError(
            f"the record {have} second text; the instruction must hold {{text}} and, for pairs alone, "
            "{text_pair}."
        )
    return text.join(part.replace("{text_pair}", text_pair) for part in parts)


def label_name(record: LabelledRecord, config: RenderConfig) -> str:
    """What the model shall answer. Raises `DataError` for a label that is none of the known ones."""
    label, names = record.label, config.labels
    return str(label) if names is None else names[class_number(record, names)]


def class_number(record: LabelledRecord, names: Sequence[str]) -> int:
    """The place of a record's label among ``names``: its name, or its number. Raises `DataError`."""
    label = record.label
    if str(label) in names:
        return names.index(str(label))
    place = -1
    if isinstance(label, int) or (isinstance(label, str) and label.isdecimal()):
        place = int(label)
    if 0 <= place < len(names):
        return place
    raise DataError(
        f"{record.origin}: the label {label!r} is not one of "
        + ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        + "."
    )
