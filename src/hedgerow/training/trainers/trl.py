"""TRL's SFTTrainer: packing, padding-free batches and what else it has.

It gets the client's tokens as they are, and -100 as the label of those that carry no loss; its loss
and its batches are its own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from hedgerow.data import Tokenized
from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.settings import TrainingSettings
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.job import OR_CLIP, Job, check_finite
from hedgerow.training.optimizers import make_optimizer
from hedgerow.training.trainers import family
from hedgerow.training.trainers.base import Trainer

if TYPE_CHECKING:
    from torch import nn


class TRL(Trainer):
    """TRL's `SFTTrainer`, for the supervised objective."""

    libraries = ("trl",)

    name: str = "trl"
    arguments: dict[str, Any] = Field({})
    """Arguments of TRL's `SFTConfig`, as {packing: true, neftune_noise_alpha: 5}; those that the
    experiment has words for, as `learning_rate`, are given there. By default none beside these."""

    def check(self, training: TrainingSettings, device: torch.device) -> None:
        """Check that TRL is there, the objective, and the arguments."""
        super().check(training, device)
        objective = training.objective
        name = objective if isinstance(objective, str) else objective.get("name")
        if name != "supervised":
            raise UserError(
                f"training.trainer trl: is for the objective supervised, not {name}: take the "
                "trainer transformers, which follows every objective"
            )
        if training.router_aux_loss_coef:
            raise UserError(
                "training.router_aux_loss_coef: TRL adds such a loss to what it reports, too: take "
                "the trainer transformers, or leave it out"
            )
        family.check_names(self.arguments)
        with tempfile.TemporaryDirectory() as folder:
            self._config(training, folder, device)

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have an SFTTrainer take the steps of the job.

        Raises:
            UserError: the model's output layer is adapted, past which its loss is computed.
        """
        from trl import SFTTrainer

        class Quiet(SFTTrainer):  # type: ignore[misc]
            def _send_telemetry(self) -> None:
                """Tell nobody."""

        family.check_output_layer(job.network, "training.trainer trl")
        data = job.referring(job.data)
        with (
            family.lent(job.network),
            checkpointed(job.network, job.settings.gradient_checkpointing),
            tempfile.TemporaryDirectory() as folder,
        ):
            config = self._config(job.settings, folder, job.network.device, job, data)
            optimizer = make_optimizer(parameters, job.settings, job.learning_rate)
            with family.in_a_sentence():
                trainer = Quiet(
                    model=job.network,
                    args=config,
                    train_dataset=_rows(data),
                    processing_class=copy.deepcopy(job.tokenizer),  # which it may change
                    optimizers=(optimizer, None),
                )
                loss = family.run(trainer)
        check_finite(loss, job.most_steps, OR_CLIP)
        return loss

    def _config(
        self,
        training: TrainingSettings,
        folder: str,
        device: torch.device,
        job: Job | None = None,
        data: Tokenized | None = None,
    ) -> Any:
        from trl import SFTConfig

        # Examples are cut already; what they are packed into has to be as long as one.
        longest = None
        if self.arguments.get("packing"):
            longest = training.batch_size if data is None else int(data.lengths.max())
        return family.arguments_of(
            SFTConfig,
            self.arguments,
            training,
            folder,
            device=device,
            job=job,
            max_length=longest,
            router_aux_loss_coef=0.0,
        )


def _rows(data: Tokenized) -> Any:
    """A dataset of tokens and labels."""
    import datasets

    examples = [data[index] for index in range(len(data))]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [each.tokens.tolist() for each in examples],
            "labels": [np.where(each.learnt, each.tokens, -100).tolist() for each in examples],
        }
    )
