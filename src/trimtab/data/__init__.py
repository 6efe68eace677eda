"""From a file to what the model sees: source -> record -> rendered -> tokens -> packed batch.

A source gives rows; `read_examples` makes examples of them; `tokenise` keeps those in a cache; a `Corpus` mixes and
splits them; a `Feed` gives the examples of each step, with a cursor that resumes at the exact one.
"""

from trimtab.data.batch import Batch, Document, collate, pack, plan_batches
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
from trimtab.data.preview import preview
from trimtab.data.records import (
    ChatRecord,
    CompletionRecord,
    Message,
    Record,
    parse_record,
    parse_row,
)
from trimtab.data.render import RenderConfig, Rendered, Renderer
from trimtab.data.source import Mapped, Row, Source, open_source
from trimtab.data.stats import TokenStats
from trimtab.data.tokenise import tokenise

__all__ = [
    "Batch",
    "ChatRecord",
    "CompletionRecord",
    "Corpus",
    "CorpusFeed",
    "Cursor",
    "Datum",
    "Document",
    "Example",
    "ExampleConfig",
    "Examples",
    "Feed",
    "Mapped",
    "Message",
    "Outcomes",
    "Portion",
    "Problem",
    "Record",
    "RenderConfig",
    "Rendered",
    "Renderer",
    "Row",
    "Source",
    "StreamFeed",
    "TokenStats",
    "collate",
    "distinct",
    "load_examples",
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
