"""Data: sources, partitioning into clients, prompt templates, tokens on disk, and batches."""

from hedgerow.data.batches import batches, collate, epoch
from hedgerow.data.canaries import Canaries
from hedgerow.data.clients import ClientData
from hedgerow.data.encoding import Encoder
from hedgerow.data.in_memory import Held, as_records
from hedgerow.data.kept import KeptTokens
from hedgerow.data.partition import partition
from hedgerow.data.preferences import Learns, good_answers
from hedgerow.data.rows import Message, Records, Remarks, Row, Rows, answered_turns, check
from hedgerow.data.sources import client_files, read
from hedgerow.data.templates import Template, in_turns
from hedgerow.data.templates import load as load_template
from hedgerow.data.tokens import Example, Spool, Tokenized, learnt_from

__all__ = [
    "Canaries",
    "ClientData",
    "Encoder",
    "Example",
    "Held",
    "KeptTokens",
    "Learns",
    "Message",
    "Records",
    "Remarks",
    "Row",
    "Rows",
    "Spool",
    "Template",
    "Tokenized",
    "answered_turns",
    "as_records",
    "batches",
    "check",
    "client_files",
    "collate",
    "epoch",
    "good_answers",
    "in_turns",
    "learnt_from",
    "load_template",
    "partition",
    "read",
]
