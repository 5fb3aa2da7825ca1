"""TRL's trainers, for two objectives.

`SFTTrainer`, which has packing and padding-free batches, gets the client's tokens as they are, and
-100 as the label of those that carry no loss; `DPOTrainer` gets both answers' tokens, and how
likely the reference finds them, which hedgerow has computed. Losses and batches are theirs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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
    """Arguments of TRL's `SFTConfig` or `DPOConfig`, as {packing: true} for the former; those that
    the experiment has words for, as `learning_rate`, are given there. By default none beside
    these."""

    def check(self, training: TrainingSettings, device: torch.device) -> None:
        """Check that TRL is there, the objective, and the arguments."""
        super().check(training, device)
        if training.router_aux_loss_coef:
            raise UserError(
                "training.router_aux_loss_coef: TRL adds such a loss to what it reports, too: take "
                "the trainer transformers, or leave it out"
            )
        family.check_names(self.arguments)
        theirs = _counterpart_of(training)
        for key in sorted(self.arguments.keys() & {*theirs.arguments, *theirs.refused}):
            raise UserError(
                f"`training.trainer.arguments.{key}`: leave it out: the loss is what "
                "training.objective says, and its reference's are of whole answers"
            )
        with tempfile.TemporaryDirectory() as folder:
            self._config(training, folder, device)

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have TRL's trainer of the objective take the steps of the job.

        Raises:
            UserError: the model's output layer is adapted, past which its loss is computed.
        """
        theirs = _counterpart_of(job.settings)
        family.check_output_layer(job.network, "training.trainer trl")
        data = job.referring(job.data)
        with (
            family.lent(job.network),
            checkpointed(job.network, job.settings.gradient_checkpointing),
            tempfile.TemporaryDirectory() as folder,
        ):
            config = self._config(job.settings, folder, job.network.device, job, data)
            optimizer = make_optimizer(parameters, job.settings, job.learning_rate)
            with family.in_a_sentence(), _without_hash():
                trainer = _trainer_of(theirs.trainer)(
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
        import trl

        theirs = _counterpart_of(training)
        # Examples are cut already; what they are packed into has to be as long as one.
        longest = None
        if self.arguments.get("packing"):
            longest = training.batch_size if data is None else int(data.lengths.max())
        return family.arguments_of(
            getattr(trl, theirs.config),
            self.arguments,
            training,
            folder,
            device=device,
            job=job,
            max_length=longest,
            router_aux_loss_coef=0.0,
            **theirs.arguments,
        )


class _Counterpart(NamedTuple):
    """What TRL has for an objective."""

    trainer: str
    """Name of its trainer's class."""
    config: str
    """Name of its arguments' class."""
    rows: Callable[[Tokenized], Any]
    """Makes a dataset of a client's examples."""
    arguments: Mapping[str, Any] = {}
    """Arguments that say what the objective's options do."""
    refused: Collection[str] = ()
    """Arguments that would make it another loss, or one of other texts than the reference has."""


def _counterpart_of(training: TrainingSettings) -> _Counterpart:
    """What TRL has for the experiment's objective.

    Raises:
        UserError: it has nothing that would descend the same loss.
    """
    objective = objective_of(training)
    # Not those that are made of them, whose losses are their own.
    if type(objective) is Supervised:
        return _Counterpart("SFTTrainer", "SFTConfig", _texts)
    if type(objective) is not DPO:
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
    return _Counterpart("DPOTrainer", "DPOConfig", _pairs, options, _ANOTHER_LOSS)


_ANOTHER_LOSS = frozenset(
    {
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "ld_alpha",
        "loss_weights",
        "max_length",
        "padding_free",
        "sync_ref_model",
        "truncation_mode",
        "use_weighting",
    }
)


def _trainer_of(name: str) -> type[Any]:
    """TRL's trainer of this name, as a run has use for it."""
    import trl

    class Prepared(getattr(trl, name)):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Tell nobody."""

        def _prepare_dataset(self, dataset: Any, *rest: Any, **more: Any) -> Any:
            """The dataset, of which a preference's has tokens already."""
            if "chosen_ids" in dataset.column_names:
                return dataset
            return super()._prepare_dataset(dataset, *rest, **more)

        def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
            """The dataset: it has the reference's log-likelihoods."""
            return dataset

    return Prepared


@contextmanager
def _without_hash() -> Iterator[None]:
    """Have DPOTrainer hash no model, as the key of log-likelihoods that it would have kept.

    It would read all weights of the model for each client of each round.
    """
    from trl.trainer import dpo_trainer

    whole = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = whole


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
