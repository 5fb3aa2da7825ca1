"""Messages between server and sites: a few words in JSON, and files in the format of `wire`.

Files travel in pieces, so that neither end ever holds one twice. What arrives is validated here as
far as the words go; what is in the files, by whoever reads them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from hedgerow.errors import InvalidMessage, readable, reason_of
from hedgerow.files import replacing
from hedgerow.names import NAME
from hedgerow.privacy.secure.letters import Answer, Ask
from hedgerow.wire import LARGEST_SENT

PIECE = 4 << 20
"""Bytes; below Flower's own limit, so that a piece is not cut again."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


MOST_SCORES = 100
"""Largest number of scores in a reply."""

Sentence = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(readable)]


class Action(StrEnum):
    """Action that a message asks of a site; the values are Flower's message types."""

    invite = "query.invite"
    entries = "query.entries"
    score = "query.score"
    secure = "query.secure"
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

    LONGEST: ClassVar[int] = 1 << 20
    """Largest number of characters, in JSON."""

    files: list[FileInfo] = []


class Request(Words):
    """Words from the server to a site."""

    LONGEST: ClassVar[int] = 1 << 28  # a late joiner's: two million records

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
    secure: Ask | None = None
    """Letter of the secure sum of the round after the last of `records`."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.files != self.records[len(self.records) - len(self.files) :]:
            raise ValueError("the files must be the last of the records")
        return self


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
    secure: Answer | None = None
    """Answer to a letter of a secure sum, or complaint beside a masked update."""
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
    """A message that has arrived: its words, and its files to be saved.

    All is checked before a file is written, but for the files' hashes.
    """

    def __init__(self, content: RecordDict, kind: type[W], most: int | None = None) -> None:
        """Validate the words, and that the files are as long as they say.

        Args:
            content: Flower's records, of which the files are taken out.
            kind: of the words.
            most: number of bytes that the files may have together; None where what they should have
                is compared elsewhere.

        Raises:
            InvalidMessage: it is malformed, or is not what its words say.
        """
        with reading():
            self.words = _words(content, kind)
            sizes = [file.bytes for file in self.words.files]
            if most is not None and sum(sizes) > most:
                raise InvalidMessage(
                    f"its files must have at most {most} bytes together, got {sum(sizes)}"
                )
            self._files = [_pieces(content, index, size) for index, size in enumerate(sizes)]
            for index in range(len(sizes)):
                del content[f"file-{index}"]  # or the pieces would stay in memory

    def save(self, index: int, path: Path) -> None:
        """Write a file, once; its memory is given back piece by piece.

        Raises:
            InvalidMessage: it is not what was announced.
        """
        digest, pieces = hashlib.sha256(), self._files[index]
        with replacing(path) as file:
            while pieces:
                data = pieces.popleft()
                digest.update(data)
                file.write(data)
            if digest.hexdigest() != self.words.files[index].sha256:
                raise InvalidMessage(f"SHA-256 of file {index} must be as announced")

    def save_all(self, folder: Path) -> list[Path]:
        """Write all files into a folder; as `save`."""
        paths = [folder / str(index) for index in range(len(self.words.files))]
        for index, path in enumerate(paths):
            self.save(index, path)
        return paths


def _words(content: RecordDict, kind: type[W]) -> W:
    record = content.get("words")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    if text is None:
        raise InvalidMessage("the message has no words")
    if not isinstance(text, str) or len(text) > kind.LONGEST:
        raise InvalidMessage(f"words must be a text of at most {kind.LONGEST} characters")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidMessage(f"invalid words: {place}: {first['msg']}") from None


def _pieces(content: RecordDict, index: int, announced: int) -> deque[bytes]:
    """The pieces of a file, which have as many bytes as was announced."""
    record = content.get(f"file-{index}")
    if not isinstance(record, ArrayRecord):
        raise InvalidMessage(f"announced file {index} is missing")
    pieces, size = deque[bytes](), 0
    for name in sorted(record):
        data = record[name].data
        if not isinstance(data, bytes):
            raise InvalidMessage(f"file {index} must come in pieces of bytes")
        pieces.append(data)
        size += len(data)
        if size > announced:
            raise InvalidMessage(f"file {index} exceeds the {announced} bytes announced")
    if size < announced:
        raise InvalidMessage(f"file {index} has {size} of the {announced} bytes announced")
    return pieces


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Read a stranger's message: whatever is wrong with it is an `InvalidMessage`.

    Flower makes objects of what was sent before anybody else sees it. Of malformed objects it
    raises what it happens to run into; and it puts an array together from the chunks that it names,
    where a short message may name one chunk any number of times. Within this context an array is
    the one piece that `pack` makes of it, and takes no memory of its own.

    Raises:
        InvalidMessage: the message cannot be read. What does not depend on its content passes: the
            SuperLink cannot be reached (`httpx.TransportError`).
    """
    original = vars(Array)["inflate"]
    inflate = Array.inflate

    def of_one_piece(object_content: bytes, children: dict[str, Any] | None = None) -> Array:
        chunks = children or {}
        if len(chunks) > 1:
            raise InvalidMessage(f"an array must come in one piece, got {len(chunks)}")
        array = inflate(object_content, dict.fromkeys(chunks, SimpleNamespace(data=b"")))
        for chunk in chunks.values():
            # The bytes that the chunk has a view of: no copy, however many arrays name it.
            array.data = chunk.data.obj
        return array

    Array.inflate = staticmethod(of_one_piece)
    try:
        yield
    except (InvalidMessage, httpx.TransportError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {reason_of(error)}"
        raise InvalidMessage(f"the message cannot be read: {what}") from None
    finally:
        Array.inflate = original


class NoReply(InvalidMessage):
    """There is no reply, and will be none; the text says what Flower says of it."""


def read_reply(grid: Grid, message_id: str, most: int) -> Parcel[Reply] | None:
    """The reply to a message; None where there is none yet.

    Args:
        grid: Flower's, through which the message was sent.
        message_id: the message's, as Flower gave it.
        most: number of bytes that the reply's files may have together.

    Raises:
        NoReply: Flower says that there will be none.
        InvalidMessage: the reply is malformed; Flower will not hand it out again.
    """
    with reading():
        for message in grid.pull_messages([message_id]):
            # The SuperLink hands out what a node has sent it unasked, too.
            if message.metadata.reply_to_message_id == message_id:
                if message.has_error():
                    raise NoReply(f"Flower says: {message.error.reason}")
                return Parcel(message.content, Reply, most)
    return None
