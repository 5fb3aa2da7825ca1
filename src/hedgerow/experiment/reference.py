"""Reference of the experiment file: type, range, default and meaning of each key.

All of it is read from the classes: the text below a field is what the key means, and a section that
has none is what its class says.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from hedgerow.errors import UserError, did_you_mean
from hedgerow.evaluation.metrics import METRICS
from hedgerow.experiment.definition import Experiment
from hedgerow.methods import METHODS
from hedgerow.methods.abilities import ABILITIES, abilities
from hedgerow.methods.parts.codec import CODECS
from hedgerow.methods.parts.server_optimizers import SERVER_OPTIMIZERS
from hedgerow.plugins import Plugin, Registry
from hedgerow.settings import Comparison
from hedgerow.training.objectives import OBJECTIVES
from hedgerow.training.optimizers import OPTIMIZERS
from hedgerow.training.trainers import TRAINERS

REGISTRIES: Mapping[str, Registry[Any]] = {
    "method": METHODS,
    "training.objective": OBJECTIVES,
    "training.optimizer": OPTIMIZERS,
    "training.trainer": TRAINERS,
    "evaluation.metrics": METRICS,
    "method.server": SERVER_OPTIMIZERS,
    "method.up": CODECS,
    "method.down": CODECS,
}
"""Keys that name plug-ins, and where these are found."""


class ExperimentFile(Experiment):
    """Experiment file: the experiment, what to compare on it, and how to try it in seconds."""

    compare: Comparison = Comparison()
    smoke: dict[str, Any] | None = None
    """Changes that `--smoke` makes so that the experiment takes seconds: `{model.path: demo,
    training.steps: 2}`; with null, it cannot be tried so."""


@dataclass(frozen=True)
class Option:
    """Key of the experiment file."""

    key: str
    """Whole path, as `training.steps`."""
    type: str
    """Kind of value, in words."""
    range: str
    """Bounds of its numbers and lists; empty where there are none."""
    required: bool
    """Whether it has no default."""
    default: Any
    """Value of a file that does not have the key, as JSON knows it."""
    meaning: str
    plugins: tuple[str, ...] = ()
    """Plug-ins that have this option, where it is not everybody's."""

    @property
    def first_sentence(self) -> str:
        """Meaning in a few words."""
        return first_sentence(self.meaning)


@dataclass(frozen=True)
class Listed:
    """Plug-in in a list of its kind."""

    name: str
    summary: str
    reference: str
    """Paper that describes it, or nothing."""


@dataclass(frozen=True)
class Page:
    """All that there is to say about a key, and about the keys below it."""

    key: str
    """Empty for the whole file."""
    options: list[Option]
    plugins: list[Listed]
    """Plug-ins that may stand there, or the one that it names."""


def page(key: str = "") -> Page:
    """Page about a key of the experiment file; without one, about all of it.

    Args:
        key: as `training`, `data.fields.input`, `method.ranks` (of all methods that have it),
            `method.flora`, `method.flora.ranks` or `method.package.module:Class`.

    Raises:
        UserError: there is no such key.
    """
    # Each element of a list has the same keys.
    plain = ".".join(part for part in key.split(".") if not part.isdecimal())
    for place, registry in REGISTRIES.items():
        rest = plain.removeprefix(f"{place}.")
        name, below = _plugin_and_option(rest)
        if rest != plain and (":" in name or name in registry):
            own, shared = plugin_options(place, name)
            options = [*own, *shared]
            found = _at(options, f"{place}.{below}" if below else place)
            if below and not found:
                raise _unknown(key, [f"{place}.{name}{o.key.removeprefix(place)}" for o in options])
            return Page(key, found, [] if below else [about(place, name)])
    options = list(_options(ExperimentFile))
    # Of a part of a method whose name is not given, the options that any part of its kind has.
    parts = [p for p in REGISTRIES if p.startswith("method.") and plain.startswith(f"{p}.")]
    options += [option for place in parts for option in _options_of_plugins(place)]
    found = _at(options, plain)
    if not found:
        raise _unknown(key, [option.key for option in options])
    return Page(key, found, listed(plain) if plain in REGISTRIES else [])


def listed(place: str) -> list[Listed]:
    """Plug-ins that a key may name; what cannot be imported says so instead of what it does."""
    found = []
    for name in REGISTRIES[place]:
        try:
            found.append(about(place, name))
        except UserError as error:
            found.append(Listed(name, str(error), ""))
    return found


def about(place: str, name: str) -> Listed:
    """What a plug-in says of itself, or how its docstring begins.

    Raises:
        UserError: there is none of this name.
    """
    kind = REGISTRIES[place].find(name, place)
    summary = getattr(kind, "summary", None) or first_sentence(_paragraphs(kind.__doc__))
    return Listed(name, summary, getattr(kind, "reference", ""))


def description(place: str, name: str) -> str:
    """Docstring of a plug-in's module, where it is one of a package, or else its own."""
    kind = REGISTRIES[place].find(name, place)
    module = sys.modules.get(kind.__module__)
    return inspect.cleandoc(getattr(module, "__doc__", None) or kind.__doc__ or "")


def plugin_options(place: str, name: str) -> tuple[list[Option], list[Option]]:
    """Options of a plug-in under the key that names it: its own, and those that it inherits.

    Raises:
        UserError: there is none of this name.
    """
    kind = REGISTRIES[place].find(name, place)
    inherited = {key for base in kind.__mro__[1:] for key in getattr(base, "model_fields", ())}
    own: list[Option] = []
    shared: list[Option] = []
    for option in _options_of_plugin(kind, place, name):
        first = option.key.removeprefix(f"{place}.").partition(".")[0]
        (shared if first in inherited else own).append(option)
    return own, shared


def abilities_of(name: str) -> dict[str, bool | None]:
    """What a method allows with its default options, by the titles of `ABILITIES`.

    None: the question does not arise. Empty where an option has no default, or where the method
    cannot be imported.
    """
    try:
        found = abilities(METHODS.find(name, "method.name").model_validate({}))
    except (UserError, ValidationError):
        return {}
    return {ABILITIES[key].title: answer for key, answer in found.items()}


def first_sentence(text: str) -> str:
    """Beginning of a text, to its first full stop or semicolon."""
    return re.split(r"[.;](?:\s|$)", text, maxsplit=1)[0]


def _plugin_and_option(text: str) -> tuple[str, str]:
    """`flora.compress.bits` as flora and compress.bits; a module's name may have points itself."""
    module, colon, rest = text.rpartition(":")
    name, _, option = rest.partition(".")
    return module + colon + name, option


def _at(options: Iterable[Option], key: str) -> list[Option]:
    """Options at a key and below it."""
    return [option for option in options if f"{option.key}.".startswith(f"{key}." if key else "")]


def _unknown(key: str, known: list[str]) -> UserError:
    """Sentence for a key that is not there; who leaves its section out is understood."""
    whole = [k for k in known if k.endswith(f".{key}")]
    close = f", did you mean `{whole[0]}`?" if whole else did_you_mean(key, known)
    return UserError(f"there is no key `{key}`{close} (see `hedgerow explain` for all of them)")


def _options(kind: type[BaseModel], prefix: str = "") -> Iterator[Option]:
    """All keys of a section, each before those below it."""
    for name, field in kind.model_fields.items():
        key = prefix + name
        inner = _sections(field.annotation)
        yield Option(
            key=key,
            type=" or ".join(_types(field.annotation)),
            range="; ".join(dict.fromkeys(_ranges(field.annotation, field.metadata))),
            required=field.is_required(),
            default=_plain(field),
            meaning=_meaning(kind, name, inner),
        )
        # Below a method's own options, those of its parts would hide them.
        if key in REGISTRIES and not key.startswith("method."):
            yield from _options_of_plugins(key)
        for section in inner if key not in REGISTRIES else ():
            yield from _options(section, f"{key}.")


def _options_of_plugin(kind: type[Plugin], place: str, name: str) -> list[Option]:
    """Options of a plug-in, without its name."""
    options = _options(kind, f"{place}.")
    return [replace(o, plugins=(name,)) for o in options if o.key != f"{place}.name"]


def _options_of_plugins(place: str) -> Iterator[Option]:
    """Options of all plug-ins that a key may name: what is equal in several, once."""
    (name,) = (option for option in _options(Plugin, f"{place}."))
    yield name
    groups: dict[str, list[Option]] = {}
    for plugin in REGISTRIES[place]:
        try:
            kind = REGISTRIES[place].find(plugin, place)
        except UserError:
            continue  # which the list of plug-ins says
        for option in _options_of_plugin(kind, place, plugin):
            same = groups.setdefault(option.key, [])
            for index, other in enumerate(same):
                if replace(other, plugins=option.plugins) == option:
                    same[index] = replace(other, plugins=(*other.plugins, plugin))
                    break
            else:
                same.append(option)
    for same in groups.values():
        yield from same


def _meaning(kind: type[BaseModel], name: str, sections: list[type[BaseModel]]) -> str:
    """What a key means: the text below it, here or in a class that this one inherits it from."""
    texts = [kind.model_fields[name].description]
    texts += [_texts(base.__module__).get((base.__name__, name)) for base in kind.__mro__]
    texts += [section.__doc__ for section in sections]
    return _paragraphs(next((text for text in texts if text), ""))


@cache
def _texts(module: str) -> dict[tuple[str, str], str]:
    """Texts below the fields of a module's classes, by class and field; none without its source."""
    # pydantic's `use_attribute_docstrings` would read them for every command and every worker.
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, SyntaxError, TypeError):
        return {}
    found = {}
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for field, text in pairwise(kind.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name, value = field.target, text.value
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                    found[kind.name, name.id] = str(value.value)
    return found


def _paragraphs(text: str | None) -> str:
    """Text without its line breaks, but for those between paragraphs."""
    parts = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def _plain(field: FieldInfo) -> Any:
    """Default of a key as it would stand in a file; None where there is none."""
    if field.is_required():
        return None
    return _as_written(field.get_default(call_default_factory=True, validated_data={}))


def _as_written(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_written(part) for part in value]
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        if isinstance(value, Plugin):
            return {"name": value.name, **changed} if changed.keys() - {"name"} else value.name
        return changed
    return to_jsonable_python(value)


_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def _types(annotation: Any) -> list[str]:
    """Forms that a value may have, in words; null is the last."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _types(inner[0])
    if origin in (Union, types.UnionType):
        forms = [form for part in inner for form in _types(part)]
        return sorted(dict.fromkeys(forms), key=lambda form: form == "null")
    if origin is Literal:
        return [f"one of {', '.join(map(str, inner))}"]
    if origin in (list, tuple):
        parts = _types(inner[0])
        plural = [f"list of {part}s" for part in parts if part in _WORDS.values()]
        return plural if len(parts) == len(plural) == 1 else [f"list, each {' or '.join(parts)}"]
    if origin is dict:
        return [f"mapping of {' or '.join(_types(inner[0]))} to {' or '.join(_types(inner[1]))}"]
    if annotation in (None, type(None)):
        return ["null"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["name or mapping" if issubclass(annotation, Plugin) else "mapping"]
    return [_WORDS.get(annotation, "any value")]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Classes with keys of their own in an annotation; those of plug-ins depend on their names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, Plugin) else [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _ranges(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[str]:
    """Bounds of a value, and of the values in it, in words."""
    words = [word for constraint in metadata for word in _bounds(constraint)]
    if words:
        yield ", ".join(words)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        for constraint in more:
            yield from _ranges(None, getattr(constraint, "metadata", [constraint]))
        yield from _ranges(inner)
    elif get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _ranges(part)


def _bounds(constraint: Any) -> Iterator[str]:
    for kind, attribute, words in _BOUNDS:
        if isinstance(constraint, kind):
            yield words.format(getattr(constraint, attribute))


_BOUNDS = (
    (annotated_types.Ge, "ge", "at least {:g}"),
    (annotated_types.Gt, "gt", "above {:g}"),
    (annotated_types.Le, "le", "at most {:g}"),
    (annotated_types.Lt, "lt", "below {:g}"),
    (annotated_types.MultipleOf, "multiple_of", "a multiple of {:g}"),
    (annotated_types.MinLen, "min_length", "a length of at least {:g}"),
    (annotated_types.MaxLen, "max_length", "a length of at most {:g}"),
)
