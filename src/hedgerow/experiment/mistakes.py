"""Settings from plain values; a mistake is one sentence that names its key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ValidationError,
)

from hedgerow.errors import UserError, did_you_mean
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.methods import METHODS
from hedgerow.methods.base import Method
from hedgerow.settings import EvaluationSettings, TrainingSettings
from hedgerow.training.optimizers import SHORTHANDS, chosen

_Settings = TypeVar("_Settings", bound=BaseModel)


def validate(content: Mapping[str, Any], where: str, kind: type[_Settings]) -> _Settings:
    """Settings of a kind from plain values; a mistake is a `UserError` that begins with `where`."""
    try:
        settings = parsed(kind, content)
        evaluation = getattr(settings, "evaluation", None)
        if isinstance(evaluation, EvaluationSettings):
            metrics_of(evaluation.metrics)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return settings


def parsed(
    kind: type[_Settings],
    content: Mapping[str, Any],
    prefix: tuple[str, ...] = (),
) -> _Settings:
    """Settings whose keys stand below those of `prefix`; a mistake is a sentence."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(sentence(error, kind, prefix)) from None


def method_of(options: Any) -> Method:
    """The method that `options` name; its own class knows the other keys."""
    options = {"name": options} if isinstance(options, str) else options
    name = options.get("name") if isinstance(options, dict) else None
    if not isinstance(name, str):
        raise UserError("`method` needs a name, as in {name: flora, ranks: 16}")
    return parsed(METHODS.find(name, "method.name"), options, ("method",))


def with_optimizer(training: TrainingSettings) -> TrainingSettings:
    """The settings with all options of the optimiser, where there are some, and its shorthands.

    So a resolved experiment says what holds, and means the same when it is read again.
    """
    kind, options = chosen(training)
    optimizer = parsed(kind, options, ("training", "optimizer"))
    complete = optimizer.model_dump(mode="json")
    content = training.model_dump() | {key: complete[key] for key in SHORTHANDS if key in complete}
    if not isinstance(training.optimizer, str):
        content["optimizer"] = complete
    return parsed(TrainingSettings, content, ("training",))


def sentence(error: ValidationError, kind: type[BaseModel], prefix: tuple[str, ...]) -> str:
    """The first thing that is wrong, as one sentence that names its key."""
    # Where a value may have several forms, the form that got furthest is the one that was meant.
    first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
    location = [part for part in first["loc"] if not _FORM.fullmatch(str(part))]
    key = ".".join(str(part) for part in (*prefix, *location))
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        close = did_you_mean(str(location[-1]), known)
        return f"`{key}` is not a known key{close} (known here: {', '.join(known)})"
    if first["type"] == "missing":
        return f"`{key}` is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = first["input"]
    is_shown = isinstance(given, str | int | float) and repr(given) not in message
    shown = f", not {given!r}" if is_shown else ""
    return f"`{key}`: {message}{shown}" if key else message + shown


_FORM = re.compile(r"str|int|float|constrained-.*|(list|dict|function).*[\[(].*|ClientFile")
"""What pydantic puts into a location to name the form that it tried; it is no key of the file."""


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        field = kind.model_fields.get(str(part))
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if inner:
            kind = inner[0]
    return list(kind.model_fields)
