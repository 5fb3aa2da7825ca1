"""hedgerow report, export: look at runs, and take their models along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    Dtype,
    Format,
    OfClient,
    Overrides,
    Round,
    RunPath,
    Target,
    app,
)
from hedgerow.errors import UserError


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs or comparisons.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = ...,  # type: ignore[assignment]
    answers: Annotated[
        int, typer.Option(min=0, help="Number of test questions to show answers to; 0: none.")
    ] = 5,
    target: Target = None,
) -> None:
    """Make one page of charts, tables and answers about runs.

    It is one HTML file, which opens from the disk and asks no network for anything.

    Example: hedgerow report comparison --out page.html
    """
    from hedgerow import api, console

    notes = api.report(*folders, out=out, answers=answers, target=target, progress=True)
    for note in notes:
        console.out.print(f"not shown: {note}", soft_wrap=True)
    console.out.print(f"{out}: {console.size(out.stat().st_size)}")


@app.command()
def export(
    run: RunPath,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder, or the file of a ledger, to make.")
    ],
    overrides: Overrides = None,
    to: Annotated[
        Format,
        typer.Option(
            help="What to make: an adapter for peft, merged weights for transformers, or all "
            "entries in one file."
        ),
    ] = ...,  # type: ignore[assignment]
    round: Round = None,
    client: OfClient = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank to cut the adapter to, by its best approximation."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of its squared singular values that a cut adapter keeps."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number type of the weights; the run's by default.")
    ] = None,
) -> None:
    """Export a run's model, or its ledger.

    Example: hedgerow export runs/first adapter --to adapter
    """
    from hedgerow import console, export

    changes = overrides or []
    if (rank is not None or energy is not None) and to != Format.adapter:
        raise UserError("--rank and --energy cut an adapter: use them with --to adapter")
    if dtype is not None and to == Format.ledger:
        raise UserError("--dtype is of weights: use it with --to adapter or --to merged")
    if to == Format.adapter:
        size = export.to_adapter(
            run, out, round, client, changes, rank=rank, energy=energy, dtype=dtype
        )
        served = _served(size.rank)
        console.out.print(
            f"{out}: an adapter of {size.matrices} matrices, rank {size.rank} ({served})",
            soft_wrap=True,
        )
    elif to == Format.merged:
        export.to_merged(run, out, round, client, changes, dtype=dtype)
        console.out.print(f"{out}: the whole model")
    else:
        if round is not None or client is not None:
            raise UserError(
                "a packed ledger has all rounds and clients: leave out --round, --client"
            )
        export.to_ledger(run, out, changes)
        console.out.print(f"{out}: {console.size(out.stat().st_size)}")


_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for, from its default on; adapters may have any rank up to them."""


def _served(rank: int) -> str:
    """What a server has to be told to take an adapter of this rank."""
    if rank > _VLLM_RANKS[-1]:
        return f"vLLM takes {_VLLM_RANKS[-1]} at most: --rank {_VLLM_RANKS[-1]} cuts to that"
    return f"vLLM: --max-lora-rank {next(most for most in _VLLM_RANKS if most >= rank)}"
