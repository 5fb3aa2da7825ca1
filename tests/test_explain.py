"""What `hedgerow explain`, `methods` and `--help` say: all that there is, at once."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from pydantic import Field

from hedgerow.cli.entry import app
from hedgerow.errors import UserError
from hedgerow.experiment import reference
from hedgerow.methods import METHODS
from hedgerow.plugins import Plugin, Registry
from hedgerow.settings import Section

ROOT = Path(__file__).parents[1]
# The walk-through of real networks has other programs' commands, and is run by test_deploy.py; a
# table of architectures is no experiment's.
_APART = {ROOT / "docs/deploy.md", ROOT / "docs/compatibility.md"}
DOCS = "\n".join(
    path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path not in _APART
)
"""README, and the documentation."""
EXAMPLES = Path(__file__).parents[1] / "examples"

UNITS = re.compile(
    r"\b(bits|bytes|clients|multiples?|nats|number of|passes|rounds|seconds|share|steps|tokens"
    r"|without a unit)\b",
    re.IGNORECASE,
)
"""Words that say what a number counts."""

OPTIONS = reference.page().options
"""Every key of the file, with the options of all plug-ins."""


def title(option):
    return f"{option.key}-{'-'.join(option.plugins[:1])}"


def commands(command=None, path=()):
    """Every command by its words, the groups among them."""
    command = command or typer.main.get_command(app)
    found = {path: command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= commands(inner, (*path, name))
    return found


@pytest.mark.parametrize("option", OPTIONS, ids=title)
def test_every_option_says_what_it_is(option):
    assert re.match(r"[A-Z]\w+", option.meaning), "begins with a noun"
    assert option.meaning.endswith("."), "is a sentence"
    assert not re.match(r"(The|A|An|Of|How|What|Which|If|When)\b", option.meaning)
    if "number" in option.type:
        assert option.range or UNITS.search(option.meaning), "says what it counts, or its bounds"
    assert "null" not in option.type or "null" in option.meaning, "says what null means"


@pytest.mark.parametrize("option", OPTIONS, ids=title)
def test_every_option_is_shown_with_its_default(hedgerow, option):
    key = option.key
    if len(option.plugins) == 1:
        (place,) = (p for p in reference.REGISTRIES if key.startswith(f"{p}."))
        key = f"{place}.{option.plugins[0]}{key.removeprefix(place)}"
    result = hedgerow("explain", key)
    assert result.code == 0
    default = option.default if isinstance(option.default, str) else json.dumps(option.default)
    shown = " ".join(result.out.split())
    assert ("required" if option.required else f"default {default}") in shown
    assert option.type in shown
    assert option.range in shown


def test_every_field_is_a_key():
    """No section is left out, by whatever way it is named."""
    keys = {option.key.rpartition(".")[2] for option in OPTIONS}
    kinds = [kind for kind in Section.__subclasses__() if kind.__module__.startswith("hedgerow.")]
    assert len(kinds) >= 10
    for kind in kinds:
        assert set(kind.model_fields) <= keys
    for kind in METHODS.values():
        assert set(kind.model_fields) <= keys


def test_all_keys_in_a_line_each(hedgerow):
    result = hedgerow("explain")
    lines = [line.strip() for line in result.out.splitlines()]
    for option in reference.page().options:
        mine = [line for line in lines if line.split(" ")[0] == option.key]
        # Options of several plug-ins may share a key.
        assert any(option.first_sentence in line for line in mine)
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.schedule", ["one of constant, linear, cosine", "default constant", "cos("]),
        ("training", ["training.steps", "training.max_grad_norm", "above 0"]),
        ("data.fields.input", ["text or null", "default input"]),
        ("data.partition.kind", ["one of iid, dirichlet, shard, column", "required"]),
        ("data.clients.0.name", ["Name of the client"]),
        ("method", ["flora", "FLoRA, arXiv 2409.05976", "method.compress.bits"]),
        ("method.ranks", ["of centralized, ditto", "list of whole numbers"]),
        ("method.flora", ["the aggregate is exact", "method.restart", "method.ranks"]),
        ("method.fedavg", ["dense changes averaged"]),
        ("method.flora.compress.bits", ["one of 8, 16, 32", "default 8"]),
        ("method.hedgerow.methods.flora:FLoRA.scaling", ["one of size, uniform, adaptive"]),
        ("compare.sweep", ["Values to try"]),
        ("smoke", ["--smoke"]),
        ("about", ["text or null"]),
    ],
)
def test_a_key_is_explained(hedgerow, key, words):
    result = hedgerow("explain", key)
    assert result.code == 0, result.err
    for word in words:
        assert word in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.lerning_rate", "did you mean `training.learning_rate`?"),
        ("learning_rate", "did you mean `training.learning_rate`?"),
        ("method.flora.rank", "did you mean `method.flora.ranks`?"),
        ("method.florra", "did you mean"),
        ("training.", "there is no key"),
        ("method.nowhere:Class", "there is no module nowhere"),
    ],
)
def test_a_key_that_is_not_there(hedgerow, key, words):
    result = hedgerow("explain", key)
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1


def test_machines_read_json(hedgerow):
    (steps,) = json.loads(hedgerow("explain", "training.steps", "--json").out)["keys"]
    assert steps["default"] is None
    assert steps["range"] == "at least 1"
    assert {"flora", "ferret"} <= {m["name"] for m in json.loads(hedgerow("methods", "--json").out)}
    flora = json.loads(hedgerow("methods", "flora", "--json").out)
    assert flora["shared_options"][0]["key"] == "method.ranks"


@pytest.mark.parametrize("name", [*METHODS, "hedgerow.methods.flora:FLoRA"])
def test_a_method_is_shown_with_its_algorithm_and_options(hedgerow, name):
    result = hedgerow("methods", name)
    assert result.code == 0
    kind = METHODS.find(name, "method")
    boxes = [line for line in inspect.getmodule(kind).__doc__.splitlines() if line[:2] == "  "]
    for words in (kind.summary, kind.reference, *boxes):
        assert words in result.out
    own, shared = reference.plugin_options("method", name)
    places = [result.out.index(f"\n{option.key}\n") for option in [*own, *shared]]
    assert places == sorted(places)


def test_a_method_that_is_not_there(hedgerow):
    result = hedgerow("methods", "florra")
    assert result.code == 2
    assert "did you mean `flora`" in result.err


class Shape(Plugin):
    """Shape of a plug-in; it is only here to be listed."""


class Square(Shape):
    """Square, as any other."""

    name: str = "square"

    side: float = Field(1.0, gt=0)
    """Length of a side, in metres."""


class Oblong(Shape):
    """Oblong."""

    name: str = "oblong"

    side: float = Field(1.0, gt=0)
    """Length of a side, in metres."""
    other: int | None = Field(None, ge=2)
    """Length of the other side, in metres; null is any."""


@pytest.fixture
def shapes(monkeypatch):
    """Another kind of plug-in, as the methods are one."""
    shapes = Registry("shape", Shape, "hedgerow.methods", see="")
    monkeypatch.setattr(shapes, "_own", {"square": Square, "oblong": Oblong}, raising=False)
    places = {**reference.REGISTRIES, "training.optimizer": shapes}
    monkeypatch.setattr(reference, "REGISTRIES", places)


def test_other_plugins_are_shown_as_methods_are(hedgerow, shapes):
    out = hedgerow("explain", "training.optimizer").out
    assert "Square, as any other" in out
    both = hedgerow("explain", "training.optimizer.side").out
    assert both.count("training.optimizer.side") == 1
    assert "of square, oblong" in both
    assert "at least 2" in hedgerow("explain", "training.optimizer.oblong.other").out
    assert "training.optimizer.other" in hedgerow("explain", "training").out
    assert hedgerow("explain", "training.optimizer.square.other").code == 2


def test_a_plugin_without_source_has_no_meaning_and_does_no_harm():
    namespace = {"Plugin": Plugin, "__name__": "nowhere"}
    exec("class Odd(Plugin):\n    name: str = 'odd'\n    size: int = 3\n    'Size.'", namespace)
    (option,) = reference._options_of_plugin(namespace["Odd"], "method", "odd")
    assert (option.type, option.default, option.meaning) == ("whole number", 3, "")


# --- documentation ------------------------------------------------------------------------------


def nested(content, prefix=""):
    """Keys of a YAML mapping, as paths."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from nested(value, f"{prefix}{key}.")


BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
OVERRIDES = set(re.findall(r"\b((?:[a-z_]+\.)+[a-z_]+)=", DOCS))
WRITTEN = {key for block in BLOCKS for key in nested(yaml.safe_load(block))}


@pytest.mark.parametrize("key", sorted(OVERRIDES | WRITTEN))
def test_documented_keys_are_explained(hedgerow, monkeypatch, key):
    if key == "method.mu":  # of the example that the documentation runs
        monkeypatch.syspath_prepend(str(EXAMPLES))
        key = "method.own_method:FedProx.mu"
    assert hedgerow("explain", key).code == 0


def test_documented_inline_options_are_explained():
    """`restart: warm`, `{kind: iid, clients: 10}`: keys of some section."""
    assert len(OVERRIDES | WRITTEN) > 30
    known = {option.key.rpartition(".")[2] for option in OPTIONS} | {o.key for o in OPTIONS}
    known |= {"north", "south"}  # names of clients
    text = re.sub(r"```.*?```", "", DOCS, flags=re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        try:
            content = yaml.safe_load(" ".join(span.split()))
        except yaml.YAMLError:
            continue
        if isinstance(content, dict) and ":" in span:
            assert {key for key in content if isinstance(key, str)} <= known, span


def test_documented_commands_and_their_options_have_help():
    known = commands()
    options = {name for c in known.values() for p in c.params for name in (*p.opts, "--help")}
    # TensorBoard's, of bench/bytes_to_loss.py and bench/privacy.py, and of servers
    others = {"--logdir", "--only", "--choose", "--levels", "--dolly"}
    others |= {"--enable-lora", "--max-lora-rank", "--lora-modules", "--outfile"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCS)) - others <= options
    used = re.findall(r"(?:^|/|`)hedgerow ([a-z-]+)", DOCS, re.MULTILINE)
    assert len(used) > 20
    assert {(name,) for name in used} <= known.keys()


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_has_an_example_and_no_stray_backslash(hedgerow, path):
    result = hedgerow(*path, "--help")
    assert result.code == 0
    assert "\\" not in result.out
    example = f"Example: hedgerow {' '.join(path)}" if path else "Try it: hedgerow demo"
    assert example in result.out


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_says_what_each_argument_is(hedgerow, path):
    out = hedgerow(*path, "--help").out
    _, has, rest = out.partition("Arguments:\n")
    assert out.count("rguments:\n") == len(has[:1])
    for line in filter(None, rest.partition("\n\n")[0].splitlines()):
        assert re.match(r" {2}\S+ {2,}\w| {3,}\S", line), line
    # What the list of commands says is whole.
    assert "..." not in out.partition("Commands:")[2]


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.stepps=3", "see `hedgerow explain training`"),
        ("training.steps=0", "`training.steps`: must be at least 1, not 0; see"),
        ("training.steps=1.5", "must be a whole number, not 1.5"),
        ("training.schedule=x", "must be constant, linear or cosine, not 'x'; see"),
        ("training=3", "must be a mapping, not 3; see `hedgerow explain training`"),
        ("method.ranks=few", "must be a whole number or a list, not 'few'; see `hedgerow methods"),
        ("method.ranks=[]", "must have a length of at least 1"),
        ("method.compress.bits=3", "must be 8, 16 or 32, not 3"),
        ("method.dropout=1", "must be below 1"),
        ("method.name=florra", "see `hedgerow methods`"),
        ("method={ranks: 3}", "see `hedgerow methods`"),
        ("data.clients=[{nam: 3}]", "is missing; see `hedgerow explain data.clients`"),
        ("evaluation.metrics=[los]", "see `hedgerow explain evaluation.metrics`"),
        ("federation.keep_updates=maybe", "must be true or false"),
        ("abuot=x", "see `hedgerow explain`"),
        ("compare.seeds=0", "see `hedgerow explain compare.seeds`"),
        ("model={}", "`model.path` is missing; see `hedgerow explain model`"),
    ],
)
def test_a_mistake_names_the_command_that_helps(hedgerow, override, says, tmp_path):
    result = hedgerow("run", an_experiment(tmp_path), override, "--out", tmp_path / "run")
    assert result.code == 2
    assert says in result.err
    assert result.err.count("\n") == 1
    (command,) = re.findall(r"see `hedgerow ([^`]*)`", result.err)
    assert hedgerow(*command.split()).code == 0


def test_what_a_long_list_would_say_is_left_to_the_command(hedgerow, tmp_path):
    where = [an_experiment(tmp_path), "method=ferret", "--out", tmp_path / "run"]
    long = hedgerow("run", *where, "method.bit=1").err
    assert "did you mean `bits`?; see `hedgerow methods ferret`" in long
    assert "known here" not in long


def an_experiment(folder):
    path = folder / "experiment.yaml"
    data = {"source": "demo", "partition": {"kind": "iid", "clients": 3}}
    content = {"model": {"path": "demo"}, "data": data, "method": {"name": "flora", "ranks": 2}}
    path.write_text(yaml.safe_dump(content))
    return path


# --- at once ------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "peft", "numba", "pandas", "datasets", "pyarrow", "safetensors"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["methods"], 0),
        (["methods", "flora"], 0),
        (["explain"], 0),
        (["explain", "training.schedule"], 0),
        (["run", "EXPERIMENT", "training.stepps=3", "--out", "run"], 2),
        (["compare", "EXPERIMENT", "method.rank=3", "--methods", "fedit", "--out", "run"], 2),
        (["flower", "init", "EXPERIMENT", "app", "data.share=2"], 2),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_needs_no_tensors_imports_none(arguments, code, tmp_path):
    arguments = [str(an_experiment(tmp_path)) if a == "EXPERIMENT" else a for a in arguments]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hedgerow", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert result.returncode == code, result.stderr[-2000:]
    imported = set(re.findall(r"^import time: .*\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert "typer" in imported
    assert not imported & HEAVY


def test_a_broken_installed_plugin_does_not_hide_the_others(monkeypatch, hedgerow):
    def find(name, key):
        if name == "flora":
            raise UserError("flora cannot be imported")
        return Registry.find(METHODS, name, key)

    monkeypatch.setattr(METHODS, "find", find)
    out = hedgerow("methods").out
    assert "flora cannot be imported" in out
    assert "fedit" in out
    assert "method.over" in hedgerow("explain").out
