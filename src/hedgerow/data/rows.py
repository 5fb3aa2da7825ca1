"""Rows: what hedgerow learns from and scores, checked once, whatever they are read from."""

from __future__ import annotations

import decimal
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from hedgerow.errors import NothingToLearn, UserError

if TYPE_CHECKING:
    from hedgerow.settings import Fields

Record = dict[str, Any]
"""One example as its source has it: column names and their values."""


Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks; `tool` is what a call of a tool has returned.
        content: what is said.
        calls: calls of tools that the assistant makes, each with `function`, which has a `name` and
            `arguments`, and maybe an `id`, as chat templates take them.
        told: `name` and `tool_call_id` of what a tool has returned, where they are there.
    """

    role: Role
    content: str
    calls: tuple[Record, ...] = ()
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One example: what is asked, and what should be answered.

    Attributes:
        instruction: what is asked; the last user's turn of a conversation.
        input: context of the instruction; empty where there is none.
        output: the right answer; empty where there is none, or calls of tools alone.
        history: earlier turns of the conversation, the system's first, where there are any.
        between: calls of tools, and what they returned, after the instruction and before the
            answer.
        calls: calls of tools that are the answer, or part of it, as those of a `Message`.
        tools: what may be called, each as `{"type": "function", "function": {"name": …}}`.
        columns: all columns of the row's source, by name.
        number: place in its source, from 1; 0 of a row that has none.
        where: file, or what else it is from, for messages; empty where nobody has said.
        other: an answer beside the right one, as the rejected one of a pair; empty where there is
            none.
        desirable: whether the answer is a good one, as is said of it or goes without saying.
    """

    instruction: str
    input: str = ""
    output: str = ""
    history: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0
    where: str = field(default="", compare=False)
    between: tuple[Message, ...] = ()
    calls: tuple[Record, ...] = ()
    tools: tuple[Record, ...] = ()
    other: str = ""
    desirable: bool = True

    def place(self, whose: str) -> str:
        """What a message calls the row, as "ward (2024.csv): row 3".

        Args:
            whose: the client or source that it belongs to.
        """
        known = f"{whose} ({self.where})" if self.where not in ("", whose) else whose
        return ": ".join(filter(None, [known, f"row {self.number}" if self.number else ""]))


@dataclass(frozen=True, eq=False)
class Records:
    """Rows as their source has them, before they are checked.

    Attributes:
        rows: one dictionary a row, with Python's own types; a missing value (null, NaN) is None.
        where: the file, or what else they are from, for messages.
        numbers: place of each in its source, from 1.
        classes: names of the classes that the integers of a column stand for, by column.
        typed: whether each column had one type for all its values, as a table's, so that mappings
            have the keys of all others.
    """

    rows: Sequence[Record]
    where: str
    numbers: Sequence[int]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    typed: bool = False

    @classmethod
    def of(
        cls,
        found: Iterable[Any],
        where: str,
        numbers: Sequence[int] | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        *,
        typed: bool = False,
    ) -> Records:
        """Records of dictionaries from anywhere.

        Args:
            found: a mapping from column names to values for each row.
            where: what they are from, for messages.
            numbers: place of each in its source; from 1 on if None.
            classes: as the attribute.
            typed: as the attribute.

        Raises:
            UserError: one is no such mapping.
        """
        rows: list[Record] = []
        gaps: set[str] = set()
        for row in found:
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise UserError(
                    f"{where}: row {len(rows) + 1} must be a dictionary from column names to "
                    f"values, not {type(row).__name__}"
                )
            try:
                rows.append({key: _plain(value) for key, value in row.items()})
            except RecursionError:
                raise UserError(f"{where}: row {len(rows) + 1} is nested too deeply") from None
            # Libraries that know no missing integer (pandas, NumPy) write NaN for it, and only into
            # columns of one type is it handed on as null.
            gaps |= {k for k, v in rows[-1].items() if v is None and (typed or row[k] is not None)}
        _restore_integers(rows, gaps)
        return cls(rows, where, numbers or range(1, len(rows) + 1), classes or {}, typed)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Records:
        """Those of the rows, in this order."""
        rows = [self.rows[index] for index in indices]
        numbers = [self.numbers[index] for index in indices]
        return replace(self, rows=rows, numbers=numbers)


class Remarks:
    """What happened to how many rows, and where first; said once, when a run begins."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, where: str, number: int) -> None:
        """Count a row of which something is to be said, as "left out: no answer"."""
        self.counts[what] += 1
        self._first.setdefault(what, f"{where} row {number}")

    def update(self, other: Remarks) -> None:
        """Add what another source's rows gave rise to."""
        self.counts.update(other.counts)
        self._first = other._first | self._first

    def take(self) -> list[str]:
        """Sentences as `sentences`, of rows that are then forgotten."""
        taken = self.sentences()
        self.counts.clear()
        self._first.clear()
        return taken

    def sentences(self) -> list[str]:
        """One for each kind, as "2 rows left out: no answer (first: a.jsonl row 3)"."""
        return [
            f"{count:,} {'row' if count == 1 else 'rows'} {what} (first: {self._first[what]})"
            for what, count in self.counts.items()
        ]


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """Rows of one source that can be used, and what is to be said about these and the others.

    Attributes:
        rows: the rows, in their source's order.
        remarks: what was left out, skipped or ignored.
    """

    rows: Sequence[Row]
    remarks: Remarks

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


class _LeftOut(Exception):
    """A row that cannot be used; the text says why, as in "2 rows left out: …"."""


def answered_turns(row: Row) -> list[Row]:
    """A row for each answer of a conversation, in order, after the turns before it.

    Its columns have `turn` as well, from 1, unless the source has such a column. Earlier answers
    that are blank are left out; the last one has a row in any case.
    """
    asked = Message("user", row.instruction)
    turns = [*row.history, asked, *row.between, Message("assistant", row.output, row.calls)]
    rows, number, last = [], 0, 0
    for place, turn in enumerate(turns):
        if turn.role == "user":
            last = place
        if turn.role != "assistant":
            continue
        number += 1
        columns = {"turn": number} | dict(row.columns)
        if place == len(turns) - 1:
            rows.append(replace(row, columns=columns))
        elif turn.content.strip() or turn.calls:
            rows.append(
                Row(
                    instruction=turns[last].content,
                    output=turn.content,
                    history=tuple(turns[:last]),
                    columns=columns,
                    number=row.number,
                    where=row.where,
                    between=tuple(turns[last + 1 : place]),
                    calls=turn.calls,
                    tools=row.tools,
                )
            )
    return rows


def check(
    records: Records,
    fields: Fields,
    *,
    answered: bool = True,
    every_turn: bool = False,
    tools: bool = False,
) -> Rows:
    """Rows of records.

    Rows that are empty, that ask nothing or that answer nothing are left out and counted, and so
    are conversations with images, turns that do not alternate, or calls of tools that the prompt
    cannot write.

    Args:
        records: what was read.
        fields: columns that hold instruction, input and output, a conversation, or a pair of
            answers. Where they are the defaults and the records have `messages`, `conversations`,
            `prompt` and `completion`, or `chosen` and `rejected` instead, those are read.
        answered: whether a row without an answer is of no use.
        every_turn: whether all answers of a conversation count, or the last one alone.
        tools: whether the prompt writes tools, their calls, and what they return.

    Raises:
        UserError: naming the source, the row and the column of what cannot be used.
        NothingToLearn: no row is left.
    """
    where, remarks = records.where, Remarks()
    if not len(records):
        raise NothingToLearn(f"{where}: holds no rows: give at least one example")
    known = {column: None for row in records.rows for column in row}
    if fields.prompt is not None:
        columns = {"instruction": fields.prompt}
        if fields.completion is not None:
            columns["output"] = fields.completion
        fields = fields.model_copy(update=columns)
    asked, fields = fields, _layout(fields, known, answered)
    answer = fields.output if fields.chosen is None else f"{fields.chosen}, {fields.rejected}"
    read_from = fields.messages or f"{fields.instruction}, {answer}"
    _check_known(records, fields, known, answered)
    named = {*_named(fields), fields.tools}
    ignored = [c for c in known if c.lower() in _LIKE_AN_INPUT and c not in named]
    reader = _Reader(records, fields, remarks, every_turn=every_turn, tools=tools)
    rows: list[Row] = []
    for number, record in zip(records.numbers, records.rows, strict=True):
        try:
            row = reader.read(record, number)
            if answered and not row.output.strip() and not row.calls:
                raise _LeftOut("no answer")
        except _LeftOut as reason:
            remarks.add(f"left out: {reason}", where, number)
            continue
        for column in ignored:
            if not is_empty(record.get(column)):
                what = f"with a column {column!r}, which `data.fields` does not name"
                remarks.add(what, where, number)
        if fields is not asked:
            remarks.add(f"read from {read_from}, for want of {asked.instruction}", where, number)
        rows.append(row)
    if not rows:
        why = "; ".join(remarks.sentences())
        raise NothingToLearn(f"{where}: no row can be used: {why}")
    return Rows(rows, remarks)


_CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold conversations by custom."""
_LIKE_AN_INPUT = {
    *("context", "input", "inputs", "passage", "document", "article", "background"),
    *("history", "system", "system_prompt", "tools"),
}
"""Columns that change what is asked, so that ignoring them is said."""
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
_CALLS = ("tool_calls", "function_call", "tool_call")
"""Keys that hold calls of tools, and roles whose text is one, as in ShareGPT's."""
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""What says that an answer is a good one, or a bad one, also in files that have texts alone."""
_MISSING = object()


def _layout(fields: Fields, known: Mapping[str, None], answered: bool) -> Fields:
    """The columns that are meant, where nobody has named any and the default ones are not there."""
    plain = ("instruction", "output")
    is_default = (fields.instruction, fields.output) == plain
    is_default &= fields.messages is None and fields.chosen is None
    if not is_default or known.keys() >= set(plain if answered else plain[:1]):
        return fields
    for column in _CONVERSATIONS:
        if column in known:
            return fields.model_copy(update={"messages": column})
    if {"prompt", "completion"} <= known.keys():
        return fields.model_copy(update={"instruction": "prompt", "output": "completion"})
    if {"chosen", "rejected"} <= known.keys():
        prompt = {"instruction": "prompt"} if "prompt" in known else {}
        return fields.model_copy(update={"chosen": "chosen", "rejected": "rejected", **prompt})
    return fields


def _named(fields: Fields) -> set[str | None]:
    """The columns that are used."""
    if fields.messages is not None:
        return {fields.messages}
    named = (fields.instruction, fields.input, fields.output, fields.chosen, fields.rejected)
    return {*named, *(c.partition(".")[0] for c in named if c is not None)}


def _check_known(
    records: Records, fields: Fields, known: Mapping[str, None], answered: bool
) -> None:
    """Raise a `UserError` for a column that no row has.

    The default column of the input, which nobody wrote, may be missing; so may that of the answer
    where none is needed.
    """
    where = records.where
    if fields.tools not in (None, "tools") and fields.tools not in known:
        raise UserError(
            f"{where}: no row has a column {fields.tools!r}: set `data.fields.tools` to the column "
            "of the tools, or to null if there is none"
        )

    def is_there(column: str) -> bool:
        if column in known:
            return True
        return "." in column and any(_value(r, column) is not _MISSING for r in records.rows)

    nested = {
        f"{column}.{inner}"
        for row in records.rows[:1]
        for column, value in row.items()
        if isinstance(value, Mapping)
        for inner in value
    }
    listed = ", ".join(repr(column) for column in sorted({*known, *nested})) or "(no columns)"
    if fields.messages is not None:
        if not is_there(fields.messages):
            raise UserError(
                f"{where}: no row has a column {fields.messages!r}: set `data.fields.messages` to "
                f"one of {listed}"
            )
        return
    if len(known) == 1 and answered and not nested and fields.instruction not in known:
        raise UserError(
            f"{where}: has one column, {next(iter(known))!r}, where a row needs an instruction and "
            "an answer: give each a column, or give conversations in `messages`"
        )
    asked, answer = ("instruction", "output") if fields.prompt is None else ("prompt", "completion")
    needed = [(asked, fields.instruction), (answer, fields.output)]
    if fields.chosen is not None and fields.rejected is not None:
        needed = [("chosen", fields.chosen), ("rejected", fields.rejected)]
        if fields.prompt is not None or fields.instruction != "instruction":
            needed.append((asked, fields.instruction))  # by default both may begin with the prompt
    if fields.label is not None:
        needed.append(("label", fields.label))
    for key, column in needed:
        if (answered or key == asked) and not is_there(column):
            raise UserError(
                f"{where}: no row has a column {column!r}: set `data.fields.{key}` to one of "
                f"{listed}"
            )
    if fields.input not in (None, "input") and not is_there(fields.input):
        raise UserError(
            f"{where}: no row has a column {fields.input!r}: set `data.fields.input` to one of "
            f"{listed}, or to null if there is none"
        )


def _value(record: Any, column: str) -> Any:
    """The value of a column, or of what is nested in it, as `answers.text`; of a list the first.

    A column whose name has dots itself is meant first.
    """
    if not isinstance(record, Mapping):
        return _MISSING
    if column in record:
        return record[column]
    parts = column.split(".")
    for count in range(len(parts) - 1, 0, -1):
        outer, inner = ".".join(parts[:count]), ".".join(parts[count:])
        if outer not in record:
            continue
        value = record[outer]
        while isinstance(value, list):
            value = value[0] if value else None
        found = None if value is None else _value(value, inner)
        if found is not _MISSING:
            return found
    return _MISSING


def value_of(record: Mapping[str, Any], column: str, otherwise: Any = None) -> Any:
    """The value of a column, or of one inside another, as `meta.topic`.

    Of a list, what its first element has; a column whose own name has dots is meant first.

    Args:
        otherwise: what is returned where there is no such column.
    """
    found = _value(record, column)
    return otherwise if found is _MISSING else found


def is_empty(value: Any) -> bool:
    """Whether there is nothing in a cell, or a list, or a mapping."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


class _Reader:
    """Makes rows of the records of one source."""

    def __init__(
        self,
        records: Records,
        fields: Fields,
        remarks: Remarks,
        *,
        every_turn: bool,
        tools: bool,
    ) -> None:
        self._fields, self._remarks, self._every_turn = fields, remarks, every_turn
        self._where, self._classes, self._typed = records.where, records.classes, records.typed
        self._writes_tools = tools

    def read(self, record: Record, number: int) -> Row:
        """The row of a record.

        Raises:
            _LeftOut: it is of no use.
            UserError: it is a mistake.
        """
        if is_empty(record):
            raise _LeftOut("every cell is empty")
        fields, where = self._fields, f"{self._where}: row {number}"
        if fields.messages is not None:
            found = self._cell(record, fields.messages, number)
            turns = self._turns(found, where, fields.messages)
            return self._conversation(record, number, turns)
        asked = self._cell(record, fields.instruction, number)
        if fields.chosen is not None and fields.rejected is not None:
            return self._pair(record, number, asked, fields.chosen, fields.rejected)
        answer = self._cell(record, fields.output, number)
        desirable = fields.label is None or self._label(record, number, fields.label)
        if _has_messages(asked) or _has_messages(answer):
            turns = self._turns(asked, where, fields.instruction, "user")
            turns += self._turns(answer, where, fields.output, "assistant")
            row = self._conversation(record, number, turns)
            if fields.label is not None and row.calls:
                raise _LeftOut("a labelled answer that calls tools")
            return replace(row, desirable=desirable)
        output = _text(answer, f"{where}: column {fields.output!r}")
        return replace(self._plain(record, number, asked), output=output, desirable=desirable)

    def _plain(self, record: Record, number: int, asked: Any) -> Row:
        """The row of a record whose cells are texts, without its answer."""
        fields, where = self._fields, f"{self._where}: row {number}"
        row = Row(
            instruction=_text(asked, f"{where}: column {fields.instruction!r}"),
            input=_text(
                self._cell(record, fields.input, number), f"{where}: column {fields.input!r}"
            ),
            columns=record,
            number=number,
            where=self._where,
            tools=self._tools(record, number),
        )
        if not (row.instruction + row.input).strip():
            raise _LeftOut("nothing is asked")
        return row

    def _pair(self, record: Record, number: int, asked: Any, chosen: str, rejected: str) -> Row:
        """The row of a better answer and a worse one, which may each hold the prompt as well.

        Args:
            asked: the prompt's cell.
            chosen: column of the better answer.
            rejected: column of the worse one.
        """
        where = f"{self._where}: row {number}"
        cells = [(c, self._cell(record, c, number)) for c in (chosen, rejected)]
        if any(is_empty(cell) for _, cell in cells):
            raise _LeftOut("no pair of answers")
        if any(map(_has_messages, [asked, *(cell for _, cell in cells)])):
            prompt = self._turns(asked, where, self._fields.instruction, "user")
            better, worse = (
                turns if turns[0].role != "assistant" else prompt + turns
                for turns in (
                    self._turns(cell, where, column, "assistant") for column, cell in cells
                )
            )
            if better[:-1] != worse[:-1] or {better[-1].role, worse[-1].role} != {"assistant"}:
                raise _LeftOut("answers of a pair that differ before their last turns")
            if better[-1].calls or worse[-1].calls:
                raise _LeftOut("answers of a pair that call tools")
            row = replace(self._conversation(record, number, better), other=worse[-1].content)
        else:
            if asked is None and _value(record, self._fields.instruction) is _MISSING:
                raise UserError(
                    f"{where}: column {chosen!r} is a text without its prompt: set "
                    "`data.fields.prompt` to the prompt's column"
                )
            better_text, worse_text = (
                _text(cell, f"{where}: column {column!r}") for column, cell in cells
            )
            row = replace(self._plain(record, number, asked), output=better_text, other=worse_text)
        if not row.other.strip():
            raise _LeftOut("no pair of answers")
        if row.output.split() == row.other.split():
            raise _LeftOut("both answers of a pair are the same")
        return row

    def _label(self, record: Record, number: int, column: str) -> bool:
        """Whether the answer of a record is a good one."""
        value = self._cell(record, column, number)
        if is_empty(value):
            raise _LeftOut("no label")
        said = _LABELS.get(str(value).strip().lower())
        if said is None:
            raise UserError(
                f"{self._where}: row {number}: column {column!r} must be true or false, not "
                f"{str(value)[:40]!r}"
            )
        return said

    def _cell(self, record: Record, column: str | None, number: int) -> Any:
        """What stands in a column: a value, None, or a list of messages."""
        value = None if column is None else _value(record, column)
        if value is _MISSING:
            return None
        names = self._classes.get(column or "")
        if names is not None and isinstance(value, int):
            return names[value] if 0 <= value < len(names) else None
        if column == self._fields.messages or not isinstance(value, list):
            return value
        if not _has_messages(value):
            if column in record:
                return value  # of which one could not be chosen; within another it is custom
            if len(value) > 1:
                what = f"with several values in column {column!r}, of which the first counts"
                self._remarks.add(what, self._where, number)
            return value[0] if value else None
        return value

    def _conversation(self, record: Record, number: int, turns: list[Message]) -> Row:
        """The last answered turn of a conversation, after the others."""
        system = tuple(turn for turn in turns[:1] if turn.role == "system")
        turns = turns[len(system) :]
        if not turns:
            raise _LeftOut("nothing is asked")
        if not self._writes_tools and any(turn.calls or turn.role == "tool" for turn in turns):
            raise _LeftOut("turns of tools, which the prompt does not write")
        if not _takes_turns(turns):
            raise _LeftOut("turns that do not alternate between user and assistant")
        if len(turns) == 1:
            turns.append(Message("assistant", ""))
        if turns[-1].role != "assistant":
            end = "a question" if turns[-1].role == "user" else "what a tool has returned"
            what = f"with {end} at the end that has no answer, and is not used"
            self._remarks.add(what, self._where, number)
            last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")
            del turns[last + 1 :]
        if sum(turn.role == "assistant" for turn in turns) > 1 and not self._every_turn:
            what = "with several answers, of which only the last counts"
            self._remarks.add(what, self._where, number)
        *earlier, answer = turns
        last = max(place for place, turn in enumerate(earlier) if turn.role == "user")
        if not earlier[last].content.strip():
            raise _LeftOut("nothing is asked")
        return Row(
            instruction=earlier[last].content,
            output=answer.content,
            history=(*system, *earlier[:last]),
            columns=record,
            number=number,
            where=self._where,
            between=tuple(earlier[last + 1 :]),
            calls=answer.calls,
            tools=self._tools(record, number),
        )

    def _tools(self, record: Record, number: int) -> tuple[Record, ...]:
        """The tools that a row offers; none where the prompt writes none.

        Raises:
            UserError: they are no descriptions of functions.
        """
        column = self._fields.tools
        value = None if column is None else record.get(column)
        if is_empty(value):
            return ()
        if not self._writes_tools:
            what = f"with tools in column {column!r}, which the prompt does not write"
            self._remarks.add(what, self._where, number)
            return ()
        place = f"{self._where}: row {number}: column {column!r}"
        found = self._parsed(value, place)
        if isinstance(found, Mapping):
            found = [found]
        if not isinstance(found, list):
            raise UserError(f"{place} must be a list of tools, not {type(found).__name__}")
        tools = []
        for n, tool in enumerate(found, start=1):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not name.strip():
                raise UserError(
                    f"{place}: tool {n} must have a name and parameters, as "
                    '{"type": "function", "function": {"name": …, "parameters": …}}'
                )
            tools.append({"type": "function", "function": function})
        _check_texts(tools, place)
        return tuple(tools)

    def _parsed(self, value: Any, place: str) -> Any:
        """What describes tools or calls, which may be a text in JSON.

        Tables have all keys of all rows in each; those without a value are none of its own.
        """
        if isinstance(value, str):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                raise UserError(f"{place} is not valid JSON") from None
        return _without_gaps(value) if self._typed else value

    def _turns(
        self,
        value: Any,
        where: str,
        column: str,
        role: Literal["user", "assistant"] | None = None,
    ) -> list[Message]:
        """The messages of a cell; a text is one of `role`.

        Raises:
            _LeftOut: some hold more than text.
            UserError: they are no messages.
        """
        place = f"{where}: column {column!r}"
        if isinstance(value, str) and role is None and value.lstrip().startswith("["):
            try:
                value = json.loads(value)  # as CSV files hold them
            except (ValueError, RecursionError):
                raise UserError(f"{place} is no list of messages in JSON") from None
        if value is None:
            return []
        if not isinstance(value, list):
            if role is None:
                raise UserError(
                    f"{place} must be a list of messages, as "
                    f'[{{"role": "user", "content": …}}, …], not {type(value).__name__}'
                )
            return [Message(role, _text(value, place))]
        return [self._message(each, f"{place}: message {n}") for n, each in enumerate(value, 1)]

    def _message(self, message: Any, at: str) -> Message:
        if not isinstance(message, Mapping):
            raise UserError(f"{at} must have a role and content, not be {type(message).__name__}")
        said = message.get("role") or message.get("from")
        content = message.get("content", message.get("value"))
        name = said.lower() if isinstance(said, str) else ""
        if name in _CALLS:
            return Message("assistant", "", self._called(content, at))
        if name not in _ROLES:
            raise UserError(
                f"{at} has the role {said!r}: give system, user, assistant or tool (or human or "
                "gpt)"
            )
        calls = next((found for key in _CALLS if (found := message.get(key))), None)
        role = _ROLES[name]
        if calls and role != "assistant":
            raise UserError(f"{at} calls tools, which the assistant alone does, not {said!r}")
        told = {
            key: _text(message[key], f"{at}: {key!r}")
            for key in ("name", "tool_call_id")
            if role == "tool" and message.get(key) is not None
        }
        if role == "tool" and isinstance(content, Mapping):
            content = json.dumps(content, ensure_ascii=False)
        return Message(role, _content(content, at), self._called(calls, at) if calls else (), told)

    def _called(self, value: Any, at: str) -> tuple[Record, ...]:
        """Calls of tools, in the form that chat templates take.

        Raises:
            UserError: they are no calls.
        """
        found = self._parsed(value, f"{at}: its calls of tools")
        calls = []
        for call in found if isinstance(found, list) else [found]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
            if isinstance(arguments, str):
                arguments = self._parsed(arguments or "{}", f"{at}: a call's arguments")
            if arguments is None:
                arguments = {}
            if not isinstance(name, str) or not name.strip() or not isinstance(arguments, Mapping):
                raise UserError(
                    f"{at}: a call of a tool must have the tool's name and arguments by name, as "
                    '{"function": {"name": …, "arguments": {…}}}'
                )
            known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
            function = {"name": name, "arguments": dict(arguments)}
            calls.append({**known, "type": "function", "function": function})
        _check_texts(calls, at)
        return tuple(calls)


def _has_messages(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, Mapping) for each in value)


def _takes_turns(turns: Sequence[Message]) -> bool:
    """Whether user and assistant take turns, but for calls of tools and what they return."""
    allowed = {"user"}
    for turn in turns:
        if turn.role not in allowed:
            return False
        if turn.role == "assistant":
            allowed = {"tool"} if turn.calls else {"user"}
        else:
            allowed = {"assistant", "tool"} if turn.role == "tool" else {"assistant"}
    return True


def _without_gaps(value: Any) -> Any:
    """A value without keys of mappings that have none."""
    if isinstance(value, Mapping):
        return {key: _without_gaps(own) for key, own in value.items() if own is not None}
    return [_without_gaps(each) for each in value] if isinstance(value, list) else value


def _check_texts(value: Any, where: str) -> None:
    """Raise a `UserError` for a text in a value, however nested, that is none."""
    for text in texts_in(value):
        check_characters(text, where)


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value as JSON has them, however nested, names of keys as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from texts_in(key)
            yield from texts_in(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from texts_in(own)


def _content(content: Any, where: str) -> str:
    """The text of a message, which may come in parts."""
    if not isinstance(content, list):
        return _text(content, where)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (
            isinstance(part, Mapping) and part.get("type", "text") != "text"
        ):
            raise _LeftOut("messages of more than text")
        texts.append(_text(text, where))
    return "".join(texts)


def _text(value: Any, where: str) -> str:
    """A value as text; nothing is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return json.dumps(value)  # as CSV files have it, rather than Python's True
    if not isinstance(value, str | int | float | decimal.Decimal):
        raise UserError(f"{where} must be text or a number, not {type(value).__name__}")
    if not isinstance(value, str | int) and not math.isfinite(value):
        raise UserError(f"{where} must be text or a finite number, not {value}")
    try:
        text = str(value)
    except ValueError:  # Python writes no integers of thousands of digits
        raise UserError(f"{where} is a number of too many digits: write it as text") from None
    check_characters(text, where)
    return text


def check_distinct(columns: Sequence[str], where: str) -> None:
    """Raise a `UserError` where two columns have one name, of which one would win unsaid."""
    for column, count in Counter(columns).items():
        if count > 1:
            raise UserError(
                f"{where}: {count} columns have one name, {column!r}: give each its own"
            )


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


def _restore_integers(rows: Sequence[Record], gaps: Iterable[str]) -> None:
    """Make integers of columns of whole numbers with gaps, of which libraries have made floats."""
    for column in gaps:
        values = [value for row in rows if (value := row.get(column)) is not None]
        if all(
            isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_EXACT
            for value in values
        ):
            for row in rows:
                if row.get(column) is not None:
                    row[column] = int(row[column])
