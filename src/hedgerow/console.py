"""What a person sees: live progress in a terminal, plain lines elsewhere, a summary at the end."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hedgerow.evaluation.metrics import Score, main_scores_of, metrics_of
from hedgerow.terminal import printable


class _Terminal(Console):
    """Rich's console, to which whatever is no text is escaped: see `hedgerow.terminal`."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; of tables, `table` has the texts escaped."""
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


# No markup: much of what is shown is what a client or a file has said.
out = _Terminal(highlight=False, markup=False)
if not out.is_terminal:
    out.width = 160  # a file has no edge at which a table would have to be folded


def is_watched() -> bool:
    """Whether there is somebody to show progress to: a terminal, or a notebook."""
    return out.is_terminal or out.is_jupyter


def _has_bars() -> bool:
    """Whether bars can move: in a terminal, or in a notebook with widgets."""
    return out.is_terminal or (out.is_jupyter and find_spec("ipywidgets") is not None)


TRAINING = Score("train_loss", label="train loss", unit="nats per token", direction="lower")
"""The clients' mean loss on their own data."""

AGGREGATION = Score("aggregation_error", label="aggregation error", direction="lower")
"""How far what was applied is from the weighted sum of the clients' updates, beside that sum."""


class ProgressWatcher:
    """Watches a run: bars in a terminal, and a line for each round everywhere.

    Use it as a context manager; the bars are there until it ends.
    """

    def __init__(self, title: str = "round", metrics: Sequence[str] = ()) -> None:
        """Begin with nothing done.

        Args:
            title: what stands before a round's number.
            metrics: names of the metrics whose main scores stand in a round's line.
        """
        self._title = title = printable(title)
        shown = [TRAINING, *main_scores_of(metrics).values(), AGGREGATION]
        self._shown = {score.key: score.label for score in shown}
        own = main_scores_of(metrics).values()
        self._shown |= {f"{s.key}_over_clients": f"clients' own {s.label}" for s in own}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=out,
            transient=True,
            disable=not _has_bars(),
            # In a notebook what is redirected to a display would be displayed by what it prints.
            redirect_stdout=out.is_terminal,
            redirect_stderr=out.is_terminal,
        )
        self._rounds = self._progress.add_task(title, total=None)
        self._clients = self._progress.add_task("clients", total=None)
        self._evaluation = self._progress.add_task("evaluation", total=None, visible=False)

    def __enter__(self) -> ProgressWatcher:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, sentence: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(sentence, soft_wrap=True)

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Start the clients' bar again."""
        self._progress.update(self._rounds, total=rounds, completed=round - 1)
        self._progress.reset(self._clients, total=clients)

    def client_finished(self, client: str, failure: str | None) -> None:
        """Advance the clients' bar; a failure is said at once."""
        self._progress.advance(self._clients)
        if failure is not None:
            self._progress.console.print(f"{client} failed: {failure}", style="yellow")

    def tries_again(self, clients: Sequence[str], seconds: float) -> None:
        """Say who is asked again, and when."""
        self._progress.console.print(
            f"updates are missing: {', '.join(clients)} will be asked again in {seconds:.0f} s",
            style="yellow",
        )

    def evaluated(self, done: int, total: int) -> None:
        """Show the evaluation's bar while it is needed."""
        visible = done < total
        self._progress.update(self._evaluation, completed=done, total=total, visible=visible)

    def round_ends(self, row: dict[str, Any]) -> None:
        """Print a line."""
        self._progress.update(self._rounds, completed=row["round"])
        scores = [f"{self._title} {row['round']}"]
        scores += [
            f"{label} {score(row[key])}"
            for key, label in self._shown.items()
            if row.get(key) is not None
        ]
        if row["bytes_up"]:
            scores.append(f"up {size(row['bytes_up'])}, down {size(row['bytes_down'])}")
        if row["seconds"] is not None:
            scores.append(f"{row['seconds']:.1f} s")
        self._progress.console.print(" · ".join(scores), soft_wrap=True)


def named_scores(row: dict[str, Any], metrics: Iterable[str]) -> dict[str, float]:
    """The scores in a row of metrics that are one number each, by their labels.

    Args:
        metrics: names of the metrics that were asked for.
    """
    found = {TRAINING.label: row.get(TRAINING.key)}
    for metric in metrics_of(metrics):
        if all(score.key in row for score in metric.scores):
            # Null in a row of metrics.jsonl, where it was measured, is what JSON has no number for.
            values = {score.label: row[score.key] for score in metric.scores}
            found |= {label: math.nan if v is None else v for label, v in values.items()}
    found[AGGREGATION.label] = row.get(AGGREGATION.key)
    return {label: value for label, value in found.items() if value is not None}


def score(value: float) -> str:
    """A score with four significant digits; errors near zero with two."""
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def size(count: int) -> str:
    """Bytes in decimal units, as `1.25 MB`."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g} {units[0]}"


def table(
    title: str, header: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: bool = True
) -> None:
    """Print a table; where it holds numbers, all columns but the first go to the right."""
    grid = Table(title=printable(title) or None, title_justify="left")
    for index, name in enumerate(header):
        grid.add_column(printable(name), justify="right" if numbers and index else "left")
    for row in rows:
        grid.add_row(*map(printable, row))
    out.print(grid)


def entry(head: str, text: str, *, indent: int) -> None:
    """Print a text beside its head, which has `indent` columns, or below a longer one.

    In a terminal lines end at its edge; elsewhere the text is one line, for whoever searches it.
    """
    begin = f"{head:<{indent}}" if len(head) < indent else f"{head}  "
    if not out.is_terminal:
        out.print(begin + " ".join(text.split()), soft_wrap=True)
        return
    out.print(_filled(text, begin, indent), soft_wrap=True)


def paragraphs(text: str, *, indent: int = 0) -> None:
    """Print a text's paragraphs, as wide as is easily read; what is set in is left as it is."""
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            out.print()
        if any(line.startswith(" ") for line in paragraph.splitlines()):
            out.print(textwrap.indent(paragraph, " " * indent), soft_wrap=True)
        else:
            out.print(_filled(paragraph, " " * indent, indent), soft_wrap=True)


def _filled(text: str, begin: str, indent: int) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width=max(min(out.width, _READABLE), indent + 20),
        initial_indent=begin,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


_READABLE = 100
"""Columns of a text, however wide the terminal is."""
