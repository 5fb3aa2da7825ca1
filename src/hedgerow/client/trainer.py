"""A script's trainer as the one that takes a client's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from hedgerow.errors import UserError
from hedgerow.lazy import peft, transformers
from hedgerow.training.job import OR_CLIP, Job, check_finite
from hedgerow.training.trainers import Trainer, family

if TYPE_CHECKING:
    from torch import nn


class ScriptTrainer(Trainer):
    """A trainer that a script has made, on the model that a method prepares."""

    name: str = "the script's trainer"
    _trainer: Any = PrivateAttr()
    _before: Callable[[], None] | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, trainer: Any) -> ScriptTrainer:
        """The trainer of a script: transformers' Trainer, or one of its kind."""
        made = cls()
        made._trainer = trainer
        return made

    def call_before(self, before: Callable[[], None]) -> None:
        """Call a function before the steps of each round."""
        self._before = before

    def train(self, job: Job, parameters: Mapping[str, nn.Parameter]) -> float:
        """Have the trainer take the steps of the job.

        Raises:
            UserError: it computes its loss past an adapter of the output layer.
        """
        trainer = self._trainer
        if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
            family.check_output_layer(job.network, self.name)
        if self._before is not None:
            self._before()
        with family.lent(job), _with(trainer.args, _given(job)):
            transformers.set_seed(job.dropout_seed % 2**31)
            _forget(trainer)
            try:
                loss = float(trainer.train().training_loss)
            finally:
                trainer.accelerator.free_memory()
                _forget(trainer)
        check_finite(loss, job.most_steps, OR_CLIP)
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


def _given(job: Job) -> dict[str, Any]:
    """Arguments that the federation gives in a round, in the place of the script's."""
    settings = job.settings
    schedule: str = settings.local_schedule
    if schedule == "constant" and settings.warmup_steps:
        schedule = "constant_with_warmup"
    return {
        "max_steps": settings.steps if settings.epochs is None else -1,
        "num_train_epochs": settings.epochs or 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": transformers.SchedulerType(schedule),
        "lr_scheduler_kwargs": {},
        "warmup_steps": settings.warmup_steps,
        "seed": job.dropout_seed % 2**31,
        "data_seed": int(job.order.integers(2**31)),
        # What a round has made is in the ledger; a checkpoint of it would be nobody's.
        "save_strategy": transformers.trainer_utils.SaveStrategy.NO,
        "load_best_model_at_end": False,
    }


@contextmanager
def _with(arguments: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """Other arguments, until the block ends."""
    before = {name: getattr(arguments, name) for name in changes}
    for name, value in changes.items():
        setattr(arguments, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)


def _forget(trainer: Any) -> None:
    """Have nothing stay of a round that was trained before."""
    trainer.optimizer, trainer.lr_scheduler = None, None
    trainer.model_wrapped = trainer.model
