"""The test set of a run, and what a model scores on it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from hedgerow.data import (
    Encoder,
    Example,
    Row,
    Spool,
    Template,
    Tokenized,
    answered_turns,
    load_template,
)
from hedgerow.data.rows import value_of
from hedgerow.errors import NothingToScore, UserError
from hedgerow.evaluation.answers import generate
from hedgerow.evaluation.choices import Choices, log_likelihoods
from hedgerow.evaluation.likelihood import Float64, Int64, Tick, losses
from hedgerow.evaluation.measuring import Evidence, derived, measure
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.evaluation.metrics.base import (
    LIKELIHOODS,
    Answer,
    Choice,
    Likelihood,
    Need,
    Preference,
)
from hedgerow.files import to_json
from hedgerow.names import MEMORY
from hedgerow.workers import ALONE, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hedgerow.model import Model
    from hedgerow.settings import EvaluationSettings, TextSettings


@dataclass(frozen=True, eq=False)
class TestSet:
    """Test rows as tokens, prepared once for all evaluations of a run."""

    __test__: ClassVar[bool] = False  # or pytest would collect it

    examples: Tokenized
    """The prompt and answer of every row, in the rows' order, uncut; with `loss_on: turns`, of
    every answer of each row, which then counts as a row of its own."""
    template: Template
    """What made text of them."""
    max_length: int
    """Tokens of prompt and answer that the loss sees."""
    scored: Int64
    """Shape (n,): the rows that have a loss."""
    references: list[str]
    """The right answer of each row, as text."""
    texts: Int64
    """Rows whose right answer is a text, shape (n,), and not calls of tools."""
    groups: list[str] | None
    """The value of the column `evaluation.by` in each row, where it is set."""
    choices: Choices | None
    """The questions among the rows, where a metric needs their options' likelihoods."""
    remarks: Sequence[str] = ()
    """Sentences on rows of the source that are left out."""
    reference: Float64 | None = None
    """Shape (2, m): log-likelihoods under the run's base, of the better and the worse answer of
    each of `pairs`; None before they are `referenced`."""
    reward_scale: float = 1.0
    """Factor β of rewards."""

    @classmethod
    def prepare(
        cls,
        rows: Sequence[Row],
        settings: TextSettings,
        evaluation: EvaluationSettings,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int | None = None,
        *,
        client: str | None = None,
        spool: Spool | None = None,
    ) -> TestSet:
        """Check the rows for what `evaluation` asks of them, and tokenise them.

        Args:
            rows: the test rows.
            settings: how they become text.
            evaluation: what is scored.
            tokenizer: the model's.
            vocabulary_size: number of the model's embeddings; None compares no tokens.
            client: name of the client whose own test rows they are; None for `data.test`.
            spool: the file that holds the tokens; None for one of its own.

        Raises:
            UserError: there are no rows; the column `evaluation.by` is missing; the likelihood
                of answers is needed and no prompt leaves room for one; options are needed and no
                row has any; or a prompt is empty where an answer is to follow it.
        """
        key, name = "data.test", "the test data"
        if client is not None:
            key, name = "data.client_test", f"the test data of {client}"
        elif settings.test is not None and settings.test != MEMORY:
            name = settings.test
        metrics = metrics_of(evaluation.metrics)
        for metric in metrics:
            metric.check()
        needs = {metric.needs: metric.name for metric in metrics}
        encoder = Encoder(load_template(settings, tokenizer), tokenizer, vocabulary_size)
        by_row = [scored_rows(row, settings) for row in rows]
        rows = list(itertools.chain.from_iterable(by_row))
        last = np.cumsum([len(turns) for turns in by_row]) - 1
        paired = "preferences" in needs
        if paired and not all(row.other for row in rows):
            raise UserError(
                f"`evaluation.metrics`: {needs['preferences']} compares pairs of answers, and the "
                f"rows of {name} have one each: name the columns of both as `chosen` and "
                "`rejected` of `data.test_fields` or `data.fields`, or leave the metric out"
            )
        # Uncut, since a prompt that leaves no room for its answer's loss can still be answered.
        examples = (spool or Spool()).tokenize(
            name, rows, encoder, sys.maxsize, "answer", paired=paired
        )
        if examples.dropped or (needs.keys() - LIKELIHOODS and not examples.prompt_lengths.all()):
            raise UserError(
                f"`{key}`: {name} has rows with an empty prompt, which no answer can follow: "
                "take them out, or choose another `data.prompt`"
            )
        scored = np.flatnonzero(examples.prompt_lengths < settings.max_length)
        if needs.keys() & LIKELIHOODS and not len(scored):
            raise NothingToScore(
                f"`data.max_length`: no answer of {name} is left to measure a loss on, since every "
                f"prompt (the shortest has {examples.prompt_lengths.min()} tokens) fills "
                f"{settings.max_length} tokens: raise it where the model has more positions, "
                "or give rows with shorter prompts"
            )
        texts = np.flatnonzero([not row.calls for row in rows])
        if "answers" in needs and not len(texts):
            raise NothingToScore(
                f"`evaluation.metrics`: every answer of {name} calls tools, and {needs['answers']} "
                "compares texts: ask for loss"
            )
        choices = None
        if "choices" in needs:
            # The columns that a question's options stand in are of its last turn.
            questions = [rows[place] for place in last.tolist()]
            choices = Choices.prepare(needs["choices"], name, questions, encoder)
            choices = replace(choices, rows=last[choices.rows])
        return cls(
            examples=examples,
            template=encoder.template,
            max_length=settings.max_length,
            scored=scored,
            references=[row.output for row in rows],
            texts=texts,
            groups=None if evaluation.by is None else _column(rows, evaluation.by, name),
            choices=choices,
        )

    def __len__(self) -> int:
        return len(self.examples)

    def digest(self) -> str:
        """SHA-256 of the examples, of the options that are scored, and of pairs' worse answers.

        They are joined by `+`, so that test sets can be compared of which one was prepared without
        the latter two; what is not there is empty, and left out at the end.
        """
        other = self.examples.other
        digests = [
            replace(self.examples, other=None).digest(),
            self.choices.digest() if self.choices else "",
            other.digest() if other is not None else "",
        ]
        return "+".join(digests).rstrip("+")

    def referenced(self, base: Model, batch_size: int, reward_scale: float) -> TestSet:
        """The test set with what rewards of its pairs are beside; itself where it has none.

        Args:
            base: the model that the run began with.
            reward_scale: factor β of rewards.
        """
        if self.examples.other is None:
            return self
        base.network.eval()
        with torch.inference_mode():
            found = self._of_pairs(base, batch_size, lambda count: None)
        return replace(self, reference=found, reward_scale=reward_scale)

    @property
    def pairs(self) -> Int64:
        """The rows that are pairs, both of whose answers have a loss; shape (m,)."""
        other = self.examples.other
        if other is None:
            return np.zeros(0, dtype=np.int64)
        return self.scored[other.prompt_lengths[self.scored] < self.max_length]

    def preferences(
        self, model: Model, batch_size: int, tick: Tick, workers: Workers = ALONE
    ) -> list[Preference]:
        """Rewards that `model` gives the answers of `pairs`."""
        assert self.reference is not None, "rewards are beside the base, see `referenced`"
        own = self._of_pairs(model, batch_size, tick, workers)
        found = self.reward_scale * (own - self.reference)
        return [Preference(*pair) for pair in found.T.tolist()]

    def _of_pairs(
        self, model: Model, batch_size: int, tick: Tick, workers: Workers = ALONE
    ) -> Float64:
        """Log-likelihoods of both answers of `pairs`; shape (2, m)."""
        assert self.examples.other is not None
        found = [
            -_losses(model, part, self.pairs, self.max_length, batch_size, tick, workers)[0]
            for part in (self.examples, self.examples.other)
        ]
        return np.stack(found)

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


def scored_rows(row: Row, settings: TextSettings) -> Sequence[Row]:
    """The rows that a row is scored as: itself, or with `loss_on: turns` one for each answer."""
    return answered_turns(row) if settings.loss_on == "turns" else [row]


def in_round(settings: EvaluationSettings, round: int, rounds: int) -> EvaluationSettings:
    """Settings with the metrics that are due when a round is evaluated.

    Args:
        rounds: number of the run's last round, in which all are due.
    """
    if round == rounds or settings.answers_every is None or round % settings.answers_every == 0:
        return settings
    known = zip(settings.metrics, metrics_of(settings.metrics), strict=True)
    due = [name for name, metric in known if metric.needs != "answers"]
    return settings.model_copy(update={"metrics": due})


@torch.inference_mode()
def evaluate(
    model: Model,
    test: TestSet,
    settings: EvaluationSettings,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """What `model` scores on `test`, by the metrics that `settings` asks for, in that order.

    With `settings.by`, there are also `eval_loss_by`, `rouge_l_by` …: a score for each value of
    that column, sorted by value. `answer_prompts_cut` and `choice_prompts_cut` count the prompts
    that had to be cut on the left to fit the model, where it was asked for answers or options.

    Args:
        test: prepared with these settings.
        progress: told how many forward passes or answers are done, of how many.
        workers: who take batches side by side.

    Raises:
        UserError: a metric fails.
    """
    model.network.eval()
    metrics = metrics_of(settings.metrics)
    needs = {metric.needs for metric in metrics}
    sizes: dict[Need, int] = {
        "likelihood": len(test.scored),
        "answers": len(test.texts),
        "choices": len(test.choices.encoded) if test.choices else 0,
        "preferences": 2 * len(test.pairs),
    }
    total, done = sum(sizes[need] for need in needs), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    evidence: dict[Need, Evidence] = {}
    counts: dict[str, int] = {}
    if "likelihood" in needs:
        evidence["likelihood"] = _likelihoods(model, test, settings.batch_size, tick, workers)
    if "answers" in needs:
        said, counts["answer_prompts_cut"] = answers(model, test, settings, tick, workers)
        right = [test.references[place] for place in test.texts.tolist()]
        pairs = [Answer(*pair) for pair in zip(right, said, strict=True)]
        evidence["answers"] = Evidence(test.texts, pairs)
    if "choices" in needs:
        assert test.choices is not None, "the test set is prepared with the same settings"
        likelihoods, cut = log_likelihoods(model, test.choices, settings.batch_size, tick, workers)
        counts["choice_prompts_cut"] = cut
        asked = zip(test.choices.questions, likelihoods, strict=True)
        found = [Choice(question.candidates, question.right, each) for question, each in asked]
        evidence["choices"] = Evidence(test.choices.rows, found)
    if "preferences" in needs:
        rewards = test.preferences(model, settings.batch_size, tick, workers)
        evidence["preferences"] = Evidence(test.pairs, rewards)

    result: dict[str, Any] = {}
    by_group: dict[str, dict[str, float]] = {}
    groups = None if settings.by is None else test.groups
    for metric in metrics:
        measured = measure(metric, evidence[metric.needs], groups)
        result |= measured.whole | derived(metric, measured.whole)
        by_group |= {f"{key}_by": means for key, means in measured.by.items()}
    return result | by_group | counts


def _likelihoods(
    model: Model, test: TestSet, batch_size: int, tick: Tick, workers: Workers
) -> Evidence:
    examples, rows = test.examples, test.scored
    sums, tokens = _losses(model, examples, rows, test.max_length, batch_size, tick, workers)
    found = [Likelihood(*row) for row in zip(sums.tolist(), tokens.tolist(), strict=True)]
    return Evidence(test.scored, found)


def _losses(
    model: Model,
    examples: Tokenized,
    rows: Int64,
    max_length: int,
    batch_size: int,
    tick: Tick,
    workers: Workers,
) -> tuple[Float64, Int64]:
    """Summed cross-entropy of some examples, cut at `max_length`, and numbers of tokens."""
    lengths = np.minimum(examples.lengths[rows], max_length)

    def read(index: int) -> Example:
        example = examples[int(rows[index])]
        cut = slice(max_length)
        return Example(example.tokens[cut], example.prompt_length, example.learnt[cut])

    return losses(model.network, lengths, read, batch_size, tick, workers)


def answers(
    model: Model,
    test: TestSet,
    settings: EvaluationSettings,
    tick: Tick,
    workers: Workers = ALONE,
) -> tuple[list[str], int]:
    """The model's greedy answer to each row of `texts`, and how many prompts had to be cut."""
    examples = (test.examples[index] for index in test.texts.tolist())
    prompts = [example.tokens[: example.prompt_length] for example in examples]
    return generate(
        model,
        prompts,
        settings.max_new_tokens,
        settings.batch_size,
        tick,
        ends=test.template.ends,
        stop=settings.stop,
        workers=workers,
    )


def _column(rows: Sequence[Row], column: str, name: str) -> list[str]:
    values = [value_of(row.columns, column, _MISSING) for row in rows]
    for row, value in zip(rows, values, strict=True):
        if value is _MISSING:
            known = ", ".join(repr(other) for other in sorted(row.columns))
            turns = ", or set `data.loss_on: turns`" if column == "turn" else ""
            raise UserError(
                f"`evaluation.by`: row {row.number} of {name} has no column {column!r}: name one "
                f"of {known}{turns}"
            )
    return [_group(value) for value in values]


_MISSING = object()


def _group(value: Any) -> str:
    """A value's name as a group: null, true, numbers and lists as JSON has them."""
    plain = value is None or isinstance(value, bool | float | list | dict)
    return to_json(value, ensure_ascii=False, default=str) if plain else str(value)
