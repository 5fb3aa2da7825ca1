"""hedgerow run, compare: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hedgerow.cli.app import (
    Engine,
    Overrides,
    Smoke,
    app,
    check_installed,
)
from hedgerow.errors import RunFailed


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run's directory, made by this command.")] = ...,  # type: ignore[assignment]
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run in --out.")] = False,
    engine: Annotated[Engine, typer.Option(help="Where clients train.")] = Engine.local,
    smoke: Smoke = False,
) -> None:
    """Run an experiment.

    Example: hedgerow run experiment.yaml federation.rounds=3 --out runs/first
    """
    from hedgerow import console
    from hedgerow import experiment as experiments

    loaded = experiments.load(experiment, overrides or [], smoke=smoke)
    with console.ProgressWatcher() as watcher:
        if engine is Engine.local:
            from hedgerow.engines import local

            local.run(loaded, out, watcher, resume=resume, on_prepared=_say_prepared)
        else:
            check_installed("flwr", "Flower", "flower")
            from hedgerow.engines.flower import simulation

            simulation.run(loaded, out, watcher, resume=resume, on_prepared=_say_prepared)
    _summarise(out)


@app.command()
def compare(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where the runs and the tables go.")] = ...,  # type: ignore[assignment]
    methods: Annotated[
        str | None,
        typer.Option(help="With commas; each maybe with options: 'flora,ferret over=lora'."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY.PATH=A,B", help="Values to try; may be given more than once."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds each.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Count bytes and rounds to this loss.")
    ] = None,
    smoke: Smoke = False,
) -> None:
    """Run several methods on one experiment, and put them beside each other.

    What the options don't say is as the file's `compare` says it. Given again, it does only what is
    missing.

    Example: hedgerow compare experiment.yaml --methods flora,fedit --seeds 3 --out comparison
    """
    from hedgerow import comparison, console
    from hedgerow import experiment as experiments

    changes = overrides or []
    given = experiments.load_comparison(experiment, changes, smoke=smoke)
    names = given.methods if methods is None else experiments.split_at(methods, ",")
    sweeps = given.sweep if sweep is None else comparison.split_sweeps(sweep)
    count = given.seeds if seeds is None else seeds
    cells = comparison.plan(experiment, changes, names, sweeps, count, out, smoke=smoke)
    # After a mistake has been found: it imports pandas.
    from hedgerow.report import tables

    outcomes = comparison.run(cells, console.ProgressWatcher)
    table = tables.summarise(outcomes, given.target if target is None else target)
    people = tables.shown(table, list(cells[0].sweep))
    tables.write(table, people, out)
    console.table("", people.columns, people.values.tolist())
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    for outcome in failed:
        console.out.print(f"{comparison.title(outcome.cell)}: {outcome.failure}", soft_wrap=True)
    files = ", ".join(f".{kind}" for kind in tables.FORMATS)
    console.out.print(
        f"the same in {out / 'comparison'}{files}; each run is in {out / 'runs'}\n"
        f"a page to look at: hedgerow report {out} --out page.html",
        soft_wrap=True,
    )
    if failed:
        raise RunFailed(f"{len(failed)} of {len(outcomes)} runs failed; given again, they go on")


def _say_prepared(prepared: Any) -> None:
    from hedgerow import console

    shards = prepared.shards
    examples = sum(len(shard) for shard in shards.values())
    notes = f"{prepared.base.name}, {len(prepared.clients)} clients, {examples:,} examples"
    truncated = sum(shard.truncated for shard in shards.values())
    dropped = sum(shard.dropped for shard in shards.values())
    if truncated:
        notes += f", {truncated:,} cut at max_length"
    if dropped:
        notes += f", {dropped:,} dropped (no answer left within max_length)"
        for name, shard in shards.items():
            if shard.dropped > len(shard):
                notes += f"\n{name} keeps {len(shard):,} of {len(shard) + shard.dropped:,} examples"
    console.out.print(notes, soft_wrap=True)


def _summarise(out: Path) -> None:
    from hedgerow import console
    from hedgerow.runs.rows import read_rows

    rows = read_rows(out)
    first, last = console.main_scores(rows[0]), console.main_scores(rows[-1])
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
