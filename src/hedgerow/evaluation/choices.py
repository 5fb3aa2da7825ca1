"""Multiple choice: which of a question's options the model finds most likely.

Options are compared as in lm-evaluation-harness: by the log-likelihood of their tokens after the
prompt (its `acc`), and by the same per character (its `acc_norm`).
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hedgerow.data import Encoder, Example, Row, Spool, Tokenized, learnt_from
from hedgerow.errors import UserError
from hedgerow.evaluation.cache import keeps_keys_only
from hedgerow.evaluation.likelihood import Float64, Int64, Tick, batch_losses
from hedgerow.model import max_positions
from hedgerow.workers import ALONE, Workers

if TYPE_CHECKING:
    from hedgerow.model import Model

Int32 = npt.NDArray[np.int32]

_LABELS = ("{letter}. {text}", "{text}", "{letter}")
"""How an output may name the right option, the surest first."""
_MOST_READINGS = 1000


@dataclass(frozen=True)
class Question:
    """The answers that a question offers, in full, and which of them is right."""

    candidates: tuple[str, ...]
    right: int


def read_question(row: Row) -> Question | None:
    """The question of a row, or None where its options cannot be told.

    A row offers its options in one of these forms:

    - a list of texts in `choices`, `options` or `endings` (HellaSwag), or a text each in columns A,
      B, C …; and `answer`, `answerKey` or `label`: the right one's index (from 0), letter, or text;
    - `choices` as {text: […], label: […]} (ARC) or {A: …, B: …}, or as a list of {label, text}, and
      the right one's label or text;
    - "Options: A. one, B. two" in the input (or at the end of the instruction), separated by commas
      or on lines of their own, and an output that ends with the right one: "The answer is: B. two",
      "two" or "B". The candidates are the output with the other options in its place.
    """
    if (offered := _offered(row)) is not None:
        return _explicit(*offered, _answer(row))
    text = f"{row.instruction}\n{row.input}"
    output = row.output.strip()
    _, found, options = text.rpartition("Options:")
    first = re.match(r"\s*A\.\s", options)
    if not (found and first):
        return None
    readings = itertools.islice(_readings(options[first.end() :], "A"), _MOST_READINGS)
    readable = [reading for reading in readings if len(reading) > 1 and all(reading)]
    for form in _LABELS:
        matches = [
            (labels, right)
            for labels in (_labels(form, reading) for reading in readable)
            for right, label in enumerate(labels)
            if output.endswith(label) and not output[: -len(label)][-1:].isalnum()
        ]
        if matches:
            # "D. this, E. coli" ends with both D and a false E: the longest label explains most.
            labels, right = max(matches, key=lambda match: len(match[0][match[1]]))
            lead = output[: len(output) - len(labels[right])]
            return Question(tuple(lead + label for label in labels), right)
    return None


_LISTS = ("choices", "options", "endings")
"""Columns that may hold a question's options."""
_ANSWERS = ("answer", "answerKey", "label")
"""Columns that may name the right one, the first before the others."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")


def _offered(row: Row) -> tuple[object, Sequence[str] | None] | None:
    """The options of a row, and their labels where it gives some; None where there are no options.

    Of a table's cells, a list is text: JSON, or as Python writes it.
    """
    columns = row.columns
    for column in _LISTS:
        if columns.get(column) is None:
            continue
        found = columns[column]
        if isinstance(found, str):
            found = _parsed(found)
            if column != "choices" and not isinstance(found, list | dict):
                continue
        if isinstance(found, list) and found and all(isinstance(each, dict) for each in found):
            found = {key: [each.get(key) for each in found] for key in ("text", "label")}
        if not isinstance(found, dict):
            return found, None
        if found.keys() == {"text", "label"}:
            return found["text"], _labels_of(found["label"])
        return list(found.values()), _labels_of(list(found))
    if columns.get("A") is None or columns.get("B") is None:
        return None
    letters = itertools.takewhile(columns.__contains__, map(chr, range(ord("A"), ord("Z") + 1)))
    return [columns[letter] for letter in letters], None


def _parsed(text: str) -> object:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _labels_of(found: object) -> Sequence[str]:
    return [str(label).strip() for label in found] if isinstance(found, list) else []


def _answer(row: Row) -> object:
    found = (row.columns.get(column) for column in _ANSWERS)
    return next((value for value in found if value not in (None, "")), row.output or None)


def _explicit(choices: object, labels: Sequence[str] | None, answer: object) -> Question | None:
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        return None
    texts = [_text(choice) for choice in choices]
    while texts and not texts[-1]:  # tables have as many columns as their longest row
        texts.pop()
    if len(texts) < 2 or not all(texts) or (labels is not None and len(labels) < len(texts)):
        return None
    right = _places(answer, texts, labels)
    # Where an answer could be read in two ways, it is not for us to choose.
    return Question(tuple(texts), right.pop()) if len(right) == 1 else None


def _text(value: object) -> str:
    """An option as text; empty where it is none."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _places(answer: object, texts: Sequence[str], labels: Sequence[str] | None) -> set[int]:
    """The options that an answer may mean."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # as a table with empty cells has whole numbers
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return set()
    said = str(answer).strip()
    if labels is not None:
        labelled = {place for place, label in enumerate(labels[: len(texts)]) if label == said}
        if labelled:
            return labelled
    elif isinstance(answer, int):
        return {answer} & set(range(len(texts)))
    same = {place for place, text in enumerate(texts) if text == said}
    if letter := _LETTER.fullmatch(said):
        return same | {ord(letter[1].upper()) - ord("A")} & set(range(len(texts)))
    if said.isdecimal() and labels is None:
        return same | {int(said)} & set(range(len(texts)))
    return same


def _readings(text: str, letter: str) -> Iterator[list[str]]:
    """All ways to read `text`, which follows "A. ", as options; the one with most options first.

    There may be several, since an option may hold what looks like the next one's letter.
    """
    following = chr(ord(letter) + 1)
    for mark in re.finditer(rf"[,\n]\s*{re.escape(following)}\.\s", text):
        for rest in _readings(text[mark.end() :], following):
            yield [text[: mark.start()].strip(), *rest]
    yield [text.strip()]


def _labels(form: str, options: Sequence[str]) -> list[str]:
    return [
        form.format(letter=chr(ord("A") + index), text=text).strip()
        for index, text in enumerate(options)
    ]


@dataclass(frozen=True, eq=False)
class Choices:
    """The questions of a test set, with their candidates as tokens."""

    questions: list[Question]
    rows: Int64
    """Shape (questions,): the row of the test set that each is from."""
    encoded: Tokenized
    """The candidates of all questions, one after another, each after its prompt and before EOS,
    whatever ends the template's answers; uncut."""
    skipped: int
    """Rows that are not here, because their options cannot be told."""

    @classmethod
    def prepare(
        cls,
        metric: str,
        name: str,
        rows: Sequence[Row],
        encoder: Encoder,
    ) -> Choices:
        """Find the questions among `rows`, and tokenise what they offer.

        Args:
            metric: name of the metric that asks them, for messages.
            name: where the rows are from, for messages.

        Raises:
            UserError: no row has options that can be told, or answers count from 1.
        """
        _check_counting(name, rows)
        read = [(number, read_question(row)) for number, row in enumerate(rows)]
        found = [(number, question) for number, question in read if question is not None]
        if not found:
            raise UserError(
                f"`evaluation.metrics`: {metric} finds no options in {name}: rows need "
                "`choices` (a list; or `options`, `endings`, or columns A, B …) with `answer` (an "
                "index from 0, a letter or a text; or `answerKey`, `label`), or an input with "
                "`Options: A. …, B. …` and an output that ends with the right one"
            )
        answered = [
            replace(rows[number], output=candidate)
            for number, question in found
            for candidate in question.candidates
        ]
        return cls(
            questions=[question for _, question in found],
            rows=np.array([number for number, _ in found]),
            # An end of several tokens, as of a newline and one more, would be a part of each.
            encoded=Spool().tokenize(
                name, answered, replace(encoder, writes_ends=False), sys.maxsize, "answer"
            ),
            skipped=len(rows) - len(found),
        )

    def digest(self) -> str:
        """SHA-256 of the options of each question, and of which one is right."""
        asked = [(question.candidates, question.right) for question in self.questions]
        return hashlib.sha256(json.dumps([self.rows.tolist(), asked]).encode()).hexdigest()


def _check_counting(name: str, rows: Sequence[Row]) -> None:
    """Raise a `UserError` where answers seem to count options from 1: each would be another's."""
    beyond = None
    for row in rows:
        offered, answer = _offered(row), _answer(row)
        if offered is None or offered[1] is not None or not isinstance(offered[0], Sequence):
            continue
        said = str(answer).strip()
        if not said.isdecimal() or said in map(str, offered[0]):
            continue
        if int(said) == 0:
            return
        if int(said) == len(offered[0]) and beyond is None:
            beyond = row.number, said
    if beyond is not None:
        raise UserError(
            f"{name}: row {beyond[0]}: the answer {beyond[1]} is none of {beyond[1]} options, "
            "since they count from 0, and no row's answer is 0: subtract 1, or give letters"
        )


def log_likelihoods(
    model: Model, choices: Choices, batch_size: int, tick: Tick, workers: Workers = ALONE
) -> tuple[list[Float64], int]:
    """The log-likelihood of each candidate after its prompt, without the EOS that would end it.

    A prompt goes through the model once, whatever the number of its candidates, where the model
    keeps keys and values alone; or else with each of them. It is cut on the left where it and the
    longest of them would not fit the model's positions.

    Returns:
        An array of shape (candidates,) for each question, and how many prompts were cut.
    """
    encoded = choices.encoded
    limit = max_positions(model.network)
    offered = [len(question.candidates) for question in choices.questions]
    firsts = np.cumsum([0, *offered[:-1]])
    prompts = encoded.prompt_lengths[firsts].astype(np.int64)
    longest = np.maximum.reduceat(encoded.lengths.astype(np.int64), firsts) - 1  # without EOS
    # A prompt's last token predicts a candidate's first, so it stays whatever happens.
    cuts = np.clip(longest - limit, 0, prompts - 1)

    def texts(question: int) -> tuple[Int32, list[Int32]]:
        """All of a prompt but its last token, and what follows it: that token and a candidate."""
        first, last = firsts[question], prompts[question] - 1
        head = encoded[first].tokens[cuts[question] : last]
        tails = [encoded[first + n].tokens[last:-1] for n in range(offered[question])]
        return head, [tail[: limit - len(head)] for tail in tails]

    fits = keeps_keys_only(model.network, min(int(longest.max()), limit))
    score = _shared if fits else _apart
    likelihoods: list[Float64] = [np.empty(0)] * len(offered)

    def scored(batch: list[int]) -> Float64:
        heads, tails = zip(*map(texts, batch), strict=True)
        return score(model.network, heads, tails)

    made = list(_batches(prompts - cuts, offered, batch_size))
    found = workers.map(scored, [batch for batch, _ in made])
    for (batch, options), sums in zip(made, found, strict=True):
        for question, sum_by_option in zip(batch, np.split(sums, len(batch)), strict=True):
            likelihoods[question] = -sum_by_option
        tick(options * len(batch))
    return likelihoods, int(np.count_nonzero(cuts))


def _batches(
    lengths: Int64, offered: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Questions with equally many options after prompts of equal length, and how many options.

    With equal lengths there is no padding in the cache, so no mask and no positions to set right.
    """

    def kind(question: int) -> tuple[int, int]:
        return -int(lengths[question]), offered[question]

    for (_, options), alike in itertools.groupby(sorted(range(len(offered)), key=kind), kind):
        questions = list(alike)
        size = max(1, batch_size // options)
        for start in range(0, len(questions), size):
            yield questions[start : start + size], options


def _shared(
    network: Any, heads: Sequence[Int32], tails: Sequence[Sequence[Int32]]
) -> npt.NDArray[np.float64]:
    """Losses of all tails, each after its head; the heads, of equal length, are read once."""
    cache = None
    if len(heads[0]):
        input_ids = torch.from_numpy(np.stack(heads).astype(np.int64)).to(network.device)
        # Without the output layer: nothing is predicted here.
        cache = network.base_model(input_ids=input_ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(tails[0]))
    examples = [Example(tail, 1, learnt_from(1, len(tail))) for each in tails for tail in each]
    sums, _ = batch_losses(network, examples, past_key_values=cache)
    return sums


def _apart(
    network: Any, heads: Sequence[Int32], tails: Sequence[Sequence[Int32]]
) -> npt.NDArray[np.float64]:
    """As `_shared`, with each tail's head read again."""
    examples = [
        Example(np.concatenate([head, tail]), start, learnt_from(start, len(head) + len(tail)))
        for head, each in zip(heads, tails, strict=True)
        for start in [len(head) + 1]
        for tail in each
    ]
    sums, _ = batch_losses(network, examples)
    return sums
