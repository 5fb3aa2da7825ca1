"""hedgerow evaluate: score a run's model, or one in a folder."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hedgerow.cli.frame import (
    AsJson,
    OfClient,
    Overrides,
    Round,
    WorkersOption,
    app,
)
from hedgerow.errors import UserError
from hedgerow.files import to_json
from hedgerow.optional import check_installed
from hedgerow.terminal import say, show

_LONGEST = 60
"""Largest number of characters of a group's name in a table."""


class Prompt(StrEnum):
    """Whose prompts questions of lm-eval are in."""

    task = "task"
    run = "run"


@app.command()
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="DIR|MODEL", help="A run's directory, or a model's folder.")
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="Test data, a file or a dataset; the run's by default.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics, with commas, as loss or your own package.module:Class; hedgerow explain "
            "evaluation.metrics has all."
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Column of which each value is scored by itself, too.")
    ] = None,
    round: Round = None,
    client: OfClient = None,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval, with commas, instead of test data."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Number of examples in the prompts of lm-eval's tasks."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            min=0, help="Number of questions of each lm-eval task; below 1, a share of them."
        ),
    ] = None,
    prompt: Annotated[
        Prompt,
        typer.Option(help="Prompts of lm-eval's tasks: as they are, or within those of the run."),
    ] = Prompt.task,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the tokenizer's chat template.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool,
        typer.Option("--fewshot-as-multiturn", help="Make each example a turn of its own."),
    ] = False,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            help="How answers to lm-eval's tasks are generated, as max_gen_toks=64,temperature=0.7 "
            "or as JSON; until, do_sample, top_p and top_k are known as well."
        ),
    ] = None,
    log_samples: Annotated[
        Path | None,
        typer.Option(help="New file for a line of JSON on each question of lm-eval's tasks."),
    ] = None,
    workers: WorkersOption = "1",
    as_json: AsJson = False,
) -> None:
    """Score a run's model, or a model in a folder, on test data.

    Example: hedgerow evaluate runs/first --data mmlu.jsonl --metrics multiple_choice --by class
    """
    from hedgerow import console

    if harness is not None:
        if (data, metrics, by) != (None, None, None):
            raise UserError("--harness brings data and metrics: leave out --data, --metrics, --by")
        if workers != "1":
            raise UserError("--workers: lm-eval's tasks are asked in one process: leave it out")
        names = [name.strip() for name in harness.split(",") if name.strip()]
        if not names or not (limit is None or 0 < limit < math.inf):
            raise UserError("--harness needs a task, as --harness mmlu, and --limit a question")
        check_installed("--harness", "lm_eval")
        from hedgerow.benchmarks import harness as lm_eval

        found = lm_eval.score_path(
            path=target,
            overrides=overrides or [],
            round=round,
            client=client,
            tasks=names,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            run_prompt=prompt is Prompt.run,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            gen_kwargs=gen_kwargs,
            log_samples=log_samples,
            say=say,
        )
        if as_json:
            show(to_json(found))
        else:
            _say_harness(str(target), found)
        return
    belonging = {
        "--include-path": include_path,
        "--num-fewshot": num_fewshot,
        "--limit": limit,
        "--prompt": prompt if prompt is not Prompt.task else None,
        "--apply-chat-template": apply_chat_template or None,
        "--fewshot-as-multiturn": fewshot_as_multiturn or None,
        "--gen-kwargs": gen_kwargs,
        "--log-samples": log_samples,
    }
    if given := [option for option, value in belonging.items() if value is not None]:
        raise UserError(f"{', '.join(given)}: of use with --harness TASKS only: add it")
    from hedgerow.evaluation.metrics import scores_of
    from hedgerow.runs.scoring import asked_for, score_path
    from hedgerow.workers import Workers

    named = None
    if metrics is not None:
        named = [name.strip() for name in metrics.split(",") if name.strip()]
    changes = asked_for(data, named, by, overrides or [])
    said: list[str] = []
    with console.ProgressWatcher("evaluation") as watcher:
        scores, asked = score_path(
            target,
            changes,
            round,
            client,
            watcher.evaluated,
            own_tests=data is None,
            say=said.append,
            workers=Workers.of(workers),
        )
    for sentence in said:
        say(sentence)
    if as_json:
        show(to_json(scores))
        return
    named_scores = console.named_scores(scores, asked).items()
    rows = [(label, console.score(value)) for label, value in named_scores]
    console.table(str(target), ["score", "value"], rows)
    for key, score in scores_of(asked).items():
        if own := scores.get(f"{key}_by_client"):
            own |= {"mean of clients": scores[f"{key}_over_clients"]}
            rows = [(name, console.score(value)) for name, value in own.items()]
            console.table("", ["client", f"{score.label} on its own test rows"], rows)
        if values := scores.get(f"{key}_by"):
            rows = [
                (
                    name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…",
                    console.score(value),
                )
                for name, value in values.items()
            ]
            console.table("", [by or "value", score.label], rows)
    for key in ("answer_prompts_cut", "choice_prompts_cut"):
        if scores.get(key):
            console.out.print(f"{scores[key]:g} prompts cut on the left to fit the model")


def _say_harness(title: str, scores: dict[str, Any]) -> None:
    from hedgerow import console
    from hedgerow.benchmarks.harness import table

    for name, part in {title: scores, **scores.get("by_client", {})}.items():
        rows = [
            (task, metric, console.score(value), "" if error is None else console.score(error))
            for task, metric, value, error in table(part)
        ]
        console.table(name, ["task", "metric", "value", "± stderr"], rows)
        if part.get("prompts_cut"):
            console.out.print(f"{part['prompts_cut']} prompts cut on the left to fit the model")
