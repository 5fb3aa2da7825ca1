"""Tokens in a run's directory, until the run has come to its end, so that a resume finds them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from hedgerow.data.tokens import LossOn, Spool, Tokenized
from hedgerow.files import passing_folder

_SPOOL, _EXAMPLES, _CLIENTS = "spool", "examples.npy", "clients.json"

_EXAMPLE = np.dtype(
    [
        ("start", np.int64),
        ("length", np.int32),
        ("prompt_length", np.int32),
        ("row", np.int32),
        ("desirable", np.bool_),
    ]
)
_Table = npt.NDArray[np.void]
"""Numbers of each example, shape (n,)."""


@dataclass(frozen=True, slots=True)
class _Client:
    """What is kept of a client beside numbers for each of its examples."""

    made_of: str
    digest: str
    first: int
    """Place of its first example; those of other answers follow, if there are any."""
    count: int
    paired: bool
    loss_on: LossOn
    truncated: int
    dropped: int
    spelt: int
    unknown: int


_CLIENTS_OF = TypeAdapter(dict[str, _Client])


class KeptTokens:
    """A folder of clients' tokens, which its owner alone may read.

    They are known by the digest of all that they were made of, and compared with their own; what is
    damaged is as if it were not there.

    Args:
        folder: of the tokens; its parent has to be there when they are saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, client: str, made_of: str) -> Tokenized | None:
        """A client's tokens, or None where there are none that were made of the same.

        Args:
            made_of: digest of the rows, and of how they become tokens (`Tokenized.made_of`).
        """
        found = self._clients.get(client)
        if found is None or found.made_of != made_of:
            return None
        try:
            other = self._tokenized(found, found.first + found.count) if found.paired else None
            own = replace(self._tokenized(found, found.first), made_of=made_of, other=other)
            return own if _digest(own) == found.digest else None
        except (OSError, ValueError):
            return None

    def save(self, shards: Mapping[str, Tokenized]) -> None:
        """Keep the tokens of all clients, in place of those that are there.

        Raises:
            UserError: the disk is full.
            OSError: there can be no such folder.
        """
        parent, name = self._folder.parent, self._folder.name
        with (
            passing_folder(parent, f"{name}-", mode=0o700) as folder,
            (folder / _SPOOL).open("w+b", buffering=0) as file,
        ):
            spool = Spool(file)
            clients: dict[str, _Client] = {}
            tables: list[_Table] = [np.empty(0, _EXAMPLE)]
            first = 0
            for client, shard in shards.items():
                kept = spool.copy(shard)
                clients[client] = _Client(
                    made_of=shard.made_of,
                    digest=_digest(kept),
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
            np.save(folder / _EXAMPLES, np.concatenate(tables), allow_pickle=False)
            text = json.dumps({name: asdict(each) for name, each in clients.items()})
            (folder / _CLIENTS).write_text(text, encoding="utf-8")
            self.forget()
            folder.rename(self._folder)

    def forget(self) -> None:
        """Remove what is kept."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @cached_property
    def _clients(self) -> dict[str, _Client]:
        try:
            return _CLIENTS_OF.validate_json((self._folder / _CLIENTS).read_bytes())
        except (OSError, ValueError):
            return {}

    @cached_property
    def _spool(self) -> Spool:
        return Spool((self._folder / _SPOOL).open("rb", buffering=0))

    @cached_property
    def _examples(self) -> _Table:
        examples: _Table = np.load(self._folder / _EXAMPLES, allow_pickle=False)
        if examples.dtype != _EXAMPLE or examples.ndim != 1:
            raise ValueError("no table of examples")
        return examples

    def _tokenized(self, client: _Client, first: int) -> Tokenized:
        """A client's tokens whose examples begin at this place."""
        examples = self._examples[first : first + client.count]
        if len(examples) != client.count or (examples["length"] < 0).any():
            raise ValueError("examples are missing")
        desirable = examples["desirable"].copy()
        return Tokenized(
            spool=self._spool,
            starts=examples["start"].copy(),
            lengths=examples["length"].copy(),
            prompt_lengths=examples["prompt_length"].copy(),
            rows=examples["row"].copy(),
            loss_on=client.loss_on,
            truncated=client.truncated,
            dropped=client.dropped,
            spelt=client.spelt,
            unknown=client.unknown,
            desirable=None if desirable.all() else desirable,
        )


def _digest(shard: Tokenized) -> str:
    """SHA-256 of all that is kept of a client's examples."""
    answers = [shard] if shard.other is None else [shard, shard.other]
    tables = b"".join(_table(each).tobytes() for each in answers)
    return hashlib.sha256(shard.digest().encode() + tables).hexdigest()


def _table(shard: Tokenized) -> _Table:
    """Numbers of each example, shape (n,)."""
    table = np.empty(len(shard), _EXAMPLE)
    table["start"], table["length"] = shard.starts, shard.lengths
    table["prompt_length"], table["row"] = shard.prompt_lengths, shard.rows
    table["desirable"] = True if shard.desirable is None else shard.desirable
    return table
