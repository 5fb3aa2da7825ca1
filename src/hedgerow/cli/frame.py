"""The command line's frame: its groups of commands, and the arguments that several share."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hedgerow import __version__
from hedgerow.errors import UserError

app = typer.Typer(
    help="Federated fine-tuning of large language models.\n\nTry it: hedgerow demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ledger_app = typer.Typer(
    help="Look at a run's ledger.", no_args_is_help=True, rich_markup_mode=None
)


flower_app = typer.Typer(
    help="Run an experiment on real networks, with Flower.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


mt_bench_app = typer.Typer(
    help="MT-bench: answer questions of two turns, and have the answers judged.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


app.add_typer(ledger_app, name="ledger")
app.add_typer(flower_app, name="flower")
app.add_typer(mt_bench_app, name="mt-bench")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Change the experiment.")
]


Smoke = Annotated[
    bool, typer.Option("--smoke", help="The file's variant of itself that takes seconds.")
]


RunPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run, or its packed ledger.")]


class Engine(StrEnum):
    """Where clients train."""

    local = "local"
    flower = "flower"


class Format(StrEnum):
    """What an export is."""

    adapter = "adapter"
    merged = "merged"
    ledger = "ledger"


def check_installed(module: str, name: str, extra: str) -> None:
    """Raise a `UserError` where an optional part is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{name} is not installed: pip install 'hedgerow[{extra}]'")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
