"""hedgerow ledger: look at a run's entries, and take the last of them back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    RunPath,
    ledger_app,
)
from hedgerow.errors import UserError


@ledger_app.command("show")
def ledger_show(run: RunPath) -> None:
    """Show the base and every entry.

    Of an entry there are its round, method, hash, parent, clients, size and training loss.

    Example: hedgerow ledger show runs/first
    """
    from hedgerow import console
    from hedgerow.runs.opening import opened_ledger

    with opened_ledger(run) as ledger:
        base = ledger.base
        console.out.print(
            f"base {base.name}: {base.architecture}, {base.parameters:,} parameters, {base.dtype}, "
            f"fingerprint {base.fingerprint[:12]}"
        )
        rows = [
            (
                str(entry.round),
                entry.method,
                record.sha256[:12],
                entry.parent[:12],
                # Of those that are named it is not told who took part.
                f"{'of ' * entry.names_all}{len(entry.participants)}",
                console.size(record.bytes),
                # Private runs say none, and neither do entries of other programs.
                "" if (loss := entry.metrics.get("train_loss")) is None else console.score(loss),
            )
            for entry, record in zip(ledger.entries(), ledger.records, strict=True)
        ]
        header = ["round", "method", "hash", "parent", "clients", "size", "train loss"]
        console.table("", header, rows)


@ledger_app.command("verify")
def ledger_verify(
    run: RunPath,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Hash of the last entry that the ledger must have."),
    ] = None,
) -> None:
    """Check every entry, and print the last one's hash.

    Size, hash, parent and order of all entries are checked. The last one's hash stands for the
    whole history: whoever has it from somebody else, as from the coordinator or another site, sees
    with --head whether the ledger is the same.

    Example: hedgerow ledger verify runs/first
    """
    from hedgerow import console
    from hedgerow.runs.opening import opened_ledger

    if head is not None and not re.fullmatch("[0-9a-fA-F]{64}", head):
        raise UserError(f"--head {head}: give all 64 digits that `hedgerow ledger verify` prints")
    with opened_ledger(run) as ledger:
        count = sum(1 for _ in ledger.entries())
        if head is not None and head.lower() != ledger.head:
            raise UserError(
                f"{run} has another history: its head is {ledger.head}, not {head.lower()}, though "
                f"its {count} entries fit each other; restore it from a copy that has that head"
            )
        console.out.print(
            f"{run}: {count} entries, all as they were appended; head {ledger.head}",
            soft_wrap=True,
        )


@ledger_app.command("rollback")
def ledger_rollback(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.")],
    round: Annotated[
        int, typer.Option(min=0, help="Round to go back to; 0 is before training.")
    ] = ...,  # type: ignore[assignment]
) -> None:
    """Take a run back to what it was after a round.

    Entries, rows of metrics, kept updates and memories of later rounds are removed for good; the
    account of privacy is not. What cannot be restored is said. hedgerow run --resume goes on from
    there, and sites of a network follow.

    Example: hedgerow ledger rollback runs/first --round 3
    """
    from hedgerow import console
    from hedgerow.runs.rollback import roll_back

    for sentence in roll_back(run, round):
        console.out.print(sentence, soft_wrap=True)
    console.out.print(
        f"{run}: as it was after round {round}; hedgerow run EXPERIMENT.yaml --out {run} --resume "
        "goes on",
        soft_wrap=True,
    )
