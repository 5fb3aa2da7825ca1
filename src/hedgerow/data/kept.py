"""Tokens in a run's directory, until the run has come to its end, so that a resume finds them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from hedgerow.data.tokens import LossOn, Spool, Tokenized, unless_all
from hedgerow.files import passing_folder, remove_left

_SPOOL, _EXAMPLES, _CLIENTS = "spool", "examples", "clients.json"

_EXAMPLE = np.dtype(
    [
        ("start", np.int64),
        ("length", np.int32),
        ("prompt_length", np.int32),
        ("row", np.int32),
        ("desirable", np.bool_),
    ]
)
"""What the table of examples says of each; another answer to a prompt repeats its row's."""
_Table = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class _Client:
    """What is kept of a client beside its examples."""

    source_digest: str
    digest: str
    """Of its tokens (`Tokenized.digest`)."""
    first: int
    """Place of its first example in the table; other answers to its prompts follow its own."""
    count: int
    paired: bool
    loss_on: LossOn
    truncated: int
    dropped: int
    spelt: int
    unknown: int


class _Index(NamedTuple):
    """What is in the file of clients."""

    sha256: str
    """Of the table of examples and of all clients."""
    clients: dict[str, _Client]


_INDEX = TypeAdapter(_Index)


class KeptTokens:
    """Tokens of clients in a folder that its owner alone may read.

    Each client's are stored with a digest of what they were made of, by which they are found, and
    with one of themselves, by which damage is: what is damaged is as if it were not there.

    Args:
        folder: of the tokens; its parent has to be there when they are saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = f"{folder.name}-"

    def find(self, client: str, source_digest: str, spool: Spool) -> Tokenized | None:
        """A client's tokens, copied into a spool; None where there are none of the same source.

        Args:
            source_digest: of the rows, and of how they become tokens (`Tokenized.source_digest`).

        Raises:
            UserError: the disk is full.
        """
        index, table = self._read
        found = index.get(client)
        if found is None or found.source_digest != source_digest:
            return None
        try:
            with (self._folder / _SPOOL).open("rb", buffering=0) as file:
                kept = Spool(file)
                other = None
                if found.paired:
                    other = _tokenized(kept, found, table, found.first + found.count)
                own = _tokenized(kept, found, table, found.first)
                own = replace(own, source_digest=source_digest, other=other)
                return spool.copy(own) if own.digest() == found.digest else None
        except (OSError, ValueError):  # the file is gone, or shorter than it was
            return None

    def save(self, shards: Mapping[str, Tokenized]) -> None:
        """Keep the tokens of all clients, in place of those that are there.

        Raises:
            UserError: the disk is full.
            OSError: there can be no such folder.
        """
        with passing_folder(self._folder.parent, self._prefix, mode=0o700) as folder:
            clients: dict[str, _Client] = {}
            tables: list[_Table] = [np.empty(0, _EXAMPLE)]
            first = 0
            with (folder / _SPOOL).open("w+b", buffering=0) as file:
                spool = Spool(file)
                for client, shard in shards.items():
                    kept = spool.copy(shard)
                    clients[client] = _Client(
                        source_digest=shard.source_digest,
                        digest=shard.digest(),
                        first=first,
                        count=len(shard),
                        paired=shard.other is not None,
                        loss_on=shard.loss_on,
                        truncated=shard.truncated,
                        dropped=shard.dropped,
                        spelt=shard.spelt,
                        unknown=shard.unknown,
                    )
                    answers = [kept] if kept.other is None else [kept, kept.other]
                    tables += map(_table, answers)
                    first += len(shard) * len(answers)
            examples = np.concatenate(tables).tobytes()
            (folder / _EXAMPLES).write_bytes(examples)
            index = _Index(_sha256(examples, clients), clients)
            (folder / _CLIENTS).write_bytes(_INDEX.dump_json(index))
            self.forget()
            folder.rename(self._folder)

    def forget(self) -> None:
        """Remove what is kept, and what a process that was killed meanwhile has left."""
        shutil.rmtree(self._folder, ignore_errors=True)
        remove_left(self._folder.parent, self._prefix)

    @cached_property
    def _read(self) -> tuple[Mapping[str, _Client], _Table]:
        """Clients by name, and the table of examples; none where one is damaged."""
        try:
            index = _INDEX.validate_json((self._folder / _CLIENTS).read_bytes())
            examples = (self._folder / _EXAMPLES).read_bytes()
        except (OSError, ValueError):
            return {}, np.empty(0, _EXAMPLE)
        if index.sha256 != _sha256(examples, index.clients):
            return {}, np.empty(0, _EXAMPLE)
        return index.clients, np.frombuffer(examples, _EXAMPLE)


def _sha256(examples: bytes, clients: Mapping[str, _Client]) -> str:
    text = json.dumps({name: asdict(each) for name, each in clients.items()})
    return hashlib.sha256(text.encode() + examples).hexdigest()


def _table(shard: Tokenized) -> _Table:
    """What the table says of examples, shape (n,)."""
    table = np.empty(len(shard), _EXAMPLE)
    table["start"], table["length"] = shard.starts, shard.lengths
    table["prompt_length"], table["row"] = shard.prompt_lengths, shard.rows
    table["desirable"] = True if shard.desirable is None else shard.desirable
    return table


def _tokenized(spool: Spool, client: _Client, table: _Table, first: int) -> Tokenized:
    """A client's examples, which stand in the table from this place on."""
    examples = table[first : first + client.count]
    return Tokenized(
        spool=spool,
        starts=examples["start"].copy(),
        lengths=examples["length"].copy(),
        prompt_lengths=examples["prompt_length"].copy(),
        rows=examples["row"].copy(),
        loss_on=client.loss_on,
        truncated=client.truncated,
        dropped=client.dropped,
        spelt=client.spelt,
        unknown=client.unknown,
        desirable=unless_all(examples["desirable"].copy()),
    )
