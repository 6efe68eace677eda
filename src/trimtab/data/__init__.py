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
from trimtab.data.order import Cursor, epoch_order, visit
from trimtab.data.preview import preview
from trimtab.data.records import (
    ChatRecord,
    CompletionRecord,
    Message,
    Record,
    parse_line,
    parse_record,
)
from trimtab.data.render import RenderConfig, Rendered, Renderer
from trimtab.data.source import JsonlFile, Line
from trimtab.data.stats import TokenStats

__all__ = [
    "Batch",
    "ChatRecord",
    "CompletionRecord",
    "Cursor",
    "Datum",
    "Document",
    "ExampleConfig",
    "Examples",
    "JsonlFile",
    "Line",
    "Message",
    "Outcomes",
    "Problem",
    "Record",
    "RenderConfig",
    "Rendered",
    "Renderer",
    "TokenStats",
    "collate",
    "epoch_order",
    "load_examples",
    "pack",
    "parse_line",
    "parse_record",
    "plan_batches",
    "preview",
    "steps",
    "stream_examples",
    "visit",
]
