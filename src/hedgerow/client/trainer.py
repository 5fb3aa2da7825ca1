"""A script's trainer as the one that takes a client's steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from hedgerow.errors import RunFailed, UserError, reason_of
from hedgerow.lazy import peft, torch, transformers
from hedgerow.training.job import LOWER_RATE, Job, check_finite
from hedgerow.training.trainers import Trainer, family

if TYPE_CHECKING:
    from torch import nn


class ScriptTrainer(Trainer):
    """A trainer that a script has made, on the model that a method prepares."""

    name: str = "the script's trainer"
    _trainer: Any = PrivateAttr()

    @classmethod
    def of(cls, trainer: Any) -> ScriptTrainer:
        """The trainer of a script: transformers' Trainer, or one of its kind."""
        made = cls()
        made._trainer = trainer
        return made

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have the trainer take the steps of the job.

        Raises:
            UserError: it computes its loss past an adapter of the output layer, or DeepSpeed
                would have other number types than the model.
            RunFailed: one of several processes could not go on.
        """
        trainer = self._trainer
        if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
            family.check_output_layer(job.network, self.name)
        if trainer.is_deepspeed_enabled:
            check_types(trainer, job.network)
        with family.lent(job.network), _as_asked(trainer, job):
            transformers.set_seed(job.dropout_seed % 2**31)
            _forget(trainer)
            try:
                found = trainer.train().training_loss
            except Exception as error:
                if trainer.accelerator.num_processes == 1:
                    raise
                # The others wait for this one's gradients, and can do nothing else.
                raise RunFailed(
                    f"{self.name}: one of its processes has failed: {reason_of(error)}"
                ) from error
            finally:
                trainer.accelerator.free_memory()
                _forget(trainer)
            # Of which each process knows its own part.
            part = torch.tensor(found, device=trainer.accelerator.device)
            loss = float(trainer.accelerator.reduce(part, "mean"))
        check_finite(loss, trainer.state.global_step, LOWER_RATE)
        return loss


def check_script(trainer: Any, num_examples: int | None) -> int:
    """Check a script's trainer; returns its number of examples.

    Raises:
        UserError: it cannot be federated.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise UserError(
            f"federate: {type(trainer).__name__} is no transformers Trainer, nor of its kind, as "
            "TRL's SFTTrainer"
        )
    if trainer.model_init is not None:
        raise UserError(
            "federate: the trainer's model_init makes another model in each round: give model=…"
        )
    if isinstance(trainer.model, peft.PeftModel):
        raise UserError(
            "federate: the trainer's model has an adapter: give it the base model alone (without "
            "peft_config), since the federation's method attaches its own"
        )
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise UserError(
            "federate: the trainer's optimizers=… hold other parameters than a round trains: name "
            "the optimiser in its arguments (optim), or as optimizer_cls_and_kwargs"
        )
    if trainer.is_fsdp_enabled:
        raise UserError(
            "federate: FSDP divides the parameters, of which a round's update needs all: launch "
            "the script without it, or with DeepSpeed's ZeRO 1 or 2"
        )
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer.accelerator.state.deepspeed_plugin)
    several = trainer.accelerator.num_processes
    here = int(os.environ.get("LOCAL_WORLD_SIZE", several))
    if here < several:
        raise UserError("federate: a site is one machine: launch the script with --num_machines 1")
    if here > several:
        raise UserError(
            f"federate: {here} processes were launched, but the trainer uses {several}: on a "
            "machine without GPUs give it use_cpu=True"
        )
    if trainer.processing_class is None:
        raise UserError("federate: the trainer needs processing_class=…, the model's tokenizer")
    if num_examples is None:
        try:
            num_examples = len(trainer.train_dataset)
        except TypeError:
            raise UserError(
                "federate: the trainer's train_dataset has no length: give num_examples"
            ) from None
    if num_examples < 1:
        raise UserError(f"federate: num_examples is {num_examples}: give 1 or more")
    return num_examples


def _check_deepspeed(plugin: Any) -> None:
    """Raise a `UserError` where DeepSpeed would train otherwise than the federation asks."""
    if plugin.zero_stage == 3:
        raise UserError(
            "federate: DeepSpeed's ZeRO 3 divides the parameters, of which a round's update needs "
            "all: take ZeRO 1 or 2, which divide gradients and the optimiser's state"
        )
    for section in ("optimizer", "scheduler"):
        if section in plugin.deepspeed_config:
            raise UserError(
                f"federate: DeepSpeed's configuration has a section {section!r}, whose learning "
                "rate is its own: leave it out, and name the optimiser in the trainer's arguments "
                "(optim)"
            )


def check_types(trainer: Any, network: nn.Module) -> None:
    """Raise a `UserError` where DeepSpeed would have other number types than the model."""
    arguments = trainer.args
    own = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    found = {each.dtype for each in network.parameters() if each.is_floating_point()}
    if others := sorted(str(dtype).removeprefix("torch.") for dtype in found - {own}):
        raise UserError(
            f"federate: DeepSpeed computes in {str(own).removeprefix('torch.')} alone, and the "
            f"model that is trained has {', '.join(others)}: load it in float32 (model.dtype), and "
            "give the trainer neither bf16 nor fp16; or train all of it in bfloat16 with bf16=True"
        )


@contextmanager
def _as_asked(trainer: Any, job: Job) -> Iterator[None]:
    """The trainer with what the federation asks for in the place of the script's arguments."""
    settings, order = job.settings, int(job.order.integers(2**31))
    arguments = {
        "max_steps": settings.steps if settings.epochs is None else -1,
        "num_train_epochs": settings.epochs or 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": transformers.SchedulerType(family.schedule_of(settings)),
        "lr_scheduler_kwargs": {},
        "warmup_steps": settings.warmup_steps,
        "seed": job.dropout_seed % 2**31,
        "data_seed": order,
        # What a round has made is in the ledger; a checkpoint of it would be nobody's.
        "save_strategy": transformers.trainer_utils.SaveStrategy.NO,
        "load_best_model_at_end": False,
    }
    own = {}
    if trainer.optimizer_cls_and_kwargs is not None:
        kind, options = trainer.optimizer_cls_and_kwargs
        own["optimizer_cls_and_kwargs"] = (kind, {**options, "lr": job.learning_rate})
    with (
        _with(trainer.args, arguments),
        _with(trainer, own),
        # The Trainer has handed it on when it was made.
        _with(trainer.accelerator.dataloader_config, {"data_seed": order}),
    ):
        yield


@contextmanager
def _with(whose: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """Other attributes, until the block ends."""
    before = {name: getattr(whose, name) for name in changes}
    for name, value in changes.items():
        setattr(whose, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(whose, name, value)


def _forget(trainer: Any) -> None:
    """Have nothing stay of a round that was trained before."""
    trainer.optimizer, trainer.lr_scheduler = None, None
    trainer.model_wrapped = trainer.model
