"""metrics.jsonl: a row for each round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hedgerow.errors import UserError
from hedgerow.files import to_json

METRICS_FILE = "metrics.jsonl"
ROWS_BY_CLIENT = "test_rows_by_client"
"""Key of the numbers of test rows of clients that were scored on their own."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
        UserError: the file is damaged.
    """
    file = path / METRICS_FILE
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    try:
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if all(isinstance(row["round"], int) for row in rows):
            return rows
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} is damaged: it is not a JSON object with a round on each line")


def to_line(row: dict[str, Any]) -> bytes:
    # Half a surrogate pair, which a group's name may hold, becomes JSON's own escape of it.
    return to_json(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
