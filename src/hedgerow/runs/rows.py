"""metrics.jsonl: a row for each round, from round 0 on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hedgerow.errors import UserError, readable
from hedgerow.files import to_json

METRICS_FILE = "metrics.jsonl"
ROWS_BY_CLIENT = "test_rows_by_client"
"""Key of the numbers of test rows of clients that were scored on their own."""

SENT_BY_CLIENT = "sent_by_client"
"""Key of what the update of each client holds, as `hedgerow.federation.traffic.contents` says."""


class _Sent(BaseModel):
    """What the update of a client holds."""

    model_config = ConfigDict(strict=True)

    bytes: int
    tensors: int
    numbers: int
    kinds: dict[str, int]
    said: list[str]


class _Row(BaseModel):
    """What readers of a row count on; whatever else was measured are numbers, or groups of them."""

    model_config = ConfigDict(extra="allow", strict=True)
    # Of a group's name it is not asked whether it is a text that can be encoded.
    __pydantic_extra__: dict[str, float | dict[Any, Any] | None]

    round: int
    participants: list[str]
    failures: dict[str, str]
    bytes_up: int
    bytes_down: int
    seconds: float | None
    eval_loss: float | None = None
    train_loss: float | None = None
    train_loss_by_client: dict[str, float | None] = {}
    test_rows_by_client: dict[str, int] = {}
    sent_by_client: dict[str, _Sent] = {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
        UserError: the file is damaged: a line is no row, or the rows are not those of rounds 0, 1,
            2 … in this order.
    """
    file = path / METRICS_FILE
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    rows = []
    for round, line in enumerate(line for line in lines if line.endswith(b"\n")):
        if reason := _wrong(line, round):
            raise UserError(
                f"{file} is damaged: line {round + 1} {reason}; restore it from a copy, or remove "
                "this line and all below it: --resume then writes their rows again, without the "
                "scores of earlier rounds"
            )
        rows.append(json.loads(line))
    return rows


def _wrong(line: bytes, round: int) -> str | None:
    """What is wrong with the row of a round; None where it can be read."""
    try:
        row = _Row.model_validate(json.loads(line))
    except (ValidationError, RecursionError, ValueError) as error:
        if not isinstance(error, ValidationError):
            return "is no JSON object"
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            return "is no JSON object"
        return readable(f"has no right `{first['loc'][0]}` ({first['msg']})")
    if row.round != round:
        return f"is of round {row.round}, not of round {round}"
    return None


def to_line(row: dict[str, Any]) -> bytes:
    # Half a surrogate pair, which a group's name may hold, becomes JSON's own escape of it.
    return to_json(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
