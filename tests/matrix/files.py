"""Data files as people have them, and what is right for each: the rows, or a sentence."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, str]]
Write = Callable[[Path], Any]
"""Writes a file of the name that it is given."""


class File(NamedTuple):
    """A file, and what is right."""

    what: str
    name: str
    write: Write
    rows: Rows | None = None
    """The rows that it is read as, all of whose values are text; None where it is refused."""
    refused: str = ""
    """A pattern that is found in the sentence by which it is refused. With `rows`, either is
    right: nothing else is."""
    said: str = ""
    """A pattern that is found in what a run says at its start."""
    overrides: tuple[str, ...] = ()
    alike: str = ""
    """What it holds: files of different formats that hold the same have the same fate."""

    def __str__(self) -> str:
        return self.what


ROWS = [
    {"instruction": "Say a", "input": "", "output": "aaa"},
    {"instruction": "Say é, then ß", "input": "", "output": "é, “ß”"},
    {"instruction": "Name a pet.", "input": "that lives,\nin a house", "output": "A cat."},
]
FIRST, SECOND, LAST = ROWS
ONE_LEFT_OUT = r"\b(1|one)\b.{0,40}\brows?\b|\brows?\b.{0,60}\b(1|one)\b"
NUMBERS = [
    {"instruction": f"Say {n}", "input": i, "output": n} for n, i in (("1", "42"), ("2", ""))
]
NO_INPUT = [{key: row[key] for key in ("instruction", "output")} for row in ROWS]
QUESTION = ("data.fields.instruction=question", "data.fields.input=null")
CLIENT_OF = ("data.partition.kind=column", "data.partition.column=site")


# --- writers ------------------------------------------------------------------------------------


def text(content: str, encoding: str = "utf-8") -> Write:
    return lambda path: path.write_bytes(content.encode(encoding, "surrogatepass"))


def array(rows: Sequence[Any], **options: Any) -> Write:
    return text(json.dumps(rows, **options))


def lines(rows: Sequence[Any], end: str = "\n") -> Write:
    return text("".join(json.dumps(row) + end for row in rows))


def cells(rows: Sequence[Mapping[str, Any]], mark: str = ",", end: str = "\n") -> str:
    """A table with a header; every text is quoted."""
    quoted = [[f'"{name}"' for name in rows[0]]]
    quoted += [[f'"{value}"' if value is not None else "" for value in r.values()] for r in rows]
    return "".join(mark.join(row) + end for row in quoted)


def parquet(rows: Sequence[Mapping[str, Any]], **types: pa.DataType) -> Write:
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.array([r[name] for r in rows], kind))
    return lambda path: pq.write_table(table, path)


def columns(names: Sequence[str], *values: Sequence[Any]) -> Write:
    """A Parquet file whose columns may have one name."""
    return lambda path: pq.write_table(
        pa.Table.from_arrays([pa.array(v) for v in values], names), path
    )


def zipped(write: Write) -> Write:
    def write_zipped(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


def cut(write: Write, share: float) -> Write:
    def write_cut(path: Path) -> None:
        write(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

    return write_cut


def with_(row: Mapping[str, Any], /, **changes: Any) -> dict[str, Any]:
    return {**row, **changes}


def without(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def talks(role: str, content: str, user: str, assistant: str) -> list[list[dict[str, str]]]:
    """Conversations of a question and an answer, by their names for things."""
    return [
        [{role: user, content: row["instruction"]}, {role: assistant, content: row["output"]}]
        for row in ROWS
    ]


def three(second: Any) -> list[Any]:
    """The rows, with another in place of the second."""
    return [FIRST, second, LAST]


_NAN = float("nan")
_EMPTY = with_(SECOND, output=None)
_NOTHING = {"instruction": None, "input": None, "output": None}
_TALK = talks("role", "content", "user", "assistant")
_SHARE_GPT = talks("from", "value", "human", "gpt")
_NESTED = [{"qa": {"q": r["instruction"], "a": r["output"]}} for r in ROWS]
_NESTED_FIELDS = ("data.fields.instruction=qa.q", "data.fields.output=qa.a")
_BOOLEAN = [with_(FIRST, output="true"), with_(FIRST, output="false")]
_LINE_MARKS = [with_(FIRST, output="a\u2028b\u2029c\x0bd\x85e"), LAST]

# --- what people have ---------------------------------------------------------------------------

FILES = [
    # The same rows in every format
    File("JSON array", "a.json", array(ROWS), ROWS),
    File("JSON array, indented", "a.json", array(ROWS, indent=2), ROWS),
    File("JSON array, byte order mark", "a.json", text("\ufeff" + json.dumps(ROWS)), ROWS),
    File("JSON array called .jsonl", "a.jsonl", array(ROWS), ROWS),
    File("JSON lines", "a.jsonl", lines(ROWS), ROWS),
    File("JSON lines called .json", "a.json", lines(ROWS), ROWS),
    File("JSON lines, CRLF and blank lines", "a.jsonl", lines(ROWS, "\r\n \r\n"), ROWS),
    File(
        "JSON lines without a last line end",
        "a.jsonl",
        text("\n".join(map(json.dumps, ROWS))),
        ROWS,
    ),
    File("ndjson", "a.ndjson", lines(ROWS), ROWS),
    File("upper-case suffix", "A.JSONL", lines(ROWS), ROWS),
    File("two dots in the name", "a.v2.json", array(ROWS), ROWS),
    File("JSON lines, gz", "a.jsonl.gz", zipped(lines(ROWS)), ROWS),
    File("JSON array, gz", "a.json.gz", zipped(array(ROWS)), ROWS),
    File("CSV", "a.csv", text(cells(ROWS)), ROWS),
    File("CSV, byte order mark and CRLF", "a.csv", text("\ufeff" + cells(ROWS, end="\r\n")), ROWS),
    File("CSV, gz", "a.csv.gz", zipped(text(cells(ROWS))), ROWS),
    File("CSV, blank lines", "a.csv", text(cells(ROWS, end="\n\n")), ROWS),
    File(
        "CSV, a nameless column of numbers",
        "a.csv",
        text(cells([{"": n, **row} for n, row in enumerate(ROWS)])),
        ROWS,
    ),
    File("TSV", "a.tsv", text(cells(ROWS, "\t")), ROWS),
    File("TSV, gz", "a.tsv.gz", zipped(text(cells(ROWS, "\t"))), ROWS),
    File("Parquet", "a.parquet", parquet(ROWS), ROWS),
    File(
        "Parquet, categories",
        "a.parquet",
        parquet(ROWS, output=pa.dictionary(pa.int8(), pa.string())),
        ROWS,
    ),
    File("Parquet, large strings", "a.parquet", parquet(ROWS, output=pa.large_string()), ROWS),
    File(
        "Parquet, views of strings",
        "a.parquet",
        parquet(ROWS, output=pa.string_view()),
        ROWS,
        "output",
    ),
    File(
        "Parquet, bytes",
        "a.parquet",
        parquet([with_(r, output=r["output"].encode()) for r in ROWS]),
        ROWS,
        "output.* (text|bytes)",
    ),
    File(
        "Parquet, row groups",
        "a.parquet",
        lambda p: pq.write_table(
            pa.Table.from_pylist(ROWS), p, row_group_size=1, compression="zstd"
        ),
        ROWS,
    ),
    File("save_to_disk", "a", lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(p), ROWS),
    File(
        "save_to_disk, splits",
        "a",
        lambda p: datasets.DatasetDict(
            train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)
        ).save_to_disk(p),
        ROWS,
    ),
    File(
        "Arrow",
        "a.arrow",
        lambda p: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), p),
        ROWS,
        "arrow",
    ),
    File(
        "JSON object of columns",
        "a.json",
        text(json.dumps({k: [r[k] for r in ROWS] for k in FIRST})),
        ROWS,
        "column|list|object",
    ),
    File(
        "JSON object around the rows",
        "a.json",
        text(json.dumps({"version": "1.0", "data": ROWS})),
        ROWS,
        "instruction|array|object",
    ),
    # Other columns
    File("no input column", "a.jsonl", lines(NO_INPUT), [*ROWS[:2], with_(LAST, input="")]),
    File(
        "named fields",
        "a.csv",
        text(cells([{"question": r["instruction"], "answer": r["output"]} for r in ROWS])),
        NO_INPUT,
        overrides=(*QUESTION, "data.fields.output=answer"),
    ),
    File(
        "prompt and completion",
        "a.jsonl",
        lines([{"prompt": r["instruction"], "completion": r["output"]} for r in ROWS]),
        NO_INPUT,
    ),
    File("messages", "a.jsonl", lines([{"messages": talk} for talk in _TALK]), NO_INPUT),
    File(
        "messages, Parquet", "a.parquet", parquet([{"messages": talk} for talk in _TALK]), NO_INPUT
    ),
    File("ShareGPT", "a.json", array([{"conversations": talk} for talk in _SHARE_GPT]), NO_INPUT),
    File("nested fields", "a.jsonl", lines(_NESTED), NO_INPUT, overrides=_NESTED_FIELDS),
    File(
        "nested fields, Parquet", "a.parquet", parquet(_NESTED), NO_INPUT, overrides=_NESTED_FIELDS
    ),
    File(
        "a dot in a column's name",
        "a.csv",
        text(cells([{"qa.q": r["instruction"], "qa.a": r["output"]} for r in ROWS])),
        NO_INPUT,
        overrides=_NESTED_FIELDS,
    ),
    File(
        "context that nobody named",
        "a.jsonl",
        lines([with_(r, context="Paris") for r in NO_INPUT]),
        NO_INPUT,
        said="context",
    ),
    File(
        "fields that are not there",
        "a.csv",
        text(cells([{"question": "a", "answer": "b"}])),
        refused=r"'instruction'.*'answer', 'question'",
    ),
    File(
        "header in upper case",
        "a.csv",
        text("Instruction,Output\na,b\n"),
        refused=r"'instruction'.*'Instruction'",
    ),
    # Values
    File(
        "numbers, JSON",
        "a.jsonl",
        lines([with_(NUMBERS[0], input=42, output=1), with_(NUMBERS[1], input=None, output=2)]),
        NUMBERS,
    ),
    File(
        "numbers, CSV", "a.csv", text("instruction,input,output\nSay 1,42,1\nSay 2,,2\n"), NUMBERS
    ),
    File(
        "numbers, Parquet integers",
        "a.parquet",
        parquet([with_(NUMBERS[0], input=42, output=1), with_(NUMBERS[1], input=None, output=2)]),
        NUMBERS,
    ),
    File(
        "numbers, integers with nulls by pandas",
        "a.parquet",
        parquet([with_(NUMBERS[0], input=42.0, output=1), with_(NUMBERS[1], input=_NAN, output=2)]),
        NUMBERS,
    ),
    File(
        "booleans, JSON",
        "a.jsonl",
        lines([with_(FIRST, output=True), with_(FIRST, output=False)]),
        _BOOLEAN,
    ),
    File("booleans, CSV", "a.csv", text("instruction,output\nSay a,true\nSay a,false\n"), _BOOLEAN),
    File(
        "booleans, Parquet",
        "a.parquet",
        parquet([with_(FIRST, output=True), with_(FIRST, output=False)]),
        _BOOLEAN,
    ),
    File(
        "a list",
        "a.jsonl",
        lines(three(with_(SECOND, output=["a", "b"]))),
        refused="(row|line|item) 2.*'output'.*list",
    ),
    File(
        "a list, Parquet",
        "a.parquet",
        parquet([with_(FIRST, output=["a"])]),
        refused="row 1.*'output'.*list",
    ),
    File(
        "a dictionary",
        "a.jsonl",
        lines(three(with_(SECOND, input={"a": 1}))),
        refused="2.*'input'",
    ),
    File(
        "a date, Parquet",
        "a.parquet",
        parquet([with_(FIRST, output=datetime.datetime(2024, 5, 17))]),
        refused="row 1.*'output'.*(date|time)",
    ),
    File(
        "a decimal, Parquet",
        "a.parquet",
        parquet([with_(FIRST, output=decimal.Decimal("1.50"))]),
        [with_(FIRST, output="1.50")],
        "row 1.*'output'",
    ),
    File(
        "line marks of Unicode, JSON lines",
        "a.jsonl",
        text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in _LINE_MARKS)),
        _LINE_MARKS,
    ),
    File("line marks of Unicode, CSV", "a.csv", text(cells(_LINE_MARKS)), _LINE_MARKS),
    File("line marks of Unicode, Parquet", "a.parquet", parquet(_LINE_MARKS), _LINE_MARKS),
    File(
        "a null character, JSON",
        "a.jsonl",
        lines([with_(FIRST, output="a\0b")]),
        [with_(FIRST, output="a\0b")],
        "line 1|row 1",
        alike="null character",
    ),
    File(
        "a null character, CSV",
        "a.csv",
        text(cells([with_(FIRST, output="a\0b")])),
        [with_(FIRST, output="a\0b")],
        "line 2|row 1",
        alike="null character",
    ),
    File(
        "a long cell, CSV",
        "a.csv",
        text(cells([with_(FIRST, output="word " * 40_000)])),
        [with_(FIRST, output="word " * 40_000)],
    ),
    File(
        "half a surrogate pair, output",
        "a.jsonl",
        lines(three(with_(SECOND, output="ok \ud83d"))),
        refused="(row|line|item) 2.*'output'",
    ),
    File(
        "half a surrogate pair, instruction",
        "a.json",
        array(three(with_(SECOND, instruction="smile \ud83d"))),
        refused="(row|line|item) 2.*'instruction'",
    ),
    File(
        "half a surrogate pair, input",
        "a.jsonl",
        lines(three(with_(SECOND, input="\udc00"))),
        refused="(row|line|item) 2.*'input'",
    ),
    File(
        "half a surrogate pair, messages",
        "a.jsonl",
        lines(
            [
                {
                    "messages": [
                        {"role": "user", "content": "hi \ud83d"},
                        {"role": "assistant", "content": "a"},
                    ]
                }
            ]
        ),
        refused="(row|line|item) 1",
    ),
    # Answers that are not there: left out, or refused, but alike
    File(
        "no answer: JSON null",
        "a.jsonl",
        lines(three(_EMPTY)),
        [FIRST, LAST],
        "2.*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: JSON NaN",
        "a.json",
        array(three(with_(SECOND, output=_NAN))),
        [FIRST, LAST],
        "2.*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: JSON empty text",
        "a.jsonl",
        lines(three(with_(SECOND, output=""))),
        [FIRST, LAST],
        "2.*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: no such key",
        "a.jsonl",
        lines(three(without(SECOND, "output"))),
        [FIRST, LAST],
        "2.*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: CSV",
        "a.csv",
        text(cells(three(_EMPTY))),
        [FIRST, LAST],
        "(row 2|line 3).*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: TSV",
        "a.tsv",
        text(cells(three(_EMPTY), "\t")),
        [FIRST, LAST],
        "(row 2|line 3).*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: Parquet null",
        "a.parquet",
        parquet(three(_EMPTY)),
        [FIRST, LAST],
        "2.*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    File(
        "no answer: Parquet NaN",
        "a.parquet",
        parquet(
            [{"instruction": "Say 1", "output": 1.0}, {"instruction": "Say 2", "output": _NAN}]
        ),
        [{"instruction": "Say 1", "output": "1"}],
        "2.*output",
        said=ONE_LEFT_OUT,
        alike="no answer",
    ),
    # Rows that are empty
    File(
        "an empty row, CSV",
        "a.csv",
        text(cells(three(_NOTHING))),
        [FIRST, LAST],
        said=ONE_LEFT_OUT,
        alike="empty row",
    ),
    File(
        "an empty row, JSON nulls",
        "a.jsonl",
        lines(three(_NOTHING)),
        [FIRST, LAST],
        said=ONE_LEFT_OUT,
        alike="empty row",
    ),
    File(
        "an empty row, JSON {}",
        "a.jsonl",
        lines(three({})),
        [FIRST, LAST],
        said=ONE_LEFT_OUT,
        alike="empty row",
    ),
    File(
        "an empty row, Parquet",
        "a.parquet",
        parquet(three(_NOTHING)),
        [FIRST, LAST],
        said=ONE_LEFT_OUT,
        alike="empty row",
    ),
    # Damaged, or something else
    File("nothing", "a.json", text(""), refused="no rows"),
    File("white space", "a.jsonl", text(" \n\n"), refused="no rows"),
    File("an empty array", "a.json", text("[]"), refused="no rows"),
    File("a header alone", "a.csv", text("instruction,output\n"), refused="no rows"),
    File(
        "Parquet without rows",
        "a.parquet",
        columns(["instruction", "output"], pa.array([], "string"), pa.array([], "string")),
        refused="no rows",
    ),
    File(
        "rows that are all empty",
        "a.csv",
        text("instruction,output\n,\n,\n"),
        refused="no rows?\\b|no examples|empty",
    ),
    File("an array of texts", "a.json", text('["a", "b"]'), refused="(item|row) 1.*object"),
    File(
        "a comma after the last row",
        "a.json",
        text(json.dumps(ROWS)[:-1] + ",]"),
        refused="line 1.*not valid JSON",
    ),
    File(
        "a comma after the last key",
        "a.jsonl",
        text('{"instruction": "a", "output": "b",}\n'),
        refused="line 1.*not valid JSON",
    ),
    File(
        "comments", "a.json", text("// mine\n" + json.dumps(ROWS)), refused="line 1.*not valid JSON"
    ),
    File(
        "a line that is cut",
        "a.jsonl",
        text("\n".join(map(json.dumps, ROWS))[:-5]),
        refused="line 3.*not valid JSON",
    ),
    File(
        "a quote that is not closed",
        "a.csv",
        text('instruction,output\na,"b\n'),
        refused="line.*CSV",
    ),
    File(
        "a row of too many cells",
        "a.csv",
        text("instruction,output\na,b\na,b,c\n"),
        refused="line 3 has 3 cells",
    ),
    File(
        "semicolons",
        "a.csv",
        text("instruction;output\na;b\n"),
        [{"instruction": "a", "output": "b"}],
        "instruction;output",
    ),
    File(
        "a column twice, CSV",
        "a.csv",
        text("instruction,output,output\na,b,c\n"),
        refused="output|one name|twice",
    ),
    File(
        "a column twice, Parquet",
        "a.parquet",
        columns(["instruction", "output", "output"], ["a"], ["b"], ["c"]),
        refused="output|one name|twice",
    ),
    File(
        "a key twice, JSON",
        "a.jsonl",
        text('{"instruction": "a", "output": "b", "output": "c"}\n'),
        refused="line 1.*(output|one name|twice)",
    ),
    File("Latin-1", "a.csv", text("instruction,output\né,b\n", "latin-1"), refused="UTF-8"),
    File("UTF-16", "a.json", text(json.dumps(ROWS), "utf-16"), ROWS, "UTF-8"),
    File("gz that is cut", "a.jsonl.gz", cut(zipped(lines(ROWS)), 0.6), refused="a.jsonl.gz"),
    File("gz that is none", "a.jsonl.gz", lines(ROWS), refused="a.jsonl.gz"),
    File(
        "Parquet that is cut", "a.parquet", cut(parquet(ROWS), 0.6), refused="not a valid Parquet"
    ),
    File("Parquet that is CSV", "a.parquet", text(cells(ROWS)), refused="not a valid Parquet"),
    File("a zip archive", "a.zip", text("PK"), refused="zip"),
    File("a spreadsheet", "a.xlsx", text("PK"), refused="xlsx"),
    File("a text", "a.txt", text("a"), refused="txt"),
    # Clients by a column
    File(
        "a client for each value",
        "a.csv",
        text("site,instruction,output\nnorth,a,b\nsouth,c,d\n"),
        [
            {"site": "north", "instruction": "a", "output": "b"},
            {"site": "south", "instruction": "c", "output": "d"},
        ],
        overrides=CLIENT_OF,
    ),
    File(
        "no value to divide by, JSON",
        "a.jsonl",
        lines(
            [
                {"site": "north", "instruction": "a", "output": "b"},
                {"site": None, "instruction": "c", "output": "d"},
            ]
        ),
        refused="2.*'site'",
        overrides=CLIENT_OF,
        alike="no site",
    ),
    File(
        "no value to divide by, CSV",
        "a.csv",
        text("site,instruction,output\nnorth,a,b\n,c,d\n"),
        refused="(row 2|line 3).*'site'",
        overrides=CLIENT_OF,
        alike="no site",
    ),
    File(
        "no value to divide by, Parquet NaN",
        "a.parquet",
        parquet(
            [
                {"site": 1.0, "instruction": "a", "output": "b"},
                {"site": _NAN, "instruction": "c", "output": "d"},
            ]
        ),
        refused="2.*'site'",
        overrides=CLIENT_OF,
        alike="no site",
    ),
]
