"""What only the models themselves can tell: their answers, and what training has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hedgerow.comparison import Cell
from hedgerow.data import Records
from hedgerow.data.templates import TEXTS, TextTemplate
from hedgerow.errors import NothingToScore, UserError
from hedgerow.evaluation.answers import check_positions
from hedgerow.evaluation.scores import TestSet, answers, scored_rows
from hedgerow.experiment import Experiment
from hedgerow.ledger import Ledger
from hedgerow.model import Model
from hedgerow.reporting.gather import Series
from hedgerow.runs import RunModels
from hedgerow.runs.lender import Lender
from hedgerow.runs.preparation import test_rows
from hedgerow.seeds import Seeds
from hedgerow.settings import TextSettings

LEADING = 64
"""How many singular values of a matrix are inspected."""


class Question(NamedTuple):
    """A row of the test data, and what models say to it."""

    prompt: str
    """Instruction and input, as they stand in the row."""
    reference: str
    before: str
    """The base model's answer."""
    after: dict[str, str]
    """The answer after the last round, by the series' label."""


class Inspection(NamedTuple):
    """What was found in the models of some series."""

    questions: list[Question]
    spectra: dict[str, dict[str, list[float]]]
    """The singular values of what training has added, descending, by series and matrix."""
    notes: list[str]
    """Why something could not be inspected: a base model that is not there, say."""


def inspect(
    series: Sequence[Series],
    count: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    lender: Lender | None = None,
    held: Mapping[Path, Records] | None = None,
) -> Inspection:
    """Answers to `count` rows of each test set, and spectra; of one run of each series.

    Where a method has no global model, the first client's stands for it.

    Args:
        progress: told how many models are inspected, of how many.
        lender: has the base model, where it is in memory.
        held: the test rows of runs, by their directories, where they are in memory.
    """
    inspector = _Inspector(count, lender or Lender(), held or {})
    notes: dict[str, None] = {}
    # Runs on one base together: it is loaded once.
    ordered = sorted(series, key=lambda each: each.first.cell.experiment.dump({"model"}))
    for done, each in enumerate(ordered):
        if progress is not None:
            progress(done, len(series))
        try:
            notes |= dict.fromkeys(inspector.inspect(each))
        except UserError as error:
            notes[str(error)] = None
        except (MemoryError, torch.OutOfMemoryError):
            notes[f"there is not enough memory to look into {each.label}"] = None
    if progress is not None:
        progress(len(series), len(series))
    return Inspection(inspector.questions, inspector.spectra, list(notes))


class _Inspector:
    """Inspects one series after another, on one base model."""

    def __init__(self, count: int, lender: Lender, held: Mapping[Path, Records]) -> None:
        self.spectra: dict[str, dict[str, list[float]]] = {}
        self._count = count
        self._lender, self._held = lender, held
        self._asked: dict[str, _Questionnaire] = {}

    @property
    def questions(self) -> list[Question]:
        """All that was asked."""
        return [question for asked in self._asked.values() for question in asked.questions]

    def inspect(self, series: Series) -> list[str]:
        """Ask the run that stands for a series, and take its spectra.

        Returns:
            Why it cannot be asked: the test data are not there, say, or have no answers.

        Raises:
            UserError: the base model is not what it was, or the ledger is damaged.
        """
        cell = series.first.cell
        experiment, method = cell.experiment, cell.experiment.method
        model, ledger = self._lender.lend(experiment.model), Ledger.open(cell.folder / "ledger")
        self._lender.check_base(ledger)
        if not len(ledger):
            return []
        questionnaire, notes = None, []
        try:
            questionnaire = self._questionnaire(cell, model)
        except UserError as error:
            notes.append(str(error))
        ledger.replay(method, model, expected=experiment.expected(ledger.trained))
        client = None if method.has_global_model else ledger.clients()[0]
        own = RunModels(method, ledger, len(ledger))
        if questionnaire is not None:
            for _ in own.models(model, [] if client is None else [client]):
                questionnaire.ask(series.label, model)
        own.merge(model, client)
        self.spectra[series.label] = dict(_spectra(model, self._lender.state))
        return notes

    def _questionnaire(self, cell: Cell, model: Model) -> _Questionnaire | None:
        """The questions for runs on this model and data, which it has answered as the base."""
        experiment, held = cell.experiment, self._held.get(cell.folder.absolute())
        if not self._count or experiment.data.test is None:
            return None
        text = experiment.data.model_dump_json(include=set(TextSettings.model_fields))
        key = f"{experiment.dump(include={'model'})}{text}{experiment.evaluation.max_new_tokens}"
        if key not in self._asked:
            try:
                self._asked[key] = _Questionnaire(experiment, model, self._count, held)
            except NothingToScore:
                return None
        return self._asked[key]


class _Questionnaire:
    """Rows spread evenly over the test data, and the base model's answers to them."""

    def __init__(
        self, experiment: Experiment, base: Model, count: int, held: Records | None
    ) -> None:
        data = experiment.data
        # Any metric of answers: they are asked for, and none is scored.
        self._settings = experiment.evaluation.model_copy(
            update={"metrics": ["exact_match"], "by": None}
        )
        found = test_rows(data, self._settings, base.tokenizer, held)
        rows = [row for row in found if not row.calls]
        if not rows:
            raise NothingToScore("every answer of the test data calls tools, and none is a text")
        places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
        chosen = [rows[place] for place in places]
        check_positions(base, self._settings)
        self._test = TestSet.prepare(chosen, data, self._settings, base.tokenizer)
        words = TextTemplate(TEXTS["plain"], "plain")
        turns = [turn for row in chosen for turn in scored_rows(row, data) if not turn.calls]
        prompts = [words.prompt(turn).strip() for turn in turns]
        references = [turn.output for turn in turns]
        texts = zip(prompts, references, self._answers(base), strict=True)
        self.questions = [Question(*each, {}) for each in texts]

    def ask(self, label: str, model: Model) -> None:
        """Ask a model, whose answers stand under `label`."""
        for question, answer in zip(self.questions, self._answers(model), strict=True):
            question.after[label] = answer

    def _answers(self, model: Model) -> list[str]:
        found, _ = answers(model, self._test, self._settings, lambda count: None)
        return [answer.strip() for answer in found]


def _spectra(model: Model, base: dict[str, Tensor]) -> Iterator[tuple[str, list[float]]]:
    """The leading singular values of each matrix's change, where there is one."""
    for name, change in model.changes(base):
        if change.any():
            yield name, _singular_values(change, name)


def _singular_values(matrix: Tensor, name: str) -> list[float]:
    """Descending; of a large matrix the leading ones, by subspace iteration (arXiv 0909.4061)."""
    if min(matrix.shape) > 4 * LEADING:
        generator = Seeds(0).torch("spectrum", name)
        basis = torch.randn(matrix.shape[1], 2 * LEADING, generator=generator)
        for _ in range(2):
            basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
        matrix = matrix @ basis
    values: list[float] = torch.linalg.svdvals(matrix)[:LEADING].tolist()
    return values
