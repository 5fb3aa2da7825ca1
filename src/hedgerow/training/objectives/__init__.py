"""The objectives of local training: one file each, which holds all of its options.

To add one, put a subclass of `hedgerow.training.objectives.base.Objective` into a file here, or
anywhere: `training.objective: {name: "package.module:Class"}`.
"""

from __future__ import annotations

from typing import Any

from hedgerow.plugins import Registry
from hedgerow.settings import TrainingSettings
from hedgerow.training.objectives.base import Objective

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    Objective,
    "hedgerow.training.objectives",
    see="hedgerow explain training.objective",
)
"""Every objective by the name that the experiment file uses, installed plug-ins included."""


def chosen_objective(training: TrainingSettings) -> tuple[type[Objective], dict[str, Any]]:
    """The objective that an experiment names, and the options that it gives it.

    Raises:
        UserError: there is no such objective.
    """
    unnamed = "`training.objective` needs a name, as in {name: dpo, beta: 0.1}"
    return OBJECTIVES.named(training.objective, "training.objective", unnamed)


def objective_of(training: TrainingSettings) -> Objective:
    """The objective that an experiment names, with its options."""
    kind, options = chosen_objective(training)
    return kind.model_validate(options)


__all__ = ["OBJECTIVES", "Objective", "chosen_objective", "objective_of"]
