"""MT-bench, first half: a model's answers to questions of two turns.

Lianmin Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685.
Questions, reference answers and answers are in the files of its authors' FastChat (`llm_judge`), so
that either side can be exchanged for theirs; `judging` is the second half.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, Field

from hedgerow.data import Encoder, Template, in_turns, load_template
from hedgerow.errors import UserError, which_client
from hedgerow.evaluation.answers import Draw, generate
from hedgerow.evaluation.likelihood import Tick
from hedgerow.files import appending_json_lines, read_json_lines
from hedgerow.model import max_positions
from hedgerow.runs.scoring import Progress, Subject, loaded
from hedgerow.seeds import Seeds

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Temperature of each category, as published; others are answered at that of writing."""

_Text = Annotated[str, Field(min_length=1)]


class Question(BaseModel):
    """A line of question.jsonl."""

    question_id: int | str
    category: str
    turns: tuple[_Text, _Text]
    reference: list[str] | None = None
    """The right answer of each turn; an empty one is none."""


class Choice(BaseModel):
    """One answer to both turns."""

    index: int = 0
    turns: list[str]


class Answer(BaseModel):
    """A line of a model's answers, and of reference answers."""

    question_id: int | str
    answer_id: str
    model_id: str
    choices: Annotated[list[Choice], Field(min_length=1)]
    tstamp: float


@dataclass(frozen=True)
class Answered:
    """Result of `answer`."""

    model_id: str
    prompt: str
    """The template: `chat` is the tokenizer's own."""
    max_new_tokens: int
    """Largest number of new tokens in a turn."""
    resumed: int
    """Number of answers that were there already."""
    answers: int
    """Number of answers that there are now."""
    cut: int
    """Number of prompts of new answers that were cut on the left."""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        UserError: it has none, a line is no question, or two have one number.
    """
    questions = read_json_lines(path, Question)
    seen = set()
    for question in questions:
        if question.question_id in seen:
            raise UserError(f"{path}: question {question.question_id} appears twice")
        seen.add(question.question_id)
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


@torch.inference_mode()
def answer(
    path: Path,
    overrides: list[str],
    round: int | None,
    client: str | None,
    questions: Path,
    out: Path,
    *,
    max_new_tokens: int = 1024,
    model_id: str | None = None,
    progress: Progress | None = None,
) -> Answered:
    """Let a run's model after a round, or a model from a folder, answer questions of two turns.

    The prompt is the tokenizer's chat template where it has one and `overrides` name no
    `data.prompt`, else the experiment's. An answer gets at most half of the model's positions, so
    that the other half can hold what it answers. Categories have the published temperatures; what
    is drawn depends on the run's seed and the question alone, so that an interrupted file goes on
    with the same answers.

    Args:
        path: a run directory, a packed ledger, or a model (or adapter) folder.
        questions: question.jsonl.
        out: the answers, appended; those that are there already are kept.
        model_id: what the model is called in the answers; its folder's name and the round if None.
        progress: told how many turns are answered, of how many.

    Raises:
        UserError: naming what does not fit, as answers of another model in `out`.
    """
    asked = read_questions(questions)
    with loaded(path, overrides, round, client) as it:
        if len(it.clients) > 1:
            raise which_client(it.name, it.clients)
        tokenizer = it.model.tokenizer
        is_chosen = any(override.startswith("data.prompt=") for override in overrides)
        prompt = "chat" if tokenizer.chat_template and not is_chosen else it.data.prompt
        template = load_template(it.data.model_copy(update={"prompt": prompt}), tokenizer)
        encoder = Encoder(template, tokenizer, it.model.vocabulary_size)
        model_id = model_id or "-".join([it.name, *it.clients])
        length = max(1, min(max_new_tokens, max_positions(it.model.network) // 2))
        ids = _answer_ids(it, asked, template, length)
        done, cut = 0, 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, 2 * len(asked))

        with appending_json_lines(out, Answer) as (before, append):
            for line in before:
                if (line.answer_id, line.model_id) != (ids.get(line.question_id), model_id):
                    raise UserError(
                        f"--out {out} has an answer to question {line.question_id} of another "
                        "model, round, question file or setting: name another file"
                    )
            answered = {line.question_id for line in before}
            size = it.evaluation.batch_size
            for _ in it.models():
                for first in range(0, len(asked), size):
                    # Always the same questions together, since what else is in a batch shows in
                    # the last digits of the logits.
                    batch = asked[first : first + size]
                    if answered.issuperset(question.question_id for question in batch):
                        tick(2 * len(batch))
                        continue
                    both, cut_here = _answer_both(it, batch, encoder, length, tick)
                    cut += cut_here
                    for question, turns in zip(batch, both, strict=True):
                        if question.question_id not in answered:
                            append(
                                Answer(
                                    question_id=question.question_id,
                                    answer_id=ids[question.question_id],
                                    model_id=model_id,
                                    choices=[Choice(turns=turns)],
                                    tstamp=time.time(),
                                )
                            )
    return Answered(model_id, prompt, length, len(before), len(asked), cut)


def _answer_both(
    it: Subject, questions: Sequence[Question], encoder: Encoder, length: int, tick: Tick
) -> tuple[list[list[str]], int]:
    """Each question's two answers, and how many prompts were cut."""
    answers: list[list[str]] = [[] for _ in questions]
    cut = 0
    for turn in (1, 2):
        rows = [
            in_turns([question.turns[0], *given, question.turns[1]][: 2 * turn - 1])
            for question, given in zip(questions, answers, strict=True)
        ]
        prompts = encoder.prompts(rows, "questions")
        new, cut_here = generate(
            it.model,
            [np.array(prompt, dtype=np.int32) for prompt in prompts],
            length,
            len(questions),
            tick,
            [_draw(it.seed, question, turn) for question in questions],
            ends=encoder.ends,
            stop=it.evaluation.stop,
        )
        cut += cut_here
        for given, text in zip(answers, new, strict=True):
            given.append(text.strip())
    return answers, cut


def _temperature(category: str) -> float:
    return TEMPERATURES.get(category, TEMPERATURES["writing"])


def _draw(seed: int, question: Question, turn: int) -> Draw | None:
    temperature = _temperature(question.category)
    generator = Seeds(seed).torch("mt-bench", question.question_id, turn)
    return Draw(temperature, generator) if temperature else None


def _answer_ids(
    it: Subject, questions: Sequence[Question], template: Template, length: int
) -> dict[int | str, str]:
    """A name for each answer that tells it from any other model's, round's or setting's.

    It is the digest of all that decides the answer, so that a file says by itself whether one may
    go on with it.
    """
    model = [it.entry or it.model.fingerprint(), *it.clients]
    ids = {}
    for question in questions:
        first, second = question.turns
        prompts = [template.prompt(in_turns(texts)) for texts in ([first], [first, "", second])]
        draw = [it.seed, _temperature(question.category)]
        ends = [it.evaluation.stop] if it.evaluation.stop else []
        content = json.dumps([model, question.question_id, prompts, length, draw, *ends])
        ids[question.question_id] = hashlib.sha256(content.encode()).hexdigest()[:32]
    return ids
