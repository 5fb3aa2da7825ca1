"""hedgerow ledger: look at a run's entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hedgerow.cli.frame import (
    RunPath,
    ledger_app,
)

if TYPE_CHECKING:
    from hedgerow.wire import Entry


@ledger_app.command("show")
def ledger_show(run: RunPath) -> None:
    """Print the base and every entry: round, parent, participants, size.

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
                str(len(entry.participants)),
                console.size(record.bytes),
                _loss(entry),
            )
            for entry, record in zip(ledger.entries(), ledger.records, strict=True)
        ]
        header = ["round", "method", "hash", "parent", "clients", "size", "train loss"]
        console.table("", header, rows)


def _loss(entry: Entry) -> str:
    """Training loss in an entry, which a private run's does not say."""
    from hedgerow import console

    loss = entry.metrics.get("train_loss")
    return "" if loss is None else console.score(loss)


@ledger_app.command("verify")
def ledger_verify(run: RunPath) -> None:
    """Check every entry: size, hash, parent, order.

    Example: hedgerow ledger verify runs/first
    """
    from hedgerow import console
    from hedgerow.runs.opening import opened_ledger

    with opened_ledger(run) as ledger:
        count = sum(1 for _ in ledger.entries())
        console.out.print(f"{run}: {count} entries, all as they were appended")
