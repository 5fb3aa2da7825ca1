"""The page: what runs came to, in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from hedgerow import __version__, console
from hedgerow.audit.words import TITLE
from hedgerow.data import Records
from hedgerow.errors import UserError
from hedgerow.evaluation.metrics import Score
from hedgerow.experiment import Experiment, without_folders
from hedgerow.files import replacing
from hedgerow.reporting import by_client, charts, models, tables
from hedgerow.reporting.audits import audits
from hedgerow.reporting.gather import Series, gather, told
from hedgerow.reporting.sections import drawn_scores, rounds_of, sections, standing_in
from hedgerow.reporting.weights import weighed_otherwise
from hedgerow.runs.changes import flat
from hedgerow.runs.lender import Lender
from hedgerow.settings import TextSettings


def write(
    folders: Sequence[Path],
    out: Path,
    answers: int,
    target: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    lender: Lender | None = None,
    held: Mapping[Path, Records] | None = None,
) -> list[str]:
    """Write the page about the runs in `folders`.

    Args:
        folders: run directories, or folders of them, as `hedgerow compare` makes.
        out: the HTML file.
        answers: how many test questions to ask the models before and after.
        target: as in `tables.summarise`; if not given, that of the comparison.
        progress: told how many models were asked, of how many.
        lender: has the base model, where it is in memory.
        held: the test rows of runs, by their directories, where they are in memory.

    Returns:
        What could not be shown, and why.

    Raises:
        UserError: a folder has no run; or `out` cannot be written to.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that is there, as page.html")
    series = gather(folders)
    tables_told = told(folders)
    target = tables_told.target if target is None else target
    inspection = models.inspect(series, answers, progress, lender=lender, held=held)
    page = render(series, inspection, target, tables_told.failures)
    with replacing(out) as file:
        file.write(page.encode())
    return inspection.notes


def render(
    series: Sequence[Series],
    inspection: models.Inspection,
    target: float | None,
    failed: Sequence[str],
) -> str:
    """The page as HTML.

    Args:
        failed: what is known of runs that have left nothing.
    """
    rounds, drawn = rounds_of(series), drawn_scores(series)
    outcomes = [outcome for each in series for outcome in each.outcomes]
    table = tables.summarise(outcomes, target)
    scores = tables.compared(outcomes)
    shown = tables.shown(table, [], scores)
    keys = ["method", *tables.columns(table, scores), *(["failed"] if "failed" in shown else [])]
    experiments = _experiments(series)
    common = _common(experiments)
    abouts = {each.first.cell.experiment.about for each in series}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hedgerow.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        version=__version__,
        title=_title(series),
        series=[
            {"label": each.label, "summary": each.first.cell.experiment.method.summary}
            for each in series
        ],
        dashes=[charts.dash(index) for index in range(len(series))],
        shapes=[charts.shape(index)[1] for index in range(len(series))],
        about=abouts.pop() if len(abouts) == 1 else None,
        headline=_headline(series, table),
        header=list(shown.columns),
        rows=[
            [{"text": text, "value": row.get(key)} for key, text in zip(keys, texts, strict=True)]
            for row, texts in zip(table, shown.values.tolist(), strict=True)
        ],
        stopped=[
            *(f"{o.cell.method}, seed {o.cell.seed}: {o.failure}" for o in outcomes if o.failure),
            *failed,
        ],
        clients=[
            {
                "title": f"{each.score.label} of each client on its own test rows",
                "about": each.about,
                "header": list(each.shown.columns),
                "rows": each.shown.values.tolist(),
            }
            for each in by_client.tables(outcomes)
        ],
        sections=sections(series, inspection, rounds),
        numbers=_numbers(rounds, drawn),
        weighed=weighed_otherwise(series),
        audit_title=TITLE,
        audits=audits(series),
        without_folders=lambda sentence: _without_folders(sentence, series),
        questions=inspection.questions,
        standing_in=standing_in(series),
        notes=[_without_folders(note, series) for note in inspection.notes],
        shared=_yaml({key: experiments[0][key] for key in common}),
        own={
            each.label: _yaml({key: value for key, value in keys.items() if key not in common})
            for each, keys in zip(series, experiments, strict=True)
        },
    )


def _title(series: Sequence[Series]) -> str:
    outcomes = [outcome for each in series for outcome in each.outcomes]
    methods = {outcome.cell.experiment.method.name for outcome in outcomes}
    models = {Path(outcome.cell.experiment.model.path).name for outcome in outcomes}
    clients = max(
        len({name for row in outcome.rows for name in (*row["participants"], *row["failures"])})
        for outcome in outcomes
    )
    seeds = len({outcome.cell.seed for outcome in outcomes})
    if len(series) == 1:
        what = series[0].label
    elif len(series) == len(methods):
        what = f"{len(series)} methods"
    else:
        names = f"{len(methods)} methods" if len(methods) > 1 else next(iter(methods))
        what = f"{len(series)} settings of {names}"
    base = f"{len(models)} models" if len(models) > 1 else next(iter(models))
    return ", ".join(
        [f"{what} on {base}", f"{clients} clients", *([f"{seeds} seeds"] if seeds > 1 else [])]
    )


def _headline(series: Sequence[Series], table: Sequence[dict[str, Any]]) -> list[str]:
    """What the table says, in a sentence or two."""
    keys = {*TextSettings.model_fields, "client_test"} - {"loss_on"}
    data = [each.first.cell.experiment.data for each in series]
    tests = {(each.model_dump_json(include=keys), each.loss_on == "turns") for each in data}
    if len(tests) > 1:
        return ["Not all runs were scored on the same test data: their scores do not compare."]
    if len(series) == 1:
        return []
    said = []
    losses = [row for row in table if row.get("eval_loss") is not None]
    if losses:
        best = min(losses, key=lambda row: float(row["eval_loss"]))
        said.append(f"The lowest loss is {best['method']}'s, {console.score(best['eval_loss'])}.")
    frugal = [row for row in table if row.get("bytes_to_target")]
    if frugal:
        best = min(frugal, key=lambda row: float(row["bytes_to_target"]))
        said.append(
            f"The fewest bytes to a loss of {console.score(best['target'])} are "
            f"{best['method']}'s, {console.size(round(best['bytes_to_target']))} up and down."
        )
    return said


def _numbers(rounds: pd.DataFrame, drawn: Mapping[str, Score]) -> tuple[list[str], list[list[str]]]:
    """What is drawn by round, as a table: its header, and its rows."""
    keys = [key for key in drawn if rounds[key].notna().any()]
    means = rounds.groupby(["series", "round"], sort=False)[["bytes", "seconds", *keys]].mean()
    rows = [
        [name, str(round), console.size(int(row["bytes"])), f"{row['seconds']:.1f}"]
        + ["" if pd.isna(row[key]) else console.score(row[key]) for key in keys]
        for (name, round), row in means.iterrows()
    ]
    titles = [drawn[key].title for key in keys]
    return ["run", "round", "bytes up and down", "seconds", *titles], rows


def _without_folders(note: str, series: Sequence[Series]) -> str:
    """A sentence with the names alone of the files that the runs know."""
    cells = [each.first.cell for each in series]
    values = [cell.folder for cell in cells] + [
        value for cell in cells for value in flat(cell.experiment.model_dump(mode="json")).values()
    ]
    paths = [Path(value) for value in values if isinstance(value, str | Path)]
    folders = {f"{path.parent}/" for path in paths if path.is_absolute()}
    for folder in sorted(folders, key=len, reverse=True):
        note = note.replace(folder, "")
    return note


def _common(experiments: Sequence[dict[tuple[str, ...], Any]]) -> list[tuple[str, ...]]:
    """The keys that have one value in all experiments."""
    first, *others = experiments
    return [key for key in first if all(key in o and o[key] == first[key] for o in others)]


def _experiments(series: Sequence[Series]) -> list[dict[tuple[str, ...], Any]]:
    """The experiment of each series, of the run that stands for it, as flat keys."""
    portable = [_portable(each.first.cell.experiment) for each in series]
    return [flat(each.model_dump(mode="json", exclude={"tracking"})) for each in portable]


def _portable(experiment: Experiment) -> Experiment:
    """The experiment without the folders of the machine that it ran on."""
    experiment = without_folders(experiment)
    path = Path(experiment.model.path)
    model = experiment.model.model_copy(
        update={"path": path.name if path.is_absolute() else str(path)}
    )
    return experiment.model_copy(update={"model": model})


def _yaml(keys: dict[tuple[str, ...], Any]) -> str:
    nested: dict[str, Any] = {}
    for way, value in keys.items():
        inner = nested
        for part in way[:-1]:
            inner = inner.setdefault(part, {})
        inner[way[-1]] = value
    return yaml.safe_dump(nested, sort_keys=False, allow_unicode=True) if nested else ""
