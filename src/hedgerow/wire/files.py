"""Tensors to bytes and back: the safetensors format, of which nothing is believed.

Both ends of the format are here. The writer, since safetensors orders the metadata by a hash map,
so that equal content gives different bytes from one process to the next, and a ledger is compared
by its bytes; and since a file of gigabytes is hashed while it is written, from the tensors' own
memory. The reader, since what arrives is a stranger's: safetensors' own takes the last of two
tensors of one name, passes on shapes that torch fails at, and reads the whole header again for each
tensor.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.lazy import torch
from hedgerow.wire.kinds import TYPES, Kind, code_of, dtype_of
from hedgerow.wire.metadata import LONGEST_TEXT, read_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 1 << 24
"""Names and shapes of 100,000 tensors; parsed, a header takes up to forty times its size."""

MAX_DIMENSIONS = 8


def kinds(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    """The kind of each tensor; those of a file are not read for it."""
    if isinstance(tensors, FileTensors):
        return tensors.kinds
    return {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def check_numbers(tensors: Mapping[str, Tensor], largest: float) -> None:
    """Raise `InvalidMessage` where a floating number is not finite, or above `largest` in size."""
    for name, kind in kinds(tensors).items():
        if kind.dtype.is_floating_point:
            _check_tensor(name, tensors[name], largest)


def _check_tensor(name: str, tensor: Tensor, largest: float) -> None:
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    # A NaN is both.
    if not math.isfinite(high - low):
        raise InvalidMessage(f"{name} contains NaN or infinity")
    if max(-low, high) > largest:
        raise InvalidMessage(f"{name} contains values above {largest:g} in magnitude")


def header_limit(shapes: Mapping[str, Sequence[int]], clients: int = 1) -> int:
    """Largest number of bytes of the header of a file about a model's trained tensors.

    A header is parsed before a name in it is compared with what is expected, so its size bounds
    what a stranger's file costs.

    Args:
        shapes: of what is trained (`Method.trained_shapes`), by name; empty where files do not
            depend on them, and have few tensors.
        clients: number of those whose tensors may stand in the file beside each other.
    """
    each = sum(_TENSORS_EACH * (len(name.encode()) + _DESCRIBED) for name in shapes)
    return min(MAX_HEADER_BYTES, clients * (_OTHERS + each if shapes else _UNKNOWN))


_TENSORS_EACH = 16
"""Tensors for each that is trained, at most: two factors, their moments, steps of a few-bit code;
methods here have four."""
_DESCRIBED = 256
"""Bytes of a tensor's description, with what its name has beside that of what is trained."""
_OTHERS = 1 << 16
"""Bytes of a client's metadata, and of tensors that are there once."""
_UNKNOWN = 1 << 22
"""Bytes of the header where nothing is known of the tensors: some 30,000 of them."""


class FileTensors(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file, each read when it is asked for.

    The file is opened anew for each, and not mapped into memory, where what was read of it would
    stay.

    Args:
        source: the file, or its bytes.
        header: largest number of bytes that its header may have.
        largest: largest magnitude of a floating number, checked whenever a tensor is read; so what
            a stranger sent can be compared with what is expected before all of it has been looked
            at, and nothing that is looked at meanwhile is NaN, infinite or absurd. None checks
            nothing.

    Raises:
        InvalidMessage: it is no such file; or, of a tensor that is read, as `check_numbers`.
        OSError: it cannot be read.
    """

    def __init__(
        self, source: Path | bytes, header: int = MAX_HEADER_BYTES, largest: float | None = None
    ) -> None:
        self._source, self._largest = source, largest
        with self._opened() as file:
            self.metadata, self._places = read_header(file, header)
        self.kinds = {name: place.kind for name, place in self._places.items()}

    def _opened(self) -> io.BufferedIOBase:
        source = self._source
        return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")

    def trusted(self) -> FileTensors:
        """The same tensors, whose numbers are not checked when they are read."""
        tensors = copy.copy(self)
        tensors._largest = None
        return tensors

    def __getitem__(self, key: str) -> Tensor:
        place = self._places[key]
        with self._opened() as file:
            tensor = place.read(file)
        if self._largest is not None and place.kind.dtype.is_floating_point:
            _check_tensor(key, tensor, self._largest)
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def to_safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: the header, then each tensor's memory, widest types first.

    Raises:
        InvalidMessage: before the first piece, where nobody could read the file; see `header_of`.
    """
    yield header_of(tensors, metadata)
    for name in _in_order(kinds(tensors)):
        tensor = tensors[name].detach().contiguous().cpu()
        yield memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def sha256_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the safetensors file that there would be of these, which is never whole in memory.

    Raises:
        InvalidMessage: nobody could read the file; see `header_of`.
    """
    digest = hashlib.sha256()
    for part in to_safetensors(tensors, metadata):
        digest.update(part)
    return digest.hexdigest()


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, up to the first tensor's memory.

    Raises:
        InvalidMessage: `read_header` would refuse it; or there are no texts and dense tensors.
    """
    _check_texts(metadata)
    _check_tensors(tensors)
    described = kinds(tensors)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in _in_order(described):
        dtype, shape = described[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": code_of(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"))
    text += " " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise UserError(f"{len(described)} tensors are more than one file can have")
    _parse_header(text, end)
    return len(text).to_bytes(8, "little") + text.encode()


def _in_order(described: Mapping[str, Kind]) -> list[str]:
    return sorted(described, key=lambda name: (-described[name].dtype.itemsize, name))


def _check_tensors(tensors: Any) -> None:
    """Whether these are tensors by name, whatever their types and shapes."""
    if isinstance(tensors, FileTensors):
        return
    if not isinstance(tensors, Mapping):
        raise InvalidMessage(
            f"tensors must be a mapping of names to tensors, got {type(tensors).__name__}"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise InvalidMessage(f"a tensor's name is {name!r:.60}, no text")
        if not isinstance(tensor, torch.Tensor):
            raise InvalidMessage(f"{name} is no tensor, but a {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise InvalidMessage(f"{name} is no dense tensor")


def _check_texts(metadata: Any) -> None:
    """Whether metadata are texts that can be shown, by name."""
    texts = [*metadata, *metadata.values()] if isinstance(metadata, Mapping) else [None]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise InvalidMessage("metadata must map printable strings to printable strings")


class Place(NamedTuple):
    """Place of a tensor in a file."""

    kind: Kind
    begin: int

    def read(self, file: io.BufferedIOBase) -> Tensor:
        """The tensor, on the CPU."""
        dtype, shape = self.kind
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        file.seek(self.begin)
        if file.readinto(data.numpy()) < len(data):  # type: ignore[arg-type]
            raise InvalidMessage("the file was truncated while it was read")
        return data.view(dtype).view(shape)


def read_header(
    file: io.BufferedIOBase, largest: int = MAX_HEADER_BYTES
) -> tuple[dict[str, str], dict[str, Place]]:
    """A safetensors file's metadata, and where its tensors are, in their order.

    Args:
        file: from its begin.
        largest: largest number of bytes that the header may have.

    Raises:
        InvalidMessage: it is no such file, or has what nobody here writes.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    begin = 8 + length
    if begin > size:
        raise InvalidMessage("the file ends before its header does")
    if length > largest:
        raise InvalidMessage(f"the header must have at most {largest} bytes, got {length}")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError:
        raise InvalidMessage("the header must be UTF-8") from None
    metadata, places = _parse_header(text, size - begin)
    return metadata, {name: place._replace(begin=begin + place.begin) for name, place in places}


def _parse_header(text: str, size: int) -> tuple[dict[str, str], list[tuple[str, Place]]]:
    """What a header says: metadata, and places in what follows it, which has `size` bytes."""
    if not text.startswith("{"):
        raise InvalidMessage("the header must start with {")
    header = read_json("header", text, dict)
    metadata = header.pop("__metadata__", {})
    _check_texts(metadata)
    for name, content in header.items():
        _check_described(name, content)
    places: list[tuple[str, Place]] = []
    end = 0
    for name, content in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind = Kind(dtype_of(content["dtype"]), tuple(content["shape"]))
        begin, end = end, end + math.prod(kind.shape) * kind.dtype.itemsize
        places.append((name, Place(kind, begin)))
        if content["data_offsets"] != [begin, end]:
            raise InvalidMessage(
                f"data_offsets of {name} must begin where the tensor before ends, and fit its shape"
            )
    if end != size:
        raise InvalidMessage(f"the tensors have {size} bytes, but the header describes {end}")
    return metadata, places


def _check_described(name: str, content: Any) -> None:
    """Raise `InvalidMessage` unless this describes a tensor in a header, as it is written here."""
    if not 0 < len(name) <= LONGEST_TEXT or not name.isprintable():
        raise InvalidMessage(
            f"tensor names must have 1 to {LONGEST_TEXT} characters, all printable"
        )
    if not isinstance(content, dict) or content.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidMessage(
            f"the header must give dtype, shape and data_offsets of {name}, and nothing else"
        )
    dtype, shape, place = content["dtype"], content["shape"], content["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise InvalidMessage(
            f"dtype of {name} must be one of {', '.join(TYPES)}, got {str(dtype)[:16]!r}"
        )
    if not _are_ints(shape) or len(shape) > MAX_DIMENSIONS or min(shape, default=1) < 1:
        raise InvalidMessage(
            f"shape of {name} must be a list of at most {MAX_DIMENSIONS} positive integers"
        )
    if not _are_ints(place):
        raise InvalidMessage(f"data_offsets of {name} must be a list of integers")


def _are_ints(content: Any) -> bool:
    # True and False are ints to Python, but not to the format.
    return isinstance(content, list) and all(type(number) is int for number in content)
