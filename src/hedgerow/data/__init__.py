"""Data: sources, partitioning into clients, prompt templates, tokens on disk, and batches."""

from hedgerow.data.batches import batches, collate, epoch
from hedgerow.data.clients import ClientData
from hedgerow.data.in_memory import Held, as_rows
from hedgerow.data.partition import partition
from hedgerow.data.sources import Row, check_columns, client_files, read
from hedgerow.data.templates import Template
from hedgerow.data.templates import load as load_template
from hedgerow.data.encoding import Encoder
from hedgerow.data.tokens import Example, Spool, Tokenized

__all__ = [
    "ClientData",
    "Example",
    "Held",
    "Row",
    "Spool",
    "Template",
    "Tokenized",
    "as_rows",
    "batches",
    "check_columns",
    "client_files",
    "collate",
    "epoch",
    "load_template",
    "partition",
    "read",
]
