"""MT-bench, second half: another model's judgments of answers, by any OpenAI-compatible endpoint.

Lianmin Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685:
each turn gets a rating from 1 to 10; or two models' answers are compared, once in either order, and
a verdict that changes with the order is a tie. Judgments are in the files of its authors' FastChat.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import openai
from pydantic import BaseModel, Field, ValidationError

from hedgerow.benchmarks import judge_prompts
from hedgerow.benchmarks.judge_prompts import Prompt
from hedgerow.benchmarks.mt_bench import Answer, Question, read_questions
from hedgerow.errors import InvalidMessage, UserError, readable
from hedgerow.files import appending_json_lines, read_json_lines
from hedgerow.runs.scoring import Progress

NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judges are given a right answer, as published."""
RATED = ("turn 1", "turn 2", "score")
COMPARED = ("wins", "ties", "losses", "win rate, %")
"""Columns of the reports."""
_LONGEST_JUDGMENT = 2048
"""Tokens, as published."""
_LARGEST_REPLY = 1_000_000
"""Bytes; a judgment of 2,048 tokens is a tenth of a percent of it."""
_ENCODINGS = ("identity", "gzip", "deflate")
"""Of replies: what a part that has arrived unpacks to, at most a thousand times its size."""
_RETRIES = 4
_SECONDS = 600
"""For a judgment, from the first try to the last byte of the last."""
_FATAL = {
    **dict.fromkeys((301, 302, 303, 307, 308), "give the URL that it redirects to"),
    401: "give the right key in {key}",
    403: "give a key in {key} that may use the model",
    404: "give the URL up to /v1, and a model that it serves",
}
"""What no other request would change, and what would."""

Winner = Literal["model_1", "model_2", "tie", "error"]


class Rating(BaseModel):
    """A line of single-answer judgments."""

    question_id: int | str
    model: str
    judge: tuple[str, str]
    """The judge's model, and the prompt's name."""
    user_prompt: str
    judgment: str
    score: Annotated[int | float, Field(ge=-1, le=10)]
    """Rating from 1 to 10, or -1 where the judgment holds none."""
    turn: int
    tstamp: float

    @property
    def asked(self) -> tuple[Any, ...]:
        """Key of the judgment: what the judge was asked, about what."""
        return (self.question_id, self.model, self.judge, self.turn, self.user_prompt)

    @property
    def is_read(self) -> bool:
        """Whether the judgment could be understood."""
        return self.score >= 0


class Match(BaseModel):
    """A line of pairwise judgments: game 1 shows model_1 as A, game 2 shows it as B."""

    question_id: int | str
    model_1: str
    model_2: str
    g1_winner: Winner
    g2_winner: Winner
    judge: tuple[str, str]
    g1_user_prompt: str
    g1_judgment: str
    g2_user_prompt: str
    g2_judgment: str
    turn: int
    tstamp: float

    @property
    def asked(self) -> tuple[Any, ...]:
        """Key of the judgment: what the judge was asked, about what."""
        models = (self.model_1, self.model_2)
        prompts = (self.g1_user_prompt, self.g2_user_prompt)
        return (self.question_id, models, self.judge, self.turn, prompts)

    @property
    def is_read(self) -> bool:
        """Whether both judgments could be understood."""
        return "error" not in (self.g1_winner, self.g2_winner)

    @property
    def winner(self) -> Winner:
        """Winner in both orders, else a tie."""
        return self.g1_winner if self.g1_winner == self.g2_winner else "tie"


Judgment = TypeVar("Judgment", bound=Rating | Match)
_Judgments = list[tuple[Question, Judgment]]


@dataclass(frozen=True)
class Report:
    """Result of `judge`."""

    header: tuple[str, ...]
    """Columns of `rows`."""
    rows: list[tuple[str, list[float | None]]]
    """The numbers of each category, and overall; None where there are no judgments."""
    total: int
    """Number of judgments that there should be."""
    cached: int
    """Judgments that were there already."""
    unread: int
    """Judgments that could not be understood, and do not count."""
    failures: list[str]
    """Reasons why judgments are missing."""
    without_reference: list[int | str]
    """Questions whose category needs a right answer, and that lack one for a turn."""


class Judge:
    """A model behind an endpoint, which may be asked several things at once while `connected`.

    Args:
        endpoint: the URL up to /v1.
        model: what the endpoint calls it.
        key: sent as a bearer token; local servers need none.
        key_name: the environment variable that it is from, for messages.
    """

    def __init__(self, endpoint: str, model: str, key: str | None, key_name: str) -> None:
        if not re.fullmatch(r"https?://[^/?#@\s][^?#@\s]*", endpoint):
            # It is not repeated, as there may be a password in it.
            raise UserError(
                "--endpoint: give a URL up to /v1, as http://localhost:8000/v1, with no user name "
                f"and no `?`; a key belongs into {key_name}"
            )
        self.endpoint, self.model = endpoint, model
        self._key, self._key_name = key, key_name
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UserError(
                f"{key_name}: contains characters that cannot be in a key: set it to the key alone"
            )

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Let it be asked until the block ends."""
        # The client wants some key; without one it would look for others in the environment.
        async with openai.AsyncOpenAI(
            base_url=self.endpoint,
            api_key=self._key or "none",
            max_retries=_RETRIES,
            default_headers={
                "Accept-Encoding": "identity",
                # Of an account elsewhere, whose names the client finds in the environment.
                **dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit()),
            },
            # What is judged goes to nobody but the endpoint that is named.
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [_bound]}
            ),
        ) as self._client:
            yield

    async def ask(self, prompt: Prompt) -> str:
        """The judgment, as text.

        Raises:
            UserError: the endpoint refuses the key, or has no such model.
            InvalidMessage: there is no usable answer in time, also after several tries.
        """
        try:
            async with asyncio.timeout(_SECONDS):
                body = await self._post(prompt)
            reply = _Reply.model_validate_json(body, strict=True)
        except TimeoutError:
            raise InvalidMessage(
                self._safe(f"{self.endpoint}: there is no whole answer after {_SECONDS} seconds")
            ) from None
        except openai.APIStatusError as error:
            reason = self._safe(f"{error.status_code}: {error.message}")
            if error.status_code in _FATAL:
                advice = _FATAL[error.status_code].format(key=self._key_name)
                raise UserError(
                    f"--endpoint {self.endpoint} refuses {self.model} ({reason}): {advice}"
                ) from None
            raise InvalidMessage(reason) from None
        except openai.APIConnectionError as error:
            reason = f"{error} {error.__cause__ or ''}".strip()
            raise InvalidMessage(self._safe(f"{self.endpoint}: {reason}")) from None
        except ValidationError:
            raise InvalidMessage("the answer is not a chat completion") from None
        return self._without_key(reply.choices[0].message.content)

    async def _post(self, prompt: Prompt) -> bytes:
        response = await self._client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            temperature=0,
            max_tokens=_LONGEST_JUDGMENT,
        )
        body: bytes = response.http_response.content
        return body

    def _without_key(self, text: str) -> str:
        """A stranger's text, which may repeat what it was sent."""
        return text.replace(self._key, "[key]") if self._key else text

    def _safe(self, text: str) -> str:
        return readable(" ".join(self._without_key(text).split()))[:300]


async def _bound(response: Any) -> None:
    """Let the client read no more than a reply's bytes, unpacked; of an error it would read all."""
    parts = response.aiter_bytes
    encoding = response.headers.get("content-encoding", "identity")

    async def aiter_bytes(*arguments: Any) -> AsyncIterator[bytes]:
        if encoding not in _ENCODINGS:
            raise InvalidMessage(f"the answer is packed as {encoding}, which is not read")
        size = 0
        async for part in parts(*arguments):
            size += len(part)
            if size > _LARGEST_REPLY:
                raise InvalidMessage(f"the answer has more than {_LARGEST_REPLY:,} bytes")
            yield part

    response.aiter_bytes = aiter_bytes


class _Message(BaseModel):
    content: Annotated[str, Field(min_length=1)]


class _Choice(BaseModel):
    message: _Message


class _Reply(BaseModel):
    """What is read of a chat completion."""

    choices: Annotated[list[_Choice], Field(min_length=1)]


@dataclass(frozen=True)
class _Single:
    """An answer to rate."""

    question: Question
    turn: int
    model: str
    prompt: Prompt

    def asked(self, judge: str) -> tuple[Any, ...]:
        """Key of its judgment."""
        by = (judge, self.prompt.name)
        return (self.question.question_id, self.model, by, self.turn, self.prompt.user)

    async def judged(self, judge: Judge) -> Rating:
        """Ask for a rating."""
        judgment = await judge.ask(self.prompt)
        return Rating(
            question_id=self.question.question_id,
            model=self.model,
            judge=(judge.model, self.prompt.name),
            user_prompt=self.prompt.user,
            judgment=judgment,
            score=rating(judgment),
            turn=self.turn,
            tstamp=time.time(),
        )


@dataclass(frozen=True)
class _Pair:
    """Two answers to compare, shown in either order."""

    question: Question
    turn: int
    models: tuple[str, str]
    prompts: tuple[Prompt, Prompt]

    def asked(self, judge: str) -> tuple[Any, ...]:
        """Key of its judgment."""
        by = (judge, self.prompts[0].name)
        users = (self.prompts[0].user, self.prompts[1].user)
        return (self.question.question_id, self.models, by, self.turn, users)

    async def judged(self, judge: Judge) -> Match:
        """Ask for both verdicts; none is asked for a second time where the first one fails."""
        first, second = [await judge.ask(prompt) for prompt in self.prompts]
        return Match(
            question_id=self.question.question_id,
            model_1=self.models[0],
            model_2=self.models[1],
            g1_winner=verdict(first, "model_1", "model_2"),
            g2_winner=verdict(second, "model_2", "model_1"),
            judge=(judge.model, self.prompts[0].name),
            g1_user_prompt=self.prompts[0].user,
            g1_judgment=first,
            g2_user_prompt=self.prompts[1].user,
            g2_judgment=second,
            turn=self.turn,
            tstamp=time.time(),
        )


def judge(
    answers: Path,
    questions: Path,
    out: Path,
    judge: Judge,
    *,
    against: Path | None = None,
    references: Path | None = None,
    parallel: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Have each answer rated, turn by turn; or compared with another model's, in both orders.

    Args:
        answers: a model's answers.
        questions: question.jsonl.
        out: the judgments, appended; what is there already is not asked again.
        against: another model's answers, to compare with.
        references: right answers, before those that stand in the questions.
        parallel: requests at once.
        progress: told how many judgments there are, of how many.

    Raises:
        UserError: naming what does not fit, or what the endpoint refuses.
    """
    asked = read_questions(questions)
    model, own = _read_answers(answers, asked)
    right = _References(references)
    lacking = [
        question.question_id
        for question in asked
        if question.category in NEED_REFERENCE and not (right(question, 1) and right(question, 2))
    ]
    if against is None:
        ratings = [
            _Single(q, turn, model, judge_prompts.single(q.turns[:turn], a[:turn], right(q, turn)))
            for q, a in zip(asked, own, strict=True)
            for turn in (1, 2)
        ]
        rated, cached, failures = _judge(ratings, Rating, out, judge, parallel, progress)
        unread = sum(not line.is_read for _, line in rated)
        rows = _rating_rows(rated)
        return Report(RATED, rows, len(ratings), cached, unread, failures, lacking)
    other, theirs = _read_answers(against, asked)
    if other == model:
        raise UserError(
            f"--against {against}: holds answers of {other} too: let one of the two be answered "
            "with another --model-id"
        )
    pairs = []
    for q, a, b in zip(asked, own, theirs, strict=True):
        for turn in (1, 2):
            shown, swapped = (
                judge_prompts.pair(q.turns[:turn], *both, right(q, turn))
                for both in ((a[:turn], b[:turn]), (b[:turn], a[:turn]))
            )
            pairs.append(_Pair(q, turn, (model, other), (shown, swapped)))
    compared, cached, failures = _judge(pairs, Match, out, judge, parallel, progress)
    unread = sum(not line.is_read for _, line in compared)
    rows = _match_rows(compared)
    return Report(COMPARED, rows, len(pairs), cached, unread, failures, lacking)


def _judge(
    cases: Sequence[Any],
    kind: type[Judgment],
    out: Path,
    judge: Judge,
    parallel: int,
    progress: Progress | None,
) -> tuple[_Judgments[Judgment], int, list[str]]:
    """The judgments there are, in the order of the cases; how many were there; what has failed."""
    failures = []
    with appending_json_lines(out, kind) as (lines, append):
        found = {line.asked: line for line in lines}
        missing = [case for case in cases if case.asked(judge.model) not in found]
        cached = len(cases) - len(missing)
        number = cached

        def take(case: Any, line: Judgment | InvalidMessage) -> None:
            nonlocal number
            number += 1
            if isinstance(line, InvalidMessage):
                where = f"question {case.question.question_id}, turn {case.turn}"
                failures.append(f"{where}: {line}")
            else:
                append(line)
                found[line.asked] = line
            if progress is not None:
                progress(number, len(cases))

        asyncio.run(_ask_all(missing, judge, parallel, take))
    keys = [(case.question, case.asked(judge.model)) for case in cases]
    return [(q, found[key]) for q, key in keys if key in found], cached, failures


async def _ask_all(
    cases: Sequence[Any],
    judge: Judge,
    parallel: int,
    take: Callable[[Any, Any], None],
) -> None:
    """Have all cases judged, `parallel` at once; each judgment, or why there is none, is taken.

    Not by threads, which could not be stopped while they wait for an answer.
    """
    free = asyncio.Semaphore(parallel)

    async def judged(case: Any) -> None:
        async with free:
            try:
                line = await case.judged(judge)
            except InvalidMessage as error:
                line = error
        take(case, line)

    async with judge.connected():
        asking = [asyncio.create_task(judged(case)) for case in cases]
        try:
            for ready in asyncio.as_completed(asking):
                await ready
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


def rating(judgment: str) -> int | float:
    """The first rating in a judgment, from 1 to 10; -1 where there is none."""
    number = r"([0-9]{1,2}(?:\.[0-9]{1,20})?)"
    found = re.search(rf"\[\[{number}\]\]", judgment) or re.search(rf"\[{number}\]", judgment)
    if found is None or not 1 <= float(found[1]) <= 10:
        return -1
    return float(found[1]) if "." in found[1] else int(found[1])


def verdict(judgment: str, a: Winner, b: Winner) -> Winner:
    """Winner by a judgment: `a`, `b`, a tie, or an error where it is not one verdict."""
    found = set(re.findall(r"\[\[([ABC])\]\]", judgment))
    winners: dict[str, Winner] = {"A": a, "B": b, "C": "tie"}
    return winners[found.pop()] if len(found) == 1 else "error"


def _rating_rows(rated: _Judgments[Rating]) -> list[tuple[str, list[float | None]]]:
    """The mean score of turn 1, of turn 2, and of both."""
    return [
        (title, [_mean([r.score for r in part if r.turn in turns]) for turns in ({1}, {2}, {1, 2})])
        for title, part in _by_category(rated)
    ]


def _match_rows(compared: _Judgments[Match]) -> list[tuple[str, list[float | None]]]:
    """Wins, ties and losses of model_1, and its win rate, with a tie as half a win."""
    *categories, overall = _by_category(compared)
    turns = [(f"turn {turn}", [m for m in overall[1] if m.turn == turn]) for turn in (1, 2)]
    rows: list[tuple[str, list[float | None]]] = []
    for title, part in [*categories, *turns, overall]:
        wins, ties, losses = (
            sum(match.winner == winner for match in part)
            for winner in ("model_1", "tie", "model_2")
        )
        rate = 100 * (wins + ties / 2) / len(part) if part else None
        rows.append((title, [wins, ties, losses, rate]))
    return rows


def _by_category(judgments: _Judgments[Judgment]) -> list[tuple[str, list[Judgment]]]:
    """The judgments that could be understood, by category and overall."""
    read = [(question.category, line) for question, line in judgments if line.is_read]
    categories = dict.fromkeys(question.category for question, _ in judgments)
    return [
        *((name, [line for category, line in read if category == name]) for name in categories),
        ("overall", [line for _, line in read]),
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _read_answers(path: Path, questions: Sequence[Question]) -> tuple[str, list[list[str]]]:
    """Who has answered, and the two answers to each of the questions."""
    lines = read_json_lines(path, Answer)
    models = sorted({line.model_id for line in lines})
    if len(models) != 1:
        held = f"answers of {', '.join(models)}" if models else "no answers"
        raise UserError(f"{path}: holds {held}: give one model's")
    by_question = {line.question_id: line.choices[0].turns for line in lines}
    for question in questions:
        if len(by_question.get(question.question_id, [])) != 2:
            raise UserError(
                f"{path}: has no two answers to question {question.question_id}: let the model "
                "answer all questions first"
            )
    return models[0], [by_question[question.question_id] for question in questions]


class _References:
    """The right answers, from a file of answers or from the questions.

    Args:
        path: of the answers, which come first; None for the questions alone.
    """

    def __init__(self, path: Path | None) -> None:
        lines = [] if path is None else read_json_lines(path, Answer)
        self._given = {line.question_id: line.choices[0].turns for line in lines}

    def __call__(self, question: Question, turn: int) -> list[str]:
        """To each turn up to this one; none where one is missing, or the category needs none."""
        if question.category not in NEED_REFERENCE:
            return []
        right = self._given.get(question.question_id, question.reference or [])[:turn]
        return right if len(right) == turn and all(text.strip() for text in right) else []
