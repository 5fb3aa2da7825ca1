"""Sentences for what pydantic finds wrong with settings, in plain words that name the key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hedgerow.errors import brief, did_you_mean


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


def check_no_boolean(value: Any, kind: type[BaseModel], field: str | None) -> None:
    """Raise a `ValueError` where a number is wanted and true or false given: Python's 1 and 0.

    Args:
        kind: the class of the settings.
        field: the key.
    """
    if isinstance(value, bool) and field is not None:
        types = set(_types(kind.model_fields[field].annotation))
        if types & {int, float} and bool not in types:
            raise ValueError(f"must be a number, not {json.dumps(value)}")


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


def _wrong(errors: list[ErrorDetails], first: ErrorDetails, kind: type[BaseModel], key: str) -> str:
    """What is wrong with a key."""
    location = _keys(first)
    if first["type"] == "extra_forbidden":
        section, name = _section(kind, location[:-1]), str(location[-1])
        if (instead := getattr(section, "elsewhere", {}).get(name)) is not None:
            return f"`{key}` is not a known key: {instead}"
        known = list(section.model_fields)
        close = did_you_mean(name, known)
        listed = f" (known here: {', '.join(known)})" if len(known) <= _FEW else ""
        return f"`{key}` is not a known key{close}{listed}"
    if first["type"] == "missing":
        return f"`{key}` is missing"
    if first["loc"][-1:] == ("[key]",):
        return f"`{key}`: a name must be a text: write it in quotes, as '{first['input']}'"
    message = _words(first)
    if _is_of_form(first):
        # It has none of the forms that it might have.
        others = [e for e in errors if _keys(e) == location and len(e["loc"]) == len(first["loc"])]
        narrower = [e for e in others if not _is_of_form(e)]
        forms = [_words(e).removeprefix("must be ") for e in others]
        message = "must be " + " or ".join(dict.fromkeys(forms))
        if narrower:
            message = _words(narrower[0])
    given = _shown(first["input"])
    is_said = re.search(rf"(?<!\w){re.escape(given)}(?!\w)", message)
    shown = f", not {given}" if given and not is_said else ""
    return f"`{key}`: {message}{shown}" if key else message + shown


def _shown(value: Any) -> str:
    """A value as a file would have it; nothing where that is long, or it is none of a file."""
    if isinstance(value, str | float):
        return brief(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return ""
    return text if len(text) <= _SHORT else ""


_SHORT = 60
"""Characters of a value that a sentence shows."""


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
    "mapping_type": "must be a mapping",
    "tuple_type": "must be a list",
    "set_type": "must be a list",
    "frozen_set_type": "must be a list",
    "iterable_type": "must be a list",
    "string_sub_type": "must be a text",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "int_parsing_size": "must be a smaller whole number",
    "none_required": "must be null",
    "enum": "must be {expected}",
    "recursion_loop": "must not hold itself",
    "invalid_key": "must have a text as its name",
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
    r"str|int|float|bool|literal|constrained-.*|(list|dict|function|literal).*[\[(].*|\[key\]|ClientFile"
)
"""What pydantic puts into a location to name the form that it tried; it is no key of the file."""


def _section(kind: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """Class of the settings at a location, or of those around it."""
    for part in location:
        field = kind.model_fields.get(str(part))
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if inner:
            kind = inner[0]
    return kind


def _known(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """As much of a location as `hedgerow explain` knows: to a list's or mapping's own entries."""
    known: list[str] = []
    for part in location:
        if part not in _section(kind, known).model_fields:
            break
        known.append(str(part))
    return known
