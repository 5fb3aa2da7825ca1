"""What a metric is: the scores that it declares, what it needs, and one function.

A metric of one's own is a subclass of `AnswerMetric`, `CorpusMetric`, `LikelihoodMetric`,
`ChoiceMetric` or `PreferenceMetric` in any module that can be imported:

    class Length(AnswerMetric):
        scores = (Score("length_share", label="length", unit="%", direction="higher"),)

        def score(self, reference: str, answer: str) -> float:
            return 100 * len(answer) / max(1, len(reference))

An experiment asks for it by `evaluation: {metrics: ["package.module:Length"]}`; an installed
package may give it a name, by an entry point of the group `hedgerow.metrics`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from hedgerow.plugins import Plugin

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Need = Literal["likelihood", "answers", "choices", "preferences"]
"""What is asked of the model: the likelihood of the right answers, answers of its own, the
likelihood of each option of multiple-choice questions, or rewards of pairs of answers."""
LIKELIHOODS: frozenset[Need] = frozenset({"likelihood", "preferences"})
"""Those that ask for likelihoods of answers, cut at `data.max_length`."""


class Score(NamedTuple):
    """A number that a metric gives, and how people are shown it."""

    key: str
    """Key in the rows of metrics.jsonl: lower-case letters, digits and `_`."""
    label: str
    """Name in tables, charts and lines."""
    unit: str = ""
    """Unit, as `%`; empty where it has none."""
    direction: Literal["lower", "higher"] | None = None
    """Which is better; None where neither is."""
    derived: bool = False
    """Whether it follows from the metric's other scores, by `Metric.derive`. What does stands
    beside them, and is neither compared nor given by `evaluation.by`."""

    @property
    def title(self) -> str:
        """Label with the unit, for an axis or a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


class Weighted(NamedTuple):
    """A row's part in a weighted mean, which is the sum of totals by the sum of weights."""

    total: float
    weight: float
    """Above 0."""


Scored = float | Weighted | Mapping[str, float | Weighted]
"""What a metric gives: its only score; or each of several, by their keys."""


class Answer(NamedTuple):
    """A row with the model's greedy answer."""

    reference: str
    """The right answer."""
    answer: str

    @property
    def finite(self) -> bool:
        """Whether the model has given numbers; always, since texts are none."""
        return True


class Likelihood(NamedTuple):
    """How likely the model finds the right answer of a row."""

    nats: float
    """Cross-entropy, summed over the answer's tokens (its EOS included)."""
    tokens: int
    """Number of those tokens, at least 1."""

    @property
    def finite(self) -> bool:
        """Whether the model has given a finite number."""
        return math.isfinite(self.nats)


class Choice(NamedTuple):
    """How likely the model finds each option of a multiple-choice question."""

    candidates: Sequence[str]
    """The options, as answers in full; at least two."""
    right: int
    """Index of the right one."""
    log_likelihoods: npt.NDArray[np.float64]
    """Log-likelihood of each option after the prompt, in nats; of shape (options,)."""

    @property
    def finite(self) -> bool:
        """Whether the model has given finite numbers."""
        return all(map(math.isfinite, self.log_likelihoods))


class Preference(NamedTuple):
    """Rewards of a pair of answers to a prompt, β·log(π(y|x) / π_base(y|x)) in nats.

    π_base is the model that the run began with, and β the objective's (`training.objective`), 1 of
    `supervised` and `orpo`.
    """

    chosen: float
    """Reward of the better answer."""
    rejected: float
    """Reward of the worse one."""

    @property
    def finite(self) -> bool:
        """Whether the model has given finite numbers."""
        return math.isfinite(self.chosen) and math.isfinite(self.rejected)


class Metric(Plugin, ABC):
    """Scores of a model on test data; the subclasses below say of what."""

    section = ("evaluation", "metrics")

    scores: ClassVar[tuple[Score, ...]] = ()
    """What it gives. The first one is the main one: it stands in a round's line, and is drawn."""
    needs: ClassVar[Need]
    """What is asked of the model."""
    per: ClassVar[Literal["row", "corpus"]]
    """Whether each row has a score, of which means are taken; or only many rows together."""

    def check(self) -> None:
        """Raise a `UserError` where it cannot be computed here.

        By default that is where one of its `libraries` is missing.
        """
        self.check_installed()

    @abstractmethod
    def measure(self, evidence: Any) -> Scored:
        """Scores of what `needs` names: of one row, or of a list of them, as `per` says."""

    def derive(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Scores that are declared as `derived`, from the others (or from means of them)."""
        return {}


class AnswerMetric(Metric):
    """A metric that compares each answer of the model with the right one."""

    needs = "answers"
    per = "row"

    def measure(self, evidence: Answer) -> Scored:
        """Scores of one row."""
        return self.score(reference=evidence.reference, answer=evidence.answer)

    @abstractmethod
    def score(self, reference: str, answer: str) -> Scored:
        """Score of an answer, beside the right one."""


class CorpusMetric(Metric):
    """A metric of all answers together; `evaluation.by` computes it again on each group's."""

    needs = "answers"
    per = "corpus"

    def measure(self, evidence: Sequence[Answer]) -> Scored:
        """Scores of many rows."""
        return self.corpus(
            references=[row.reference for row in evidence],
            answers=[row.answer for row in evidence],
        )

    @abstractmethod
    def corpus(self, references: Sequence[str], answers: Sequence[str]) -> Scored:
        """Score of all answers, beside the right ones in the same order; there is at least one."""


class LikelihoodMetric(Metric):
    """A metric of how likely the model finds the right answers."""

    needs = "likelihood"
    per = "row"

    def measure(self, evidence: Likelihood) -> Scored:
        """Scores of one row."""
        return self.score(nats=evidence.nats, tokens=evidence.tokens)

    @abstractmethod
    def score(self, nats: float, tokens: int) -> Scored:
        """Score of a row whose answer has this cross-entropy, summed over so many tokens."""


class ChoiceMetric(Metric):
    """A metric of how likely the model finds the options of each question."""

    needs = "choices"
    per = "row"

    def measure(self, evidence: Choice) -> Scored:
        """Scores of one question."""
        return self.score(
            candidates=evidence.candidates,
            right=evidence.right,
            log_likelihoods=evidence.log_likelihoods,
        )

    @abstractmethod
    def score(
        self, candidates: Sequence[str], right: int, log_likelihoods: npt.NDArray[np.float64]
    ) -> Scored:
        """Score of a question; for the arguments, see `Choice`."""


class PreferenceMetric(Metric):
    """A metric of the rewards of pairs of answers (`data.fields.chosen` and `rejected`)."""

    needs = "preferences"
    per = "row"

    def measure(self, evidence: Preference) -> Scored:
        """Scores of one pair."""
        return self.score(chosen=evidence.chosen, rejected=evidence.rejected)

    @abstractmethod
    def score(self, chosen: float, rejected: float) -> Scored:
        """Score of a pair; for the arguments, see `Preference`."""
