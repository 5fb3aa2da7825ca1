"""The experiment file.

`load` reads a YAML file, applies `key.path=value` overrides, makes paths absolute and returns an
`Experiment`. Whatever is wrong with the file is one sentence that names the key (`UserError`).

Beside the experiment, a file may say what to compare on it (`compare`, see `Comparison`), and how
to try it in seconds: `smoke` holds `key.path: value` pairs that `--smoke` puts in, as
`{model.path: demo, training.steps: 2, compare.seeds: 1}`. Neither is part of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hedgerow.errors import UserError, brief
from hedgerow.experiment import yaml
from hedgerow.experiment.definition import Experiment
from hedgerow.experiment.mistakes import validate
from hedgerow.experiment.overrides import (
    Change,
    changed,
    keys_of,
    method_changes,
    split_override,
)
from hedgerow.experiment.paths import make_paths_absolute
from hedgerow.experiment.upgrades import is_of_a_run, upgraded
from hedgerow.sentences import sentence
from hedgerow.settings import Comparison


def load(path: Path | str, overrides: Sequence[str] = (), *, smoke: bool = False) -> Experiment:
    """Read an experiment file.

    Args:
        path: a YAML file; relative paths in it are relative to its folder.
        overrides: `key.path=value`, each value in YAML; a relative path that exists from the
            working directory is taken from there, else from the file's folder.
        smoke: put in what the file says under `smoke`, before the overrides.

    Raises:
        UserError: naming the file or the key that is wrong.
    """
    path = Path(path)
    content = resolve(read(path, smoke=smoke), overrides, [Path.cwd(), path.parent], str(path))
    content.pop("compare", None)
    return validate(content, str(path), Experiment)


def load_comparison(
    path: Path, overrides: Sequence[str] = (), *, smoke: bool = False
) -> Comparison:
    """What an experiment file says about `hedgerow compare`; for the arguments, see `load`."""
    content = resolve(read(path, smoke=smoke), overrides, [Path.cwd(), path.parent], str(path))
    return comparison_of(content, str(path))


def read(path: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Content of an experiment file, with absolute paths.

    Args:
        path: a YAML file.
        smoke: put in what the file says under `smoke`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(yaml.LONGEST + 1)  # which is too long, whatever more there is
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): give an experiment file"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file: give an experiment file in YAML") from None
    content = parse_yaml(text, str(path))
    if is_of_a_run(path):
        content = upgraded(content)
    trial = content.pop("smoke", None)
    make_paths_absolute(content, [path.parent])
    return changed(content, _smoke_changes(trial, path), [path.parent]) if smoke else content


def resolve(
    content: Mapping[str, Any], overrides: Sequence[str], folders: Sequence[Path], where: str
) -> dict[str, Any]:
    """Content of an experiment with all that changes it, and with a method.

    Args:
        content: as `read` gives it.
        overrides: `key.path=value`, each value in YAML.
        folders: where an override's relative path is looked for.
        where: what the content is, for messages.

    Raises:
        UserError: an override is none, or `compare` is wrong.
    """
    compared = comparison_of(content, where)
    changes = [split_override(override) for override in overrides]
    if not any(keys in (["method"], ["method", "name"]) for keys, _ in changes):
        changes = [*_default_method(content, compared), *changes]
    resolved = changed(dict(content), changes, folders)
    comparison_of(resolved, where)  # an override may have changed it
    return resolved


def comparison_of(content: Mapping[str, Any], where: str) -> Comparison:
    """What the content of an experiment file says under `compare`."""
    try:
        return Comparison.model_validate(content.get("compare", {}))
    except ValidationError as error:
        raise UserError(f"{where}: {sentence(error, Comparison, ('compare',))}") from None


def _smoke_changes(trial: Any, path: Path) -> list[Change]:
    if trial is None:
        raise UserError(f"--smoke: {path} has no `smoke`, which would say how to try it in seconds")
    if not isinstance(trial, dict) or not trial:
        raise UserError(f"{path}: `smoke` must hold pairs as {{training.steps: 2}}")
    changes: list[Change] = []
    for key, value in trial.items():
        keys = keys_of(key)
        if keys is None:
            raise UserError(f"{path}: `smoke`: {brief(key)} is no key, as training.steps is one")
        changes.append((keys, value))
    return changes


def _default_method(content: Mapping[str, Any], compared: Comparison) -> list[Change]:
    """Where a file has no `method`, the first of those that it compares."""
    if "method" in content or not compared.methods:
        return []
    return [split_override(change) for change in method_changes(compared.methods[0])]


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping; a key that stands twice is an error, where plain YAML would keep the last."""
    try:
        content = yaml.load(text)
    except ValueError as error:
        raise UserError(f"{where}: is not valid YAML: {error}") from None
    if content is None:
        raise UserError(f"{where}: is empty: give the keys model, data, method …")
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a mapping with the keys model, data, method …")
    return content
