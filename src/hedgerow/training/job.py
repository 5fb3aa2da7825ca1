"""What one client's local training works with, whichever way it goes down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from hedgerow.data import Tokenized, batches, epoch
from hedgerow.errors import Diverged, UserError
from hedgerow.settings import TrainingSettings
from hedgerow.training.objectives import Objective, objective_of
from hedgerow.training.objectives.answers import referenced
from hedgerow.training.objectives.base import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hedgerow.privacy.example_level import GaussianSteps


class SealedExamples:
    """Examples that methods may not read, only count.

    Those of a private job, which nothing may read but the steps that add noise: that a method reads
    more is a mistake of its own, which no account covers. And those that a script's trainer has.
    """

    def __init__(self, examples: Sized, refusal: str | None = None) -> None:
        """Seal examples.

        Args:
            examples: what is counted.
            refusal: sentence to whoever reads them; None is that of private jobs.
        """
        self._examples = examples
        self._refusal = _SEALED if refusal is None else refusal

    def __len__(self) -> int:
        return len(self._examples)

    def __getattr__(self, name: str) -> Any:
        raise UserError(self._refusal)

    def __getitem__(self, index: int) -> Any:
        raise UserError(self._refusal)

    @staticmethod
    def open(data: Tokenized | SealedExamples) -> Tokenized:
        """The examples, for whoever adds noise to what it makes of them."""
        return cast(Tokenized, data._examples) if isinstance(data, SealedExamples) else data


_SEALED = (
    "privacy.level example: the method reads its clients' examples itself, beside the steps that "
    "hide them by noise: have it train along `train_along` alone, or say `learns_by_steps` False"
)


class TakesSteps(Protocol):
    """What takes a job's steps in the place of hedgerow's own loop, as any `Trainer` does."""

    @property
    def name(self) -> str:
        """Its name, for sentences."""

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Train the parameters in place; returns the mean loss."""


@dataclass(frozen=True)
class Job:
    """One client's data and the settings of one round."""

    network: Any
    """The model, as its methods have prepared it."""
    data: Tokenized | SealedExamples
    """The client's examples; their number alone in private jobs, and where `trainer` has them."""
    settings: TrainingSettings
    learning_rate: float
    """Learning rate of this round."""
    pad_id: int
    order: np.random.Generator
    """Draws the examples and the order of the batches."""
    dropout_seed: int
    """Of the network's dropout layers."""
    start: Mapping[str, Tensor] = field(default_factory=dict)
    """What the parameters were before training, by name, in host memory; empty where the method has
    taken no snapshot."""
    shared_state: Mapping[str, Tensor] = field(default_factory=dict)
    """What everybody keeps beside the global model, as `Model.shared_state`."""
    tokenizer: Any = None
    """The model's, for trainers of other libraries; None where nobody has said."""
    trainer: TakesSteps | None = None
    """Takes the steps in the place of what the settings say; None: nothing does."""
    private: GaussianSteps | None = None
    """Samples the examples, bounds their gradients and adds noise, for example-level privacy; None:
    nothing does."""

    @cached_property
    def objective(self) -> Objective:
        """What the steps descend."""
        return objective_of(self.settings)

    @property
    def most_steps(self) -> int:
        """Number of optimiser steps."""
        if self.private is not None:
            return self.private.count
        return self.settings.most_steps(len(self.data))

    def pace(self, step: int) -> float:
        """Factor of the round's learning rate in a step (0, 1, …), by its schedule and warm-up."""
        warmup, steps = self.settings.warmup_steps, self.most_steps
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        return _falling(self.settings.local_schedule, done)

    def steps(self) -> Iterator[tuple[list[Batch], int]]:
        """The batches of each optimiser step, and how many tokens or pairs its loss is a mean of.

        Those of an objective that refers to the round's start are of the network as it is when the
        first is asked for.
        """
        objective, drawn = self.objective, list(self._drawn())
        used = np.unique(np.concatenate([batch for step in drawn for batch in step]))
        data = self.referring(self.data, used)
        for indices in drawn:
            collated = [objective.collate(data, batch.tolist(), self.pad_id) for batch in indices]
            yield collated, sum(map(objective.count, collated))

    def referring(
        self, data: Tokenized | SealedExamples, indices: np.ndarray | None = None
    ) -> Tokenized:
        """Examples, and how likely the network as it is finds them if that is the reference.

        Args:
            data: the client's, for whoever may read them.
            indices: those that are needed; None: all.
        """
        examples = cast(Tokenized, data)  # sealed ones refuse to be read
        if self.objective.refers_to != "round" or examples.reference is not None:
            return examples
        return referenced(self.network, examples, self.pad_id, self.settings.batch_size, indices)

    def _drawn(self) -> Iterator[Sequence[np.ndarray]]:
        settings, lengths = self.settings, self.data.widths
        accumulate = settings.gradient_accumulation
        if settings.epochs is not None:
            each = [epoch(lengths, settings.batch_size, self.order) for _ in range(settings.epochs)]
            drawn = [batch for one in each for batch in one]
        else:
            count = self.most_steps * accumulate
            drawn = batches(lengths, settings.batch_size, count, self.order)
        for first in range(0, len(drawn), accumulate):
            yield drawn[first : first + accumulate]


LOWER_RATE = "a lower training.learning_rate may help"
"""What may keep any training from diverging."""

OR_CLIP = f"{LOWER_RATE}, or a training.max_grad_norm, as 1.0 or less"
"""What may keep training with gradients from diverging."""


def check_finite(loss: float, step: int, advice: str) -> None:
    """Raise `Diverged` with the advice where a step's loss is not a number."""
    if not np.isfinite(loss):
        raise Diverged(f"its loss was {loss} at step {step}: {advice}")


def learning_rate(settings: TrainingSettings, round: int, rounds: int) -> float:
    """The learning rate of a round (1 … rounds): whole in the first, smaller later by schedule."""
    return settings.learning_rate * _falling(settings.schedule, (round - 1) / rounds)


def _falling(schedule: str, done: float) -> float:
    """Factor of a learning rate that falls from 1 to 0, where so much (0 … 1) is done."""
    return {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + float(np.cos(np.pi * done))) / 2,
    }[schedule]
