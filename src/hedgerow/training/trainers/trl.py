"""TRL's SFTTrainer: packing, padding-free batches, Liger's kernels and what else it has.

It gets the client's tokens as they are, and -100 as the label of those that carry no loss; its loss
and its batches are its own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hedgerow.data import Tokenized
from hedgerow.errors import UserError, check_installed
from hedgerow.settings import TrainingSettings
from hedgerow.training.job import LOWER_RATE, Job, check_finite
from hedgerow.training.optimizers import make_optimizer
from hedgerow.training.trainers import family
from hedgerow.training.trainers.base import Trainer

if TYPE_CHECKING:
    from torch import nn


class TRL(Trainer):
    """TRL's `SFTTrainer`, for the supervised objective."""

    name: str = "trl"
    arguments: dict[str, Any] = Field({})
    """Arguments of TRL's `SFTConfig`, as {packing: true, use_liger_kernel: true}; those that the
    experiment has words for, as `learning_rate`, are given there. By default none beside these."""

    def check(self, training: TrainingSettings) -> None:
        """Check the objective, that TRL is there, and the arguments."""
        objective = training.objective
        name = objective if isinstance(objective, str) else objective.get("name")
        if name != "supervised":
            raise UserError(
                f"training.trainer trl: is for the objective supervised, not {name}: take the "
                "trainer transformers, which follows every objective"
            )
        check_installed("trl", "TRL", "trl")
        family.check_names(self.arguments)
        with tempfile.TemporaryDirectory() as folder:
            self._config(training, folder, device="cpu")

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have an SFTTrainer take the steps of the job."""
        from trl import SFTTrainer

        data = job.referring(job.data)
        with family.lent(job), tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model=job.network,
                args=self._config(job.settings, folder, device=job.network.device.type, job=job),
                train_dataset=_rows(data),
                processing_class=copy.deepcopy(job.tokenizer),  # which it may change
                optimizers=(
                    make_optimizer(parameters, job.settings, job.learning_rate),
                    None,
                ),
            )
            loss = family.run(trainer)
        check_finite(loss, job.most_steps, LOWER_RATE)
        return loss

    def _config(
        self, training: TrainingSettings, folder: str, *, device: str, job: Job | None = None
    ) -> Any:
        from trl import SFTConfig

        return family.arguments_of(
            SFTConfig,
            self.arguments,
            training,
            folder,
            device=device,
            job=job,
            max_length=None,  # examples are cut already
        )


def _rows(data: Tokenized) -> Any:
    """A dataset of tokens and labels."""
    import datasets

    examples = [data[index] for index in range(len(data))]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [example.tokens.tolist() for example in examples],
            "labels": [
                [token if learnt else -100 for token, learnt in zip(*pair, strict=True)]
                for pair in ((e.tokens.tolist(), e.learnt.tolist()) for e in examples)
            ],
        }
    )
