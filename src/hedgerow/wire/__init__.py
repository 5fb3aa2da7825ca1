"""Updates and entries to bytes and back: safetensors files whose metadata says what they are.

Nothing that is read is trusted, and nothing here knows a method.
"""

from hedgerow.wire.entries import (
    LARGEST_BROADCAST,
    LARGEST_WEIGHT,
    SAMPLING_RATE,
    Entry,
    Participant,
    check_participants,
)
from hedgerow.wire.files import (
    MAX_HEADER_BYTES,
    FileTensors,
    check_numbers,
    header_limit,
    kinds,
    to_safetensors,
)
from hedgerow.wire.kinds import Kind, check_kinds, in_float32, is_writable, seed_kind
from hedgerow.wire.metadata import LONGEST_TEXT, check_equal
from hedgerow.wire.updates import LARGEST_SENT, Update

__all__ = [
    "LARGEST_BROADCAST",
    "LARGEST_SENT",
    "LARGEST_WEIGHT",
    "LONGEST_TEXT",
    "MAX_HEADER_BYTES",
    "SAMPLING_RATE",
    "Entry",
    "FileTensors",
    "Kind",
    "Participant",
    "Update",
    "check_equal",
    "check_kinds",
    "check_numbers",
    "check_participants",
    "header_limit",
    "in_float32",
    "is_writable",
    "kinds",
    "seed_kind",
    "to_safetensors",
]
