"""Several methods, and several values of any key, on one experiment: a grid of runs.

Each cell of the grid is a run of its own under `runs/`, as `hedgerow run` would make it. What is
done is not done again, so a comparison that was interrupted goes on where it was, and grows by
naming more methods, values or seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hedgerow.errors import RunFailed, UserError
from hedgerow.experiment import (
    Experiment,
    check_libraries,
    load,
    method_changes,
    split_at,
)
from hedgerow.runs.directory import EXPERIMENT, RunDirectory, test_digests
from hedgerow.runs.lender import Lender
from hedgerow.runs.rows import read_rows
from hedgerow.workers import ALONE, Workers

if TYPE_CHECKING:
    from hedgerow.data import Held
    from hedgerow.federation.fleet import Watcher
    from hedgerow.runs.lender import Lender
    from hedgerow.settings import TrackingSettings


_OWN = {"federation.seed": "--seeds", "method": "--methods", "method.name": "--methods"}
"""Keys that have an option of their own."""

_MOST_CELLS = 10_000
"""Largest number of cells: more would not end, and all are checked before the first one runs."""

_LONGEST = 120
"""Largest number of characters of a folder's name."""


class Cell(NamedTuple):
    """One run of a comparison."""

    method: str
    """Method as it was named, with its options."""
    sweep: dict[str, str]
    """The values of the keys that are swept."""
    seed: int
    experiment: Experiment
    folder: Path
    """Folder of the run."""


class Outcome(NamedTuple):
    """Outcome of a cell."""

    cell: Cell
    rows: list[dict[str, Any]]
    """Its metrics, as far as it got."""
    failure: str | None = None
    """Why it did not get to its end."""


def plan(
    load: Callable[[Sequence[str]], Experiment],
    overrides: Sequence[str],
    methods: Sequence[str],
    sweeps: Mapping[str, Sequence[str]],
    seeds: int,
    out: Path,
) -> list[Cell]:
    """The cells, each with its experiment, before anything runs.

    Args:
        load: gives the experiment that all cells share, with overrides.
        overrides: `key.path=value` for all of them.
        methods: a method's name each, maybe with options: `ferret over=lora`; those that name a key
            of another section (`fedkseed training.learning_rate=3e-7`) are for this method's cells.
        sweeps: the values of each key, as on the command line.
        seeds: how many; they count up from the experiment's.

    Raises:
        UserError: naming the method, option or key that is wrong; two cells are the same.
    """
    if not methods:
        raise UserError(
            "--methods: name at least one method, here or as `compare.methods` in the experiment"
        )
    overridden = {override.partition("=")[0] for override in overrides}
    for key in sweeps:
        if key in _OWN:
            raise UserError(f"a sweep of {key}: give {_OWN[key]} instead")
        if key in overridden:
            raise UserError(
                f"{key} is set and swept: leave one out, or try other values, as --sweep {key}=…"
            )
    count = len(methods) * math.prod(map(len, sweeps.values())) * seeds
    if count > _MOST_CELLS:
        raise UserError(
            f"methods, values and seeds make {count:,} runs, and a comparison has at most "
            f"{_MOST_CELLS:,}: compare fewer of them"
        )
    cells: list[Cell] = []
    for method in methods:
        named = " ".join(split_at(method, " "))
        chosen = method_changes(method)
        for change in chosen:
            key = change.partition("=")[0]
            if key in sweeps or key == "federation.seed":
                instead = "or leave its sweep out" if key in sweeps else "give --seeds instead"
                raise UserError(f"the method {method!r} sets {key}: leave that out, {instead}")
        for values in itertools.product(*sweeps.values()):
            settings = dict(zip(sweeps, values, strict=True))
            swept = [f"{key}={value}" for key, value in settings.items()]
            loaded = load([*overrides, *chosen, *swept])
            check_libraries(loaded)
            _check_tracking(loaded.tracking)
            for seed in range(loaded.federation.seed, loaded.federation.seed + seeds):
                federation = loaded.federation.model_copy(update={"seed": seed})
                seeded = loaded.model_copy(update={"federation": federation})
                folder = out / "runs" / _file_name(named, *swept, f"seed={seed}")
                cells.append(Cell(named, settings, seed, seeded, folder))
    same: dict[str, Cell] = {}
    for cell in cells:
        other = same.setdefault(cell.experiment.dump(), cell)
        if other is not cell:
            raise UserError(f"{title(other)} and {title(cell)} are the same: leave one out")
    return cells


def split_sweeps(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key, from `key.path=a,b` each."""
    found: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        if key in found:
            raise UserError(f"--sweep {key}: name all of its values at once")
        found[key] = split_at(values, ",")
        if not key or not found[key]:
            raise UserError(f"--sweep {sweep}: give a key and its values, as key.path=1,2,3")
    return found


def run(
    cells: Sequence[Cell],
    watch: Callable[[str], AbstractContextManager[Watcher]],
    *,
    lender: Lender | None = None,
    held: Held | None = None,
    workers: Workers = ALONE,
) -> list[Outcome]:
    """Run what is missing, one cell after another, on one model that is loaded once.

    A cell that fails doesn't stop the others.

    Args:
        cells: as planned.
        watch: makes the watcher of a cell's run, with this title.
        lender: has the base model where it is in memory already.
        held: the rows that the experiment calls `(memory)`.
        workers: who train a run's clients side by side.

    Raises:
        UserError: a cell's folder holds another experiment's run; or all cells have the same
            mistake, as a model that is not there. Nothing has been run.
    """
    # Not at the top: scoring and tracking import torch, which takes seconds, and a mistake in what
    # is to be compared should be told at once.
    from hedgerow.engines import local
    from hedgerow.runs.shelf import Shelf

    # What is in memory may be another than when a cell was done: its run compares digests.
    in_memory = lender is not None or held is not None
    for cell in cells:
        _check_scored_alike(cell)
    missing = [cell for cell in cells if in_memory or not _is_done(cell)]
    lender, shelf, failures = lender or Lender(), Shelf(), {}
    mistaken = 0
    said: set[str] = set()  # cells share their data, so that what is left out is said once
    for count, cell in enumerate(missing, start=1):
        with watch(f"[{count}/{len(missing)}] {title(cell)}, round") as watcher:
            try:
                scored_on = next(filter(None, (test_digests(each.folder) for each in cells)), {})
                model = lender.lend(cell.experiment.model)
                local.run(
                    _with_date(cell, cells),
                    cell.folder,
                    watcher,
                    resume=True,
                    model=model,
                    held=held,
                    scored_on=scored_on,
                    say=partial(_say_once, watcher, said),
                    workers=workers,
                    shelf=shelf,
                )
            except (UserError, RunFailed) as error:
                failures[cell.folder] = str(error)
                mistaken += isinstance(error, UserError)
    nothing = mistaken == len(cells) and not any(cell.folder.exists() for cell in cells)
    if nothing and len(reasons := set(failures.values())) == 1:
        raise UserError(*reasons)
    return [Outcome(cell, read_rows(cell.folder), failures.get(cell.folder)) for cell in cells]


def _with_date(cell: Cell, cells: Sequence[Cell]) -> Experiment:
    """A cell's experiment, with the day that its chat template was given in it or in another."""
    from hedgerow.runs.preparation import with_date_of  # not at the top, as `local` in `run`

    experiment = cell.experiment
    for other in [cell, *cells]:
        if other.experiment.model.path == experiment.model.path:
            experiment = with_date_of(experiment, other.folder)
    return experiment


def _say_once(watcher: Watcher, said: set[str], sentence: str) -> None:
    if sentence not in said:
        said.add(sentence)
        watcher.say(sentence)


def title(cell: Cell) -> str:
    """Description of a cell, in words."""
    values = [f"{key.rpartition('.')[2]}={value}" for key, value in cell.sweep.items()]
    return ", ".join([cell.method, *values, f"seed {cell.seed}"])


def _check_tracking(settings: TrackingSettings) -> None:
    """Raise a `UserError` where the cells cannot be tracked."""
    if settings.name is not None:
        raise UserError(
            "tracking.name: leave it out: a run of a comparison is called as its folder"
        )
    if settings.to:
        from hedgerow import tracking  # not at the top, as `local` in `run`

        tracking.check(settings)


def _is_done(cell: Cell) -> bool:
    """Whether a cell's run is there to its end, and model and data are where they were."""
    if not RunDirectory.check_resumable(cell.folder, cell.experiment):
        return False
    before, now = load(cell.folder / EXPERIMENT), _with_date(cell, [cell])
    rows = read_rows(cell.folder)
    # Of others it is to be seen, once, that they are the same.
    as_before = (before.model, before.data) == (now.model, now.data)
    return as_before and bool(rows) and rows[-1]["round"] == now.federation.rounds


def _check_scored_alike(cell: Cell) -> None:
    """Raise a `UserError` where a cell's run was scored otherwise than the others will be."""
    if not RunDirectory.check_resumable(cell.folder, cell.experiment):
        return
    before, now = (
        each.evaluation.model_dump(mode="json", exclude={"every", "batch_size"})
        for each in (load(cell.folder / EXPERIMENT), cell.experiment)
    )
    for key, value in now.items():
        if before[key] != value:
            raise UserError(
                f"{cell.folder} was scored with evaluation.{key}={before[key]!r}, not {value!r}: "
                "give the same, or another --out"
            )


def _file_name(*parts: str) -> str:
    """A folder's name that says what is in it, and is another for other parts."""
    whole = ",".join(parts)
    name = re.sub(r"[^A-Za-z0-9.,_=+-]", "-", whole.replace(" ", "-"))
    if len(name) <= _LONGEST and name == whole.replace(" ", "-"):
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
