"""hedgerow run, compare: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    Engine,
    ExperimentFile,
    Overrides,
    Smoke,
    Target,
    WorkersOption,
    advising,
    app,
)
from hedgerow.errors import RunFailed


@app.command()
def run(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run's directory, which this command makes.")] = ...,  # type: ignore[assignment]
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in --out.")
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="Where clients train: here, or in Flower's simulation.")
    ] = Engine.local,
    workers: WorkersOption = "1",
    smoke: Smoke = False,
) -> None:
    """Run an experiment.

    Its clients train, round by round; models are scored, and all is kept in --out.

    Example: hedgerow run experiment.yaml federation.rounds=3 --out runs/first
    """
    with advising(lambda: _how_to_go_on(out)):
        from hedgerow import api

        finished = api.run(
            experiment,
            *(overrides or []),
            out=out,
            resume=resume,
            engine=engine.value,
            workers=workers,
            smoke=smoke,
            progress=True,
        )
    _summarise(out, finished.experiment.evaluation.metrics)


@app.command()
def compare(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the tables.")] = ...,  # type: ignore[assignment]
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, with commas, each maybe with options: 'flora,ferret over=lora'."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY.PATH=A,B", help="Values of a key to try; may be given more than once."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of seeds to run each with, from federation.seed."),
    ] = None,
    target: Target = None,
    workers: WorkersOption = "1",
    smoke: Smoke = False,
) -> None:
    """Run several methods on one experiment, and compare them.

    What is not given here is as the file's key `compare` has it. Given again, the command does only
    what is missing.

    Example: hedgerow compare experiment.yaml --methods flora,fedit --seeds 3 --out comparison
    """
    with advising(lambda: "given again, the same command does what is missing"):
        from hedgerow import api, comparison, console
        from hedgerow.experiment import split_at

        found = api.compare(
            experiment,
            *(overrides or []),
            out=out,
            methods=None if methods is None else split_at(methods, ","),
            sweep=None if sweep is None else comparison.split_sweeps(sweep),
            seeds=seeds,
            target=target,
            workers=workers,
            smoke=smoke,
            progress=True,
        )
    from hedgerow.reporting import tables

    console.table("", found.shown.columns, found.shown.values.tolist())
    for label, clients in found.clients.items():
        title = f"{label} of each client on its own test rows (* best, + better than by itself)"
        console.table(title, clients.columns, clients.values.tolist())
    for title, failure in found.failures.items():
        console.out.print(f"{title}: {failure}", soft_wrap=True)
    files = ", ".join(f".{kind}" for kind in tables.FORMATS)
    console.out.print(
        f"the same in {out / 'comparison'}{files}; each run is in {out / 'runs'}\n"
        f"a page to look at: hedgerow report {out} --out page.html",
        soft_wrap=True,
    )
    if found.failures:
        raise RunFailed(
            f"{len(found.failures)} of {found.count} runs failed; given again, they go on"
        )


def _how_to_go_on(out: Path) -> str:
    """The sentence for who interrupts a run; empty where nothing of it is written yet."""
    try:
        from hedgerow.runs.directory import EXPERIMENT
    except ImportError:  # which is still being imported
        return ""
    if not (out / EXPERIMENT).exists():
        return ""
    return f"what is written in {out} is valid; the same command goes on from there with --resume"


def _summarise(out: Path, metrics: list[str]) -> None:
    from hedgerow import console
    from hedgerow.runs.rows import read_rows

    rows = read_rows(out)
    first, last = (console.named_scores(row, metrics) for row in (rows[0], rows[-1]))
    console.table(
        str(out),
        ["score", "before", f"after round {rows[-1]['round']}"],
        [
            (name, console.score(first[name]) if name in first else "", console.score(value))
            for name, value in last.items()
        ],
    )
    up, down = (sum(row[key] for row in rows) for key in ("bytes_up", "bytes_down"))
    seconds = sum(row["seconds"] or 0 for row in rows)
    console.out.print(
        f"{console.size(up)} up, {console.size(down)} down, {seconds:.0f} s; "
        f"next: hedgerow export {out} merged --to merged",
        soft_wrap=True,
    )
