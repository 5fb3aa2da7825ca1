"""The ledger: a run is the base checkpoint plus its entries, one file each.

    ledger/
      ledger.json         the base's fingerprint, and each entry's file, size and SHA-256
      0001.safetensors    the entry of round 1, which names its parent's hash
      …

An entry's parent is the hash of the entry before; the first one's is the base's fingerprint. An
entry belongs to the ledger from the moment at which ledger.json, replaced in one step, names it:
a crash at any instant leaves either the old ledger or the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from hedgerow.errors import InvalidMessage, RunFailed, UserError
from hedgerow.files import passing_folder, replacing
from hedgerow.loading import name_of
from hedgerow.methods.base import Expected, Method, check_entry, check_fits
from hedgerow.model import Model
from hedgerow.wire import Entry

INDEX = "ledger.json"
FORMAT = "hedgerow.ledger/1"
_ENTRY_FILE = re.compile(r"\d{4,}\.safetensors")


class Base(BaseModel):
    """The checkpoint that a ledger starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    architecture: str
    parameters: int
    dtype: str
    fingerprint: str
    """SHA-256 of weights and tokenizer; the parent of the first entry."""
    adapter_of: str | None = None
    """Name of the model that the checkpoint is an adapter of; None where it is a whole model."""
    quantization: str | None = None
    """Number type that the weights of linear layers are quantized to; None where they are not."""

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what only ledgers that begin at an adapter or are quantized have."""
        content: dict[str, Any] = dump(self)
        return {key: value for key, value in content.items() if value is not None}

    @staticmethod
    def of(model: Model) -> Base:
        """Description of `model`, to which no entry has been applied yet."""
        adapter = model.origin.adapter
        return Base(
            name=model.name,
            architecture=model.architecture,
            parameters=model.network.num_parameters(),
            dtype=str(model.network.dtype).removeprefix("torch."),
            fingerprint=model.fingerprint(),
            adapter_of=None if adapter is None else name_of(adapter.base),
            quantization=model.quantization,
        )

    def difference(self, other: Base) -> str | None:
        """First difference from the checkpoint `other` but for its name, in words."""
        for what in ("architecture", "parameters", "quantization", "dtype", "fingerprint"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                return (
                    f"its {what} is {str(mine)[:24]}, the ledger's base {other.name} has "
                    f"{str(theirs)[:24]}"
                )
        return None


class Record(BaseModel):
    """An entry as ledger.json knows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def file(self) -> str:
        """The entry's file; derived, so that no index can name a file elsewhere."""
        return f"{self.round:04d}.safetensors"


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    base: Base
    trained: dict[str, list[int]] = {}
    entries: list[Record]


class Ledger:
    """A folder of entries, opened for reading and appending."""

    def __init__(self, folder: Path, index: _Index) -> None:
        self.folder = folder
        self._index = index

    @staticmethod
    def create(
        folder: Path, base: Base, trained: Mapping[str, Sequence[int]] | None = None
    ) -> Ledger:
        """A new ledger without entries; for `trained`, see the property."""
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: list(shape) for name, shape in (trained or {}).items()}
        ledger = Ledger(folder, _Index(base=base, trained=shapes, entries=[]))
        ledger._write_index()
        return ledger

    @staticmethod
    def open(folder: Path) -> Ledger:
        """The ledger in a folder.

        Raises:
            UserError: there is none, or its index is damaged.
        """
        path = folder / INDEX
        try:
            index = _Index.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{folder} holds no ledger: {INDEX}: {error.strerror}") from None
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{path} is damaged: {reason}") from None
        if index.format != FORMAT:
            raise UserError(f"{path} has the format {index.format!r}, not {FORMAT!r}")
        if [record.round for record in index.entries] != list(range(1, len(index.entries) + 1)):
            raise UserError(f"{path} is damaged: its rounds are not 1, 2, 3 …")
        return Ledger(folder, index)

    @property
    def base(self) -> Base:
        """The checkpoint that the entries build on."""
        return self._index.base

    @property
    def records(self) -> list[Record]:
        """The entries, oldest first; entry t is `records[t - 1]`."""
        return self._index.entries

    @property
    def head(self) -> str:
        """The hash that the next entry names as its parent."""
        return self.parent(len(self) + 1)

    def parent(self, round: int) -> str:
        """The hash that the entry of a round names as its parent."""
        return self.records[round - 2].sha256 if round > 1 else self.base.fingerprint

    def __len__(self) -> int:
        """The number of rounds that are in the ledger."""
        return len(self.records)

    @property
    def trained(self) -> dict[str, list[int]]:
        """The shapes of what clients train, for methods whose server has to know them."""
        return self._index.trained

    def append(
        self, entry: Entry, method: Method | None = None, expected: Expected | None = None
    ) -> Entry:
        """Write an entry and make it the head; returns it with its tensors in the file.

        Args:
            method: what has made the entry, for the checks that its participants will make.
            expected: what the run's settings say of it, for these checks.

        Raises:
            RunFailed: nobody could read the entry, or it does not fit; nothing is written.
        """
        assert entry.parent == self.head, "an entry is appended to the head"
        assert entry.round == len(self) + 1, "rounds are appended in order"
        try:
            entry.check()
            if method is not None:
                check_fits(entry, method, self.trained, entry.round, self.head, expected)
        except InvalidMessage as error:
            raise RunFailed(
                f"method {entry.method} made an entry that no participant could read: {error}"
            ) from None
        path = self.folder / f"{entry.round:04d}.safetensors"
        with replacing(path) as file:
            sha256, size = entry.write(file)
        record = Record(round=entry.round, bytes=size, sha256=sha256)
        self._index.entries.append(record)
        try:
            self._write_index()
        except OSError:
            self._index.entries.pop()
            raise
        return Entry.read(path)

    def read(self, round: int) -> Entry:
        """The entry of a round, after checking that its file is the one that was appended.

        Raises:
            UserError: naming the file that is missing, truncated, altered or out of place.
        """
        record = self.records[round - 1]
        path = self.folder / record.file
        try:
            size = path.stat().st_size
            if size != record.bytes:
                kind = "truncated" if size < record.bytes else "longer than it was"
                raise UserError(
                    f"{path} is {kind}: it has {size} bytes where the ledger says {record.bytes}; "
                    "restore it from a copy"
                )
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise UserError(f"{path} is missing: restore it from a copy") from None
        if sha256 != record.sha256:
            raise UserError(
                f"{path} was altered: its SHA-256 is not the ledger's; restore it from a copy"
            )
        entry = Entry.read(path)
        parent = self.parent(round)
        if entry.round != round or entry.parent != parent:
            raise UserError(
                f"{path} is out of place: it says round {entry.round} after "
                f"{entry.parent[:12]}, the ledger says round {round} after {parent[:12]}"
            )
        return entry

    def entries(self, until: int | None = None) -> Iterator[Entry]:
        """The entries of rounds 1 … `until` (default: all), each checked as in `read`."""
        for round in range(1, (len(self) if until is None else until) + 1):
            yield self.read(round)

    def has(self, round: int) -> bool:
        """Whether the entry of a round is in the folder: a site may have the later ones alone."""
        return (self.folder / self.records[round - 1].file).is_file()

    def clients(self, until: int | None = None) -> list[str]:
        """Everybody who took part in rounds 1 … `until` (default: all), or may have, by name.

        Of rounds whose entries are not here, nobody.
        """
        rounds = range(1, (len(self) if until is None else until) + 1)
        here = [self.read(round) for round in rounds if self.has(round)]
        return sorted({p.client for entry in here for p in entry.participants})

    def took_part(self, client: str, round: int) -> bool:
        """Whether a client's update is in the entry of a round, or may be.

        It may where the entry is not here, or does not say who took part (`Entry.names_all`). The
        entry's header alone is read, unchecked: `read` has checked the file before.
        """
        return not self.has(round) or client in self.participants(round)

    def last_round(self, client: str) -> int:
        """The last round whose entry is here and says that it has a client's update; 0: none."""
        for round in range(len(self), 0, -1):
            if self.has(round) and not self.names_all(round) and client in self.participants(round):
                return round
        return 0

    def participants(self, round: int) -> list[str]:
        """Names of the clients whose updates are, or may be, in an entry; as in `took_part`."""
        return [participant.client for participant in self._header(round).participants]

    def names_all(self, round: int) -> bool:
        """Whether an entry names all that might have taken part (`Entry.names_all`)."""
        return self._header(round).names_all

    def _header(self, round: int) -> Entry:
        """An entry whose tensors nobody asks for."""
        return Entry.read(self.folder / self.records[round - 1].file)

    def replay(
        self,
        method: Method,
        model: Model,
        until: int | None = None,
        *,
        after: int = 0,
        expected: Expected | None = None,
    ) -> None:
        """Advance `model`, which is at round `after`, to round `until` (default: the head).

        Args:
            expected: what the run's settings say of entries; None does not ask.

        Raises:
            UserError: an entry is not the one that was appended, or does not fit.
        """
        last = len(self) if until is None else until
        # Of a method whose last entry is the whole step, the others need not even be here.
        first = after + 1 if method.entries_accumulate else max(after + 1, last)
        rounds = range(first, last + 1)
        shapes = method.trained_shapes(model) if rounds else {}
        for round in rounds:
            entry = self.read(round)
            try:
                check_entry(entry, method, shapes, round, self.parent(round), expected)
            except InvalidMessage as error:
                raise UserError(
                    f"{self.folder}: the entry of round {round} does not fit: {error}"
                ) from None
            method.apply(model, entry)

    def adopt(self, record: Record, file: Path | None) -> None:
        """Append an entry of another copy of this ledger, which has been checked.

        Args:
            record: what the other copy's index says of it.
            file: the entry, which is moved here; None where only later ones are needed.
        """
        assert record.round == len(self) + 1, "rounds are appended in order"
        if file is not None:
            file.replace(self.folder / record.file)
        self._index.entries.append(record)
        self._write_index()

    def truncate(self, rounds: int) -> None:
        """Forget all entries but those of the first rounds."""
        if rounds < len(self):
            del self._index.entries[rounds:]
            self._write_index()
            self.remove_later()

    def remove_later(self) -> None:
        """Remove files of entries after the head, which a killed process has left."""
        for path in self.folder.glob("*.safetensors"):
            if _ENTRY_FILE.fullmatch(path.name) and int(path.stem) > len(self):
                path.unlink()

    def check_base(self, base: Base, where: str) -> None:
        """Raise a `UserError` unless `base` is the checkpoint that the entries build on."""
        if difference := base.difference(self.base):
            raise UserError(f"{where} is not the base of the ledger in {self.folder}: {difference}")

    def pack(self, out: Path, experiment: str) -> None:
        """Write the ledger and its experiment (YAML) as one file, an uncompressed zip archive."""
        with replacing(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # ZipInfo's fixed date makes one ledger always one file.
            archive.writestr(zipfile.ZipInfo("experiment.yaml"), experiment)
            for name in [INDEX, *(record.file for record in self.records)]:
                info = zipfile.ZipInfo(f"ledger/{name}")
                with (
                    archive.open(info, "w", force_zip64=True) as target,
                    (self.folder / name).open("rb") as source,
                ):
                    shutil.copyfileobj(source, target)

    def _write_index(self) -> None:
        with replacing(self.folder / INDEX) as file:
            file.write(json.dumps(self._index.model_dump(), indent=1).encode())


@contextmanager
def unpack(file: Path) -> Iterator[Path]:
    """A packed ledger as a run directory, which is there until the block ends.

    Raises:
        UserError: the file is no packed ledger, or holds anything else.
    """
    temporary = Path(tempfile.gettempdir())
    with passing_folder(temporary, "hedgerow-ledger-", mode=0o700) as folder:
        _extract(file, folder)
        yield folder


def _extract(file: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                parts = info.filename.split("/")
                known = parts == ["experiment.yaml"] or (
                    parts[0] == "ledger"
                    and len(parts) == 2
                    and (parts[1] == INDEX or _ENTRY_FILE.fullmatch(parts[1]))
                )
                # Stored, not compressed: a small file can then not unpack to a huge one, unless
                # its members overlap.
                if not known or info.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{file} is no packed ledger: it holds {info.filename!r}")
            if sum(info.file_size for info in archive.infolist()) > file.stat().st_size:
                raise UserError(
                    f"{file} is no packed ledger: it says that it holds more than it is"
                )
            archive.extractall(folder)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{file} is no packed ledger: {error}") from None
