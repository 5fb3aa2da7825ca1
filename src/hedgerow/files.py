"""Files that are there whole, or not at all; JSON, and files of its lines, which grow."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from hedgerow.errors import UserError

_Line = TypeVar("_Line", bound=BaseModel)

_PARTIAL = ".partial"
"""End of the name of a file that is not whole yet."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes that Linux's and macOS's file systems allow at most."""


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """A folder of its own until the block ends, empty at first: files in it are of no more use."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` in one step when it is whole and on the disk."""
    # Of the name, as much as leaves room for what marks it, in whole characters.
    begun = os.fsencode(path.name)[: _LONGEST_NAME - len(_PARTIAL)].decode(errors="ignore")
    partial = path.with_name(begun + _PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say of what
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name could be lost with the power
    finally:
        os.close(folder)


@contextmanager
def passing_folder(parent: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Path]:
    """A new folder in `parent`, removed when the block ends unless it has another name then.

    Those that processes have left which were killed in such a block are removed before.

    Args:
        parent: a folder.
        prefix: what their names begin with, before eight hexadecimal digits.
        mode: of the folder, of which the umask takes away.

    Raises:
        OSError: there can be no such folder.
    """
    remove_left(parent, prefix)
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir(mode=mode)
        # While this process lives, nobody takes the folder for one that was left.
        with suppress(FileNotFoundError):  # somebody did, before it was locked
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                break
            os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders that this user's killed processes have left in a `passing_folder`.

    Other users' stay, though one may be allowed to remove them.
    """
    ours = re.compile(re.escape(prefix) + "[0-9a-f]{8}")
    try:
        found = [folder for folder in parent.iterdir() if ours.fullmatch(folder.name)]
    except OSError:  # no folder, or none that may be read
        return
    for folder in found:
        # In use, or on a file system without locks: one that is open is locked by its process.
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def to_json(value: Any, **style: Any) -> str:
    """JSON of plain values, in which a number that is not finite is null, since JSON has no such.

    Args:
        value: dictionaries, lists and plain values.
        style: as `json.dumps` takes it, as `indent=1`.
    """
    return json.dumps(_finite(value), allow_nan=False, **style)


def expanded(path: str) -> str:
    """A path with `~` as the home folder it stands for, or as it is where there is none."""
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        return path


def check_name(path: str | Path, what: str) -> None:
    """Raise a `UserError` where no file system could have a file of this name.

    Args:
        what: key or option that gives the path, for the message.
    """
    if "\0" in str(path):
        raise UserError(f"{what}: {str(path)!r} holds a NUL character, which no file's name has")
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        raise UserError(
            f"{what}: {str(path)[:40]}… is too long for the name of a file: give one of at most "
            f"{_LONGEST_NAME} bytes"
        )


def check_place(path: Path, what: str) -> None:
    """Raise a `UserError` where no folder could be made at a path, or written to.

    Args:
        what: key or option that gives the path, for the message.
    """
    check_name(path, what)
    try:
        there = next(each for each in [path.absolute(), *path.absolute().parents] if each.exists())
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}: name another place") from None
    if not there.is_dir():
        raise UserError(f"{what} {path}: {there} is a file, which can hold no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path}: {there} may not be written to: name another place")


def read_json_lines(path: Path, kind: type[_Line]) -> list[_Line]:
    """What a file holds, one JSON object of a kind on each line; empty lines do not count.

    Raises:
        UserError: it cannot be read, or a line is something else.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return _parsed(path, lines, kind)


@contextmanager
def appending_json_lines(
    path: Path, kind: type[_Line]
) -> Iterator[tuple[list[_Line], Callable[[_Line], None]]]:
    """What a file holds already, and a function that appends a line to it.

    The file is made by its first line. A last line that a kill has cut short is dropped. No other
    process can open the file in this way meanwhile.

    Raises:
        UserError: a line is not of the kind, another process has the file open, or there is no
            such folder.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it first")
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written to by another hedgerow process") from None
        file.seek(0)
        whole, newline, cut = file.read().rpartition(b"\n")
        lines = _parsed(path, whole.splitlines(), kind)
        first_key = f'{{"{next(iter(kind.model_fields))}":'.encode()
        if not (cut.startswith(first_key) or first_key.startswith(cut)):
            raise UserError(f"{path}: its last line is none of hedgerow's: name another file")
        file.truncate(len(whole + newline))

        def append(line: _Line) -> None:
            file.write(line.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        try:
            yield lines, append
        finally:
            if not file.seek(0, os.SEEK_END):
                path.unlink()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(path: Path, lines: Sequence[bytes], kind: type[_Line]) -> list[_Line]:
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed.append(kind.model_validate_json(line, strict=True))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            where = f"`{key}`: {first['msg']}" if key else first["msg"]
            raise UserError(f"{path} line {number}: {where}") from None
    return parsed
