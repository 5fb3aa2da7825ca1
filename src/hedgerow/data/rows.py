"""Rows: what hedgerow learns from and scores, checked once, whatever they are read from."""

from __future__ import annotations

import decimal
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from hedgerow.errors import NothingToLearn, UserError

if TYPE_CHECKING:
    from hedgerow.settings import Fields

Record = dict[str, Any]
"""One example as its source has it: column names and their values."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example: what is asked, and what should be answered.

    Attributes:
        instruction: what is asked; the last user's turn of a conversation.
        input: context of the instruction; empty where there is none.
        output: the right answer; empty where there is none.
        history: earlier turns of the conversation, the system's first, where there are any.
        columns: all columns of the row's source, by name.
        number: place in its source, from 1; 0 of a row that has none.
    """

    instruction: str
    input: str = ""
    output: str = ""
    history: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0


@dataclass(frozen=True, eq=False)
class Records:
    """Rows as their source has them, before they are checked.

    Attributes:
        rows: one dictionary a row, with Python's own types; a missing value (null, NaN) is None.
        where: the file, or what else they are from, for messages.
        numbers: place of each in its source, from 1.
    """

    rows: Sequence[Record]
    where: str
    numbers: Sequence[int]

    @classmethod
    def of(cls, found: Iterable[Any], where: str, numbers: Sequence[int] | None = None) -> Records:
        """Records of dictionaries from anywhere.

        Args:
            found: a mapping from column names to values for each row.
            where: what they are from, for messages.
            numbers: place of each in its source; from 1 on if None.

        Raises:
            UserError: one is no such mapping.
        """
        rows: list[Record] = []
        for row in found:
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise UserError(
                    f"{where}: row {len(rows) + 1} must be a dictionary from column names to "
                    f"values, not {type(row).__name__}"
                )
            rows.append({key: _plain(value) for key, value in row.items()})
        _restore_integers(rows)
        return cls(rows, where, numbers or range(1, len(rows) + 1))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Records:
        """Those of the rows, in this order."""
        rows = [self.rows[index] for index in indices]
        return Records(rows, self.where, [self.numbers[index] for index in indices])


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """Rows of one source that can be used, and what is to be said about the others.

    Attributes:
        rows: the rows, in their source's order.
        remarks: what happened to how many rows, as `{"left out: no answer": 2}`.
    """

    rows: Sequence[Row]
    remarks: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


class NothingUsable(NothingToLearn):
    """Data of which nothing is left to use, though nothing in them is a mistake."""


def check(records: Records, fields: Fields, *, answered: bool = True) -> Rows:
    """Rows of records.

    Args:
        records: what was read.
        fields: columns that hold instruction, input and output.
        answered: whether a row without an answer is of no use.

    Raises:
        UserError: naming the source, the row and the column of what cannot be used.
        NothingUsable: no row is left.
    """
    where = records.where
    if not len(records):
        raise NothingUsable(f"{where}: holds no rows: give at least one example")
    known = {column for row in records.rows for column in row}
    _check_known(fields, known, where, answered)
    remarks: Counter[str] = Counter()
    rows: list[Row] = []
    for number, record in zip(records.numbers, records.rows, strict=True):
        if all(value in (None, "", [], {}) for value in record.values()):
            remarks["skipped: every cell is empty"] += 1
            continue
        text = partial(_text, record, where=f"{where}: row {number}")
        row = Row(
            instruction=text(fields.instruction),
            input=text(fields.input),
            output=text(fields.output),
            columns=record,
            number=number,
        )
        if answered and not row.output.strip():
            remarks["left out: no answer"] += 1
        else:
            rows.append(row)
    if not rows:
        raise NothingUsable(f"{where}: no row has an answer in column {fields.output!r}")
    return Rows(rows, remarks)


def _check_known(fields: Fields, known: set[str], where: str, answered: bool) -> None:
    """Raise a `UserError` for a column that no row has.

    The default column of the input, which nobody wrote, may be missing; so may that of the answer
    where none is needed.
    """
    for key, column in [("instruction", fields.instruction), ("output", fields.output)]:
        if column not in known and (answered or key != "output"):
            raise UserError(
                f"{where}: no row has a column {column!r}: set `data.fields.{key}` to one of "
                f"{_listed(known)}"
            )
    if fields.input not in (None, "input") and fields.input not in known:
        raise UserError(
            f"{where}: no row has a column {fields.input!r}: set `data.fields.input` to one of "
            f"{_listed(known)}, or to null if there is none"
        )


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(repr(column) for column in sorted(columns)) or "(no columns)"


def _text(record: Record, column: str | None, where: str) -> str:
    """The text of a column; empty where the row has none."""
    value = None if column is None else record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str | int | float | decimal.Decimal) or isinstance(value, bool):
        kind = json.dumps(value) if isinstance(value, bool) else type(value).__name__
        raise UserError(f"{where}: column {column!r} must be text or a number, not {kind}")
    text = str(value)
    check_characters(text, f"{where}: column {column!r}")
    return text


def check_characters(text: str, where: str) -> None:
    """Raise a `UserError` for a text that holds what is no character, and cannot be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"{where} holds half a character (U+{code:04X}, a surrogate without its pair) after "
            f"{error.start} characters: take it out"
        ) from None


def _plain(value: Any) -> Any:
    """A value as a JSON file would have given it, however nested."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # NumPy's numbers and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    is_missing = isinstance(value, float | decimal.Decimal) and math.isnan(value)
    return None if is_missing or type(value).__name__ in ("NAType", "NaTType") else value


_LARGEST_EXACT = 2**53


def _restore_integers(rows: Sequence[Record]) -> None:
    """Make integers of a column of whole numbers with gaps.

    Libraries that know no missing integer (pandas, NumPy) have made floats of it.
    """
    columns: dict[str, bool] = {}
    gaps: set[str] = set()
    for row in rows:
        for column, value in row.items():
            if value is None:
                gaps.add(column)
            elif columns.get(column, True):
                columns[column] = (
                    isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_EXACT
                )
    for column in gaps:
        if columns.get(column):
            for row in rows:
                if isinstance(row.get(column), float):
                    row[column] = int(row[column])
