"""Rollback: a run as it was after an earlier round, to go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, load
from hedgerow.ledger import Ledger
from hedgerow.runs.directory import DATA, EXPERIMENT, RunDirectory, clients_here, locked
from hedgerow.runs.memory import RoundMemory
from hedgerow.runs.opening import check_round

_NAMED = 5
"""Clients that are named in a sentence about several."""


def roll_back(path: Path, round: int) -> list[str]:
    """Take a run back to what it was after a round: ledger, rows, memories and kept updates.

    It counts from the moment at which ledger.json is replaced; what is then left of later rounds
    is removed, and after a kill a resumed run, or the same once more, removes the rest. Keys and
    accounts of privacy stay, since what was released stays released.

    Args:
        path: the run's directory.
        round: number of the round, 0 for the base.

    Returns:
        Sentences for people on what is not as it was: memories that are not kept any more, whose
        owners begin anew without them.

    Raises:
        UserError: there is no such run or round, another process has it open, a file of it is
            damaged, or somebody could not begin anew; nothing has been changed.
    """
    if path.is_file():
        raise UserError(f"{path} is a packed ledger: roll the run's directory back, and pack that")
    if not (path / EXPERIMENT).is_file():
        raise UserError(f"{path} is no run directory: it has no {EXPERIMENT}")
    if not (path / DATA).is_file():
        raise UserError(
            f"{path} has no {DATA}, as a site's copy of a run, which follows the coordinator's: "
            "roll that back"
        )
    with locked(path) as lock:
        experiment = load(path / EXPERIMENT)
        directory = RunDirectory(path, Ledger.open(path / "ledger"), lock)
        round = check_round(directory.ledger, round)
        for _ in directory.ledger.entries(round):
            pass  # what stays is whole
        rows, here = directory.rows()[: round + 1], clients_here(path)
        lost = _lost(directory, experiment, here, round)
        directory.ledger.truncate(round)
        directory.remove_later()
        directory.write_rows(rows)
        for memory in lost.values():
            memory.save({})
    return _sentences(experiment, list(lost), round, elsewhere=not here)


def _lost(
    directory: RunDirectory, experiment: Experiment, clients: Sequence[str], round: int
) -> dict[str | None, RoundMemory]:
    """Who has not kept what a run needs after a round, and where it would be; None is the server.

    Raises:
        UserError: somebody could not begin anew without it, or a file is damaged.
    """
    lost: dict[str | None, RoundMemory] = {}
    for client, memory, since, may_be_lost in directory.needed(experiment, clients, round):
        if not memory.lacks(since):
            memory.load()  # sees that it is whole
            continue
        if not may_be_lost:
            owner = "the server" if client is None else client
            wrong = "noise (privacy.bands)" if client is None else experiment.method.name
            raise UserError(
                f"--round {round}: what {owner} kept of round {since} is not there any more, "
                f"without which {wrong} would go wrong; the last two rounds are kept: give one of "
                "these, or 0"
            )
        lost[client] = (
            directory.server_memory(since) if client is None else directory.memory(client, since)
        )
    return lost


def _sentences(
    experiment: Experiment, lost: Sequence[str | None], round: int, *, elsewhere: bool
) -> list[str]:
    """Sentences on what is not as it was.

    Args:
        lost: who has to begin anew; None is the server.
        elsewhere: whether clients are sites of a network.
    """
    said = []
    clients = [client for client in lost if client is not None]
    owners = ["the server"] if None in lost else []
    if clients:
        more = f" and {len(clients) - _NAMED} more" if len(clients) > _NAMED else ""
        owners.append(", ".join(clients[:_NAMED]) + more)
    if owners:
        said.append(
            f"what {' and '.join(owners)} kept of rounds up to {round} is not there any more, as "
            "the last two rounds alone stay: they begin anew without it, and the run goes on "
            "otherwise than it did (after --round 0 it would not)"
        )
    remember = experiment.method.clients_remember or experiment.training.keep_optimizer
    if remember and elsewhere and round:
        said.append(
            "what clients kept of rounds up to then is at their sites, which say in their logs "
            "where it is not there any more"
        )
    if experiment.privacy is not None:
        said.append(
            "the account of privacy stays as it is: what was released of the rounds that are gone "
            "still counts"
        )
    return said
