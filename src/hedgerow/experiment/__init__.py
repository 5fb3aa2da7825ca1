"""Experiments: from a YAML file and overrides to settings that are checked."""

from hedgerow.experiment.definition import Experiment, without_folders
from hedgerow.experiment.file import load, load_comparison
from hedgerow.experiment.libraries import check_libraries, check_server_libraries
from hedgerow.experiment.mistakes import validate
from hedgerow.experiment.overrides import apply_overrides, method_changes, split_at

__all__ = [
    "Experiment",
    "apply_overrides",
    "check_libraries",
    "check_server_libraries",
    "load",
    "load_comparison",
    "method_changes",
    "split_at",
    "validate",
    "without_folders",
]
