"""Metadata of files: strings by name, read with suspicion."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hedgerow.errors import InvalidMessage

LONGEST_TEXT = 512
"""Characters of a tensor's name, and of what an update says."""

_NATURAL = re.compile(r"[1-9][0-9]{0,18}")


def read_json(what: str, text: str, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """The content of a JSON text, which is of this kind and has no name twice in one object.

    Raises:
        InvalidMessage: it is something else; `what` says where it stands.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"{what}: invalid JSON: {error}") from None
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "an array"
        raise InvalidMessage(f"{what} must be {expected} in JSON")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has two values of one name")
    return content


def take(metadata: dict[str, str], format: str, *names: str) -> list[str]:
    """Remove the values of these names from the metadata of a file, and return them.

    Raises:
        InvalidMessage: the file is of another format, or lacks one of the names.
    """
    if metadata.pop("format", None) != format:
        raise InvalidMessage(f"format must be {format}")
    for name in names:
        if name not in metadata:
            raise InvalidMessage(f"metadata must have {name}")
    return [metadata.pop(name) for name in names]


def natural(what: str, text: str) -> int:
    """Positive integer of at most 63 bits, from its decimal digits.

    Raises:
        InvalidMessage: it is something else; `what` names it.
    """
    if not _NATURAL.fullmatch(text) or int(text) >= 2**63:
        raise InvalidMessage(
            f"{what} must be a positive integer below 2^63, got {text[:LONGEST_TEXT]!r}"
        )
    return int(text)


def check_equal(said: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Raise `InvalidMessage` unless both mappings are equal; the text names what differs."""
    for what in sorted(said.keys() | expected.keys()):
        if said.get(what) != expected.get(what):
            given = str(said.get(what))[:LONGEST_TEXT]
            raise InvalidMessage(f"{what} must be {expected.get(what)}, got {given}")
