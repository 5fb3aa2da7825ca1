"""The test set of a run, and what a model scores on it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from hedgerow.data import Example, Row, Spool, Tokenized, check_columns, load_template
from hedgerow.errors import UserError
from hedgerow.evaluation.answers import (
    GENERATED,
    exact_match,
    final_answer_match,
    generate,
    rouge_l,
)
from hedgerow.evaluation.choices import Choices, log_likelihoods
from hedgerow.evaluation.likelihood import Tick, losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgerow.model import Model
    from hedgerow.settings import EvaluationSettings, TextSettings

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TestSet:
    """Test rows as tokens, prepared once for all evaluations of a run."""

    __test__: ClassVar[bool] = False  # or pytest would collect it

    examples: Tokenized
    """The prompt and answer of every row, in the rows' order, uncut."""
    max_length: int
    """Tokens of prompt and answer that the loss sees."""
    scored: Int64
    """Shape (n,): the rows that have a loss."""
    references: list[str]
    """The right answer of each row, as text."""
    groups: list[str] | None
    """The value of the column `evaluation.by` in each row, where it is set."""
    choices: Choices | None
    """The questions among the rows, where `multiple_choice` is asked for."""

    @classmethod
    def prepare(
        cls,
        rows: Sequence[Row],
        settings: TextSettings,
        evaluation: EvaluationSettings,
        tokenizer: PreTrainedTokenizerBase,
    ) -> TestSet:
        """Check the rows for what `evaluation` asks of them, and tokenise them.

        Raises:
            UserError: there are no rows; a column is missing; `loss` is asked for and no prompt
                leaves room for an answer; `multiple_choice` is asked for and no row has options; or
                a prompt is empty where an answer is to follow it.
        """
        name = settings.test or "the test data"
        fields, metrics = settings.fields_of_test, set(evaluation.metrics)
        # Multiple choice alone needs no output: a question may name its answer otherwise.
        answered = (
            rows if metrics - {"multiple_choice"} else [{fields.output: ""} | r for r in rows]
        )
        check_columns(answered, fields, name)
        template = load_template(settings.prompt, tokenizer, fields)
        # Uncut, since a prompt that leaves no room for its answer's loss can still be answered.
        examples = Spool().tokenize(name, answered, template, tokenizer, sys.maxsize, "answer")
        if examples.dropped or (metrics - {"loss"} and not examples.prompt_lengths.all()):
            raise UserError(
                f"`data.test`: {name} has rows with an empty prompt, which no answer can follow: "
                "take them out, or choose another `data.prompt`"
            )
        scored = np.flatnonzero(examples.prompt_lengths < settings.max_length)
        if "loss" in metrics and not len(scored):
            raise UserError(
                f"`data.max_length`: no answer of {name} is left to measure a loss on, since every "
                f"prompt (the shortest has {examples.prompt_lengths.min()} tokens) fills "
                f"{settings.max_length} tokens: raise it"
            )
        choices = None
        if "multiple_choice" in metrics:
            choices = Choices.prepare(name, rows, fields, template, tokenizer)
        return cls(
            examples=examples,
            max_length=settings.max_length,
            scored=scored,
            references=[str(row[fields.output]) for row in answered],
            groups=None if evaluation.by is None else _column(rows, evaluation.by, name),
            choices=choices,
        )

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def truncated(self) -> int:
        """Rows that count for the loss, with answers cut at `data.max_length`."""
        return int((self.examples.lengths[self.scored] > self.max_length).sum())

    @property
    def dropped(self) -> int:
        """Rows that do not count for the loss, since their prompts fill `data.max_length`."""
        return len(self) - len(self.scored)

    @property
    def skipped(self) -> int:
        """Rows that do not count for multiple choice, since their options cannot be told."""
        return self.choices.skipped if self.choices else 0


@dataclass(frozen=True, eq=False)
class _Score:
    """A weighted mean over rows: sums / weights."""

    rows: Int64
    sums: npt.NDArray[np.float64]
    weights: npt.NDArray[np.floating | np.integer]

    def mean(self) -> float:
        return float(self.sums.sum() / self.weights.sum())

    def means_by(self, groups: Sequence[str]) -> dict[str, float]:
        values, index = np.unique([groups[row] for row in self.rows], return_inverse=True)
        means = np.bincount(index, self.sums) / np.bincount(index, self.weights)
        return dict(zip(values.tolist(), means.tolist(), strict=True))


@torch.inference_mode()
def evaluate(
    model: Model,
    test: TestSet,
    settings: EvaluationSettings,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What `model` scores on `test`, by the metrics that `settings` asks for.

    - `loss`: `eval_loss`, the mean cross-entropy of a token of an answer (nats; its EOS included),
      each token weighing the same whichever row it is from; `eval_perplexity`, its exponential.
    - `rouge_l`, `exact_match`, `final_answer`: of greedy answers, in percent. `answer_prompts_cut`
      counts prompts that had to be cut on the left to fit the model.
    - `multiple_choice`: `accuracy` and `accuracy_norm`, how often the right option has the highest
      log-likelihood (or the highest per character), and `accuracy_chance`, what guessing would
      score; in percent. `choice_prompts_cut` counts as above.

    With `settings.by`, there are also `eval_loss_by`, `rouge_l_by` …: a score for each value of
    that column, sorted by value.

    Args:
        test: prepared with these settings.
        progress: told how many forward passes or answers are done, of how many.

    Raises:
        UserError: the answers leave no room for prompts in the model's positions, or the model
            cannot be asked multiple choice.
    """
    model.network.eval()
    metrics = set(settings.metrics)
    generating = metrics & GENERATED
    choices = test.choices if "multiple_choice" in metrics else None
    total = len(test.scored) if "loss" in metrics else 0
    total += len(test) if generating else 0
    total += len(choices.encoded) if choices else 0
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    scores: dict[str, _Score] = {}
    counts: dict[str, int] = {}
    if "loss" in metrics:
        scores["eval_loss"] = _loss(model, test, settings.batch_size, tick)
    if generating:
        said, cut = answers(model, test, settings, tick)
        counts["answer_prompts_cut"] = cut
        pairs = list(zip(test.references, said, strict=True))
        if "rouge_l" in metrics:
            scores["rouge_l"] = _percent([rouge_l(*pair) for pair in pairs])
        if "exact_match" in metrics:
            scores["exact_match"] = _percent([exact_match(*pair) for pair in pairs])
        if "final_answer" in metrics:
            scores["final_answer"] = _percent([final_answer_match(*pair) for pair in pairs])
    if choices:
        accuracies, cut = _accuracies(model, choices, settings.batch_size, tick)
        scores |= accuracies
        counts["choice_prompts_cut"] = cut

    result: dict[str, Any] = {name: score.mean() for name, score in scores.items()}
    if "eval_loss" in result:
        loss = result["eval_loss"]
        result["eval_perplexity"] = perplexity(loss)
    if settings.by is not None:
        assert test.groups is not None, "the test set is prepared with the same settings"
        result |= {f"{name}_by": score.means_by(test.groups) for name, score in scores.items()}
    return result | counts


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def _loss(model: Model, test: TestSet, batch_size: int, tick: Tick) -> _Score:
    lengths = np.minimum(test.examples.lengths[test.scored], test.max_length)

    def read(index: int) -> Example:
        example = test.examples[int(test.scored[index])]
        return Example(example.tokens[: test.max_length], example.prompt_length, example.loss_from)

    return _Score(test.scored, *losses(model.network, lengths, read, batch_size, tick))


def answers(
    model: Model, test: TestSet, settings: EvaluationSettings, tick: Tick
) -> tuple[list[str], int]:
    """The model's greedy answer to each row, and how many prompts had to be cut."""
    examples = (test.examples[index] for index in range(len(test)))
    prompts = [example.tokens[: example.prompt_length] for example in examples]
    return generate(model, prompts, settings.max_new_tokens, settings.batch_size, tick)


def _accuracies(
    model: Model, choices: Choices, batch_size: int, tick: Tick
) -> tuple[dict[str, _Score], int]:
    likelihoods, cut = log_likelihoods(model, choices, batch_size, tick)
    by_sum, by_character, by_chance = [], [], []
    for question, likelihood in zip(choices.questions, likelihoods, strict=True):
        characters = [len(candidate) for candidate in question.candidates]
        by_sum.append(likelihood.argmax() == question.right)
        by_character.append((likelihood / characters).argmax() == question.right)
        by_chance.append(1 / len(characters))
    return {
        "accuracy": _percent(by_sum, choices.rows),
        "accuracy_norm": _percent(by_character, choices.rows),
        "accuracy_chance": _percent(by_chance, choices.rows),
    }, cut


def _percent(fractions: Sequence[float], rows: Int64 | None = None) -> _Score:
    rows = np.arange(len(fractions)) if rows is None else rows
    return _Score(rows, 100 * np.array(fractions, dtype=np.float64), np.ones(len(fractions)))


def _column(rows: Sequence[Row], column: str, name: str) -> list[str]:
    for number, row in enumerate(rows, start=1):
        if column not in row:
            known = ", ".join(repr(other) for other in sorted(row))
            raise UserError(
                f"`evaluation.by`: row {number} of {name} has no column {column!r}: name one of "
                f"{known}"
            )
    return [str(row[column]) for row in rows]
