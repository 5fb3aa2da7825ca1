"""The command line's frame: its groups of commands, and the arguments that several share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from hedgerow import __version__
from hedgerow.terminal import show

# Where rich is installed typer escapes `[required]` for rich's markup, even with none in use; and
# without it, help needs not import rich.
typer.core.HAS_RICH = False

app = typer.Typer(
    help="Federated fine-tuning of large language models.\n\nTry it: hedgerow demo\n\n"
    "Every key of an experiment file: hedgerow explain",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ledger_app = typer.Typer(
    help="Look at a run's ledger, or take rounds back.\n\n"
    "Example: hedgerow ledger verify runs/first",
    no_args_is_help=True,
    rich_markup_mode=None,
)


flower_app = typer.Typer(
    help="Run an experiment on real networks, with Flower.\n\n"
    "Example: hedgerow flower init experiment.yaml app",
    no_args_is_help=True,
    rich_markup_mode=None,
)


mt_bench_app = typer.Typer(
    help="MT-bench: answer questions of two turns, and have the answers judged.\n\n"
    "Example: hedgerow mt-bench answer runs/first --questions question.jsonl --out answers.jsonl",
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


WorkersOption = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="N|auto",
        help="How many clients train, or batches are scored, side by side, in one thread each; "
        "auto: as many as there are free processors. CPU only.",
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


RunPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run, or its packed ledger.")]


advisers: list[Callable[[], str]] = []
"""What is asked, where a command is interrupted, for what its user should know."""


@contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """Have whoever interrupts the block told what `advice` returns then; an empty text is left out.

    Raises:
        KeyboardInterrupt: with that text, where there was one.
    """
    advisers.append(advice)
    try:
        yield
    except KeyboardInterrupt:
        # It stays: who interrupts again, while this ends the command, is told the same.
        raise KeyboardInterrupt(*filter(None, [advice()])) from None
    except BaseException:
        advisers.remove(advice)
        raise
    advisers.remove(advice)


class Engine(StrEnum):
    """Where clients train."""

    local = "local"
    flower = "flower"


class Format(StrEnum):
    """What an export is."""

    adapter = "adapter"
    merged = "merged"
    ledger = "ledger"


class Dtype(StrEnum):
    """Dtype of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        show(__version__)
        raise typer.Exit
