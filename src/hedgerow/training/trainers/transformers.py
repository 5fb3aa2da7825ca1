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

from hedgerow.lazy import torch, transformers
from hedgerow.settings import TrainingSettings
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.job import OR_CLIP, Job, check_finite
from hedgerow.training.optimizers import make_optimizer
from hedgerow.training.routers import balanced_loss
from hedgerow.training.trainers import family
from hedgerow.training.trainers.base import Trainer

if TYPE_CHECKING:
    from torch import Tensor, nn


class Transformers(Trainer):
    """transformers' `Trainer`, which brings accelerate's mixed precision."""

    name: str = "transformers"
    arguments: dict[str, Any] = Field({})
    """Arguments of transformers' `TrainingArguments`, as {bf16: true, dataloader_num_workers: 2};
    those that the experiment has words for, as `learning_rate`, are given there. By default none
    beside these."""

    def check(self, training: TrainingSettings, device: torch.device) -> None:
        """Check the arguments."""
        super().check(training, device)
        family.check_names(self.arguments)
        with tempfile.TemporaryDirectory() as folder:
            kind = transformers.TrainingArguments
            family.arguments_of(kind, self.arguments, training, folder, device=device)

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have a Trainer take the steps of the job."""
        data, settings = job.referring(job.data), job.settings
        total, count = 0.0, 0

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
                nonlocal total, count
                router = settings.router_aux_loss_coef
                loss = balanced_loss(job.objective, model, inputs, router)
                tokens = job.objective.count(inputs)
                check_finite(float(loss.detach()), self.state.global_step + 1, OR_CLIP)
                total, count = total + float(loss.detach()), count + tokens
                # Of passes that are accumulated, each is a mean of its own.
                return loss / max(tokens, 1)

        with (
            family.lent(job.network),
            checkpointed(job.network, job.settings.gradient_checkpointing),
            tempfile.TemporaryDirectory() as folder,
        ):
            arguments = family.arguments_of(
                transformers.TrainingArguments,
                self.arguments,
                settings,
                folder,
                device=job.network.device,
                job=job,
            )
            optimizer = make_optimizer(parameters, settings, job.learning_rate)
            with family.in_a_sentence():
                trainer = Along(
                    model=job.network,
                    args=arguments,
                    train_dataset=range(len(data)),  # of which `collate` makes batches
                    data_collator=collate,
                    optimizers=(optimizer, None),
                )
                trainer.model_accepts_loss_kwargs = False
                family.run(trainer)
        return total / max(count, 1)
