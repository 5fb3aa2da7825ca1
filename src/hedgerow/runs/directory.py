"""A run's directory: the resolved experiment, the ledger, a row of metrics for each round."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import TypeAdapter

from hedgerow.data import KeptTokens
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, load
from hedgerow.files import check_name, check_place, replacing
from hedgerow.ledger import INDEX, Base, Ledger
from hedgerow.runs.changes import another_run, changes
from hedgerow.runs.memory import RoundMemory
from hedgerow.runs.personal import CLIENTS
from hedgerow.runs.rows import METRICS_FILE, read_rows, to_line
from hedgerow.settings import ClientFile
from hedgerow.wire import Update

EXPERIMENT = "experiment.yaml"

DATA = "data.json"
"""File of digests: of the clients' tokens, so that a run is only resumed on the data that it began
with, and of test rows, so that it is said where scores are of others."""

TEST_DATA = "(test data)"
"""Key of the digest of the test data, which no client may be called."""
CLIENT_TESTS = "(clients' test data)"
"""Key of the digest of all clients' own test rows together."""
OF_TESTS = {TEST_DATA, CLIENT_TESTS}
"""Keys of what is scored on, beside the clients' names."""

Digests = dict[str, str | None]
"""Digest of each client's data, in the clients' order, or None where it is not known here; and
that of the test data, where there are some."""
_DIGESTS = TypeAdapter(Digests)

TOKENS = "tokens"
"""Folder of the clients' tokens, until the run has come to its end."""

LOCK = ".lock"

NOISE = "noise"
"""Folder of the last rounds' noise, where it is correlated; as secret as the key."""


class Needed(NamedTuple):
    """Memory that a run needs to go on."""

    client: str | None
    """Client that remembers; None is the server."""
    memory: RoundMemory
    since: int
    """Last round in which something was saved that counts; 0 where there is none."""
    may_be_lost: bool
    """Whether its owner may begin anew without it."""


class RunDirectory:
    """An open run directory, which no other process can open meanwhile."""

    def __init__(
        self, path: Path, ledger: Ledger, lock: TextIO, changes: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.ledger = ledger
        self.changes = changes
        """Sentences for people: what this run does otherwise than before it was resumed."""
        self._lock = lock

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if isinstance(error, UserError) and not len(self.ledger) and not self.rows():
                # A mistake that is only seen in the first evaluation, as a metric's.
                for child in self.path.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                if not self.path.is_symlink():
                    self.path.rmdir()
        finally:
            self._lock.close()

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise a `UserError` where a new run would write over something, or could not write."""
        check_name(path, "--out")
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file: name a directory that is not there yet")
        check_place(path, "--out")
        # What a run that was killed at its very first step has left is nobody's work.
        begun = {LOCK, DATA, f"{DATA}.partial", f"{EXPERIMENT}.partial"}
        if path.is_dir() and any(child.name not in begun for child in path.iterdir()):
            hint = (
                "go on with it (--resume, or resume=True in Python), or "
                if (path / EXPERIMENT).exists()
                else ""
            )
            raise UserError(f"--out {path} exists already: {hint}name another directory")

    @staticmethod
    def check_resumable(path: Path, experiment: Experiment) -> bool:
        """Whether there is a run to go on with.

        Raises:
            UserError: it is another experiment's run, naming the key that differs.
        """
        check_place(path, "--out")
        if not (path / EXPERIMENT).exists():
            RunDirectory.check_free(path)
            return False
        before = load(path / EXPERIMENT)
        if difference := another_run(before, experiment):
            raise UserError(
                f"--resume: {path} was run with {difference}: give the same experiment, or another "
                "--out"
            )
        folder = path / "ledger"
        if not (folder / INDEX).exists():
            # A run that was stopped at its very beginning has nothing yet; this one had.
            if (path / METRICS_FILE).exists() or any(folder.glob("*.safetensors")):
                raise UserError(f"{folder / INDEX} is missing: restore it from a copy")
            return False
        done = len(Ledger.open(folder))
        rounds, planned = experiment.federation.rounds, before.federation.rounds
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
        data: Digests,
        trained: Mapping[str, Sequence[int]],
    ) -> RunDirectory:
        """A new run, on data with these digests by client; for `trained`, see `Ledger`.

        Raises:
            UserError: another process has begun a run here, since `check_free` found none.
        """
        path.mkdir(parents=True, exist_ok=True)
        lock = locked(path)
        if (path / "ledger" / INDEX).exists() or (path / METRICS_FILE).exists():
            lock.close()
            raise UserError(
                f"--out {path} exists already, as another process has begun a run there: name "
                "another directory"
            )
        _write_settings(path, experiment, data)
        return RunDirectory(path, Ledger.create(path / "ledger", base, trained), lock)

    @staticmethod
    def resume(
        path: Path,
        experiment: Experiment,
        base: Base,
        data: Digests,
        trained: Mapping[str, Sequence[int]],
    ) -> RunDirectory:
        """A run to go on with; metrics of rounds that the ledger has not are dropped.

        Raises:
            UserError: the base or a client's data are not those that the run began with; or the
                memory of the server or a client is missing or damaged.
        """
        lock = locked(path)
        ledger = Ledger.open(path / "ledger")
        before, began_with = load(path / EXPERIMENT), _digests(path)
        named = _with_names(began_with, before)
        _check_data(path, named, data, _other_date(before, experiment))
        ledger.check_base(base, f"model.path {experiment.model.path}")
        if ledger.trained != {name: list(shape) for name, shape in trained.items()}:
            raise UserError(f"{path / 'ledger' / INDEX} was altered: restore it from a copy")
        rows = read_rows(path)[: len(ledger) + 1]
        _check_participants(path, rows, ledger)
        clients = [name for name in data if name not in OF_TESTS]
        compared = all(named[name] and data[name] for name in clients)  # and found the same
        said = changes(
            before,
            experiment,
            len(ledger) + 1,
            same_examples=True if compared else None,
            same_test=same_data(began_with.get(TEST_DATA), data.get(TEST_DATA)),
            same_client_tests=same_data(began_with.get(CLIENT_TESTS), data.get(CLIENT_TESTS)),
        )
        directory = RunDirectory(path, ledger, lock, said)
        here = [name for name in clients if data[name]]
        for needed in directory.needed(experiment, here, len(ledger)):
            needed.memory.check(needed.since)
        # A network's server does not know its clients' digests, and must not forget them.
        kept = {name: began_with.get(name) for name, digest in data.items() if digest is None}
        directory.remove_later()  # of a rollback that was killed
        KeptTokens(path / TOKENS).forget()  # which have been read, if at all
        if experiment.data.client_test is None:
            began_with.pop(CLIENT_TESTS, None)
        _write_settings(path, experiment, began_with | data | kept)
        directory.write_rows(rows)
        return directory

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_rows(self.path)

    def write_row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with (self.path / METRICS_FILE).open("ab") as file:
            file.write(to_line(row))
            file.flush()
            os.fsync(file.fileno())

    def server_memory(self, round: int) -> RoundMemory:
        """The server's memory in a round."""
        return RoundMemory(self.path / "server", round, parent=self.ledger.parent)

    def noise_memory(self, bands: int, round: int) -> RoundMemory:
        """The memory of a round's noise, where it is correlated over so many rounds.

        Whoever reads the noise of all of them can take some away.
        """
        return RoundMemory(
            self.path / NOISE, round, parent=self.ledger.parent, stay=bands, is_secret=True
        )

    def memory(self, client: str, round: int) -> RoundMemory:
        """The memory of a client of this engine in a round."""
        counts = partial(self.ledger.took_part, client)
        return RoundMemory(self.client_folder(client), round, counts, self.ledger.parent)

    def client_folder(self, client: str) -> Path:
        """Folder of what a client of this engine keeps for itself."""
        return self.path / CLIENTS / client

    def needed(
        self, experiment: Experiment, clients: Iterable[str], after: int
    ) -> Iterator[Needed]:
        """Memories that a run needs to go on after a round.

        Args:
            experiment: says who remembers something.
            clients: those whose memory is in this directory.
            after: number of the round.
        """
        method, privacy = experiment.method, experiment.privacy
        if method.server_remembers:
            yield Needed(None, self.server_memory(after + 1), after, True)
        if privacy is not None and privacy.bands is not None:
            for round in range(max(1, after - privacy.bands + 2), after + 1):
                yield Needed(None, self.noise_memory(privacy.bands, round + 1), round, False)
        if method.clients_remember or experiment.training.keep_optimizer:
            rounds, rows = range(1, after + 1), self.rows()
            last = {name: n for n in rounds for name in self._took_part(n, rows)}
            for client in clients:
                memory = self.memory(client, after + 1)
                yield Needed(client, memory, last.get(client, 0), method.clients_may_forget)

    def _took_part(self, round: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Names of those whose updates are in an entry, as far as that is known here."""
        if not self.ledger.names_all(round):
            return self.ledger.participants(round)
        return list(rows[round]["participants"]) if round < len(rows) else []

    def remove_later(self) -> None:
        """Remove what is of rounds after the ledger's last, but for rows, logs and keys."""
        last = len(self.ledger)
        self.ledger.remove_later()
        for folder in [self.path / "server", self.path / NOISE, *(self.path / CLIENTS).glob("*/")]:
            RoundMemory(folder, last).remove_later()
        for folder in (self.path / "updates").glob("round-*/"):
            round = folder.name.removeprefix("round-")
            if round.isdecimal() and int(round) > last:
                shutil.rmtree(folder)

    def write_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write metrics.jsonl anew, with these rows."""
        with replacing(self.path / METRICS_FILE) as file:
            file.writelines(to_line(row) for row in rows)

    def keep_update(self, update: Update) -> None:
        """Keep a client's update, where the experiment asks for it."""
        folder = self.path / "updates" / f"round-{update.round:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{update.client}.safetensors") as file:
            update.write(file)


def test_digests(path: Path) -> dict[str, str]:
    """Digests of what a run was last scored on, by `OF_TESTS`; none where there is no run."""
    digests = _digests(path) if (path / DATA).exists() else {}
    return {name: digest for name in sorted(OF_TESTS) if (digest := digests.get(name)) is not None}


def examples_digest(path: Path, client: str) -> str | None:
    """Digest of the examples of a client that a run began with; None where it is not known here."""
    return _digests(path).get(client) if (path / DATA).exists() else None


def same_data(before: str | None, now: str | None) -> bool | None:
    """Whether two digests are of the same data; None where one is not known.

    Where one has more parts (`+`), as that of test data whose options are scored, what both have
    is compared.
    """
    if before is None or now is None:
        return None
    parts = zip(before.split("+"), now.split("+"), strict=False)
    return all(old == new for old, new in parts if old and new)


def clients_here(path: Path) -> list[str]:
    """Clients of a run whose data, and so whose memories, are in this place.

    Raises:
        UserError: data.json is missing or damaged.
    """
    return [name for name, digest in _digests(path).items() if digest and name not in OF_TESTS]


def _digests(path: Path) -> Digests:
    try:
        return _DIGESTS.validate_json((path / DATA).read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path / DATA} is missing or damaged: restore it from a copy") from None


def _with_names(began_with: Digests, experiment: Experiment) -> Digests:
    """Digests by client; of servers of version 0.1, which named no client, the names alone."""
    listed = experiment.data.clients
    if began_with.keys() - OF_TESTS or not isinstance(listed, list):
        return began_with
    return {c.name: None for c in listed if isinstance(c, ClientFile)} | began_with


def _other_date(before: Experiment, now: Experiment) -> str | None:
    """The day that chat templates wrote, and the other one that they are to write, if any."""
    texts = [each.data for each in (before, now) if each.data.prompt == "chat"]
    days = [text.template.date for text in texts if text.template.date is not None]
    return f"data.template.date={days[0]}, not {days[1]}" if len(set(days)) == 2 else None


def _check_data(path: Path, before: Digests, now: Digests, other_date: str | None) -> None:
    """Raise a `UserError` unless the clients, their order and their data are as before.

    Args:
        other_date: another day in the prompts, if any, which alone makes other examples of the same
            data.
    """
    old, new = ([name for name in each if name not in OF_TESTS] for each in (before, now))
    if gone := [name for name in old if name not in now]:
        raise UserError(
            f"--resume: {path} began with {_listed(gone)}, which now has no examples or is not "
            "named: give the same clients"
        )
    if added := [name for name in new if name not in before]:
        raise UserError(
            f"--resume: {path} began without {_listed(added)}, which is named now or has examples "
            "now: give the same clients"
        )
    if old != new:
        raise UserError(f"--resume: the clients stand in another order than when {path} began")
    for client in new:
        same = same_data(before[client], now[client])
        if not same and other_date:
            raise UserError(
                f"--resume: {path} was run with {other_date}: give the same, or another --out"
            )
        if same is False:
            raise UserError(f"--resume: the data of {client} have changed since {path} began")


def _check_participants(path: Path, rows: Sequence[Mapping[str, Any]], ledger: Ledger) -> None:
    """Raise a `UserError` unless rows name those who took part, as the ledger has them.

    Where it does not say who did, they have to be some of those who might have.
    """
    for row in rows[1:]:
        names, round = ledger.participants(row["round"]), row["round"]
        if ledger.names_all(round):
            names = [name for name in names if name in row["participants"]]
        if row["participants"] != names:
            raise UserError(
                f"{path / METRICS_FILE} was altered: its row of round {round} names other "
                "participants than the ledger; restore it from a copy"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _write_settings(path: Path, experiment: Experiment, data: Digests) -> None:
    with replacing(path / DATA) as file:
        file.write(json.dumps(data, indent=1).encode())
    with replacing(path / EXPERIMENT) as file:
        file.write(experiment.dump().encode())


def locked(path: Path) -> TextIO:
    """The lock of a run directory; it is free again when the file is closed or its process ends."""
    lock = (path / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{path} is being written to by another hedgerow process") from None
    return lock
