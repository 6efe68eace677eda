"""From a file to what the model sees: source -> record -> rendered -> tokens -> packed batch.

A source gives rows; `read_examples` makes examples of them; `tokenise` keeps those in a cache; a `Corpus` mixes and
splits them; a `Feed` gives the examples of each step, with a cursor that resumes at the exact one.
"""

from trimtab.data.batch import Batch, Document, collate, pack, plan_batches
from trimtab.data.classes import ClassRenderer, labels_in
from trimtab.data.corpus import Corpus, Portion, distinct, without
from trimtab.data.datum import Datum
from trimtab.data.examples import (
    Example,
    ExampleConfig,
    Examples,
    Outcomes,
    Problem,
    load_examples,
    read_examples,
    strict,
)
from trimtab.data.feed import CorpusFeed, Cursor, Feed, StreamFeed
from trimtab.data.folder import Folder
from trimtab.data.functions import Mapped, UserFunction, load_function
from trimtab.data.hub import DatasetSource
from trimtab.data.jsonl import JsonFile, JsonlFile
from trimtab.data.memory import PythonRows
from trimtab.data.messages import Message, ToolCall
from trimtab.data.open import open_source
from trimtab.data.preview import preview
from trimtab.data.records import (
    ChatRecord,
    CompletionRecord,
    LabelledRecord,
    PreferenceRecord,
    Record,
    TextRecord,
    UnpairedRecord,
)
from trimtab.data.render import Rendered, Renderer, Renders
from trimtab.data.render_config import RenderConfig
from trimtab.data.shapes import parse_record, parse_row
from trimtab.data.source import Row, Source
from trimtab.data.stats import TokenStats
from trimtab.data.tables import CsvFile, ParquetFile
from trimtab.data.text import TextFile
from trimtab.data.tokenise import tokenise

__all__ = [
    "Batch",
    "ChatRecord",
    "ClassRenderer",
    "CompletionRecord",
    "Corpus",
    "CorpusFeed",
    "CsvFile",
    "Cursor",
    "DatasetSource",
    "Datum",
    "Document",
    "Example",
    "ExampleConfig",
    "Examples",
    "Feed",
    "Folder",
    "JsonFile",
    "JsonlFile",
    "LabelledRecord",
    "Mapped",
    "Message",
    "Outcomes",
    "ParquetFile",
    "Portion",
    "PreferenceRecord",
    "Problem",
    "PythonRows",
    "Record",
    "RenderConfig",
    "Rendered",
    "Renderer",
    "Renders",
    "Row",
    "Source",
    "StreamFeed",
    "TextFile",
    "TextRecord",
    "TokenStats",
    "ToolCall",
    "UnpairedRecord",
    "UserFunction",
    "collate",
    "distinct",
    "labels_in",
    "load_examples",
    "load_function",
    "open_source",
    "pack",
    "parse_record",
    "parse_row",
    "plan_batches",
    "preview",
    "read_examples",
    "strict",
    "tokenise",
    "without",
]
