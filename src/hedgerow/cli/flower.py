"""hedgerow flower: take an experiment to real networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    ExperimentFile,
    Overrides,
    flower_app,
)
from hedgerow.optional import check_installed


@flower_app.command("init")
def flower_init(
    experiment: ExperimentFile,
    folder: Annotated[
        Path, typer.Argument(metavar="APP_DIR", help="The app's folder, which is made.")
    ],
    overrides: Overrides = None,
) -> None:
    """Write a Flower app for an experiment, which flwr run takes.

    The base model is read once, for its fingerprint; clients' files need not be here.

    Example: hedgerow flower init experiment.yaml app
    """
    from hedgerow import console
    from hedgerow import experiment as experiments

    check_installed("hedgerow flower", "flwr")
    loaded = experiments.load(experiment, overrides or [])
    # After a mistake has been found: it imports torch.
    from hedgerow.engines.flower import app as apps

    made = apps.init(loaded, folder, experiment.stem, say=console.out.print)
    console.out.print(
        f"{folder}: a Flower app for {', '.join(made.clients)}, whose base is {made.base.name} "
        f"({made.base.fingerprint[:12]}); next: flwr run {folder} SUPERLINK",
        soft_wrap=True,
    )
