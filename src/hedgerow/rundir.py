"""A run's directory: the resolved experiment, the ledger, a row of metrics for each round."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor

from hedgerow.errors import InvalidMessage, UserError
from hedgerow.experiment import Experiment, TrackingSettings, load
from hedgerow.files import replacing
from hedgerow.ledger import INDEX, Base, Ledger
from hedgerow.wire import FileTensors, Update, to_safetensors

if TYPE_CHECKING:
    from hedgerow.methods.base import Method

EXPERIMENT = "experiment.yaml"
METRICS = "metrics.jsonl"
DATA = "data.json"
"""Digests of the clients' tokens, so that a run is only resumed on the data that it began with."""
LOCK = ".lock"
FREE: set[tuple[str, ...]]
FREE = {("federation", key) for key in ("rounds", "min_clients", "deadline", "attempts", "backoff")}
FREE |= {("about",), ("evaluation", "every")}
FREE |= {("tracking", key) for key in TrackingSettings.model_fields}
"""What a resumed run may change, as no entry depends on it (only a schedule, on the rounds)."""


class RunDirectory:
    """An open run directory, which no other process can open meanwhile."""

    def __init__(self, path: Path, ledger: Ledger, lock: TextIO) -> None:
        self.path = path
        self.ledger = ledger
        self._lock = lock

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise a `UserError` where a new run would write over something."""
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file: name a directory that is not there yet")
        # What a run that was killed at its very first step has left is nobody's work.
        begun = {LOCK, DATA, f"{DATA}.partial", f"{EXPERIMENT}.partial"}
        if path.is_dir() and any(child.name not in begun for child in path.iterdir()):
            hint = "add --resume to go on with it, or " if (path / EXPERIMENT).exists() else ""
            raise UserError(f"--out {path} exists already: {hint}name another directory")

    @staticmethod
    def check_resumable(path: Path, experiment: Experiment) -> bool:
        """Whether there is a run to go on with.

        Raises:
            UserError: it is another experiment's run, naming the key that differs.
        """
        if not (path / EXPERIMENT).exists():
            RunDirectory.check_free(path)
            return False
        before = flat(load(path / EXPERIMENT).model_dump(mode="json"))
        now = flat(experiment.model_dump(mode="json"))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in FREE:
                raise UserError(
                    f"--resume: {path} was run with {'.'.join(key)}={before.get(key)!r}, not "
                    f"{now.get(key)!r}: give the same experiment, or another --out"
                )
        folder = path / "ledger"
        if not (folder / INDEX).exists():
            # A run that was stopped at its very beginning has nothing yet; this one had.
            if (path / METRICS).exists() or any(folder.glob("*.safetensors")):
                raise UserError(f"{folder / INDEX} is missing: restore it from a copy")
            return False
        done = len(Ledger.open(folder))
        rounds, planned = now["federation", "rounds"], before["federation", "rounds"]
        if rounds < done:
            raise UserError(f"--resume: federation.rounds={rounds}, but {path} has {done} already")
        if done and rounds != planned and experiment.training.schedule != "constant":
            raise UserError(
                f"--resume: {path} was planned for federation.rounds={planned}, which its "
                f"{experiment.training.schedule} learning-rate schedule depends on: give the same"
            )
        return True

    @staticmethod
    def create(
        path: Path,
        experiment: Experiment,
        base: Base,
        data: dict[str, str],
        trained: Mapping[str, Sequence[int]],
    ) -> RunDirectory:
        """A new run, on data with these digests by client; for `trained`, see `Ledger`."""
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        with replacing(path / DATA) as file:
            file.write(json.dumps(data, indent=1).encode())
        with replacing(path / EXPERIMENT) as file:
            file.write(experiment.dump().encode())
        return RunDirectory(path, Ledger.create(path / "ledger", base, trained), lock)

    @staticmethod
    def resume(
        path: Path,
        experiment: Experiment,
        base: Base,
        data: dict[str, str],
        trained: Mapping[str, Sequence[int]],
    ) -> RunDirectory:
        """A run to go on with; metrics of rounds that the ledger has not are dropped.

        Raises:
            UserError: the base or a client's data are not those that the run began with; or what
                the server or a client has kept is missing or damaged.
        """
        lock = _locked(path)
        ledger = Ledger.open(path / "ledger")
        try:
            before = json.loads((path / DATA).read_bytes())
        except (OSError, ValueError):
            raise UserError(
                f"{path / DATA} is missing or damaged: restore it from a copy"
            ) from None
        for client in data:
            if before.get(client) != data[client]:
                raise UserError(f"--resume: the data of {client} have changed since {path} began")
        ledger.check_base(base, f"model.path {experiment.model.path}")
        if ledger.trained != {name: list(shape) for name, shape in trained.items()}:
            raise UserError(f"{path / 'ledger' / INDEX} was altered: restore it from a copy")
        rows = [row for row in read_rows(path) if row["round"] <= len(ledger)]
        directory = RunDirectory(path, ledger, lock)
        directory._check_memories(experiment.method, data, rows)
        with replacing(path / EXPERIMENT) as file:
            file.write(experiment.dump().encode())
        with replacing(path / METRICS) as file:
            file.writelines(_line(row) for row in rows)
        return directory

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_rows(self.path)

    def write_row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with (self.path / METRICS).open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def server_memory(self, round: int) -> RoundMemory:
        """What the server keeps for itself."""
        return RoundMemory(self.path / "server", round)

    def memory(self, client: str, round: int) -> RoundMemory:
        """What a client of this engine keeps for itself."""
        return RoundMemory(self.path / "clients" / client, round)

    def _check_memories(
        self, method: Method, clients: Iterable[str], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raise a `UserError` unless everybody has what it kept.

        Args:
            clients: those that keep it in this directory.
            rows: which say who took part in which round.
        """
        round = len(self.ledger) + 1
        if method.server_remembers:
            self.server_memory(round).check(since=round - 1)
        if method.clients_remember:
            last = {name: row["round"] for row in rows for name in row["participants"]}
            for client in clients:
                self.memory(client, round).check(since=last.get(client, 0))

    def keep_update(self, update: Update) -> None:
        """Keep a client's update, where the experiment asks for it."""
        folder = self.path / "updates" / f"round-{update.round:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{update.client}.safetensors") as file:
            update.write(file)


class RoundMemory:
    """What a client, or the server, keeps from round to round: a file each, the latest two of them.

    A run that is resumed at an earlier round than the file's finds the one before it.
    """

    def __init__(self, folder: Path, round: int) -> None:
        self._folder, self._round = folder, round

    def load(self) -> Mapping[str, Tensor]:
        """What was kept in the last round before this one.

        Raises:
            UserError: its file is damaged.
        """
        latest = self._latest()
        if latest is None:
            return {}
        try:
            return FileTensors(latest)
        except (InvalidMessage, OSError) as error:
            raise UserError(f"{latest} is damaged ({error}): restore it from a copy") from None

    def check(self, since: int) -> None:
        """Raise a `UserError` unless there is what was kept in round `since` (0: none) or later."""
        latest = self._latest()
        if since and (latest is None or int(latest.stem) < since):
            raise UserError(
                f"{self._folder} lacks what was kept in round {since}, without which the run would "
                "go on as another: restore it from a copy, or begin anew with another --out"
            )
        self.load()

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of this round."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._folder / f"{self._round:04d}.safetensors") as file:
            for part in to_safetensors(tensors, {}):
                file.write(part)
        for path in self._files():
            if int(path.stem) > self._round:
                path.unlink()
        for path in self._files()[:-2]:
            path.unlink()

    def _latest(self) -> Path | None:
        """The file of the last round before this one."""
        earlier = [path for path in self._files() if int(path.stem) < self._round]
        return earlier[-1] if earlier else None

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"), key=lambda path: int(path.stem))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
        UserError: the file is damaged.
    """
    file = path / METRICS
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    try:
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if all(isinstance(row["round"], int) for row in rows):
            return rows
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} is damaged: it is not a JSON object with a round on each line")


def _locked(path: Path) -> TextIO:
    """The lock of a run directory; it is free again when the file is closed or its process ends."""
    lock = (path / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{path} is being written to by another hedgerow process") from None
    return lock


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: a loss that is not a number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(content: Any, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested mappings as one, whose keys are the ways to the values."""
    if not isinstance(content, dict):
        return {key: content}
    found: dict[tuple[str, ...], Any] = {}
    for name, value in content.items():
        found |= flat(value, (*key, str(name)))
    return found
