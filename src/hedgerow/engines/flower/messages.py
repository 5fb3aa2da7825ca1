"""Messages between server and sites: a few words in JSON, and files in the format of `wire`.

Files travel in pieces, so that neither end ever holds one twice. What arrives is validated here as
far as the words go; what is in the files, by whoever reads them.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hedgerow.errors import InvalidMessage, readable
from hedgerow.files import replacing
from hedgerow.names import NAME
from hedgerow.wire import LARGEST_SENT

PIECE = 4 << 20
"""Bytes; below Flower's own limit, so that a piece is not cut again."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


MOST_SCORES = 100
"""Largest number of scores in a reply."""

Sentence = Annotated[str, Field(max_length=1000), AfterValidator(readable)]


class Action(StrEnum):
    """Action that a message asks of a site; the values are Flower's message types."""

    invite = "query.invite"
    entries = "query.entries"
    score = "query.score"
    train = "train.round"

    def register(self, app: ClientApp, handle: Callable[[Message, Context], Message]) -> None:
        """Have a ClientApp handle messages of this kind."""
        category, _, name = self.partition(".")
        decorator = app.train(name) if category == "train" else app.query(name)
        decorator(handle)


class FileInfo(BaseModel):
    """A file as its sender announces it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: Count
    sha256: Hash


class Words(BaseModel):
    """The part of a message that is no file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    files: list[FileInfo] = []


class Request(Words):
    """Words from the server to a site."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Names the run, whose state a site keeps apart from other runs'."""
    first: Annotated[int, Field(ge=1, lt=2**31)] = 1
    """The round of the first of `records`."""
    records: list[FileInfo] = []
    """The ledger's entries from round `first` on; the files are the last of them."""
    date: datetime.date | None = None
    """Day that the run's chat template writes; None where it writes none."""
    train: bool = False
    """Train the round after the last of `records`."""
    score: bool | None = None
    """Score the client's model after the last of `records` on its own test rows."""


class Held(BaseModel):
    """Head of a site's copy of the ledger."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    round: Count
    head: Hash


class OwnScores(BaseModel):
    """Scores of the model that a client has, on test rows of its own, which stay at its site."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rows: Annotated[int, Field(ge=1, lt=2**63)]
    """Number of test rows."""
    values: Annotated[
        dict[
            Annotated[str, Field(max_length=200)],
            Annotated[float, Field(ge=-LARGEST_SENT, le=LARGEST_SENT)],
        ],
        Field(max_length=MOST_SCORES),
    ]
    """Main score of each metric by its key, but for those that are no finite numbers."""


class Reply(Words):
    """Words from a site to the server."""

    name: Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]
    num_examples: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    held: Held | None = None
    refused: Sentence | None = None
    """The site does not take part, and why."""
    scores: OwnScores | None = None
    """What the client's model scores, where that was asked and it has test rows of its own."""
    failure: Sentence | None = None
    """The site takes part, but has no update in this round, and why."""


def info(file: Path) -> FileInfo:
    """A file's size and SHA-256."""
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileInfo(bytes=file.stat().st_size, sha256=sha256)


def pack(words: Words, files: Sequence[Path] = ()) -> RecordDict:
    """Words and files as Flower's records; `words.files` must announce the files."""
    # What is not said is left out, so that earlier versions can read what has nothing new.
    text = words.model_dump_json(exclude_none=True)
    content = RecordDict({"words": ConfigRecord({"json": text})})
    for index, file in enumerate(files):
        pieces: dict[str, Array] = {}
        with file.open("rb") as opened:
            while data := opened.read(PIECE):
                pieces[f"{len(pieces):06d}"] = Array("uint8", (len(data),), "bytes", data)
        content[f"file-{index}"] = ArrayRecord(pieces, keep_input=False)
    return content


W = TypeVar("W", bound=Words)


class Parcel(Generic[W]):
    """A message that has arrived: its words, and its files to be saved."""

    def __init__(self, content: RecordDict, kind: type[W]) -> None:
        """Validate the words.

        Raises:
            InvalidMessage: they are not of this kind.
        """
        try:
            text = content.config_records["words"]["json"]
            self.words = kind.model_validate_json(text if isinstance(text, str) else "")
        except KeyError:
            raise InvalidMessage("the message has no words") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InvalidMessage(f"invalid words: {place}: {first['msg']}") from None
        self._content = content

    def save(self, index: int, path: Path) -> None:
        """Write a file, whose memory is given back piece by piece.

        Raises:
            InvalidMessage: it is not what was announced.
        """
        announced = self.words.files[index]
        try:
            pieces = self._content.array_records[f"file-{index}"]
        except KeyError:
            raise InvalidMessage(f"announced file {index} is missing") from None
        digest, size = hashlib.sha256(), 0
        with replacing(path) as file:
            for name in sorted(pieces):
                data = pieces.pop(name).data
                size += len(data)
                if size > announced.bytes:
                    raise InvalidMessage(
                        f"file {index} exceeds the {announced.bytes} bytes announced"
                    )
                digest.update(data)
                file.write(data)
            if (size, digest.hexdigest()) != (announced.bytes, announced.sha256):
                raise InvalidMessage(f"size and SHA-256 of file {index} must be as announced")

    def save_all(self, folder: Path) -> list[Path]:
        """Write all files into a folder; as `save`."""
        paths = [folder / str(index) for index in range(len(self.words.files))]
        for index, path in enumerate(paths):
            self.save(index, path)
        return paths
