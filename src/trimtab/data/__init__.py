"""From a file to what the model sees: source -> record -> rendered -> tokens -> packed batch.

Each stage is a generator of ``(item, cursor)``; the cursor resumes at the exact example.
"""

from trimtab.data.batch import Batch, Document, collate, pack, plan_batches
from trimtab.data.datum import Datum
from trimtab.data.examples import (
    ExampleConfig,
    Examples,
    Outcomes,
    Problem,
    load_examples,
    steps,
    stream_examples,
)
from trimtab.data.folder import Folder
from trimtab.data.functions import Mapped, UserFunction, load_function
from trimtab.data.hub import DatasetSource
from trimtab.data.jsonl import JsonFile, JsonlFile
from trimtab.data.memory import PythonRows
from trimtab.data.messages import Message, ToolCall
from trimtab.data.open import open_source
from trimtab.data.order import Cursor, epoch_order, visit
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
from trimtab.data.render import Rendered, Renderer
from trimtab.data.render_config import RenderConfig
from trimtab.data.shapes import parse_record, parse_row
from trimtab.data.source import Row, Source
from trimtab.data.stats import TokenStats
from trimtab.data.tables import CsvFile, ParquetFile
from trimtab.data.text import TextFile

__all__ = [
    "Batch",
    "ChatRecord",
    "CompletionRecord",
    "CsvFile",
    "Cursor",
    "DatasetSource",
    "Datum",
    "Document",
    "ExampleConfig",
    "Examples",
    "Folder",
    "JsonFile",
    "JsonlFile",
    "LabelledRecord",
    "Mapped",
    "Message",
    "Outcomes",
    "ParquetFile",
    "PreferenceRecord",
    "Problem",
    "PythonRows",
    "Record",
    "RenderConfig",
    "Rendered",
    "Renderer",
    "Row",
    "Source",
    "TextFile",
    "TextRecord",
    "TokenStats",
    "ToolCall",
    "UnpairedRecord",
    "UserFunction",
    "collate",
    "epoch_order",
    "load_examples",
    "load_function",
    "open_source",
    "pack",
    "parse_record",
    "parse_row",
    "plan_batches",
    "preview",
    "steps",
    "stream_examples",
    "visit",
]
