"""Multiple choice: which of a question's options the model finds most likely.

Options are compared as in lm-evaluation-harness: by the log-likelihood of their tokens after the
prompt (its `acc`), and by the same per character (its `acc_norm`).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hedgerow.data import Encoder, Example, Row, Spool, Tokenized
from hedgerow.errors import UserError
from hedgerow.evaluation.likelihood import Float64, Int64, Tick, batch_losses
from hedgerow.model import max_positions

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

    A row offers its options in one of two forms:

    - `choices`, a list of texts, and `answer`, the right one's index (from 0) or letter;
    - "Options: A. one, B. two" in the input (or at the end of the instruction), separated by commas
      or on lines of their own, and an output that ends with the right one: "The answer is: B. two",
      "two" or "B". The candidates are the output with the other options in its place.
    """
    if "choices" in row.columns:
        return _explicit(row.columns["choices"], row.columns.get("answer"))
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


def _explicit(choices: object, answer: object) -> Question | None:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        return None
    if isinstance(answer, str) and re.fullmatch("[A-Za-z]", answer.strip()):
        answer = ord(answer.strip().upper()) - ord("A")
    candidates = tuple(str(choice).strip() for choice in choices)
    if not isinstance(answer, int) or answer not in range(len(candidates)) or not all(candidates):
        return None
    return Question(candidates, answer)


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
    """The candidates of all questions, one after another, each after its prompt; uncut."""
    skipped: int
    """Rows that are not here, because their options cannot be told."""
    metric: str
    """Name of the metric that asks them, for messages."""

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
            UserError: no row has options that can be told.
        """
        read = [(number, read_question(row)) for number, row in enumerate(rows)]
        found = [(number, question) for number, question in read if question is not None]
        if not found:
            raise UserError(
                f"`evaluation.metrics`: {metric} finds no options in {name}: rows need "
                "`choices` (a list) with `answer` (an index or a letter), or an input with "
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
            encoded=Spool().tokenize(name, answered, encoder, sys.maxsize, "answer"),
            skipped=len(rows) - len(found),
            metric=metric,
        )


def log_likelihoods(
    model: Model, choices: Choices, batch_size: int, tick: Tick
) -> tuple[list[Float64], int]:
    """The log-likelihood of each candidate after its prompt, without the EOS that would end it.

    A prompt goes through the model once, whatever the number of its candidates. It is cut on the
    left where it and the longest of them would not fit the model's positions.

    Returns:
        An array of shape (candidates,) for each question, and how many prompts were cut.

    Raises:
        UserError: the model keeps no key-value cache.
    """
    encoded = choices.encoded
    limit = max_positions(model.network)
    offered = [len(question.candidates) for question in choices.questions]
    firsts = np.cumsum([0, *offered[:-1]])
    prompts = encoded.prompt_lengths[firsts].astype(np.int64)
    longest = np.maximum.reduceat(encoded.lengths.astype(np.int64), firsts) - 1  # without EOS
    # A prompt's last token predicts a candidate's first, so it stays whatever happens.
    cuts = np.clip(longest - limit, 0, prompts - 1)
    likelihoods: list[Float64] = [np.empty(0)] * len(offered)
    for batch, options in _batches(prompts - cuts, offered, batch_size):
        heads, tails = [], []
        for question in batch:
            first, last = firsts[question], prompts[question] - 1
            heads.append(encoded[first].tokens[cuts[question] : last])
            for candidate in range(first, first + options):
                tail = encoded[candidate].tokens[last:-1]
                tails.append(Example(tail[: limit - len(heads[-1])], prompt_length=1, loss_from=1))
        cache = _read_once(model.network, heads, options, choices.metric)
        sums, _ = batch_losses(model.network, tails, past_key_values=cache)
        for question, sum_by_option in zip(batch, np.split(sums, len(batch)), strict=True):
            likelihoods[question] = -sum_by_option
        tick(len(tails))
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


def _read_once(network: Any, heads: Sequence[Int32], times: int, metric: str) -> Any:
    """The key-value cache after each of `heads` (of equal length), each repeated `times`."""
    if not len(heads[0]):
        return None
    input_ids = torch.from_numpy(np.stack(heads).astype(np.int64)).to(network.device)
    # Without the output layer: nothing is predicted here.
    output = network.base_model(input_ids=input_ids, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise UserError(
            f"`evaluation.metrics`: {metric} needs a key-value cache, which "
            f"{type(network).__name__} does not have: leave it out"
        )
    cache.batch_repeat_interleave(times)
    return cache
