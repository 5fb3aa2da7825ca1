"""Trainers of other libraries: one file each, which drives a client's local steps.

To add one, put a subclass of `hedgerow.training.trainers.base.Trainer` into a file here, or
anywhere: `training.trainer: {name: "package.module:Class"}`.
"""

from __future__ import annotations

from typing import Any

from hedgerow.plugins import Registry
from hedgerow.settings import TrainingSettings
from hedgerow.training.trainers.base import Trainer

TRAINERS: Registry[Trainer] = Registry(
    "trainer",
    Trainer,
    "hedgerow.training.trainers",
    see="hedgerow explain training.trainer",
)
"""Every trainer by the name that the experiment file uses, installed plug-ins included."""


def chosen_trainer(training: TrainingSettings) -> tuple[type[Trainer], dict[str, Any]] | None:
    """The trainer that an experiment names, and the options that it gives it; None: hedgerow's.

    Raises:
        UserError: there is no such trainer.
    """
    if training.trainer is None:
        return None
    unnamed = "`training.trainer` needs a name, as in {name: transformers, arguments: {…}}"
    return TRAINERS.named(training.trainer, "training.trainer", unnamed)


def trainer_of(training: TrainingSettings) -> Trainer | None:
    """The trainer that an experiment names, with its options; None: hedgerow's own loop."""
    chosen = chosen_trainer(training)
    if chosen is None:
        return None
    kind, options = chosen
    return kind.model_validate(options)


__all__ = ["TRAINERS", "Trainer", "chosen_trainer", "trainer_of"]
