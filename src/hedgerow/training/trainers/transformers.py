"""transformers' Trainer: its loop, with accelerate, along the experiment's objective.

The batches, the loss and the optimiser are hedgerow's, so that every objective and optimiser can be
had; the order of the examples, the learning rate's course and all that `arguments` name are the
Trainer's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hedgerow.data import Tokenized
from hedgerow.lazy import transformers
from hedgerow.settings import TrainingSettings
from hedgerow.training.job import LOWER_RATE, Job, check_finite
from hedgerow.training.optimizers import make_optimizer
from hedgerow.training.trainers import family
from hedgerow.training.trainers.base import Trainer

if TYPE_CHECKING:
    from torch import Tensor, nn


class Transformers(Trainer):
    """transformers' `Trainer`, which brings accelerate: mixed precision, and DeepSpeed."""

    name: str = "transformers"
    arguments: dict[str, Any] = Field({})
    """Arguments of transformers' `TrainingArguments`, as {bf16: true, dataloader_num_workers: 2};
    those that the experiment has words for, as `learning_rate`, are given there. By default none
    beside these."""

    def check(self, training: TrainingSettings) -> None:
        """Check the arguments."""
        family.check_names(self.arguments)
        with tempfile.TemporaryDirectory() as folder:
            self._settings(training, folder, device="cpu")

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have a Trainer take the steps of the job."""
        data = job.referring(job.data)
        totals = _Totals()

        def collate(indices: list[int]) -> dict[str, Tensor]:
            return dict(job.objective.collate(data, indices, job.pad_id))

        class Along(transformers.Trainer):  # type: ignore[misc]
            def compute_loss(
                self,
                model: Any,
                inputs: Mapping[str, Tensor],
                return_outputs: bool = False,
                num_items_in_batch: Any = None,
            ) -> Tensor:
                total, count = job.objective.total(model, inputs), job.objective.count(inputs)
                totals.add(float(total.detach()), count)
                # Of passes that are accumulated, each is a mean of its own.
                return total / max(count, 1)

        with family.lent(job), tempfile.TemporaryDirectory() as folder:
            trainer = Along(
                model=job.network,
                args=self._settings(
                    job.settings,
                    folder,
                    device=job.network.device.type,
                    job=job,
                ),
                train_dataset=_Indices(data),
                data_collator=collate,
                optimizers=(
                    make_optimizer(parameters, job.settings, job.learning_rate),
                    None,
                ),
            )
            trainer.model_accepts_loss_kwargs = False
            family.run(trainer)
        check_finite(totals.loss, job.most_steps, LOWER_RATE)
        return totals.loss / max(totals.count, 1)

    def _settings(
        self, training: TrainingSettings, folder: str, *, device: str, job: Job | None = None
    ) -> Any:
        kind = transformers.TrainingArguments
        return family.arguments_of(kind, self.arguments, training, folder, device=device, job=job)


class _Indices:
    """The places of a client's examples: batches are made of those alone."""

    def __init__(self, data: Tokenized) -> None:
        self._count = len(data)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class _Totals:
    """Sum of losses, and of what they count."""

    def __init__(self) -> None:
        self.loss, self.count = 0.0, 0

    def add(self, loss: float, count: int) -> None:
        self.loss, self.count = self.loss + loss, self.count + count
