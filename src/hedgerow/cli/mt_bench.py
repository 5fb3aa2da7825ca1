"""hedgerow mt-bench: answers to questions of two turns, and judgments of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hedgerow.cli.frame import (
    OfClient,
    Overrides,
    Round,
    advising,
    mt_bench_app,
)
from hedgerow.errors import RunFailed
from hedgerow.optional import check_installed

_GO_ON = "given again, the same command does what is missing"


@mt_bench_app.command("answer")
def mt_bench_answer(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="A run's directory, or a model's folder.")
    ],
    overrides: Overrides = None,
    questions: Annotated[
        Path, typer.Option(help="The questions, as FastChat's question.jsonl.")
    ] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="File of the answers; those in it stay.")] = ...,  # type: ignore[assignment]
    round: Round = None,
    client: OfClient = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest number of tokens of an answer; half of the model's positions at most.",
        ),
    ] = 1024,
    model_id: Annotated[
        str | None, typer.Option(help="Name of the model in the answers; the run's by default.")
    ] = None,
) -> None:
    """Answer MT-bench's questions, each of two turns.

    Given again, the command goes on where it was.

    Example: hedgerow mt-bench answer runs/first --questions question.jsonl --out answers.jsonl
    """
    from hedgerow import console
    from hedgerow.benchmarks import mt_bench

    with advising(lambda: _GO_ON), console.ProgressWatcher("answers") as watcher:
        done = mt_bench.answer(
            path=target,
            overrides=overrides or [],
            round=round,
            client=client,
            questions=questions,
            out=out,
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
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS.jsonl", help="The answers to judge.")],
    questions: Annotated[
        Path, typer.Option(help="The questions, as FastChat's question.jsonl.")
    ] = ...,  # type: ignore[assignment]
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible API, as http://localhost:8000/v1.")
    ] = ...,  # type: ignore[assignment]
    model: Annotated[str, typer.Option(help="Judge, by its name at the endpoint.")] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path, typer.Option(help="File of the judgments; none in it is asked for again.")
    ] = ...,  # type: ignore[assignment]
    against: Annotated[
        Path | None, typer.Option(help="Answers to compare with; without it, answers are rated.")
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(help="File of right answers, which go before those in the questions."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Number of requests at a time.")] = 4,
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that has the endpoint's key, if it needs one.")
    ] = "OPENAI_API_KEY",
) -> None:
    """Have a model rate answers from 1 to 10, or compare them.

    With --against, each is compared with another model's, in both orders. Given again, the command
    asks only for what is missing.

    Example: hedgerow mt-bench judge answers.jsonl --questions question.jsonl
    --endpoint https://api.openai.com/v1 --model gpt-4 --out judgments.jsonl
    """
    from hedgerow import console

    check_installed("hedgerow mt-bench judge", "openai")
    from hedgerow.benchmarks import judging

    judge = judging.Judge(endpoint, model, os.environ.get(key_variable), key_variable)
    with advising(lambda: _GO_ON), console.ProgressWatcher("judgments") as watcher:
        report = judging.judge(
            answers=answers,
            questions=questions,
            out=out,
            judge=judge,
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
