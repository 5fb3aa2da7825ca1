"""hedgerow report, export: look at runs, and take their models along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    Dtype,
    Format,
    Overrides,
    RunPath,
    app,
)
from hedgerow.errors import UserError


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs, or comparisons.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = ...,  # type: ignore[assignment]
    answers: Annotated[
        int, typer.Option(min=0, help="Questions to ask before and after; 0 asks none.")
    ] = 5,
    target: Annotated[
        float | None, typer.Option(help="Count bytes and rounds to this loss.")
    ] = None,
) -> None:
    """Make one page of charts, tables and answers about runs, which opens without a network.

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
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder or file to make.")],
    overrides: Overrides = None,
    to: Annotated[Format, typer.Option(help="What to make.")] = ...,  # type: ignore[assignment]
    round: Annotated[int | None, typer.Option(help="The round, instead of the last.")] = None,
    client: Annotated[
        str | None, typer.Option(help="Whose model, where clients have their own.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut an adapter to its best approximation.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep this share of its energy.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the weights, instead of the run's.")
    ] = None,
) -> None:
    """Export a run's model: an adapter (peft), merged weights (transformers), or its ledger.

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
