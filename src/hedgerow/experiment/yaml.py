"""YAML without surprises: of version 1.2, where `on`, `1:30` and `010` are what they look like."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar, NamedTuple

import yaml

_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
"""The scalars of YAML 1.2's core schema, https://yaml.org/spec/1.2.2/#103-core-schema; version 1.1,
which PyYAML reads, takes 1e-3 for text, 1:30 for 90 and 010 for 8."""

LONGEST = 10_000_000
"""Largest number of characters of a text in YAML: of the files of 100,000 clients, say."""

MOST_VALUES = 200_000
"""Largest number of values (texts, numbers, mappings, lists) of a text in YAML."""

DEEPEST = 50
"""Largest number of levels of mappings and lists in each other."""

LONGEST_NUMBER = 100
"""Largest number of characters of a number; none that is of use has more than 25."""


class Written(float):
    """A number whose text is as it was written: 1e-3, say, in the names of what is compared."""

    text: str

    def __str__(self) -> str:
        return self.text


class _Size(NamedTuple):
    """Size of a value, with all that its aliases name."""

    values: int
    """Number of texts, numbers, lists and mappings, itself among them."""
    depth: int
    """Number of levels, of which it is the first."""


class Loader(yaml.SafeLoader):
    """Reads what YAML 1.2's core schema has, of bounded size, and no mapping with one key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, as PyYAML declares it
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._size = _Size(values=0, depth=0)
        self._named: dict[str, _Size] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next value, counted as often as it is named: aliases of aliases grow by powers."""
        event, around = self.peek_event(), self._size  # type: ignore[no-untyped-call]
        self._depth += 1
        self._check(_Size(around.values, self._depth), event)
        self._size = _Size(values=1, depth=1)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._named:
                raise _problem(f"*{event.anchor} stands in what it names", event)
            self._size = self._named[event.anchor]
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            self._named[event.anchor] = self._size
        self._size = _Size(
            around.values + self._size.values, max(around.depth, 1 + self._size.depth)
        )
        self._check(_Size(self._size.values, self._depth + self._size.depth - 1), event)
        return node

    def _check(self, size: _Size, place: yaml.Event) -> None:
        if size.depth > DEEPEST:
            raise _problem(f"it is nested more than {DEEPEST} levels deep", place)
        if size.values > MOST_VALUES:
            raise _problem(f"it has more than {MOST_VALUES:,} values, with those of aliases", place)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _problem("a mapping must stand there, as {key: value}", node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _tag("merge"):
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise _problem("a key must be a text or a number", key_node)
            if key in seen:
                raise _problem(f"the name {key!r} stands twice in one mapping", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.Node) -> str:
        """A text; what is escaped in two halves, as JSON does it, is one character."""
        if not isinstance(node, yaml.ScalarNode):
            raise _problem("a text or a number must stand there", node)
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _problem("a text has half of a character (\\uD800 to \\uDFFF)", node) from None

    def construct_null(self, node: yaml.Node) -> None:
        """Nothing."""
        self._written(node, "null")

    def construct_bool(self, node: yaml.Node) -> bool:
        """True or false."""
        return self._written(node, "bool").lower() == "true"

    def construct_int(self, node: yaml.Node) -> int:
        """A whole number: decimal also where it begins with 0."""
        text = self._written(node, "int")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.Node) -> float:
        """A number, infinity or NaN."""
        text = self._written(node, "float")
        number = Written(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number.text = text
        return number

    def construct_unknown(self, node: yaml.Node) -> Any:
        """Nothing: what a tag would make is not known."""
        raise _problem(f"the tag {node.tag} is not known: leave it out", node)

    def _written(self, node: yaml.Node, tag: str) -> str:
        """Text of a value that has a tag, which may have been written before any other text."""
        text = self.construct_scalar(node)
        if not _SCALARS[tag].fullmatch(text):
            raise _problem(
                f"what stands there is no {tag}, as its tag says: leave the tag out", node
            )
        if len(text) > LONGEST_NUMBER:
            raise _problem(
                f"a number has more than {LONGEST_NUMBER} characters: give a shorter one, or put "
                "quotes around it if it is a text",
                node,
            )
        return text


class Dumper(yaml.SafeDumper):
    """Quotes the texts that YAML 1.1 or 1.2 would read as something else."""


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


def _problem(problem: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _whole(pattern: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(f"(?:{pattern.pattern})$")


for _name, _first in [
    ("null", ["~", "n", "N", ""]),
    ("bool", list("tTfF")),
    ("int", list("-+0123456789")),
    ("float", list("-+.0123456789")),
]:
    Loader.add_implicit_resolver(_tag(_name), _whole(_SCALARS[_name]), _first)
Loader.add_implicit_resolver(_tag("merge"), re.compile("<<$"), ["<"])
for _name in ("int", "float"):
    Dumper.add_implicit_resolver(_tag(_name), _whole(_SCALARS[_name]), list("-+.0123456789"))
for _name, _construct in {
    "null": Loader.construct_null,
    "bool": Loader.construct_bool,
    "int": Loader.construct_int,
    "float": Loader.construct_float,
    "str": Loader.construct_scalar,
    "seq": Loader.construct_yaml_seq,
    "map": Loader.construct_yaml_map,
}.items():
    Loader.add_constructor(_tag(_name), _construct)
Loader.add_constructor(None, Loader.construct_unknown)


def load(text: str) -> Any:
    """What a text says.

    Raises:
        ValueError: it is no YAML; the sentence says where, and why.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and may have {LONGEST:,}")
    try:
        loader = Loader(text)
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"character {error.position + 1} cannot be shown and may not stand there: take it out"
        ) from None
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem or error.context).split())
        mark = error.problem_mark or error.context_mark
        raise ValueError(_place(mark) + _PLAIN.get(problem, problem)) from None
    except (ValueError, OverflowError):  # which PyYAML lets through, of \U00110000
        raise ValueError(
            f"{_place(loader.get_mark())}there is no character of the number that is escaped there"
        ) from None


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


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
    "second occurrence": "an anchor (&) of that name stands above: give another name",
    "but found another document": "a second document begins (---): give one",
}
"""PyYAML's problems whose words say little to people who do not know how YAML is parsed."""
