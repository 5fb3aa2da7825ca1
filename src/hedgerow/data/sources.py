"""Where rows come from: files, one per client or one for all, datasets as on the Hub, the demo."""

from __future__ import annotations

import bz2
import contextlib
import csv
import errno
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from hedgerow.bundled import tasks
from hedgerow.data.rows import Record, Records, check_distinct
from hedgerow.errors import UserError, did_you_mean
from hedgerow.names import DEMO, MEMORY, NAME
from hedgerow.seeds import Seeds

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from hedgerow.settings import ClientFile

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst")
_BATCH = 1024
"""Rows of a Parquet file that are read at once."""
Classes = Mapping[str, Sequence[str]]
"""The names that the integers of a column stand for, by column."""
_LARGEST, _TIMES = 2**28, 100
"""Bytes that a file may hold unpacked: so many at least, or its size as often."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def may_be_on_hub(source: str) -> bool:
    """Whether `source`, where no such file exists, reads as the name of a model or dataset."""
    return not source.endswith(SUFFIXES + PACKED) and _HUB_NAME.fullmatch(source) is not None


def read(
    source: str,
    split: str,
    subset: str | None = None,
    share: float = 1.0,
    first: int | None = None,
) -> Records:
    """The rows of a file, of one split of a dataset as on the Hugging Face Hub, or of the demo.

    What a file holds packed may be 256 MiB, or 100 times its size where that is more.

    Args:
        source: a JSON (array of objects), JSONL, CSV or TSV (with a header) or Parquet file, the
            text ones maybe packed; a folder that holds a dataset as the Hub or
            `Dataset.save_to_disk` has it, or the name of one there; or `demo`.
        split: which split of a dataset; files have none.
        subset: which subset (configuration) of a dataset; files have none.
        share: of the rows, drawn at random but always the same, in their order; at least one.
        first: number of rows from the beginning that are read, and of which `share` is drawn; a
            dataset is streamed then, so that no more of it is loaded. With None, all.

    Raises:
        UserError: the source is missing, unreadable, empty, or holds something else than rows.
    """
    path, numbers, typed = Path(source), None, False
    classes: Classes = {}
    if source == MEMORY:
        raise UserError(
            "the run's data were in the memory of the program that began it: hand them over there "
            "again, or name files in data.clients, data.source or data.test"
        )
    if source == DEMO:
        rows = _read_demo(split)[:first]
    elif path.is_dir() if _exists(path) else may_be_on_hub(source):
        typed = True
        if first is None:
            with _explained(source, split, subset):
                dataset = _load_dataset(source, split, subset)
            # Before they become Python's objects, which take several times as much memory.
            if share < 1:
                drawn = _drawn(len(dataset), share)
                numbers, share = [index + 1 for index in drawn], 1.0
                dataset = dataset.select(drawn)
            rows, classes = dataset.to_list(), classes_of(dataset.features)
        else:
            # Rows come over the network as they are asked for.
            with _explained(source, split, subset):
                stream = _load_dataset(source, split, subset, streamed=True)
                rows = list(itertools.islice(stream, first))
                classes = classes_of(stream.features or {})
    else:
        rows, classes = _read_file(path, first)
        typed = _kind(path.name)[0] == ".parquet"
    return share_of(Records.of(rows, source, numbers, classes, typed=typed), share)


def share_of(records: Records, share: float, first: int | None = None) -> Records:
    """Share of the rows, above 0 and at most 1: drawn at random, always the same, in their order.

    At least one is left, where there are any. It is drawn of so many `first` ones, or of all.
    """
    if first is not None and first < len(records):
        records = records.select(range(first))
    return records if share == 1 else records.select(_drawn(len(records), share))


def _drawn(count: int, share: float) -> list[int]:
    """Indices of a share of `count` rows, in their order."""
    most = min(count, max(1, round(share * count)))
    chosen: list[int] = Seeds(0).numpy("share").choice(count, most, replace=False).tolist()
    return sorted(chosen)


def client_files(
    clients: str | dict[str, str | list[str]] | list[ClientFile | str],
) -> dict[str, list[Path]]:
    """The files of each client, by the client's name.

    Args:
        clients: a pattern such as `train_{}.json` ({} = 0, 1, 2 … become `client-000`,
            `client-001`, `client-002` …); a mapping from names to a file or several; or a list of
            files (named by their stems) and of `{name, file}`.

    Raises:
        UserError: a file is missing or stands twice, or a name is taken twice or cannot be a name.
    """
    if isinstance(clients, str):
        return _numbered_files(clients)
    if isinstance(clients, dict):
        named = [(name, as_list(file)) for name, file in clients.items()]
    else:
        named = [
            (Path(c).stem, [c]) if isinstance(c, str) else (c.name, as_list(c.file))
            for c in clients
        ]
    if not named:
        raise UserError("`data.clients` names no client: give at least one file")
    files: dict[str, list[Path]] = {}
    for name, own in named:
        if not NAME.fullmatch(name):
            raise UserError(
                f"`data.clients`: {name!r} cannot be a client's name (letters, digits, `.`, `_` "
                f"and `-`, a letter or digit first): write {{name: …, file: {own[0]}}}"
            )
        if name in files:
            raise UserError(
                f"`data.clients`: two clients are called {name!r} ({files[name][0]} and {own[0]}): "
                "give each a name of its own, as in {name: …, file: …}"
            )
        files[name] = _own_files(name, own, "data.clients")
        for file in files[name]:
            if str(file) != MEMORY and not _exists(file):
                whose = "the" if len(own) == 1 else "a"
                raise UserError(
                    f"`data.clients`: {file}, {whose} file of client {name!r}, does not exist"
                )
    return files


def as_list(files: str | list[str]) -> list[str]:
    """Files of which one may stand alone."""
    return [files] if isinstance(files, str) else files


def _own_files(name: str, own: Sequence[str], key: str) -> list[Path]:
    """The files of one client, which differ."""
    for file, count in Counter(own).items():
        if count > 1:
            raise UserError(f"`{key}`: {file} stands twice for {name!r}: name each file once")
    return list(map(Path, own))


def client_test_files(
    tests: str | dict[str, str | list[str]] | list[ClientFile], names: Sequence[str]
) -> dict[str, list[Path]]:
    """The files of each client's own test rows, by the client's name; they need not be there.

    Args:
        tests: as `data.client_test` has files: a pattern, whose numbers are the clients' places; a
            mapping of names to a file or several; or a list of `{name, file}`.
        names: the clients, in their order.

    Raises:
        UserError: the pattern has no place for a number, or a name is none of a client's.
    """
    if isinstance(tests, str):
        _check_pattern(tests, "data.client_test")
        return {name: [_numbered(tests, number)] for number, name in enumerate(names)}
    named = list(tests.items()) if isinstance(tests, dict) else [(t.name, t.file) for t in tests]
    files: dict[str, list[Path]] = {}
    for name, file in named:
        if name not in names:
            raise UserError(
                f"`data.client_test`: there is no client {name!r}{did_you_mean(name, names)}: name "
                "clients as data.clients or data.partition does"
            )
        if name in files:
            raise UserError(f"`data.client_test`: {name!r} stands twice: give it one list of files")
        files[name] = _own_files(name, as_list(file), "data.client_test")
    return files


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder; no, where its name is too long, say."""
    try:
        return path.exists()
    except OSError:
        return False


def _numbered_files(pattern: str) -> dict[str, list[Path]]:
    _check_pattern(pattern, "data.clients")

    def path(number: int) -> Path:
        return _numbered(pattern, number)

    count = next(number for number in itertools.count() if not _exists(path(number)))
    if count == 0:
        raise UserError(f"`data.clients`: {path(0)} does not exist: files are numbered from 0")
    # A gap would silently leave out every client after it.
    if _exists(path(count + 1)):
        raise UserError(
            f"`data.clients`: {path(count)} does not exist, but {path(count + 1)} does: number the "
            "files without a gap, or list them"
        )
    return {f"client-{number:03d}": [path(number)] for number in range(count)}


def _check_pattern(pattern: str, key: str) -> None:
    """Raise a `UserError` where a pattern that stands under `key` has no place for a number."""
    if "{}" not in pattern:
        raise UserError(
            f"`{key}`: {pattern} has no {{}}: write it where the files' numbers 0, 1, 2 … stand, "
            "or list the files"
        )


def _numbered(pattern: str, number: int) -> Path:
    return Path(pattern.replace("{}", str(number)))


def _read_file(path: Path, first: int | None) -> tuple[list[Record], Classes]:
    """The rows of a file, maybe so many first ones alone, and the names of its columns' classes.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    kind, packed = _kind(path.name)
    try:
        if not path.exists():
            raise UserError(f"{path}: does not exist: give a file ({', '.join(SUFFIXES)})")
        if not path.is_file():
            raise UserError(f"{path}: is no file: give one ({', '.join(SUFFIXES)})")
        if kind not in SUFFIXES or (packed and kind == ".parquet"):
            hint = ": save the sheet as CSV" if kind in (".xls", ".xlsx", ".ods") else ""
            raise UserError(
                f"{path}: files ending in {path.suffix!r} are not known{hint}: give "
                f"{', '.join(SUFFIXES)}, or one of the text files packed "
                f"({', '.join(PACKED)})"
            )
        if kind == ".parquet":
            return _read_parquet(path, first)
        with _opened(path, packed) as file:
            if kind in (".csv", ".tsv"):
                return _read_csv(file, path, "," if kind == ".csv" else "\t", first), {}
            return _read_json(file, path, first), {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8: convert it first") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "input error"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _kind(name: str) -> tuple[str, str]:
    """The suffix that tells a file's kind, and the one that tells how it is packed, if it is."""
    path = Path(name.lower())
    packed = path.suffix if path.suffix in PACKED else ""
    return Path(path.stem if packed else path).suffix, packed


@contextlib.contextmanager
def _opened(path: Path, packed: str) -> Iterator[TextIO]:
    """A text file, unpacked as it is read.

    Raises:
        UserError: while it is read: it is larger, unpacked, than it may be.
    """
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if packed == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif packed == ".bz2":
            file = stack.enter_context(bz2.BZ2File(file))
        elif packed == ".xz":
            file = stack.enter_context(lzma.LZMAFile(file))
        elif packed == ".zst":
            import pyarrow

            file = stack.enter_context(pyarrow.CompressedInputStream(file, "zstd"))
        if packed:
            file = io.BufferedReader(_Bounded(file, path))
        # As they stand: newlines within the cells of CSV files are text, and JSON minds none.
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


class _Bounded(io.RawIOBase):
    """What a packed file holds, as long as that is not out of all proportion to its size."""

    def __init__(self, unpacked: BinaryIO, path: Path) -> None:
        super().__init__()
        self._unpacked, self._path = unpacked, path
        self._left = _most_unpacked(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._unpacked.read(len(buffer))
        buffer[: len(piece)] = piece
        self._left -= len(piece)
        if self._left < 0:
            raise _too_large(self._path)
        return len(piece)


def _most_unpacked(path: Path) -> int:
    """Number of bytes that a file may hold unpacked."""
    return max(_LARGEST, _TIMES * path.stat().st_size)


def _too_large(path: Path) -> UserError:
    return UserError(
        f"{path}: holds more than {_most_unpacked(path):,} bytes, over {_TIMES} times its size, "
        "which data hardly do: if it is no mistake, unpack it first"
    )


def _read_json(file: TextIO, path: Path, first: int | None) -> list[Record]:
    """An array of objects, or one object a line: the content tells, since suffixes often lie."""
    numbered = enumerate(file, start=1)
    start, begin = next(((n, line) for n, line in numbered if line.strip()), (1, ""))
    if begin.lstrip().startswith("["):
        values = _parse("\n" * (start - 1) + begin + file.read(), path, 1)[:first]
        rows = [(f"item {number}", value) for number, value in enumerate(values, start=1)]
    else:
        lines = itertools.chain([(start, begin)], numbered)
        written = ((number, line) for number, line in lines if line.strip())
        rows = [
            (f"line {number}", _parse(line.rstrip(), path, number))
            for number, line in itertools.islice(written, first)
        ]
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f'{path}: {place} is not an object: each row must be one, as {{"instruction": …}}'
            )
    if len(rows) == 1:
        _check_one_row(rows[0][1], path)
    return [row for _, row in rows]


def _check_one_row(row: Record, path: Path) -> None:
    """Raise a `UserError` for rows in a wrapping: {"data": [rows]}, or columns instead of rows."""
    values = list(row.values())
    lists = [value for value in values if isinstance(value, list)]
    (wrapped, *_) = [*lists, []]
    is_wrapped = len(row) == 1 and wrapped and all(isinstance(each, dict) for each in wrapped)
    if is_wrapped and not any("role" in each or "from" in each for each in wrapped):
        raise UserError(
            f"{path}: is one object around the rows: give the list under {next(iter(row))!r} alone"
        )
    sizes = {len(value) for value in lists}
    # Of dictionaries, those of pandas are, whose keys are the rows' numbers.
    keys = {tuple(v) for v in values if isinstance(v, dict) and all(map(str.isdecimal, v))}
    if len(values) > 1 and (
        (len(lists) == len(values) and len(sizes) == 1 and sizes != {1})
        or (len(keys) == 1 and keys != {()} and all(isinstance(v, dict) for v in values))
    ):
        raise UserError(
            f"{path}: is one object of columns: give one of rows instead, as pandas' "
            'to_json(orient="records") writes them'
        )


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {line + error.lineno - 1} is not valid JSON ({error.msg}): give an "
            "array of objects, or one object a line"
        ) from None
    except _NamedTwice as error:
        raise UserError(f"{path}: line {line} cannot be read: {error}") from None
    except ValueError:
        raise UserError(
            f"{path}: line {line} cannot be read: a number has thousands of digits"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: line {line} cannot be read: it is nested too deeply") from None


class _NamedTwice(ValueError):
    """A JSON object has one name twice."""


def _object(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object, whose names differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        (name, _), *_ = (Counter(name for name, _ in pairs)).most_common(1)
        raise _NamedTwice(f"the name {name!r} stands twice in one object: give each its own")
    return made


def _read_csv(file: TextIO, path: Path, delimiter: str, first: int | None) -> list[Record]:
    csv.field_size_limit(2**31 - 1)  # The default refuses texts above 128 KiB.
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    try:
        header = next(filter(None, reader), [])
        check_distinct(header, str(path))
        if len(header) == 1 and (found := re.search(r"[;\t|,]", header[0])):
            raise UserError(
                f"{path}: its header is one column, {header[0]!r}: separate columns by "
                f"{'commas' if delimiter == ',' else 'tabs'}, not by {found[0]!r}"
            )
        rows: list[list[str]] = []
        for cells in itertools.islice(filter(None, reader), first):
            if len(cells) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells where the header has "
                    f"{len(header)}: quote texts that hold {delimiter!r} or newlines"
                )
            rows.append(cells)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not valid CSV ({error})") from None
    return [dict(zip(header, cells, strict=True)) for cells in rows]


def _read_parquet(path: Path, first: int | None) -> tuple[list[Record], Classes]:
    import pyarrow
    import pyarrow.parquet

    rows: list[Record] = []
    left = _most_unpacked(path)
    try:
        # Not read_table, which adds columns that it guesses from the folders' names.
        with pyarrow.parquet.ParquetFile(path) as file:
            check_distinct(file.schema_arrow.names, str(path))
            schema = file.schema_arrow
            # A value that is repeated is there once, so that few bytes may be any number of rows.
            for batch in file.iter_batches(_BATCH):
                left -= batch.nbytes
                if left < 0:
                    raise _too_large(path)
                rows += batch.to_pylist()[: None if first is None else first - len(rows)]
                if len(rows) == first:
                    break
    except pyarrow.ArrowException:
        raise UserError(f"{path}: is not a valid Parquet file") from None
    except ValueError as error:  # a structure that has one name twice
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not schema.metadata or b"huggingface" not in schema.metadata:
        return rows, {}
    import datasets

    return rows, classes_of(datasets.Features.from_arrow_schema(schema))


def _read_demo(split: str) -> list[Record]:
    rows = [row for own in tasks.clients().values() for row in own]
    if split == "test":
        rows = tasks.test_rows()
    elif split != "train":
        raise UserError(f"{DEMO}: has no split {split!r}: give train or test")
    return [dict(row) for row in tasks.with_wrong(rows)]


def classes_of(features: Mapping[str, Any]) -> Classes:
    """Names of the classes in the columns of a dataset that hold their numbers."""
    return {column: kind.names for column, kind in features.items() if hasattr(kind, "int2str")}


def _load_dataset(
    name: str, split: str, subset: str | None, *, streamed: bool = False
) -> Dataset | IterableDataset:
    """One split of a dataset; what `save_to_disk` has written is on the disk, not streamed."""
    import datasets

    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise ValueError(f"it has {', '.join(saved)}")
        return saved[split]
    if streamed:
        return datasets.load_dataset(name, subset, split=split, streaming=True)
    return datasets.load_dataset(name, subset, split=split)


@contextlib.contextmanager
def _explained(name: str, split: str, subset: str | None) -> Iterator[None]:
    """Have what `datasets` raises in the block be a `UserError` that says what can be done."""
    import datasets

    try:
        yield
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{name}: is neither a file nor a dataset that you can read on the Hugging Face Hub: "
            "check the name"
        ) from None
    except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError):
        raise UserError(
            f"{name}: holds no data file that is known: give one ({', '.join(SUFFIXES)})"
        ) from None
    except ImportError as error:
        raise UserError(
            f"{name}: cannot be read without a package that is not installed ({error}; for .zst "
            "pip install 'hedgerow[zstd]')"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC or "disk space" in str(error):
            raise UserError(
                f"{name}: does not fit on the disk: set `data.rows` (of test data "
                "`data.test_rows`) to read so many first rows of it without loading the others"
            ) from None
        if Path(name).is_dir():
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: cannot be read as a dataset ({reason})") from None
        raise UserError(
            f"{name}: is no file, and the Hugging Face Hub cannot be reached for a dataset of that "
            "name: give a file, or connect to the network"
        ) from None
    except (
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        part = f"the split {split!r}" + (f" of the subset {subset!r}" if subset else "")
        raise UserError(
            f"{name}: {part} cannot be loaded ({reason}): see `data.split` and `data.subset`, or "
            "`data.test_split` and `data.test_subset`"
        ) from None
