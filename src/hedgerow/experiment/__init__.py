"""Experiments: from a YAML file and overrides to settings that are checked."""

from hedgerow.experiment.definition import Experiment, without_folders
from hedgerow.experiment.file import load, load_comparison
from hedgerow.experiment.mistakes import validate
from hedgerow.experiment.overrides import apply_overrides, method_changes, split_at

__all__ = [
    "Experiment",
    "apply_overrides",
    "load",
    "load_comparison",
    "method_changes",
    "split_at",
    "validate",
    "without_folders",
]
