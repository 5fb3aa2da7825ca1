"""Where rows come from: files, one per client or one for all, datasets as on the Hub, the demo."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hedgerow.bundled import tasks
from hedgerow.data.rows import Record, Records
from hedgerow.errors import UserError
from hedgerow.names import DEMO, MEMORY, NAME
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from datasets import Dataset

    from hedgerow.settings import ClientFile

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def may_be_on_hub(source: str) -> bool:
    """Whether `source`, where no such file exists, reads as the name of a model or dataset."""
    return not source.endswith(SUFFIXES) and _HUB_NAME.fullmatch(source) is not None


def read(source: str, split: str, subset: str | None = None, share: float = 1.0) -> Records:
    """The rows of a file, of one split of a dataset as on the Hugging Face Hub, or of the demo.

    Args:
        source: a JSON (array of objects), JSONL, CSV (with a header) or Parquet file; a folder that
            holds a dataset as the Hub has it, or the name of one there; or `demo`.
        split: which split of a dataset; files have none.
        subset: which subset (configuration) of a dataset; files have none.
        share: of the rows, drawn at random but always the same, in their order; at least one.

    Raises:
        UserError: the source is missing, unreadable, empty, or holds something else than rows.
    """
    path, numbers = Path(source), None
    if source == MEMORY:
        raise UserError(
            "the run's data were in the memory of the program that began it: hand them over there "
            "again, or name files in data.clients, data.source or data.test"
        )
    if source == DEMO:
        rows = _read_demo(split)
    elif path.is_dir() or (not path.exists() and may_be_on_hub(source)):
        dataset = _load_dataset(source, split, subset)
        # Before they become Python's objects, which take several times as much memory.
        if share < 1:
            drawn = _drawn(len(dataset), share)
            numbers, share = [index + 1 for index in drawn], 1.0
            dataset = dataset.select(drawn)
        rows = dataset.to_list()
    else:
        rows = _read_file(path)
    return share_of(Records.of(rows, source, numbers), share)


def share_of(records: Records, share: float) -> Records:
    """Share of the rows, above 0 and at most 1: drawn at random, always the same, in their order.

    At least one is left, where there are any.
    """
    return records if share == 1 else records.select(_drawn(len(records), share))


def _drawn(count: int, share: float) -> list[int]:
    """Indices of a share of `count` rows, in their order."""
    most = min(count, max(1, round(share * count)))
    chosen: list[int] = Seeds(0).numpy("share").choice(count, most, replace=False).tolist()
    return sorted(chosen)


def client_files(clients: str | dict[str, str] | list[ClientFile | str]) -> dict[str, Path]:
    """The file of each client, by the client's name.

    Args:
        clients: a pattern such as `train_{}.json` ({} = 0, 1, 2 … become `client-000`,
            `client-001`, `client-002` …); a mapping name: file; or a list of files (named by their
            stems) and of `{name, file}`.

    Raises:
        UserError: a file is missing, or a name is taken twice or cannot be a name.
    """
    if isinstance(clients, str):
        return _numbered_files(clients)
    if isinstance(clients, dict):
        named = list(clients.items())
    else:
        named = [(Path(c).stem, c) if isinstance(c, str) else (c.name, c.file) for c in clients]
    if not named:
        raise UserError("`data.clients` names no client: give at least one file")
    files: dict[str, Path] = {}
    for name, file in named:
        if not NAME.fullmatch(name):
            raise UserError(
                f"`data.clients`: {name!r} cannot be a client's name (letters, digits, `.`, `_` "
                f"and `-`, a letter or digit first): write {{name: …, file: {file}}}"
            )
        if name in files:
            raise UserError(
                f"`data.clients`: two clients are called {name!r} ({files[name]} and {file}): "
                "give each a name of its own, as in {name: …, file: …}"
            )
        files[name] = Path(file)
        if file != MEMORY and not files[name].is_file():
            raise UserError(f"`data.clients`: {file}, the file of client {name!r}, does not exist")
    return files


def _numbered_files(pattern: str) -> dict[str, Path]:
    if "{}" not in pattern:
        raise UserError(
            f"`data.clients`: {pattern} has no {{}}: write it where the files' numbers 0, 1, 2 … "
            "stand, or list the files"
        )

    def path(number: int) -> Path:
        return Path(pattern.replace("{}", str(number)))

    count = next(number for number in itertools.count() if not path(number).is_file())
    if count == 0:
        raise UserError(f"`data.clients`: {path(0)} does not exist: files are numbered from 0")
    # A gap would silently leave out every client after it.
    if path(count + 1).is_file():
        raise UserError(
            f"`data.clients`: {path(count)} does not exist, but {path(count + 1)} does: number the "
            "files without a gap, or list them"
        )
    return {f"client-{number:03d}": path(number) for number in range(count)}


def _read_file(path: Path) -> list[Record]:
    if not path.exists():
        raise UserError(f"{path}: does not exist: give a file ({', '.join(SUFFIXES)})")
    try:
        match path.suffix.lower():
            case ".json" | ".jsonl":
                with path.open(encoding="utf-8-sig") as file:
                    return _read_json(file, path)
            case ".csv":
                with path.open(encoding="utf-8-sig", newline="") as file:
                    return _read_csv(file, path)
            case ".parquet":
                return _read_parquet(path)
            case suffix:
                raise UserError(
                    f"{path}: files ending in {suffix!r} are not known: give {', '.join(SUFFIXES)}"
                )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or 'input error'})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8: convert it first") from None


def _read_json(file: TextIO, path: Path) -> list[Record]:
    """An array of objects, or one object a line: the content tells, since suffixes often lie."""
    first = next((line.lstrip() for line in file if not line.isspace()), "")
    file.seek(0)
    if first.startswith("["):
        values = _parse(file.read(), path, 1)
        rows = [(f"item {number}", value) for number, value in enumerate(values, start=1)]
    else:
        rows = [
            (f"line {number}", _parse(line.rstrip(), path, number))
            for number, line in enumerate(file, start=1)
            if not line.isspace()
        ]
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f'{path}: {place} is not an object: each row must be one, as {{"instruction": …}}'
            )
    return [row for _, row in rows]


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        # pandas and json.dump write missing values as NaN, which would become the text "nan".
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {line + error.lineno - 1} is not valid JSON ({error.msg}): give an "
            "array of objects, or one object a line"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, endless nesting
        raise UserError(f"{path}: line {line} cannot be read: {error}") from None


def _read_csv(file: TextIO, path: Path) -> list[Record]:
    csv.field_size_limit(2**31 - 1)  # The default refuses texts above 128 KiB.
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}: two columns have one name: give each column its own")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells where the header has "
                    f"{len(header)}: quote texts that hold commas"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not valid CSV ({error})") from None
    return rows


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table, which adds columns that it guesses from the folders' names.
        with pyarrow.parquet.ParquetFile(path) as file:
            rows: list[Record] = file.read().to_pylist()
    except pyarrow.ArrowException:
        raise UserError(f"{path}: is not a valid Parquet file") from None
    return rows


def _read_demo(split: str) -> list[Record]:
    if split == "train":
        return [dict(row) for rows in tasks.clients().values() for row in rows]
    if split == "test":
        return [dict(row) for row in tasks.test_rows()]
    raise UserError(f"{DEMO}: has no split {split!r}: give train or test")


def _load_dataset(name: str, split: str, subset: str | None) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{name}: is neither a file nor a dataset that you can read on the Hugging Face Hub: "
            "check the name"
        ) from None
    except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError):
        raise UserError(
            f"{name}: holds no data file that is known: give one ({', '.join(SUFFIXES)})"
        ) from None
    except OSError:
        raise UserError(
            f"{name}: is no file, and the Hugging Face Hub cannot be reached for a dataset of that "
            "name: give a file, or connect to the network"
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        part = f"the split {split!r}" + (f" of the subset {subset!r}" if subset else "")
        raise UserError(
            f"{name}: {part} cannot be loaded ({reason}): see `data.split` and `data.subset`, or "
            "`data.test_split` and `data.test_subset`"
        ) from None
