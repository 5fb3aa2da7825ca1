"""Entries: what the server broadcasts, and a ledger is made of."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.names import NAME
from hedgerow.wire.files import (
    MAX_HEADER_BYTES,
    FileTensors,
    check_numbers,
    header_of,
    sha256_of,
    to_safetensors,
)
from hedgerow.wire.metadata import LONGEST_TEXT, natural, read_json, take

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_FORMAT = "hedgerow.entry/1"

LARGEST_BROADCAST = 1e17
"""Largest magnitude that a participant accepts of a number in an entry: sums of what servers
accept, times scales and learning rates; products of two, summed over all ranks, are within
float32's range."""

LARGEST_WEIGHT = 100.0
"""Largest weight of an update in an entry; weights mostly sum to 1."""

SAMPLING_RATE = "client_sampling_rate"
"""Metric of entries whose clients were drawn in secret: the probability with which each of the
participants took part."""

_METRIC = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Participant:
    """A client's part in an entry; `weight` is what its update counted, mostly n_k / Σ n."""

    client: str
    num_examples: int
    weight: float


@dataclass(frozen=True)
class Entry:
    """Broadcast of the server after a round: one step of the global model."""

    method: str
    round: int
    parent: str
    """Hash of the entry before, or the base model's fingerprint."""
    participants: list[Participant]
    metrics: dict[str, float]
    """Numbers that need neither the model nor a clock: equal runs give equal bytes."""
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the method without which the tensors mean something else."""

    @property
    def names_all(self) -> bool:
        """Whether its participants are all that might have taken part, and not those who did."""
        return SAMPLING_RATE in self.metrics

    def check(self) -> None:
        """Raise `InvalidMessage` unless what `write` writes can be read, and says the same then."""
        metadata = self._metadata()
        header_of(self.tensors, metadata)
        options = _entry(metadata, self.tensors).options
        if options != dict(self.options):
            raise InvalidMessage(
                f"its options are {dict(self.options)}, but would be read as {options}"
            )
        check_participants(self.participants)
        check_numbers(self.tensors, LARGEST_BROADCAST)

    def digest(self) -> str:
        """SHA-256 of the entry as a file, but for `metrics`."""
        return sha256_of(self.tensors, replace(self, metrics={})._metadata())

    def write(self, file: BinaryIO) -> tuple[str, int]:
        """Write the entry as a safetensors file; returns its SHA-256 and its size in bytes.

        Raises:
            InvalidMessage: before anything is written, where there can be no such file.
        """
        digest, size = hashlib.sha256(), 0
        for part in to_safetensors(self.tensors, self._metadata()):
            file.write(part)
            digest.update(part)
            size += len(part)
        return digest.hexdigest(), size

    @staticmethod
    def read(path: Path, header: int = MAX_HEADER_BYTES) -> Entry:
        """The entry in a file; its tensors are read when they are asked for.

        Whether it is an entry that fits is for the receiver to say.

        Args:
            path: a safetensors file.
            header: largest number of bytes that its header may have; see `header_limit`.

        Raises:
            UserError: the file is no entry, with its name.
        """
        try:
            tensors = FileTensors(path, header)
            return _entry(tensors.metadata, tensors)
        except (InvalidMessage, OSError) as error:
            raise UserError(f"{path} is not a ledger entry: {error}") from None

    def _metadata(self) -> dict[str, str]:
        participants = [vars(p) for p in self.participants]
        metadata = {
            "format": ENTRY_FORMAT,
            "method": self.method,
            "round": str(self.round),
            "parent": self.parent,
            "participants": _as_json("participants", participants, separators=(",", ":")),
            "metrics": _as_json("metrics", self.metrics, sort_keys=True),
        }
        if self.options:
            metadata["options"] = _as_json("options", self.options, sort_keys=True)
        return metadata


def _as_json(what: str, content: Any, **style: Any) -> str:
    try:
        return json.dumps(content, **style)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage(f"{what} cannot be written: {error}") from None


def _entry(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Entry:
    """The entry of a file's metadata and tensors."""
    said = dict(metadata)
    method, round, parent, participants, metrics = take(
        said, ENTRY_FORMAT, "method", "round", "parent", "participants", "metrics"
    )
    options = read_json("options", said.pop("options", "{}"), dict)
    if said:
        raise InvalidMessage(f"unexpected metadata {min(said)[:LONGEST_TEXT]}")
    everybody = [_participant(p) for p in read_json("participants", participants, list)]
    return Entry(
        method=method,
        round=natural("round", round),
        parent=parent,
        participants=everybody,
        metrics=_metrics(metrics),
        tensors=tensors,
        options=options,
    )


def check_participants(participants: Sequence[Participant]) -> None:
    """Raise `InvalidMessage` unless there are participants, each once, with sensible weights."""
    if not participants:
        raise InvalidMessage("an entry must have at least one participant")
    if len({p.client for p in participants}) < len(participants):
        raise InvalidMessage("participants must be distinct")
    for p in participants:
        if not 0 <= p.weight <= LARGEST_WEIGHT:
            raise InvalidMessage(
                f"weight of {p.client} must be between 0 and {LARGEST_WEIGHT:g}, got {p.weight}"
            )


def _participant(content: Any) -> Participant:
    match content:
        case {"client": str(client), "num_examples": int(n), "weight": float(weight)} if (
            len(content) == 3
            and NAME.fullmatch(client)
            and (type(n) is int and 1 <= n < 2**63)
            and math.isfinite(weight)
        ):
            return Participant(client, n, weight)
    raise InvalidMessage(
        "participants must each have a client, num_examples and a weight, and nothing else"
    )


def _metrics(text: str) -> dict[str, float]:
    metrics: dict[str, float] = read_json("metrics", text, dict)
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            raise InvalidMessage(
                f"metric `{name[:LONGEST_TEXT]}` must be named by up to 64 lower-case letters, "
                "digits and _, a letter first"
            )
        # Beyond a float's range is an integer of JSON's, or infinity; a NaN is in no range.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise InvalidMessage(f"metric `{name}` must be a finite number, got {value!r:.60}")
    return metrics
