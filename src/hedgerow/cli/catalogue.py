"""hedgerow methods, demo: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    app,
)


@app.command()
def methods() -> None:
    """List the methods and their papers.

    Example: hedgerow methods
    """
    from hedgerow import console
    from hedgerow.methods import METHODS

    rows = [(name, method.summary, method.reference) for name, method in METHODS.items()]
    console.table("", ["method", "what it does", "paper"], rows, numbers=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("demo-run"),
) -> None:
    """Train eight clients of different ranks on the built-in model, and compare methods.

    Example: hedgerow demo --out demo-run
    """
    from hedgerow import demo

    demo.run(out)
