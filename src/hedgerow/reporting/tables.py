"""A comparison as a table: the mean and the spread over seeds, on the terminal and in files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from hedgerow import console
from hedgerow.comparison import Outcome
from hedgerow.evaluation.metrics import Score, main_scores_of, scores_of
from hedgerow.files import replacing, to_json

FORMATS = ("csv", "json", "md", "tex")


def summarise(outcomes: Sequence[Outcome], target: float | None = None) -> list[dict[str, Any]]:
    """One row for each method and values of swept keys, over its seeds.

    Args:
        outcomes: of all cells, with the seeds of one method and values after one another.
        target: the loss that `bytes_to_target` and `rounds_to_target` are about; if not given,
            the largest last loss of the runs that have learnt anything.

    Returns:
        `method`, the swept keys, `seeds` (how many got to the end), `failed`, and means over seeds,
        each with its spread (largest - smallest) under `…_spread` where there are several: the
        scores, `bytes_up`, `bytes_down`, `seconds`, and `target`, `rounds_to_target` and
        `bytes_to_target` (up and down together), which are None where a seed did not get there.
    """
    target = default_target(outcomes) if target is None else target
    measured = [s for s in compared(outcomes) if any(o.rows and s in o.rows[-1] for o in outcomes)]
    table = []
    for (method, sweep), group in groupby(outcomes, lambda o: (o.cell.method, o.cell.sweep)):
        together = list(group)
        done = [outcome.rows for outcome in together if outcome.failure is None and outcome.rows]
        row: dict[str, Any] = {"method": method, **sweep, "seeds": len(done)}
        row["failed"] = len(together) - len(done)
        for score in measured:
            row |= _over_seeds(score, [rows[-1].get(score) for rows in done])
        for key in ("bytes_up", "bytes_down", "seconds"):
            row |= _over_seeds(key, [sum(each[key] or 0 for each in rows) for rows in done])
        if target is not None:
            reached = [_to_target(rows, target) for rows in done]
            row["target"] = target
            row |= _over_seeds("rounds_to_target", [r and r[0] for r in reached])
            row |= _over_seeds("bytes_to_target", [r and r[1] for r in reached])
        table.append(row)
    return table


def default_target(outcomes: Iterable[Outcome]) -> float | None:
    """The largest last loss of the runs that have learnt anything; None where no loss is known."""
    ends = [
        (outcome.rows[0].get("eval_loss"), outcome.rows[-1].get("eval_loss"))
        for outcome in outcomes
        if outcome.failure is None and outcome.rows
    ]
    return max((end for begin, end in ends if begin and end and end < begin), default=None)


def compared(outcomes: Iterable[Outcome]) -> dict[str, Score]:
    """The scores that are compared where they were measured, after the last round, by their keys.

    The outcomes' metrics' main scores, the others of which one direction is better, and the means
    over clients of the main ones on their own test rows.
    """
    names = dict.fromkeys(
        name for each in outcomes for name in each.cell.experiment.evaluation.metrics
    )
    mains = main_scores_of(names)
    own = {
        f"{key}_over_clients": score._replace(key=f"{key}_over_clients", label=f"own {score.label}")
        for key, score in mains.items()
    }
    return {
        key: score
        for key, score in scores_of(names).items()
        if key in mains or (score.direction and not score.derived)
    } | own


def shown(
    table: Sequence[dict[str, Any]], keys: Sequence[str], scores: Mapping[str, Score]
) -> pd.DataFrame:
    """The table for people: rounded numbers, `mean ± half the spread`, bytes in their units.

    Args:
        table: as `summarise` gives it.
        keys: those that were swept.
        scores: as `compared` gives them.
    """
    names = columns(table, scores)
    # What some rows have was measured in all that got to their end, and may be no number.
    measured = {key for key in scores for row in table if row.get(key) is not None}
    lines = []
    for row in table:
        line = {"method": row["method"], **{key: row[key] for key in keys}}
        for key, name in names.items():
            is_nan = row[key] is None and row["seeds"] and key in measured
            line[name] = "nan" if is_nan else _shown(key, row[key], row.get(f"{key}_spread"))
        if any(each["failed"] for each in table):
            line["failed"] = str(row["failed"] or "")
        lines.append(line)
    return pd.DataFrame(lines)


def columns(table: Sequence[dict[str, Any]], scores: Mapping[str, Score]) -> dict[str, str]:
    """The numbers that people are shown, by their keys in the table, with their names."""
    names = {key: score.label for key, score in scores.items()}
    names |= {"bytes_up": "up", "bytes_down": "down", "seconds": "seconds"}
    target = next((row["target"] for row in table if "target" in row), None)
    if target is not None:
        names["rounds_to_target"] = f"rounds to {target:.4g}"
        names["bytes_to_target"] = f"bytes to {target:.4g}"
    return {key: name for key, name in names.items() if all(key in row for row in table)}


def write(table: Sequence[dict[str, Any]], people: pd.DataFrame, out: Path) -> None:
    """Write `comparison.csv` and `.json` with all numbers, `.md` and `.tex` for people."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = pd.DataFrame(table)
    texts = {
        "csv": numbers.to_csv(index=False),
        "json": to_json(table, indent=1) + "\n",
        "md": people.to_markdown(index=False, disable_numparse=True) + "\n",
        "tex": people.to_latex(index=False, escape=True),
    }
    for kind in FORMATS:
        with replacing(out / f"comparison.{kind}") as file:
            file.write(texts[kind].encode())


def _over_seeds(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean, and with several seeds the spread; None where one has no value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return {key: None}
    spread = {f"{key}_spread": max(known) - min(known)} if len(known) > 1 else {}
    return {key: fmean(known), **spread}


def _to_target(rows: Sequence[dict[str, Any]], target: float) -> tuple[int, int] | None:
    """The first round at or below a loss, and the bytes of all rounds up to it."""
    spent = 0
    for row in rows:
        spent += row["bytes_up"] + row["bytes_down"]
        loss = row.get("eval_loss")
        if loss is not None and loss <= target:
            return row["round"], spent
    return None


def _shown(key: str, mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    if key.startswith("bytes"):
        return console.size(round(mean))
    if key in ("seconds", "rounds_to_target"):
        return f"{mean:.4g}"
    return f"{mean:.4g}" + (f" ± {spread / 2:.2g}" if spread is not None else "")
