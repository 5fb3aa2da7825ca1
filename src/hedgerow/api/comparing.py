"""`hr.compare` and `hr.report`: runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgerow import settings
from hedgerow.api.draft import PathLike, SectionLike, draft, plain
from hedgerow.api.running import watcher
from hedgerow.experiment import Experiment, validate
from hedgerow.names import MEMORY
from hedgerow.optional import check_installed
from hedgerow.workers import Workers

if TYPE_CHECKING:
    import pandas

    from hedgerow.api.runs import Run


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Runs of several methods, values and seeds on one experiment.

    Attributes:
        path: the comparison's directory, which `hr.report` takes.
        table: means over seeds: one row for each method and value, for computing with.
        shown: the same for people: named columns, rounded, with spreads.
        clients: by metric, scores of each client on test rows of its own, by method, for people.
        runs: each run that has begun, by its title (method, values and seed).
        failures: why a run did not get to its end, by its title.
        count: number of runs in all.
    """

    path: Path
    table: pandas.DataFrame
    shown: pandas.DataFrame
    clients: Mapping[str, pandas.DataFrame]
    runs: Mapping[str, Run]
    failures: Mapping[str, str]
    count: int

    def __repr__(self) -> str:
        return f"Comparison({str(self.path)!r}: {len(self.runs)} of {self.count} runs)"

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return str(self.shown.to_html(index=False))


def compare(
    experiment: PathLike | Experiment | Mapping[str, Any] | None = None,
    *overrides: str,
    out: PathLike,
    methods: Sequence[str] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | None = None,
    target: float | None = None,
    workers: int | str = 1,
    smoke: bool = False,
    progress: bool | None = None,
    model: Any = None,
    tokenizer: Any = None,
    clients: Any = None,
    test: Any = None,
    data: SectionLike | None = None,
    training: SectionLike | None = None,
    federation: SectionLike | None = None,
    privacy: SectionLike | None = None,
    audit: SectionLike | None = None,
    evaluation: SectionLike | None = None,
    tracking: SectionLike | None = None,
    rounds: int | None = None,
) -> Comparison:
    """Run several methods on one experiment, and put them beside each other.

    Called again, it does only what is missing. What is not said is as the file's `compare` says it.

    Args:
        experiment: as for `hr.run`, and so are `smoke`, `progress`, `model`, `tokenizer`,
            `clients`, `test`, `rounds` and the sections.
        overrides: `key.path=value`, for all runs.
        out: directory of the comparison.
        methods: name of each method, maybe with options: `["flora", "ferret over=lora"]`.
        sweep: values of each key that are tried: `{"training.learning_rate": [1e-3, 3e-3]}`.
        seeds: number of seeds each; they count up from `federation.seed`. 1 by default.
        target: loss that bytes and rounds are counted to.
        workers: number of a run's clients that train side by side, as for `hr.run`.

    Returns:
        The comparison; a run that failed does not stop the others.

    Raises:
        UserError: naming the method, option or key that is wrong.
    """
    sections = {
        "data": data,
        "training": training,
        "federation": federation,
        "privacy": privacy,
        "audit": audit,
        "evaluation": evaluation,
        "tracking": tracking,
    }
    drafted = draft(
        experiment,
        where="hr.compare",
        smoke=smoke,
        model=model,
        tokenizer=tokenizer,
        clients=clients,
        test=test,
        method=None,
        sections=sections,
        rounds=rounds,
    )
    from hedgerow import comparison

    said = drafted.comparison(overrides).model_dump()
    handed = {"methods": methods, "sweep": sweep, "seeds": seeds, "target": target}
    said |= {key: plain(value) for key, value in handed.items() if value is not None}
    given = validate(said, "hr.compare", settings.Comparison)
    cells = comparison.plan(
        drafted.load, overrides, given.methods, given.sweep, given.seeds, Path(out)
    )
    for cell in cells:
        if cell.experiment.model.path == MEMORY:
            drafted.check_model(cell.experiment)
    measured = dict.fromkeys(name for c in cells for name in c.experiment.evaluation.metrics)
    watch = partial(watcher, progress, metrics=list(measured))
    from hedgerow.api.base import BaseInMemory
    from hedgerow.api.runs import Run
    from hedgerow.reporting import by_client, tables

    base = None
    if drafted.network is not None:
        base = BaseInMemory(drafted.network, drafted.tokenizer)
    with nullcontext(None) if base is None else base.lent() as lender:
        held = drafted.held if drafted.has_rows else None
        outcomes = comparison.run(
            cells, watch, lender=lender, held=held, workers=Workers.of(workers)
        )
    table = tables.summarise(outcomes, given.target)
    people = tables.shown(table, list(cells[0].sweep), tables.compared(outcomes))
    tables.write(table, people, Path(out))
    of_clients = by_client.tables(outcomes)
    by_client.write(of_clients, Path(out))
    import pandas

    return Comparison(
        path=Path(out),
        table=pandas.DataFrame(table),
        shown=people,
        clients={each.score.label: each.shown for each in of_clients},
        runs={
            comparison.title(outcome.cell): Run(
                outcome.cell.folder, base=base, test=drafted.held.test
            )
            for outcome in outcomes
            if outcome.rows
        },
        failures={
            comparison.title(outcome.cell): outcome.failure
            for outcome in outcomes
            if outcome.failure is not None
        },
        count=len(outcomes),
    )


def report(
    *runs: PathLike | Run | Comparison,
    out: PathLike,
    answers: int = 5,
    target: float | None = None,
    progress: bool | None = None,
) -> list[str]:
    """Write one HTML page of charts, tables and answers about runs, which needs no network.

    Args:
        runs: runs or comparisons, or their directories.
        out: the HTML file.
        answers: number of test questions that are asked before and after; 0 asks none.
        target: loss that bytes and rounds are counted to.
        progress: whether to show what happens; None shows it in a terminal and in a notebook.

    Returns:
        What could not be shown, and why.

    Raises:
        UserError: one of them is no run, `out` cannot be written to, or what draws charts is not
            installed.
    """
    check_installed("a report page", "altair", "vl_convert")
    from hedgerow.api.runs import Run
    from hedgerow.reporting import page

    folders = [each.path if isinstance(each, Run | Comparison) else Path(each) for each in runs]
    opened = [run for each in runs for run in _runs_of(each)]
    bases = {id(run.base.network): run.base for run in opened if run.base is not None}
    held = {run.path: run.test for run in opened if run.test is not None}
    base = next(iter(bases.values())) if len(bases) == 1 else None
    with (
        watcher(progress, "models") as watching,
        nullcontext(None) if base is None else base.lent() as lender,
    ):
        return page.write(
            folders,
            Path(out),
            answers,
            target,
            watching.evaluated,
            lender=lender,
            held=held,
        )


def _runs_of(each: PathLike | Run | Comparison) -> list[Run]:
    """The runs that are open already."""
    from hedgerow.api.runs import Run

    if isinstance(each, Comparison):
        return list(each.runs.values())
    return [each] if isinstance(each, Run) else []
