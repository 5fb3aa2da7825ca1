"""Settings from plain values; a mistake is one sentence that names its key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_core import ErrorDetails

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
        if odd := [key for key in content if not isinstance(key, str) or key == "self"]:
            raise UserError(f"`{odd[0]}` is not a known key; see `hedgerow explain`")
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
    see: str | None = None,
) -> _Settings:
    """Settings whose keys stand below those of `prefix`; a mistake is a sentence."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(sentence(error, kind, prefix, see)) from None


def method_of(options: Any) -> Method:
    """The method that `options` name; its own class knows the other keys."""
    options = {"name": options} if isinstance(options, str) else options
    name = options.get("name") if isinstance(options, dict) else None
    if not isinstance(name, str):
        raise UserError(
            "`method` needs a name, as in {name: flora, ranks: 16}; see `hedgerow methods`"
        )
    kind = METHODS.find(name, "method.name")
    return parsed(kind, options, ("method",), see=f"hedgerow methods {name}")


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


def sentence(
    error: ValidationError, kind: type[BaseModel], prefix: tuple[str, ...], see: str | None = None
) -> str:
    """The first thing that is wrong, as one sentence that names its key.

    Args:
        kind: the class of the settings.
        prefix: the keys that lead to them.
        see: the command that shows what is possible, if it is not `hedgerow explain` with the key.
    """
    # Where a value may have several forms, the form that got furthest is the one that was meant.
    errors = error.errors(include_url=False)
    first = max(errors, key=lambda e: len(e["loc"]))
    location = _keys(first)
    key = ".".join(str(part) for part in (*prefix, *location))
    # Of a key that is not there, or not known, the section says what is possible.
    is_key = first["type"] in ("extra_forbidden", "missing")
    place = (*prefix, *_known(kind, location[:-1] if is_key else location))
    see = see or " ".join(["hedgerow explain", *([".".join(place)] if place else [])])
    return f"{_wrong(errors, first, kind, key)}; see `{see}`"


def _wrong(errors: list[ErrorDetails], first: ErrorDetails, kind: type[BaseModel], key: str) -> str:
    """What is wrong with a key."""
    location = _keys(first)
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        close = did_you_mean(str(location[-1]), known)
        listed = f" (known here: {', '.join(known)})" if len(known) <= _FEW else ""
        return f"`{key}` is not a known key{close}{listed}"
    if first["type"] == "missing":
        return f"`{key}` is missing"
    message = _words(first)
    if _is_of_form(first):
        # It has none of the forms that it might have.
        others = [e for e in errors if _keys(e) == location and len(e["loc"]) == len(first["loc"])]
        narrower = [e for e in others if not _is_of_form(e)]
        forms = [_words(e).removeprefix("must be ") for e in others]
        message = "must be " + " or ".join(dict.fromkeys(forms))
        if narrower:
            message = _words(narrower[0])
    given = first["input"]
    is_said = re.search(rf"(?<!\w){re.escape(repr(given))}(?!\w)", message)
    is_shown = isinstance(given, str | int | float) and not is_said
    shown = f", not {given!r}" if is_shown else ""
    return f"`{key}`: {message}{shown}" if key else message + shown


def _words(error: ErrorDetails) -> str:
    """What a value must be, in plain words where pydantic has others."""
    if error["type"] in _PLAIN:
        context = {name: _unquoted(value) for name, value in error.get("ctx", {}).items()}
        return _PLAIN[error["type"]].format(**context)
    message = error["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _unquoted(value: Any) -> str:
    return value.replace("'", "") if isinstance(value, str) else f"{value:g}"


_PLAIN = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "too_short": "must have a length of at least {min_length}",
    "too_long": "must have a length of at most {max_length}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "literal_error": "must be {expected}",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}
"""What pydantic's kinds of mistake are called; they are listed at
https://docs.pydantic.dev/latest/errors/validation_errors/."""


def _is_of_form(error: ErrorDetails) -> bool:
    """Whether a value is something else than was asked for, and not only out of range."""
    return error["type"] == "literal_error" or error["type"].endswith(("_type", "_parsing"))


_FEW = 12
"""How many known keys a sentence lists; of more, the command that it names does."""


def _keys(error: ErrorDetails) -> list[str | int]:
    """The keys that lead to a mistake, below those of the settings."""
    return [part for part in error["loc"] if not _FORM.fullmatch(str(part))]


_FORM = re.compile(
    r"str|int|float|bool|literal|constrained-.*|(list|dict|function|literal).*[\[(].*|ClientFile"
)
"""What pydantic puts into a location to name the form that it tried; it is no key of the file."""


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        field = kind.model_fields.get(str(part))
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if inner:
            kind = inner[0]
    return list(kind.model_fields)


def _known(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """As much of a location as `hedgerow explain` knows: to a list's or mapping's own entries."""
    known: list[str] = []
    for part in location:
        if part not in _keys_at(kind, known):
            break
        known.append(str(part))
    return known
