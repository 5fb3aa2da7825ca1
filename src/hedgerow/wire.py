"""Updates and entries to bytes and back: safetensors files whose metadata says what they are.

Both ends of the format are here. The writer, since safetensors orders the metadata by a hash map,
so that equal content gives different bytes from one process to the next, and a ledger is compared
by its bytes; and since a file of gigabytes is hashed while it is written, from the tensors' own
memory. The reader, since what arrives is a stranger's: safetensors' own takes the last of two
tensors of one name, passes on shapes that torch fails at, and reads the whole header again for each
tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.names import NAME

if TYPE_CHECKING:
    from hedgerow.methods.base import Method

UPDATE_FORMAT = "hedgerow.update/1"
ENTRY_FORMAT = "hedgerow.entry/1"
MAX_HEADER_BYTES = 1 << 24
"""Names and shapes of 100,000 tensors; parsed, a header takes up to forty times its size."""
MAX_DIMENSIONS = 8
LONGEST_TEXT = 512
"""Characters of a tensor's name, and of what an update says."""

LARGEST_SENT = 1e10
"""What a server accepts of a number in an update."""
LARGEST_BROADCAST = 1e17
"""What a participant accepts of a number in an entry: sums of what servers accept, times scales and
learning rates; products of two, summed over all ranks, are within float32's range."""

LARGEST_WEIGHT = 100.0
"""What an update may count for in an entry; weights mostly sum to 1."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}

_NATURAL = re.compile(r"[1-9][0-9]{0,18}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Update:
    """What one client sends after its local training."""

    method: str
    round: int
    client: str
    parent: str
    """Hash of the entry that the training started from."""
    num_examples: int
    train_loss: float
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)
    """What the method says of the tensors, as `r` and `lora_alpha` of an adapter."""

    def encode(self) -> bytes:
        """The update as a safetensors file."""
        return b"".join(self._parts())

    def write(self, file: BinaryIO) -> None:
        """Write the update as a safetensors file."""
        for part in self._parts():
            file.write(part)

    @staticmethod
    def decode(data: bytes) -> Update:
        """The update in `data`.

        Raises:
            InvalidMessage: `data` is no update, or holds a number that is not finite or absurd.
        """
        file = io.BytesIO(data)
        metadata, places = _read_header(file)
        return _update(metadata, {name: place.read(file) for name, place in places.items()})

    @staticmethod
    def read(path: Path) -> Update:
        """The update in a file; its tensors are read when they are asked for.

        Raises:
            InvalidMessage: as in `decode`.
            OSError: the file cannot be read.
        """
        tensors = FileTensors(path)
        return _update(tensors.metadata, tensors)

    def check(self, method: str, round: int, parent: str, client: str, num_examples: int) -> None:
        """Raise `InvalidMessage` unless the update is the one that was asked for."""
        asked = {
            "method": method,
            "round": round,
            "parent": parent,
            "client": client,
            "num_examples": num_examples,
        }
        _check_equal({what: getattr(self, what) for what in asked}, asked)

    def check_about(self, expected: Mapping[str, str]) -> None:
        """Raise `InvalidMessage` unless `about` is as the method has it."""
        _check_equal(self.about, expected)

    def _parts(self) -> Iterator[bytes | memoryview]:
        metadata = {
            "format": UPDATE_FORMAT,
            "method": self.method,
            "round": str(self.round),
            "client": self.client,
            "parent": self.parent,
            "num_examples": str(self.num_examples),
            "train_loss": repr(self.train_loss),
            **self.about,
        }
        return to_safetensors(self.tensors, metadata)


def _update(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Update:
    """The update of a file's metadata and tensors, checked."""
    about = dict(metadata)
    method, round, client, parent, num_examples, train_loss = _take(
        about,
        UPDATE_FORMAT,
        *("method", "round", "client", "parent", "num_examples", "train_loss"),
    )
    if max(map(len, (*about, *metadata.values()))) > LONGEST_TEXT:
        raise InvalidMessage(f"its metadata have more than {LONGEST_TEXT} characters in one place")
    if not _NUMBER.fullmatch(train_loss) or not abs(float(train_loss)) <= LARGEST_SENT:
        raise InvalidMessage(f"its train_loss is {train_loss}")
    check_numbers(tensors, LARGEST_SENT)
    return Update(
        *(method, _natural("round", round), client, parent),
        *(_natural("num_examples", num_examples), float(train_loss), tensors, about),
    )


@dataclass(frozen=True)
class Participant:
    """A client's part in an entry; `weight` is what its update counted, mostly n_k / Σ n."""

    client: str
    num_examples: int
    weight: float


@dataclass(frozen=True)
class Entry:
    """What the server broadcasts after a round: one step of the global model."""

    method: str
    round: int
    parent: str
    """Hash of the entry before, or the base model's fingerprint."""
    participants: list[Participant]
    metrics: dict[str, float]
    """What is known without the model and without a clock: equal runs give equal bytes."""
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the method without which the tensors mean something else."""

    def write(self, file: BinaryIO) -> tuple[str, int]:
        """Write the entry as a safetensors file; returns its SHA-256 and its size in bytes."""
        metadata = {
            "format": ENTRY_FORMAT,
            "method": self.method,
            "round": str(self.round),
            "parent": self.parent,
            "participants": json.dumps([vars(p) for p in self.participants], separators=(",", ":")),
            "metrics": json.dumps(self.metrics, sort_keys=True),
        }
        if self.options:
            metadata["options"] = json.dumps(self.options, sort_keys=True)
        digest, size = hashlib.sha256(), 0
        for part in to_safetensors(self.tensors, metadata):
            file.write(part)
            digest.update(part)
            size += len(part)
        return digest.hexdigest(), size

    @staticmethod
    def read(path: Path) -> Entry:
        """The entry in a file; its tensors are read when they are asked for.

        Whether it is an entry that fits is for `check_entry` to say.

        Raises:
            UserError: the file is no entry, with its name.
        """
        try:
            tensors = FileTensors(path)
            said = dict(tensors.metadata)
            method, round, parent, participants, metrics = _take(
                said, ENTRY_FORMAT, "method", "round", "parent", "participants", "metrics"
            )
            options = _json("options", said.pop("options", "{}"), dict)
            if said:
                raise InvalidMessage(f"its metadata have {min(said)[:LONGEST_TEXT]}")
            everybody = [_participant(p) for p in _json("participants", participants, list)]
            return Entry(
                *(method, _natural("round", round), parent, everybody, _metrics(metrics)),
                *(tensors, options),
            )
        except (InvalidMessage, OSError) as error:
            raise UserError(f"{path} is not a ledger entry: {error}") from None


def check_entry(
    entry: Entry,
    method: Method,
    shapes: Mapping[str, Sequence[int]],
    round: int,
    parent: str,
) -> None:
    """What every participant does with an entry from elsewhere before it applies it.

    Args:
        entry: as it was read; its tensors are read one by one.
        method: the experiment's.
        shapes: `method.trained_shapes` of the participant's own model.
        round: the one that comes next.
        parent: hash of the entry before, or the base model's fingerprint.

    Raises:
        InvalidMessage: it is not what `method` makes in this round; the text says why.
    """
    if entry.method != method.name:
        raise InvalidMessage(
            f"round {round} is an entry of {entry.method[:LONGEST_TEXT]}, but the experiment's "
            f"method is {method.name}"
        )
    if dict(entry.options) != method.entry_options():
        raise InvalidMessage(
            f"round {round} was made with {str(dict(entry.options))[:LONGEST_TEXT]}, but the "
            f"experiment's method has {method.entry_options()}"
        )
    _check_equal({"round": entry.round, "parent": entry.parent}, {"round": round, "parent": parent})
    _check_participants(entry.participants)
    method.check_weights(entry.participants)
    method.check_entry(entry, shapes)
    check_numbers(entry.tensors, LARGEST_BROADCAST)


def _check_participants(participants: Sequence[Participant]) -> None:
    """There are some, each once, and none of them has an absurd weight."""
    if not participants:
        raise InvalidMessage("it has no participants")
    if len({p.client for p in participants}) < len(participants):
        raise InvalidMessage("it has a participant twice")
    for p in participants:
        if not 0 <= p.weight <= LARGEST_WEIGHT:
            raise InvalidMessage(f"the weight of {p.client} is {p.weight}")


class Kind(NamedTuple):
    """What a tensor is, whatever its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{_DTYPES.get(self.dtype, self.dtype)} {list(self.shape)}"


def kinds(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    """The kind of each tensor; those of a file are not read for it."""
    if isinstance(tensors, FileTensors):
        return tensors.kinds
    return {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def in_float32(shapes: Mapping[str, Sequence[int]]) -> dict[str, Kind]:
    """The kinds of float32 tensors of these shapes."""
    return {name: Kind(torch.float32, tuple(shape)) for name, shape in shapes.items()}


def check_kinds(given: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    """Raise `InvalidMessage` unless tensors of exactly the expected names and kinds are given."""
    if missing := expected.keys() - given.keys():
        raise InvalidMessage(f"it lacks {min(missing)}")
    if unknown := given.keys() - expected.keys():
        raise InvalidMessage(f"it has {min(unknown)}, which does not belong there")
    for name, kind in expected.items():
        if given[name] != kind:
            raise InvalidMessage(f"{name} is {given[name]}, not {kind}")


def check_numbers(tensors: Mapping[str, Tensor], largest: float) -> None:
    """Raise `InvalidMessage` where a floating number is not finite, or above `largest` in size."""
    for name, kind in kinds(tensors).items():
        if kind.dtype.is_floating_point:
            low, high = (float(bound) for bound in torch.aminmax(tensors[name]))
            # A NaN is both.
            if not math.isfinite(high - low):
                raise InvalidMessage(f"{name} has numbers that are not finite")
            if max(-low, high) > largest:
                raise InvalidMessage(f"{name} has numbers above {largest:g}")


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    The file is opened anew for each, and not mapped into memory, where what was read of it would
    stay.

    Raises:
        InvalidMessage: it is no such file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self.metadata, self._places = _read_header(file)
        self.kinds = {name: place.kind for name, place in self._places.items()}

    def __getitem__(self, key: str) -> Tensor:
        place = self._places[key]
        with self._path.open("rb") as file:
            return place.read(file)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def to_safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: the header, then each tensor's memory, widest types first."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise UserError(f"{len(names)} tensors are more than one file can have")
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        tensor = tensors[name].detach().contiguous().cpu()
        yield memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


class _Place(NamedTuple):
    """Where in a file a tensor is."""

    kind: Kind
    begin: int

    def read(self, file: io.BufferedIOBase) -> Tensor:
        """The tensor, on the CPU."""
        dtype, shape = self.kind
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        file.seek(self.begin)
        if file.readinto(data.numpy()) < len(data):  # type: ignore[arg-type]
            raise InvalidMessage("it is shorter than it was")
        return data.view(dtype).view(shape)


def _read_header(file: io.BufferedIOBase) -> tuple[dict[str, str], dict[str, _Place]]:
    """A safetensors file's metadata, and where its tensors are, in their order.

    Raises:
        InvalidMessage: it is no such file, or has what nobody here writes.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    begin = 8 + length
    if begin > size:
        raise InvalidMessage("it is too short for what its header announces")
    if length > MAX_HEADER_BYTES:
        raise InvalidMessage(f"its header has more than {MAX_HEADER_BYTES} bytes")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError:
        raise InvalidMessage("its header is not in UTF-8") from None
    if not text.startswith("{"):
        raise InvalidMessage("its header does not begin as one")
    header = _json("header", text, dict)
    metadata = header.pop("__metadata__", {})
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise InvalidMessage("its metadata are no mapping of printable texts")
    for name, content in header.items():
        _check_described(name, content)
    places: dict[str, _Place] = {}
    end = begin
    for name, content in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind = Kind(_TYPES[content["dtype"]], tuple(content["shape"]))
        places[name] = _Place(kind, end)
        end += math.prod(kind.shape) * kind.dtype.itemsize
        if content["data_offsets"] != [places[name].begin - begin, end - begin]:
            raise InvalidMessage(f"{name} is not where the tensor before it ends")
    if end != size:
        raise InvalidMessage(f"it has {size} bytes, but its header describes {end}")
    return metadata, places


def _check_described(name: str, content: Any) -> None:
    """Whether this is a tensor's description in a header, of what is written here."""
    if not 0 < len(name) <= LONGEST_TEXT or not name.isprintable():
        raise InvalidMessage("a tensor's name is empty, too long or not printable")
    if not isinstance(content, dict) or content.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidMessage(f"its header does not say what {name} is and where")
    dtype, shape, place = content["dtype"], content["shape"], content["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise InvalidMessage(f"{name} has numbers of the kind {str(dtype)[:16]!r}")
    if not _are_ints(shape) or len(shape) > MAX_DIMENSIONS or min(shape, default=1) < 1:
        raise InvalidMessage(f"the shape of {name} is no list of up to {MAX_DIMENSIONS} lengths")
    if not _are_ints(place):
        raise InvalidMessage(f"its header does not say where {name} is")


def _are_ints(content: Any) -> bool:
    # True and False are ints to Python, but not to the format.
    return isinstance(content, list) and all(type(number) is int for number in content)


def _json(what: str, text: str, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """The content of a JSON text, which is of this kind and has no name twice in one object.

    Raises:
        InvalidMessage: it is something else; `what` says where it stands.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"its {what} cannot be read: {error}") from None
    if not isinstance(content, kind):
        raise InvalidMessage(f"its {what} cannot be read: it is no {kind.__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice in one mapping")
    return content


def _take(metadata: dict[str, str], format: str, *names: str) -> list[str]:
    """Take what has these names out of the metadata of a file in a format."""
    if metadata.pop("format", None) != format:
        raise InvalidMessage(f"its format is not {format}")
    for name in names:
        if name not in metadata:
            raise InvalidMessage(f"its metadata lack {name}")
    return [metadata.pop(name) for name in names]


def _natural(what: str, text: str) -> int:
    """1, 2, … as `str` writes them, of at most 63 bits."""
    if not _NATURAL.fullmatch(text) or int(text) >= 2**63:
        raise InvalidMessage(f"its {what} is {text[:LONGEST_TEXT]!r}")
    return int(text)


def _participant(content: Any) -> Participant:
    match content:
        case {"client": str(client), "num_examples": int(n), "weight": float(weight)} if (
            len(content) == 3
            and NAME.fullmatch(client)
            and (type(n) is int and 1 <= n < 2**63)
            and math.isfinite(weight)
        ):
            return Participant(client, n, weight)
    raise InvalidMessage("its participants are not names, numbers of examples and weights")


def _metrics(text: str) -> dict[str, float]:
    metrics: dict[str, float] = _json("metrics", text, dict)
    for name, value in metrics.items():
        # Beyond a float's range is an integer of JSON's, or infinity; a NaN is in no range.
        is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        if not is_number or not _METRIC.fullmatch(name):
            raise InvalidMessage("its metrics are not finite numbers by name")
    return metrics


def _check_equal(said: Mapping[str, object], expected: Mapping[str, object]) -> None:
    for what in sorted(said.keys() | expected.keys()):
        if said.get(what) != expected.get(what):
            given = str(said.get(what))[:LONGEST_TEXT]
            raise InvalidMessage(f"its {what} is {given}, not {expected.get(what)}")
