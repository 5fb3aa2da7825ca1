"""Each client's scores on test rows of its own, by method: who is best for it, and who gains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from hedgerow import console
from hedgerow.comparison import Outcome
from hedgerow.evaluation.metrics import Score, main_scores_of
from hedgerow.files import replacing, to_json

BEST, GAINS = "*", "+"
"""Marks of the best score of a client, and of one that is better than what it has by itself."""


class Table(NamedTuple):
    """A score of each client by method, on test rows of its own; means over seeds."""

    score: Score
    values: dict[str, dict[str, float]]
    """By method, with its options, and client."""
    alone: str | None
    """The method in which clients train by themselves, if one is there."""

    @property
    def about(self) -> str:
        """What the marks mean, in a sentence or two."""
        said = (
            f"{self.score.label[:1].upper()}{self.score.label[1:]} of each client's model on test "
            f"rows of its own, after the last round; means over seeds. {BEST} is the best of a row"
        )
        if self.alone is None:
            return f"{said}."
        return f"{said}, {GAINS} better than {self.alone}, where the client trains by itself."

    @property
    def shown(self) -> pd.DataFrame:
        """The table for people: a row for each client, the mean of those that all methods scored,
        if there are any, and how many clients gain."""
        clients = list(dict.fromkeys(name for own in self.values.values() for name in own))
        lines: list[dict[str, str]] = []
        for client in clients:
            row = {m: own[client] for m, own in self.values.items() if client in own}
            lines.append({"client": client, **self._marked(row)})
        shared = [name for name in clients if all(name in own for own in self.values.values())]
        if shared:
            means = {m: fmean(own[c] for c in shared) for m, own in self.values.items()}
            some = f"the {len(shared)} clients that all methods scored"
            mean_of = "clients" if shared == clients else some
            lines.append({"client": f"mean of {mean_of}", **self._marked(means)})
        if self.alone is not None:
            gains = {m: str(self._gains(m)) for m in self.values if m != self.alone}
            lines.append({"client": "clients that gain", **gains})
        return pd.DataFrame(lines, columns=["client", *self.values]).fillna("")

    def _marked(self, row: dict[str, float]) -> dict[str, str]:
        best = min(row.values()) if self._lower else max(row.values())
        alone = row.get(self.alone or "")
        return {
            method: console.score(value)
            + (f" {GAINS}" if self._is_better(value, alone) else "")
            + (f" {BEST}" if value == best else "")
            for method, value in row.items()
        }

    def _gains(self, method: str) -> int:
        """Number of clients that have a better score than by themselves."""
        assert self.alone is not None
        alone = self.values[self.alone]
        return sum(self._is_better(v, alone.get(name)) for name, v in self.values[method].items())

    @property
    def _lower(self) -> bool:
        return self.score.direction != "higher"

    def _is_better(self, value: float, alone: float | None) -> bool:
        if alone is None:
            return False
        return value < alone if self._lower else value > alone


def tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """A table for each main score that clients have on test rows of their own.

    Args:
        outcomes: runs, of which those count that got to their end.
    """
    done = [outcome for outcome in outcomes if outcome.failure is None and outcome.rows]
    names = dict.fromkeys(n for each in done for n in each.cell.experiment.evaluation.metrics)
    found = []
    for key, score in main_scores_of(names).items():
        values = _values(done, f"{key}_by_client")
        if values:
            found.append(Table(score, values, _alone(done, values)))
    return found


def write(found: Sequence[Table], out: Path) -> None:
    """Write `clients.json` with all numbers, and `clients.md` for people; nothing of no table."""
    if not found:
        return
    numbers = [
        {"method": method, "client": client, table.score.key: value}
        for table in found
        for method, own in table.values.items()
        for client, value in own.items()
    ]
    texts = [
        f"{table.about}\n\n{table.shown.to_markdown(index=False, disable_numparse=True)}\n"
        for table in found
    ]
    for kind, text in (("json", to_json(numbers, indent=1) + "\n"), ("md", "\n".join(texts))):
        with replacing(out / f"clients.{kind}") as file:
            file.write(text.encode())


def _values(done: Sequence[Outcome], key: str) -> dict[str, dict[str, float]]:
    """Means over seeds, by method and client, of what the last rows have under a key."""
    found: dict[str, list[dict[str, Any]]] = {}
    for outcome in done:
        if own := outcome.rows[-1].get(key):
            found.setdefault(_label(outcome), []).append(own)
    return {
        label: {
            client: fmean(row[client] for row in rows)
            for client in rows[0]
            if all(row.get(client) is not None for row in rows)
        }
        for label, rows in found.items()
    }


def _alone(done: Sequence[Outcome], values: dict[str, dict[str, float]]) -> str | None:
    """The first method in which each client trains by itself."""
    for outcome in done:
        method = outcome.cell.experiment.method
        if not method.communicates and not method.pools_data and _label(outcome) in values:
            return _label(outcome)
    return None


def _label(outcome: Outcome) -> str:
    swept = [f"{key.rpartition('.')[2]}={v}" for key, v in outcome.cell.sweep.items()]
    return ", ".join([outcome.cell.method, *swept])
