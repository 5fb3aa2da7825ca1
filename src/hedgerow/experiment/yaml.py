"""YAML without surprises: of version 1.2, where `on`, `1:30` and `010` are what they look like."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_NUMBERS = {
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
"""The numbers of YAML 1.2's core schema, https://yaml.org/spec/1.2.2/#103-core-schema; version 1.1,
which PyYAML reads, takes 1e-3 for text, 1:30 for 90 and 010 for 8."""


class Written(float):
    """A number whose text is as it was written: 1e-3, say, in the names of what is compared."""

    text: str

    def __str__(self) -> str:
        return self.text


class Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does, and refuses a mapping that has one key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, as PyYAML declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _tag("merge"):
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _problem("a key must be a text or a number", key_node)
            if key in seen:
                raise _problem(f"the name {key!r} stands twice in one mapping", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """A whole number: decimal also where it begins with 0."""
        text = str(node.value)
        try:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:  # of more digits than Python reads
            raise _problem("the number is too large", node) from None

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """A number, infinity or NaN."""
        text = str(node.value)
        number = Written(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number.text = text
        return number

    def construct_unknown(self, node: yaml.Node) -> Any:
        """Nothing: what a tag would make is not known."""
        raise _problem(f"the tag {node.tag} is not known: leave it out", node)


class Dumper(yaml.SafeDumper):
    """Quotes the texts that YAML 1.1 or 1.2 would read as something else."""


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


def _problem(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _name, _pattern, _first in [
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _NUMBERS["int"], list("-+0123456789")),
    ("float", _NUMBERS["float"], list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
]:
    Loader.add_implicit_resolver(_tag(_name), re.compile(f"(?:{_pattern.pattern})$"), _first)
for _name, _pattern in _NUMBERS.items():
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    Dumper.add_implicit_resolver(_tag(_name), _whole, list("-+.0123456789"))
Loader.add_constructor(_tag("int"), Loader.construct_int)
Loader.add_constructor(_tag("float"), Loader.construct_float)
Loader.add_constructor(None, Loader.construct_unknown)


def load(text: str) -> Any:
    """What a text says.

    Raises:
        ValueError: it is no YAML; the sentence says where, and why.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ValueError(where + _PLAIN.get(problem, problem)) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"character {error.position + 1} cannot be shown and may not stand there: take it out"
        ) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump(content: Any) -> str:
    """The content as YAML."""
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True))


_PLAIN = {
    "found character '\\t' that cannot start any token": "a tab stands where only spaces may: "
    "indent with spaces",
    "mapping values are not allowed here": "a colon stands where none may: put a space behind a "
    "key's colon, and quotes around a text with one",
    "found unexpected end of stream": "a quote that was opened is not closed",
    "expected <block end>, but found '<block mapping start>'": "a key is indented otherwise than "
    "those above it",
    "expected ',' or '}', but got '<stream end>'": "a { is not closed",
    "expected ',' or ']', but got '<stream end>'": "a [ is not closed",
    "but found another document": "a second document begins (---): give one",
}
"""PyYAML's problems whose words say little to people who do not know how YAML is parsed."""
