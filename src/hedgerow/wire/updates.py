"""Updates: what clients send."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hedgerow.errors import InvalidMessage
from hedgerow.wire.files import MAX_HEADER_BYTES, FileTensors, header_of, sha256_of, to_safetensors
from hedgerow.wire.metadata import LONGEST_TEXT, check_equal, natural, take

if TYPE_CHECKING:
    from torch import Tensor

UPDATE_FORMAT = "hedgerow.update/1"

LARGEST_SENT = 1e10
"""Largest magnitude that a server accepts of a number in an update."""

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


@dataclass(frozen=True)
class Update:
    """Update that one client sends after its local training."""

    method: str
    round: int
    client: str
    parent: str
    """Hash of the entry that the training started from."""
    num_examples: int
    train_loss: float | None
    """Mean loss of the training; None in private runs, which hide it."""
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)
    """Further metadata of the method's, as `r` and `lora_alpha` of an adapter."""
    epsilon: float | None = None
    """Privacy loss ε of the client's rounds so far, with example-level privacy; else None."""

    def to_bytes(self) -> bytes:
        """The update as a safetensors file."""
        return b"".join(self._parts())

    def write(self, file: BinaryIO) -> None:
        """Write the update as a safetensors file."""
        for part in self._parts():
            file.write(part)

    def digest(self) -> str:
        """SHA-256 of the update as a file, but for `epsilon`."""
        return sha256_of(self.tensors, replace(self, epsilon=None)._metadata())

    @staticmethod
    def from_bytes(
        data: bytes,
        header: int = MAX_HEADER_BYTES,
        fits: Callable[[Update], None] | None = None,
    ) -> Update:
        """The update in `data`.

        Args:
            data: a safetensors file.
            header: largest number of bytes that its header may have; see `header_limit`.
            fits: told of the update before all of its numbers are looked at, to raise
                `InvalidMessage` unless its names and kinds are those that are expected; None
                expects nothing.

        Raises:
            InvalidMessage: `data` is no update, or holds a number that is not finite or absurd.
        """
        tensors = FileTensors(data, header, largest=LARGEST_SENT)
        return replace(_update(tensors, fits), tensors=dict(tensors))

    @staticmethod
    def read(
        path: Path,
        header: int = MAX_HEADER_BYTES,
        fits: Callable[[Update], None] | None = None,
    ) -> Update:
        """The update in a file; its tensors are read when they are asked for.

        For arguments, see `from_bytes`.

        Raises:
            InvalidMessage: as in `from_bytes`.
            OSError: the file cannot be read.
        """
        tensors = FileTensors(path, header, largest=LARGEST_SENT)
        update = _update(tensors, fits)
        for name, kind in tensors.kinds.items():
            if kind.dtype.is_floating_point:
                tensors[name]  # which checks it
        return replace(update, tensors=tensors.trusted())

    def check(
        self,
        method: str,
        round: int,
        parent: str,
        client: str,
        num_examples: int,
        *,
        says_loss: bool = True,
        says_epsilon: bool = False,
    ) -> None:
        """Raise `InvalidMessage` unless the update is the one that was asked for.

        Args:
            method: its name.
            round: from 1.
            parent: hash of the entry that the training starts from.
            client: its name.
            num_examples: number of its examples.
            says_loss: whether it has to say its training loss; else it must not.
            says_epsilon: whether it has to say what privacy it has spent; else it must not.
        """
        asked = {
            "method": method,
            "round": round,
            "parent": parent,
            "client": client,
            "num_examples": num_examples,
        }
        check_equal({what: getattr(self, what) for what in asked}, asked)
        said = {"train_loss": says_loss, "epsilon": says_epsilon}
        for what, is_said in said.items():
            if (getattr(self, what) is not None) != is_said:
                must = "must have" if is_said else "must not have"
                raise InvalidMessage(f"metadata {must} {what} in this run")

    def check_about(self, expected: Mapping[str, str]) -> None:
        """Raise `InvalidMessage` unless `about` is as the method has it."""
        check_equal(self.about, expected)

    def check_writable(self) -> None:
        """Raise `InvalidMessage` unless there can be a file of what the method has made.

        Whether its numbers are absurd is for the reader to say.
        """
        header_of(self.tensors, self._metadata())

    def _parts(self) -> Iterator[bytes | memoryview]:
        return to_safetensors(self.tensors, self._metadata())

    def _metadata(self) -> dict[str, str]:
        said = {
            "format": UPDATE_FORMAT,
            "method": self.method,
            "round": str(self.round),
            "client": self.client,
            "parent": self.parent,
            "num_examples": str(self.num_examples),
        }
        numbers = {"train_loss": self.train_loss, "epsilon": self.epsilon}
        said |= {name: repr(number) for name, number in numbers.items() if number is not None}
        if not isinstance(self.about, Mapping):
            given = type(self.about).__name__
            raise InvalidMessage(f"`about` must map strings to strings, got {given}")
        for name, text in self.about.items():
            if not isinstance(text, str) or name in {*said, *numbers}:
                raise InvalidMessage(
                    f"`about` has {name!r:.60}: {text!r:.60}: "
                    "it must have strings, under names of its own"
                )
        return {**said, **self.about}


def _update(tensors: FileTensors, fits: Callable[[Update], None] | None) -> Update:
    """The update in a file, whose metadata are checked; its numbers are when they are read."""
    about = dict(tensors.metadata)
    names = ("method", "round", "client", "parent", "num_examples")
    method, round, client, parent, num_examples = take(about, UPDATE_FORMAT, *names)
    if max(map(len, (*about, *tensors.metadata.values()))) > LONGEST_TEXT:
        raise InvalidMessage(f"metadata must be strings of at most {LONGEST_TEXT} characters")
    train_loss, epsilon = (_number(name, about) for name in ("train_loss", "epsilon"))
    update = Update(
        method=method,
        round=natural("round", round),
        client=client,
        parent=parent,
        num_examples=natural("num_examples", num_examples),
        train_loss=train_loss,
        tensors=tensors,
        about=about,
        epsilon=epsilon,
    )
    if fits is not None:
        fits(update)
    return update


def _number(name: str, about: dict[str, str]) -> float | None:
    """Number that is removed from the metadata; None where there is none."""
    text = about.pop(name, None)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or not abs(float(text)) <= LARGEST_SENT:
        raise InvalidMessage(
            f"{name} must be a number of magnitude up to {LARGEST_SENT:g}, got {text}"
        )
    return float(text)
