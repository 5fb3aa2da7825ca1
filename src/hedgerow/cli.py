"""The commands; each calls one function of the package and prints what it gives back."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import safetensors
import typer

from hedgerow import __version__
from hedgerow.environment import quieten
from hedgerow.errors import RunFailed, UserError

app = typer.Typer(
    help="Federated fine-tuning of large language models.\n\nTry it: hedgerow demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ledger_app = typer.Typer(
    help="Look at a run's ledger.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(ledger_app, name="ledger")
flower_app = typer.Typer(
    help="Run an experiment on real networks, with Flower.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(flower_app, name="flower")
mt_bench_app = typer.Typer(
    help="MT-bench: answer questions of two turns, and have the answers judged.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(mt_bench_app, name="mt-bench")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Change the experiment.")
]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="The file's variant of itself that takes seconds.")
]
RunPath = Annotated[Path, typer.Argument(metavar="DIR", help="A run, or its packed ledger.")]


class Engine(StrEnum):
    """Where clients train."""

    local = "local"
    flower = "flower"


class Format(StrEnum):
    """What an export is."""

    adapter = "adapter"
    merged = "merged"
    ledger = "ledger"


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
            _check_installed("flwr", "Flower", "flower")
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
    from hedgerow.report import tables

    changes = overrides or []
    given = experiments.load_comparison(experiment, changes, smoke=smoke)
    names = given.methods if methods is None else experiments.split_at(methods, ",")
    sweeps = given.sweep if sweep is None else comparison.split_sweeps(sweep)
    count = given.seeds if seeds is None else seeds
    cells = comparison.plan(experiment, changes, names, sweeps, count, out, smoke=smoke)
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


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs, or comparisons.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = ...,  # type: ignore[assignment]
    answers: Annotated[
        int, typer.Option(min=0, help="Questions to ask before and after; 0 asks none.")
    ] = 5,
    target: Annotated[
        float | None, typer.Option(help="Count bytes and rounds to this loss.")
    ] = None,
) -> None:
    """Make one page of charts, tables and answers about runs, which opens without a network.

    Example: hedgerow report comparison --out page.html
    """
    from hedgerow import console
    from hedgerow.report import page

    with console.ProgressWatcher("models") as watcher:
        notes = page.write(folders, out, answers, target, watcher.evaluated)
    for note in notes:
        console.out.print(f"not shown: {note}", soft_wrap=True)
    console.out.print(f"{out}: {console.size(out.stat().st_size)}")


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="DIR|MODEL", help="A run, or a model folder.")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="The test data, instead of the run's.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="With commas: loss, rouge_l, exact_match, final_answer, multiple_choice."
        ),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Also score each value of this column.")] = None,
    round: Annotated[int | None, typer.Option(help="The round, instead of the last.")] = None,
    client: Annotated[str | None, typer.Option(help="Whose model, of a standalone run.")] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS", help="Tasks of lm-eval instead of the test data; with commas."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with your own lm-eval tasks.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompts of lm-eval's tasks.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Questions of each lm-eval task; below 1, a share.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a run's model, or any causal language model in a folder, on test data.

    Example: hedgerow evaluate runs/first --data mmlu.jsonl --metrics multiple_choice --by class
    """
    from hedgerow import console
    from hedgerow import experiment as experiments

    if harness is not None:
        if (data, metrics, by) != (None, None, None):
            raise UserError("--harness brings data and metrics: leave out --data, --metrics, --by")
        names = [name.strip() for name in harness.split(",") if name.strip()]
        if not names or not (limit is None or 0 < limit < math.inf):
            raise UserError("--harness needs a task, as --harness mmlu, and --limit a question")
        _check_installed("lm_eval", "lm-eval", "harness")
        from hedgerow.evaluation import harness as lm_eval

        found = lm_eval.score_target(
            *(target, overrides or [], round, client, names),
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
        )
        if as_json:
            print(json.dumps(found))
        else:
            _say_harness(str(target), found)
        return
    if (include_path, num_fewshot, limit) != (None, None, None):
        raise UserError("--include-path, --num-fewshot and --limit belong to --harness")
    from hedgerow.evaluation.targets import score_target

    changes = list(overrides or [])
    if data is not None:
        changes = [*experiments.DEFAULT_TEST, *changes, f"data.test={json.dumps(data)}"]
    if by is not None:
        changes.append(f"evaluation.by={json.dumps(by)}")
    if metrics is not None:
        changes.append(f"evaluation.metrics=[{metrics}]")
    with console.ProgressWatcher("evaluation") as watcher:
        scores = score_target(target, changes, round, client, watcher.evaluated)
    if as_json:
        print(json.dumps(scores))
        return
    rows = [(name, console.score(value)) for name, value in console.main_scores(scores).items()]
    console.table(str(target), ["score", "value"], rows)
    for key, values in scores.items():
        if key.endswith("_by"):
            rows = [(name, console.score(value)) for name, value in values.items()]
            console.table("", [by or "value", key.removesuffix("_by")], rows)
    for key in ("dropped", "truncated", "skipped"):
        if scores.get(key):
            console.out.print(f"{key}: {scores[key]} rows")


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder or file to make.")],
    overrides: Overrides = None,
    to: Annotated[Format, typer.Option(help="What to make.")] = ...,  # type: ignore[assignment]
    round: Annotated[int | None, typer.Option(help="The round, instead of the last.")] = None,
    client: Annotated[str | None, typer.Option(help="Whose model, of a standalone run.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut an adapter to its best approximation.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep this share of its energy.")
    ] = None,
) -> None:
    """Export a run's model: an adapter (peft), merged weights (transformers), or its ledger.

    Example: hedgerow export runs/first adapter --to adapter
    """
    from hedgerow import console, export

    changes = overrides or []
    if (rank is not None or energy is not None) and to != Format.adapter:
        raise UserError("--rank and --energy cut an adapter: use them with --to adapter")
    if to == Format.adapter:
        ranks = export.to_adapter(
            run, out, round, client, changes, rank=rank, energy=energy
        ).values()
        spread = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        console.out.print(f"{out}: an adapter of {len(ranks)} matrices, rank {spread}")
    elif to == Format.merged:
        export.to_merged(run, out, round, client, changes)
        console.out.print(f"{out}: the whole model")
    else:
        if round is not None or client is not None:
            raise UserError(
                "a packed ledger has all rounds and clients: leave out --round, --client"
            )
        export.to_ledger(run, out, changes)
        console.out.print(f"{out}: {console.size(out.stat().st_size)}")


@mt_bench_app.command("answer")
def mt_bench_answer(
    target: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder.")],
    overrides: Overrides = None,
    questions: Annotated[Path, typer.Option(help="FastChat's question.jsonl.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The answers; those that are there stay.")] = ...,  # type: ignore[assignment]
    round: Annotated[int | None, typer.Option(help="The round, instead of the last.")] = None,
    client: Annotated[str | None, typer.Option(help="Whose model, of a standalone run.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer; at most half of the model's positions.")
    ] = 1024,
    model_id: Annotated[
        str | None, typer.Option(help="The model's name in the answers, instead of the run's.")
    ] = None,
) -> None:
    """Answer MT-bench's questions, each of two turns.

    Given again, it goes on where it was.

    Example: hedgerow mt-bench answer runs/first --questions question.jsonl --out answers.jsonl
    """
    from hedgerow import console
    from hedgerow.evaluation import mt_bench

    with console.ProgressWatcher("answers") as watcher:
        done = mt_bench.answer(
            *(target, overrides or [], round, client, questions, out),
            max_new_tokens=max_new_tokens,
            model_id=model_id,
            progress=watcher.evaluated,
        )
    console.out.print(
        f"{out}: {done.answers} answers of {done.model_id} ({done.resumed} were there), prompt "
        f"{done.prompt}, at most {done.max_new_tokens} tokens a turn",
        soft_wrap=True,
    )
    if done.cut:
        console.out.print(f"{done.cut} prompts cut on the left to fit the model")


@mt_bench_app.command("judge")
def mt_bench_judge(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS.jsonl")],
    questions: Annotated[Path, typer.Option(help="FastChat's question.jsonl.")] = ...,  # type: ignore[assignment]
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible, as http://localhost:8000/v1.")
    ] = ...,  # type: ignore[assignment]
    model: Annotated[str, typer.Option(help="The judge, as the endpoint calls it.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The judgments; none is asked for twice.")] = ...,  # type: ignore[assignment]
    against: Annotated[
        Path | None, typer.Option(help="Compare with these answers, instead of rating.")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Right answers, before those in the questions.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    key_variable: Annotated[
        str, typer.Option(help="The environment variable with the endpoint's key, if it needs one.")
    ] = "OPENAI_API_KEY",
) -> None:
    """Have answers rated from 1 to 10, or compared with another model's, by a model.

    Given again, it asks only for what is missing.

    Example: hedgerow mt-bench judge answers.jsonl --questions question.jsonl
    --endpoint https://api.openai.com/v1 --model gpt-4 --out judgments.jsonl
    """
    from hedgerow import console

    _check_installed("openai", "openai", "judge")
    from hedgerow.evaluation import judging

    judge = judging.Judge(endpoint, model, os.environ.get(key_variable), key_variable)
    with console.ProgressWatcher("judgments") as watcher:
        report = judging.judge(
            *(answers, questions, out, judge),
            against=against,
            references=references,
            parallel=parallel,
            progress=watcher.evaluated,
        )
    if report.total > len(report.failures):
        rows = [
            (title, *("" if value is None else console.score(value) for value in values))
            for title, values in report.rows
        ]
        console.table(str(answers), ["category", *report.header], rows)
    if report.without_reference:
        ids = ", ".join(map(str, report.without_reference))
        console.out.print(f"judged without a right answer, as there is none: {ids}", soft_wrap=True)
    if report.unread:
        console.out.print(f"{report.unread} judgments could not be understood and do not count")
    console.out.print(
        f"{out}: {report.total - len(report.failures)} judgments, "
        f"{report.cached} of them were there",
        soft_wrap=True,
    )
    if report.failures:
        raise RunFailed(
            f"{len(report.failures)} of {report.total} judgments failed (as {report.failures[0]}); "
            "given again, they go on"
        )


@ledger_app.command("show")
def ledger_show(run: RunPath) -> None:
    """Print the base and every entry: round, parent, participants, size.

    Example: hedgerow ledger show runs/first
    """
    from hedgerow import console, runs

    with runs.opened(run, []) as (_, ledger):
        base = ledger.base
        console.out.print(
            f"base {base.name}: {base.architecture}, {base.parameters:,} parameters, {base.dtype}, "
            f"fingerprint {base.fingerprint[:12]}"
        )
        rows = [
            (
                str(entry.round),
                entry.method,
                record.sha256[:12],
                entry.parent[:12],
                str(len(entry.participants)),
                console.size(record.bytes),
                console.score(entry.metrics["train_loss"]),
            )
            for entry, record in zip(ledger.entries(), ledger.records, strict=True)
        ]
        header = ["round", "method", "hash", "parent", "clients", "size", "train loss"]
        console.table("", header, rows)


@ledger_app.command("verify")
def ledger_verify(run: RunPath) -> None:
    """Check every entry: size, hash, parent, order.

    Example: hedgerow ledger verify runs/first
    """
    from hedgerow import console, runs

    with runs.opened(run, []) as (_, ledger):
        count = sum(1 for _ in ledger.entries())
        console.out.print(f"{run}: {count} entries, all as they were appended")


@flower_app.command("init")
def flower_init(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")],
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="Made by this command.")],
    overrides: Overrides = None,
) -> None:
    """Write a Flower app for an experiment, for `flwr run`.

    Example: hedgerow flower init experiment.yaml app
    """
    from hedgerow import console
    from hedgerow import experiment as experiments

    _check_installed("flwr", "Flower", "flower")
    from hedgerow.engines.flower import app as apps

    loaded = experiments.load(experiment, overrides or [])
    made = apps.init(loaded, folder, experiment.stem)
    console.out.print(
        f"{folder}: a Flower app for {', '.join(made.clients)}, whose base is {made.base.name} "
        f"({made.base.fingerprint[:12]}); next: flwr run {folder} SUPERLINK",
        soft_wrap=True,
    )


@app.command()
def methods() -> None:
    """List the methods and their papers.

    Example: hedgerow methods
    """
    from hedgerow import console
    from hedgerow.methods import METHODS

    rows = [(name, method.summary, method.reference) for name, method in METHODS.items()]
    console.table("", ["method", "what it does", "paper"], rows, numbers=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("demo-run"),
) -> None:
    """Train eight clients of different ranks on the built-in model, and compare methods.

    Example: hedgerow demo --out demo-run
    """
    from hedgerow import demo

    demo.run(out)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """The entry point: mistakes become one sentence and an exit code."""
    quieten()
    try:
        app()
    except UserError as error:
        _stop(str(error), 2)
    except RunFailed as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted; what is written is valid, and a run goes on with --resume", 130)
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        _stop(f"{error.filename or 'the output'}: {error.strerror}; {_MENDABLE[error.errno]}", 2)
    except safetensors.SafetensorError as error:
        # safetensors wraps what the system says when it cannot write.
        _stop(f"the output could not be written: {error}", 2)


_MENDABLE = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT), "make room, then try again (a run goes on with --resume)"
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    "name a place that you may write to",
)
_MENDABLE[errno.EFBIG] = "raise the limit on file sizes (a run goes on with --resume)"


def _check_installed(module: str, name: str, extra: str) -> None:
    """Raise a `UserError` where an optional part is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{name} is not installed: pip install 'hedgerow[{extra}]'")


def _stop(sentence: str, code: int) -> None:
    print(f"hedgerow: {sentence}", file=sys.stderr)
    sys.exit(code)


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


def _say_harness(title: str, scores: dict[str, Any]) -> None:
    from hedgerow import console
    from hedgerow.evaluation.harness import table

    for name, part in {title: scores, **scores.get("by_client", {})}.items():
        rows = [
            (task, metric, console.score(value), "" if error is None else console.score(error))
            for task, metric, value, error in table(part)
        ]
        console.table(name, ["task", "metric", "value", "± stderr"], rows)
        if part.get("prompts_cut"):
            console.out.print(f"{part['prompts_cut']} prompts cut on the left to fit the model")


def _summarise(out: Path) -> None:
    from hedgerow import console
    from hedgerow.rundir import read_rows

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
