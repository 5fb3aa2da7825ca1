"""The optimisers of local training: one file each, which holds all of its options.

To add one, put a subclass of `hedgerow.training.optimizers.base.Optimizer` into a file here, or
anywhere: `training.optimizer: {name: "package.module:Class"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hedgerow.errors import UserError
from hedgerow.lazy import torch
from hedgerow.plugins import Registry
from hedgerow.settings import TrainingSettings
from hedgerow.training.optimizers.base import Optimizer

if TYPE_CHECKING:
    from torch import nn

OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    Optimizer,
    "hedgerow.training.optimizers",
    see="hedgerow explain training.optimizer",
)
"""Every optimiser by the name that the experiment file uses, installed plug-ins included."""

SHORTHANDS = ("momentum", "weight_decay")
"""Options that may also stand right under `training:`."""


def chosen(training: TrainingSettings) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimiser that an experiment names, and the options that it gives it.

    Raises:
        UserError: there is no such optimiser; or it lacks what `training.momentum` or
            `training.weight_decay` gives, or has another value of its own for it.
    """
    unnamed = "`training.optimizer` needs a name, as in {name: adamw, betas: [0.9, 0.99]}"
    kind, options = OPTIMIZERS.named(training.optimizer, "training.optimizer", unnamed)
    for option in SHORTHANDS:
        value = getattr(training, option)
        if option not in kind.model_fields:
            if value:
                raise UserError(
                    f"`training.{option}`: the optimizer {options['name']} has none: leave it out"
                )
        elif option in training.model_fields_set and options.setdefault(option, value) != value:
            raise UserError(
                f"`training.{option}` is {value} and `training.optimizer.{option}` is "
                f"{options[option]}: give one of them"
            )
    return kind, options


def optimizer_of(training: TrainingSettings) -> Optimizer:
    """The optimiser that an experiment names, with its options."""
    kind, options = chosen(training)
    return kind.model_validate(options)


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser that the experiment names."""
    optimizer = optimizer_of(settings).build(parameters, learning_rate)
    if not isinstance(optimizer, torch.optim.Optimizer):
        given = settings.optimizer
        raise UserError(
            f"training.optimizer {given}: `build` must return a torch.optim.Optimizer, not "
            f"{type(optimizer).__name__}"
        )
    return optimizer


__all__ = ["OPTIMIZERS", "SHORTHANDS", "Optimizer", "chosen", "make_optimizer", "optimizer_of"]
