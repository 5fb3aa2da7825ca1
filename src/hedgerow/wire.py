"""Updates and entries to bytes and back: safetensors files whose metadata says what they are.

The reader is safetensors' own. The writer is here for two reasons: safetensors orders the metadata
by a hash map, so that equal content gives different bytes from one process to the next, and a
ledger is compared by its bytes; and a file of gigabytes is hashed while it is written, from the
tensors' own memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hedgerow.errors import UserError

UPDATE_FORMAT = "hedgerow.update/1"
ENTRY_FORMAT = "hedgerow.entry/1"
MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class InvalidMessage(ValueError):
    """Bytes that are no update or entry, or not the expected one; the text says why."""


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
        return b"".join(to_safetensors(self.tensors, metadata))

    @staticmethod
    def decode(data: bytes) -> Update:
        """The update in `data`.

        Raises:
            InvalidMessage: `data` is no update, or holds a number that is not finite.
        """
        metadata = _metadata(data)
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise InvalidMessage(f"not a safetensors file: {error}") from None
        if metadata.pop("format", None) != UPDATE_FORMAT:
            raise InvalidMessage(f"its format is not {UPDATE_FORMAT}")
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise InvalidMessage(f"{name} has numbers of the kind {tensor.dtype}")
            if not tensor.isfinite().all():
                raise InvalidMessage(f"{name} has numbers that are not finite")
        try:
            update = Update(
                method=metadata.pop("method"),
                round=int(metadata.pop("round")),
                client=metadata.pop("client"),
                parent=metadata.pop("parent"),
                num_examples=int(metadata.pop("num_examples")),
                train_loss=float(metadata.pop("train_loss")),
                tensors=tensors,
                about=metadata,
            )
        except (KeyError, ValueError) as error:
            raise InvalidMessage(f"its metadata is incomplete: {error}") from None
        if not math.isfinite(update.train_loss):
            raise InvalidMessage(f"its train_loss is {update.train_loss}")
        return update


@dataclass(frozen=True)
class Participant:
    """A client's part in an entry; `weight` is p_k, and the weights of an entry sum to 1."""

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
            "participants": json.dumps([vars(p) for p in self.participants]),
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

        Raises:
            UserError: the file is no entry, with its name.
        """
        try:
            tensors = FileTensors(path)
            metadata = tensors.metadata
            if metadata.get("format") != ENTRY_FORMAT:
                raise InvalidMessage(f"its format is not {ENTRY_FORMAT}")
            return Entry(
                method=metadata["method"],
                round=int(metadata["round"]),
                parent=metadata["parent"],
                participants=[Participant(**p) for p in json.loads(metadata["participants"])],
                metrics=_numbers(json.loads(metadata["metrics"])),
                tensors=tensors,
                options=json.loads(metadata.get("options", "{}")),
            )
        except (
            *(KeyError, TypeError, ValueError, AttributeError, OSError),
            safetensors.SafetensorError,
        ) as error:
            raise UserError(f"{path} is not a ledger entry: {error}") from None


def _numbers(content: Any) -> dict[str, float]:
    if not isinstance(content, dict) or not all(type(v) in (int, float) for v in content.values()):
        raise InvalidMessage("its metrics are not numbers by name")
    return content


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    The file is opened anew for each: an open one is mapped into memory, where what was read of it
    would stay until the last tensor is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._opened() as file:
            self._keys = list(file.keys())
            self.metadata: dict[str, str] = file.metadata() or {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        with self._opened() as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _opened(self) -> Any:
        return safetensors.safe_open(self._path, framework="pt")


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
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        tensor = tensors[name].detach().contiguous().cpu()
        yield memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file in memory, which the library's own loader leaves out."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise InvalidMessage("it is too short for what its header announces")
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidMessage("its header is not a safetensors header with metadata") from None
    if not isinstance(metadata, dict):
        raise InvalidMessage("its metadata is not a mapping")
    return {str(key): str(value) for key, value in metadata.items()}
