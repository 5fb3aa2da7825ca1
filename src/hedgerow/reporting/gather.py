"""The runs that a page is about, found in folders and put together by what they differ in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hedgerow.comparison import Cell, Outcome
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, load
from hedgerow.runs.changes import flat
from hedgerow.runs.directory import EXPERIMENT
from hedgerow.runs.rows import METRICS_FILE, read_rows

_Key = tuple[str, ...]
_SEED: _Key = ("federation", "seed")


class Series(NamedTuple):
    """The runs of one method with one choice of options; they differ in their seeds."""

    label: str
    """The method's name, and the options in which it differs from others of that name."""
    outcomes: list[Outcome]

    @property
    def first(self) -> Outcome:
        """The run that stands for all where one has to: of the first seed that has most rounds."""
        return max(self.outcomes, key=lambda outcome: outcome.rows[-1]["round"])

    @property
    def counted(self) -> list[Outcome]:
        """The runs that means are taken of: those at their end; all where none is."""
        done = [outcome for outcome in self.outcomes if outcome.failure is None]
        return done or self.outcomes


def gather(folders: Iterable[Path]) -> list[Series]:
    """The series in `folders`, the lowest last loss first.

    Args:
        folders: run directories, or folders of them, as `hedgerow compare` makes.

    Raises:
        UserError: a folder has no run, or a run has not measured anything yet.
    """
    found = list(dict.fromkeys(run.resolve() for folder in folders for run in _runs_in(folder)))
    experiments = {run: load(run / EXPERIMENT) for run in found}
    together: dict[str, list[Path]] = {}
    for run, label in zip(found, labels(list(experiments.values())), strict=True):
        together.setdefault(label, []).append(run)
    series = []
    for label, runs in together.items():
        seeds = [experiments[run].federation.seed for run in runs]
        if len(set(seeds)) == len(seeds):
            runs.sort(key=lambda run: experiments[run].federation.seed)
            series.append(Series(label, [_outcome(label, run, experiments[run]) for run in runs]))
        else:  # the same experiment, run several times: before and after a change of the code, say
            above = os.path.commonpath(runs)
            series += [
                Series(name, [_outcome(name, run, experiments[run])])
                for run in runs
                for name in [f"{label} in {run.relative_to(above)}"]
            ]
    return sorted(series, key=_last_loss)


class Told(NamedTuple):
    """What the tables of comparisons tell of their runs."""

    failures: list[str]
    """Which cells failed; some of them have left no run."""
    target: float | None
    """The loss that bytes and rounds are counted to, if it is one."""


def told(folders: Iterable[Path]) -> Told:
    """What the tables in `folders` tell; nothing where there are none.

    Raises:
        UserError: a table is damaged.
    """
    failures, targets = [], set()
    for folder in folders:
        path = folder / "comparison.json"
        try:
            for row in json.loads(path.read_bytes()):
                targets.add(row.get("target"))
                if row["failed"]:
                    count = row["seeds"] + row["failed"]
                    failures.append(f"{row['method']}: {row['failed']} of {count} runs failed")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path} is damaged: give the comparison again, which writes it"
            ) from None
    return Told(failures, targets.pop() if len(targets) == 1 else None)


def labels(experiments: Sequence[Experiment]) -> list[str]:
    """Each experiment's method, with as few options as tell it from others of its name.

    Seeds are no options, and neither is who is told of the run. What is null where it is null
    unless somebody asks for more, as `privacy`, goes without saying.
    """
    flats = [
        flat(experiment.model_dump(mode="json", exclude={"tracking"})) for experiment in experiments
    ]
    names = [str(mine["method", "name"]) for mine in flats]
    alike = {
        name: [its for its, other in zip(flats, names, strict=True) if other == name]
        for name in set(names)
    }
    telling = {name: _telling(others) for name, others in alike.items()}
    words = []
    for name, mine, experiment in zip(names, flats, experiments, strict=True):
        asked = flat(experiment.model_dump(mode="json", exclude_defaults=True))
        options = [
            f"{key[-1]}={_short(mine.get(key), [other.get(key) for other in alike[name]])}"
            for key in telling[name]
            if mine.get(key) is not None or key in asked
        ]
        words.append(", ".join([name, *options]))
    return words


def _telling(flats: Sequence[Mapping[_Key, Any]]) -> list[_Key]:
    """The fewest keys that tell apart whatever differs (one after another, the most telling)."""
    keys = [key for key in dict.fromkeys(key for each in flats for key in each) if key != _SEED]
    chosen: list[_Key] = []

    def apart(keys: Sequence[_Key]) -> int:
        return len({tuple(repr(each.get(key)) for key in keys) for each in flats})

    def words(key: _Key) -> int:
        return sum(len(repr(each.get(key))) for each in flats)

    while apart(chosen) < apart(keys):
        chosen.append(
            max(keys, key=lambda key: (apart([*chosen, key]), key[0] == "method", -words(key)))
        )
    return chosen


def _runs_in(folder: Path) -> list[Path]:
    if (folder / METRICS_FILE).is_file() and (folder / EXPERIMENT).is_file():
        return [folder]
    # A comparison keeps its runs one level further down.
    found = [
        path.parent
        for pattern in ("*", "runs/*")
        for path in folder.glob(f"{pattern}/{METRICS_FILE}")
    ]
    if not found:
        raise UserError(
            f"{folder} has no run in it: give a run's directory, or a folder that hedgerow compare "
            "has made"
        )
    return sorted(found)


def _outcome(label: str, run: Path, experiment: Experiment) -> Outcome:
    rows = [_drawable(row) for row in read_rows(run)]
    if not rows:
        raise UserError(f"{run} has measured nothing yet: wait for its first round")
    last, planned = rows[-1]["round"], experiment.federation.rounds
    failure = None if last == planned else f"stopped after round {last} of {planned}"
    cell = Cell(label, {}, experiment.federation.seed, experiment, run)
    return Outcome(cell, rows, failure)


def _drawable(value: Any) -> Any:
    """A row of metrics, with � for characters that no drawing can have, as a name may."""
    if isinstance(value, dict):
        return {_drawable(key): _drawable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_drawable(each) for each in value]
    return _NOT_OF_XML.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


_NOT_OF_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 has not, section 2.2."""


def _last_loss(series: Series) -> float:
    losses = [outcome.rows[-1].get("eval_loss") for outcome in series.outcomes]
    return min((loss for loss in losses if loss is not None), default=float("inf"))


def _short(value: Any, others: Iterable[Any]) -> str:
    """A value in words: of a path, as few of its last parts as tell it from the others."""
    if not isinstance(value, str) or "/" not in value:
        return str(value)
    parts = value.split("/")
    ends = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    different = [other for other in others if isinstance(other, str) and other != value]
    return next(
        (end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in different)),
        value,
    )
