"""Changes of an experiment from the command line: `key.path=value`, and methods with options."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hedgerow.errors import UserError, brief
from hedgerow.experiment import yaml
from hedgerow.experiment.definition import Experiment
from hedgerow.experiment.mistakes import method_of
from hedgerow.experiment.paths import make_paths_absolute
from hedgerow.methods import METHODS
from hedgerow.methods.parts.codec import CODECS
from hedgerow.methods.parts.server_optimizers import SERVER_OPTIMIZERS
from hedgerow.plugins import Registry
from hedgerow.settings import Section, TrainingSettings, sections
from hedgerow.training.objectives import OBJECTIVES
from hedgerow.training.optimizers import OPTIMIZERS, SHORTHANDS
from hedgerow.training.trainers import TRAINERS

Change = tuple[list[str], Any]
"""The keys that lead to a value, and the value that it gets."""


def method_changes(method: str) -> list[str]:
    """The overrides that a method with its options stands for.

    An option is the method's own (`over=lora`), unless it names another section's key
    (`training.learning_rate=3e-7`).

    Raises:
        UserError: it has no name, or two.
    """
    name, *options = split_at(method, " ") or [""]
    if not name or "=" in name or any(option.partition("=")[0] == "name" for option in options):
        raise UserError(f"the method {method!r}: give one name, then its options")
    own = [o if o.partition(".")[0] in _OTHER_SECTIONS else f"method.{o}" for o in options]
    return [f"method.name={name}", *own]


_OTHER_SECTIONS = {"model", "data", "training", "federation", "evaluation"}


def split_at(text: str, separator: str) -> list[str]:
    """The parts between separators that are in no bracket, without what is empty."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in ")}]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def apply_overrides(
    content: dict[str, Any], overrides: Sequence[str], folders: Sequence[Path]
) -> dict[str, Any]:
    """`content` with each `key.path=value` in it; relative paths are looked for in `folders`."""
    return changed(content, [split_override(override) for override in overrides], folders)


def changed(
    content: dict[str, Any], changes: Iterable[Change], folders: Sequence[Path]
) -> dict[str, Any]:
    """`content` with each value where its keys say."""
    before, content = content.get("method"), copy.deepcopy(content)
    changes = list(changes)
    for keys, value in changes:
        nested = {keys[-1]: copy.deepcopy(value)}
        for key in reversed(keys[:-1]):
            nested = {key: nested}
        make_paths_absolute(nested, folders)
        if keys[-1] == "name" or keys in _DECIDE_WHAT_IS_KEPT:
            forget_kept(content)
        section = content
        for depth, key in enumerate(keys[:-1], start=1):
            nested = nested[key]
            choice = _CHOICES.get(tuple(keys[:depth]))
            if choice is not None:
                _open(section, key, choice, keys[depth:], value)
            is_word = isinstance(section.get(key), bool) and _is_by_word(keys[:depth])
            if is_word or section.get(key) is None:  # not there, as `privacy: null`
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise UserError(f"{'.'.join(keys)}: `{key}` is a value, it has no keys of its own")
        if keys == ["training", "optimizer"]:
            forget_defaults(section)
        section[keys[-1]] = nested[keys[-1]]
    _drop_idle(content, before, changes)
    return content


_DECIDE_WHAT_IS_KEPT = (["method"], ["training", "optimizer"], ["training", "trainer"])


def _is_by_word(keys: Sequence[str]) -> bool:
    """Whether keys lead to a section that may be given as `true` or `false`."""
    kinds: list[type[Section]] = [Experiment]
    for key in keys:
        fields = [kind.model_fields[key] for kind in kinds if key in kind.model_fields]
        kinds = [section for field in fields for section in sections(field.annotation)]
    return any(kind.by_word for kind in kinds)


def _drop_idle(content: dict[str, Any], before: Any, changes: Sequence[Change]) -> None:
    """Drop options of a method that was replaced which do not count beside those of the new one.

    What is given after the new method's name stays: where it does not count, that is a mistake.
    """
    method = content.get("method")
    old = before.get("name") if isinstance(before, dict) else before
    chosen = [i for i, (keys, _) in enumerate(changes) if keys in (["method"], ["method", "name"])]
    if not chosen or not isinstance(method, dict) or old == method.get("name"):
        return
    if changes[chosen[-1]][0] == ["method"]:
        return  # all of it was given
    try:
        counting = METHODS.find(str(method.get("name")), "method.name").counting(method)
    except UserError:
        return  # which is said where the whole experiment is checked
    given = {keys[1] for keys, _ in changes[chosen[-1] :] if keys[0] == "method"}
    for key in set(method) & _options_of(old, METHODS) - counting - given:
        del method[key]


def forget_defaults(training: dict[str, Any]) -> None:
    """Drop what a resolved experiment says under `training:` of an optimiser that is replaced.

    Its default momentum, say, is not the next one's; what somebody chose stays.
    """
    chosen = training.get("optimizer", TrainingSettings.model_fields["optimizer"].default)
    name = chosen.get("name") if isinstance(chosen, dict) else chosen
    try:
        fields = OPTIMIZERS.find(str(name), "training.optimizer").model_fields
    except UserError:
        return  # which is said where the whole experiment is checked
    for key in SHORTHANDS:
        if key in training and key in fields and training[key] == fields[key].default:
            del training[key]


def forget_kept(content: dict[str, Any]) -> None:
    """Drop a `training.keep_optimizer` that is the default of what is replaced.

    Of the method, the optimiser or the trainer, with which there is none to keep.
    """
    training = content.get("training")
    if not isinstance(training, dict) or "keep_optimizer" not in training:
        return
    try:
        default = bool(method_of(content.get("method")).keeps_optimizer)
    except UserError:
        return  # which is said where the whole experiment is checked
    if training["keep_optimizer"] in (None, default and training.get("trainer") is None):
        del training["keep_optimizer"]


class _Choice(NamedTuple):
    """A key whose value is one of several plug-ins: its name, or a mapping that has it."""

    registry: Registry[Any]
    default: str | None
    """The name that is meant where the key is left out."""


_CHOICES = {
    ("method",): _Choice(METHODS, None),
    ("training", "optimizer"): _Choice(
        OPTIMIZERS, TrainingSettings.model_fields["optimizer"].default
    ),
    ("training", "objective"): _Choice(
        OBJECTIVES, TrainingSettings.model_fields["objective"].default
    ),
    ("training", "trainer"): _Choice(TRAINERS, None),
    ("method", "server"): _Choice(SERVER_OPTIMIZERS, None),
    ("method", "up"): _Choice(CODECS, None),
    ("method", "down"): _Choice(CODECS, None),
}


def _open(
    section: dict[str, Any], key: str, choice: _Choice, changed: Sequence[str], value: Any
) -> None:
    """Make a mapping of what is chosen at a key, so that `changed` in it gets `value`."""
    chosen = section.get(key, choice.default)
    if isinstance(chosen, str):
        section[key] = {"name": chosen}
    if list(changed) == ["name"]:
        if choice.registry is OPTIMIZERS:
            forget_defaults(section)
        _drop_options_of_another(section.get(key), value, choice.registry)


def _drop_options_of_another(options: Any, name: Any, registry: Registry[Any]) -> None:
    """`method.name=fedavg` on a file for flora leaves out what only adapters have, as `ranks`."""
    if isinstance(options, dict):
        known, before = (_options_of(n, registry) for n in (name, options.get("name")))
        for key in set(options) - known if known else ():
            if key in before:
                del options[key]


def _options_of(name: Any, registry: Registry[Any]) -> set[str]:
    """Options of a plug-in by its name; none of one that is not there."""
    try:
        return set(registry.find(str(name), "name").model_fields)
    except UserError:
        return set()  # which is said where the whole experiment is checked


def split_override(override: str) -> Change:
    """`training.steps=5` as (["training", "steps"], 5)."""
    key, equals, text = override.partition("=")
    keys = keys_of(key)
    if not equals or keys is None:
        raise UserError(
            f"{brief(override)} is not an override: write key.path=value, as training.steps=5"
        )
    try:
        return keys, yaml.load(text)
    except ValueError as error:
        raise UserError(f"{brief(override)}: the value is not valid YAML: {error}") from None


def keys_of(path: Any) -> list[str] | None:
    """`training.steps` as ["training", "steps"]; None of what leads to no value of a file."""
    keys = path.split(".") if isinstance(path, str) else []
    return keys if all(keys) and 0 < len(keys) <= yaml.DEEPEST else None
