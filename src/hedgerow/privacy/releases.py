"""Log of what private data have been released in, by which privacy is accounted for.

Noise derives from the bits of what it is added to. So what is made again with the same bits is no
other release, and costs nothing; made on another processor, say, it has independent noise, and
costs as much as any. Which of the two it was, only the hashes of what was handed on can say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from hedgerow.errors import UserError
from hedgerow.files import replacing

RELEASES = "privacy.json"
"""File of a log, beside the key that noise derives from or what a client keeps for itself."""


class Logged(BaseModel):
    """One line of the log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int
    parent: str
    """Hash of the entry before, from which the round began; empty where that does not count."""
    sha256: str | None
    """Digest of what was released; None: begun, and nothing yet."""
    clients: list[str]
    """Names of those whose data it was made from."""


_LINES = TypeAdapter(list[Logged])


class ReleaseLog:
    """Log of releases, which only grows, whatever becomes of the ledger.

    Args:
        file: of the log; none is there before the first release.
        known: rounds that the ledger has, each with the hash of the entry before.

    Raises:
        UserError: it is damaged, or lacks a round that is known, so that accounts would be too low.
    """

    def __init__(self, file: Path, known: Iterable[tuple[int, str]]) -> None:
        self._file = file
        try:
            self._lines = _LINES.validate_json(file.read_bytes()) if file.exists() else []
        except ValueError:
            raise UserError(f"{file} is damaged: restore it from a copy") from None
        if missing := set(known) - {(line.round, line.parent) for line in self._lines}:
            raise UserError(
                f"{file} lacks round {min(missing)[0]}, which was trained, so that privacy would "
                "be spent twice: restore it from a copy, or begin anew with another --out"
            )

    def __bool__(self) -> bool:
        """Whether there is any release."""
        return bool(self._lines)

    def by_round(self, client: str) -> Counter[tuple[int, str]]:
        """Number of releases of a client's data by round and hash of the entry before."""
        return Counter((line.round, line.parent) for line in self._lines if client in line.clients)

    def by_client(self) -> dict[str, Counter[tuple[int, str]]]:
        """What `by_round` says of each client that there are releases of."""
        found: dict[str, Counter[tuple[int, str]]] = {}
        for line in self._lines:
            for name in line.clients:
                found.setdefault(name, Counter())[line.round, line.parent] += 1
        return found

    def has(self, round: int, parent: str, sha256: str | None = None) -> bool:
        """Whether a release of a round was begun, or was one with this digest."""
        return any(
            (line.round, line.parent) == (round, parent) and sha256 in (None, line.sha256)
            for line in self._lines
        )

    def costs(self, round: int, parent: str, sha256: str) -> bool:
        """Whether `add` would count as one more, since it is neither known nor begun only."""
        here = [line for line in self._lines if (line.round, line.parent) == (round, parent)]
        return not {sha256, None} & {line.sha256 for line in here}

    def begin(self, round: int, parent: str, clients: Iterable[str]) -> None:
        """Count a release of a round from now on, whatever will be released."""
        self._write([*self._lines, _line(round, parent, None, clients)])

    def add(self, round: int, parent: str, sha256: str, clients: Iterable[str]) -> None:
        """Log a release before it is handed on: of a round that was begun, or another one.

        One that is logged already is the same release.
        """
        if self.has(round, parent, sha256):
            return
        lines = list(self._lines)
        for place, line in enumerate(lines):
            if (line.round, line.parent, line.sha256) == (round, parent, None):
                del lines[place]
                break
        self._write([*lines, _line(round, parent, sha256, clients)])

    def _write(self, lines: list[Logged]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as file:
            file.write(_LINES.dump_json(lines))
        self._lines = lines


def _line(round: int, parent: str, sha256: str | None, clients: Iterable[str]) -> Logged:
    return Logged(round=round, parent=parent, sha256=sha256, clients=sorted(clients))
