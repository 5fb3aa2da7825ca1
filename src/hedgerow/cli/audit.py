"""hedgerow audit: what left each client, and what can be guessed from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import AsJson, Overrides, app
from hedgerow.files import to_json
from hedgerow.terminal import show


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.")],
    overrides: Overrides = None,
    client: Annotated[
        str | None, typer.Option(help="Client whose rows are looked for; all by default.")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Largest number of rows of a client, and of others, to try.")
    ] = 200,
    as_json: AsJson = False,
) -> None:
    """Say what left each client, and what the model tells of rows.

    Rows of clients whose data are here are compared with test rows. Canaries (hedgerow explain
    audit) give a lower bound of ε beside the promised one. All is kept in DIR/audit.json, which
    hedgerow report shows.

    Example: hedgerow audit runs/first
    """
    from hedgerow import console
    from hedgerow.audit import examining, words

    with console.ProgressWatcher("audit") as watcher:
        found = examining.audit(run, overrides or [], client, rows, progress=watcher.evaluated)
    if as_json:
        show(to_json(found.model_dump()))
        return
    for part in words.told(found):
        for sentence in part.sentences:
            console.paragraphs(sentence)
        if part.table is not None:
            console.table(part.table.title, part.table.header, part.table.rows)
        console.out.print()
    console.out.print(f"{run / 'audit.json'}: all of it, for programs", soft_wrap=True)
