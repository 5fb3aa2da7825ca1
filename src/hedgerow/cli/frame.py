"""The command line's frame: its groups of commands, and the arguments that several share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from hedgerow import __version__
from hedgerow.terminal import show

# Where rich is installed typer escapes `[required]` for rich's markup, even with none in use; and
# without it, help needs not import rich.
typer.core.HAS_RICH = False


_make_argument = typer.core.TyperArgument.__init__


@functools.wraps(_make_argument)
def _with_help(self: typer.core.TyperArgument, *, help: str | None = None, **options: Any) -> None:
    """Make an argument whose help stays."""
    _make_argument(self, **options)
    self.help = help


# Arguments of click 8.4 and newer have a help of their own, which empties that of typer's, and
# commands a section of their own for it, beside typer's.
typer.core.TyperArgument.__init__ = _with_help  # type: ignore[method-assign]
typer.core.TyperCommand.format_arguments = lambda *_: None  # type: ignore[method-assign]


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
    help="Show, check or roll back a run's ledger.\n\nExample: hedgerow ledger verify runs/first",
    no_args_is_help=True,
    rich_markup_mode=None,
)


flower_app = typer.Typer(
    help="Take an experiment to a real network, with Flower.\n\n"
    "Example: hedgerow flower init experiment.yaml app",
    no_args_is_help=True,
    rich_markup_mode=None,
)


mt_bench_app = typer.Typer(
    help="Answer MT-bench's questions, and have the answers judged.\n\n"
    "Example: hedgerow mt-bench answer runs/first --questions question.jsonl --out answers.jsonl",
    no_args_is_help=True,
    rich_markup_mode=None,
)


app.add_typer(ledger_app, name="ledger")
app.add_typer(flower_app, name="flower")
app.add_typer(mt_bench_app, name="mt-bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE...",
        help="Changes of the experiment, as federation.rounds=3; hedgerow explain has the keys.",
    ),
]


ExperimentFile = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment file.")
]


Smoke = Annotated[
    bool, typer.Option("--smoke", help="Take the file's variant `smoke`, which takes seconds.")
]


WorkersOption = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="N|auto",
        help="Number of clients that train, or of batches that are scored, side by side, in one "
        "thread each; auto: as many as there are free processors. For models on the CPU.",
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


Round = Annotated[
    int | None, typer.Option(help="Round whose model it is; the last one by default.")
]


OfClient = Annotated[
    str | None, typer.Option(help="Client whose model it is, where each has one of its own.")
]


Target = Annotated[
    float | None, typer.Option(help="Also count the rounds and bytes that it takes to this loss.")
]


RunPath = Annotated[
    Path, typer.Argument(metavar="DIR", help="A run's directory, or its packed ledger.")
]


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
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and exit.")
    ] = False,
) -> None:
    if version:
        show(__version__)
        raise typer.Exit
