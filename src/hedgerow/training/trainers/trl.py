"""TRL's trainers, for two objectives: packing, padding-free batches and what else they have.

`SFTTrainer` gets the client's tokens as they are, and -100 as the label of those that carry no
loss; `DPOTrainer` gets both answers' tokens, and how likely the reference finds them, which
hedgerow has computed. Losses and batches are theirs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field

from hedgerow.data import Tokenized
from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.settings import TrainingSettings
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.job import OR_CLIP, Job, check_finite
from hedgerow.training.objectives import objective_of
from hedgerow.training.objectives.dpo import DPO
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.training.optimizers import make_optimizer
from hedgerow.training.trainers import family
from hedgerow.training.trainers.base import Trainer

if TYPE_CHECKING:
    from torch import nn


class TRL(Trainer):
    """TRL's `SFTTrainer` for the objective `supervised`, and its `DPOTrainer` for `dpo`."""

    libraries = ("trl",)

    name: str = "trl"
    arguments: dict[str, Any] = Field({})
    """Arguments of TRL's `SFTConfig` or `DPOConfig`, as {packing: true, neftune_noise_alpha: 5};
    those that the experiment has words for, as `learning_rate`, are given there. By default none
    beside these."""

    def check(self, training: TrainingSettings, device: torch.device) -> None:
        """Check that TRL is there, the objective, and the arguments."""
        super().check(training, device)
        if training.router_aux_loss_coef:
            raise UserError(
                "training.router_aux_loss_coef: TRL adds such a loss to what it reports, too: take "
                "the trainer transformers, or leave it out"
            )
        family.check_names(self.arguments)
        for key in sorted(self.arguments.keys() & _theirs(training).arguments.keys()):
            raise UserError(
                f"`training.trainer.arguments.{key}`: leave it out, since training.objective "
                "decides it"
            )
        with tempfile.TemporaryDirectory() as folder:
            self._config(training, folder, device)

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have TRL's trainer of the objective take the steps of the job.

        Raises:
            UserError: the model's output layer is adapted, past which its loss is computed.
        """
        theirs = _theirs(job.settings)
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
                trainer = theirs.trainer()(
                    model=job.network,
                    args=config,
                    train_dataset=theirs.rows(data),
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
        theirs = _theirs(training)
        # Examples are cut already; what they are packed into has to be as long as one.
        longest = None
        if self.arguments.get("packing"):
            longest = training.batch_size if data is None else int(data.lengths.max())
        return family.arguments_of(
            theirs.config(),
            self.arguments,
            training,
            folder,
            device=device,
            job=job,
            max_length=longest,
            router_aux_loss_coef=0.0,
            **theirs.arguments,
        )


class _Theirs(NamedTuple):
    """What TRL has for an objective; its classes are imported where they are needed."""

    trainer: Callable[[], type[Any]]
    config: Callable[[], type[Any]]
    arguments: Mapping[str, Any]
    """Arguments that say what the objective's options do."""
    rows: Callable[[Tokenized], Any]
    """Makes a dataset of a client's examples."""


def _theirs(training: TrainingSettings) -> _Theirs:
    """What TRL has for the experiment's objective.

    Raises:
        UserError: it has nothing that would descend the same loss.
    """
    objective = objective_of(training)
    if isinstance(objective, Supervised):
        return _Theirs(_sft_trainer, _sft_config, {}, _texts)
    if not isinstance(objective, DPO):
        raise UserError(
            f"training.trainer trl: is for the objectives supervised and dpo, not {objective.name}:"
            " take the trainer transformers, which follows every objective"
        )
    if objective.loss == "sigmoid" and objective.label_smoothing:
        raise UserError(
            "training.trainer trl: TRL's sigmoid loss knows no label_smoothing: take the loss "
            "robust, or the trainer transformers"
        )
    options = {
        "beta": objective.beta,
        "loss_type": [objective.loss],
        "label_smoothing": objective.label_smoothing,
        "precompute_ref_log_probs": True,
        "disable_dropout": False,  # which would last
    }
    return _Theirs(_dpo_trainer, _dpo_config, options, _pairs)


def _sft_config() -> type[Any]:
    from trl import SFTConfig

    return SFTConfig  # type: ignore[no-any-return]


def _dpo_config() -> type[Any]:
    from trl import DPOConfig

    return DPOConfig  # type: ignore[no-any-return]


def _sft_trainer() -> type[Any]:
    from trl import SFTTrainer

    class Quiet(SFTTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Tell nobody."""

    return Quiet


def _dpo_trainer() -> type[Any]:
    from trl import DPOTrainer

    class Prepared(DPOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Tell nobody."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            """The dataset: it has tokens."""
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
            """The dataset: it has the reference's log-likelihoods."""
            return dataset

    return Prepared


def _pairs(data: Tokenized) -> Any:
    """A dataset of prompts, both answers, and the reference's log-likelihoods of them."""
    import datasets

    rejected = data.other
    assert rejected is not None, "the data are prepared for the objective"
    assert data.reference is not None, "the job has been referred"
    assert rejected.reference is not None, "as has the other part of it"
    better, worse = ([part[index] for index in range(len(data))] for part in (data, rejected))
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": [each.tokens[: each.prompt_length].tolist() for each in better],
            "chosen_ids": [each.tokens[each.prompt_length :].tolist() for each in better],
            "rejected_ids": [each.tokens[each.prompt_length :].tolist() for each in worse],
            "ref_chosen_logps": data.reference.tolist(),
            "ref_rejected_logps": rejected.reference.tolist(),
        }
    )


def _texts(data: Tokenized) -> Any:
    """A dataset of tokens and labels."""
    import datasets

    examples = [data[index] for index in range(len(data))]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [each.tokens.tolist() for each in examples],
            "labels": [np.where(each.learnt, each.tokens, -100).tolist() for each in examples],
        }
    )
