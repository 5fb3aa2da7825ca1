"""The experiment file: typed, validated, every default documented.

`load` reads a YAML file, applies `key.path=value` overrides, makes paths absolute and returns an
`Experiment`. Whatever is wrong with the file is one sentence that names the key (`UserError`).

Beside the experiment, a file may say what to compare on it (`compare`, see `Comparison`), and how
to try it in seconds: `smoke` holds `key.path: value` pairs that `--smoke` puts in, as
`{model.path: demo, training.steps: 2, compare.seeds: 1}`. Neither is part of a run.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from hedgerow import methods
from hedgerow.data.sources import may_be_on_hub
from hedgerow.errors import UserError
from hedgerow.methods.base import Method
from hedgerow.names import NAME

Change = tuple[list[str], Any]
"""The keys that lead to a value, and the value that it gets."""
Metric = Literal["loss", "rouge_l", "exact_match", "final_answer", "multiple_choice"]
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Section(BaseModel):
    """A part of the experiment file; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    """The base model, which stays where it is and is never changed on disk."""

    path: str
    """A folder in Hugging Face format, a model's name on the Hub, or `demo`, the bundled tiny model
    (where no folder of that name is beside the experiment file)."""
    revision: str | None = None
    """The Hub revision (branch, tag or commit); None is the default branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base weights while training and evaluating; adapters are always float32."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` …"""


class ClientFile(Section):
    """One client's data, by name."""

    name: str
    file: str


class Fields(Section):
    """Which columns hold what."""

    instruction: str = "instruction"
    input: str | None = "input"
    """Context of the instruction; rows may leave it empty or out. None: there is no such column."""
    output: str = "output"


class Partition(Section):
    """How one source is divided into clients."""

    kind: Literal["iid", "dirichlet", "shard", "column"]
    """`iid`: equal random parts; `dirichlet`: each value of `column` spread by Dirichlet(alpha);
    `shard`: sorted by `column`, `shards` pieces for each client; `column`: a client per value."""
    clients: int | None = Field(None, ge=1)
    """How many clients; for `column` the number of values decides."""
    column: str | None = None
    alpha: float = Field(0.5, gt=0)
    """Dirichlet concentration: small is very uneven, large is nearly iid."""
    shards: int = Field(2, ge=1)
    """Shards per client."""

    @model_validator(mode="after")
    def _complete(self) -> Partition:
        if self.kind == "column":
            if self.clients is not None:
                raise ValueError("`clients` is decided by the column's values: leave it out")
        elif self.clients is None:
            raise ValueError(f"kind {self.kind} needs `clients`, the number of clients")
        if self.kind != "iid" and self.column is None:
            raise ValueError(f"kind {self.kind} needs `column`, the column to divide by")
        return self


class TextSettings(Section):
    """How rows become text and tokens, and the rows to evaluate on."""

    test: str | None = None
    """What to evaluate on, as `source`; None evaluates nothing."""
    test_subset: str | None = None
    """The subset (configuration) to evaluate on where `test` is a Hub dataset that has some."""
    test_split: str = "test"
    """The split to evaluate on where `test` is a Hub dataset."""
    test_share: float = Field(1.0, gt=0, le=1)
    """The share of the rows of `test` that counts, drawn at random but the same in every run."""
    fields: Fields = Fields()
    test_fields: Fields | None = None
    """The columns of the test data, where they are not called as `fields` says."""
    prompt: str = "alpaca"
    """`alpaca`, `alpaca-short`, `plain`, `chat` (the tokenizer's own), or a template's file."""
    max_length: int = Field(512, ge=2)
    """Tokens of prompt and answer together; what is longer is cut at the end, and counted."""
    loss_on: Literal["answer", "all"] = "answer"

    @property
    def fields_of_test(self) -> Fields:
        """The columns of the test data."""
        return self.test_fields or self.fields


DEFAULT_TEST = [
    f"data.{key}={json.dumps(field.default)}"
    for key, field in TextSettings.model_fields.items()
    if key.startswith("test_")
]
"""Overrides for other test data than an experiment's, whose own say how those were to be read."""


class DataSettings(TextSettings):
    """Who holds what: files per client, or one source and how to divide it."""

    clients: str | dict[str, str] | list[ClientFile | str] | None = None
    """`train_{}.json` ({} = 0, 1, 2 …), a mapping name: file, or a list of {name, file}."""
    source: str | None = None
    """Instead of `clients`: a JSON, JSONL, CSV or Parquet file, a dataset's name on the Hub or a
    folder that holds one, or `demo`, the built-in tasks (where no file of that name is beside the
    experiment file)."""
    subset: str | None = None
    """The subset (configuration) to train on where `source` is a Hub dataset that has some."""
    split: str = "train"
    """The split to train on where `source` is a Hub dataset."""
    share: float = Field(1.0, gt=0, le=1)
    """The share of the rows of `source`, or of each client's file, that counts; drawn at random but
    the same in every run."""
    partition: Partition | None = None
    """How `source` is divided."""

    @model_validator(mode="after")
    def _one_kind_of_clients(self) -> DataSettings:
        if (self.clients is None) == (self.source is None):
            raise ValueError("give either `clients` (files) or `source` with `partition`")
        if (self.source is None) != (self.partition is None):
            raise ValueError("`source` and `partition` go together")
        return self

    @field_validator("clients")
    @classmethod
    def _names(cls, clients: Any) -> Any:
        names = list(clients) if isinstance(clients, dict) else []
        if isinstance(clients, list):
            names = [c.name for c in clients if isinstance(c, ClientFile)]
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"client name {name!r} must be letters, digits, `.`, `_` or `-`, "
                    "and begin with a letter or digit"
                )
        return clients


class TrainingSettings(Section):
    """What a client does in a round."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps a round; 10 where neither `steps` nor `epochs` is given."""
    epochs: int | None = Field(None, ge=1)
    """Instead of `steps`: passes over the client's data a round."""
    batch_size: int = Field(8, ge=1)
    """Sequences in one forward pass."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes per optimiser step."""
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate over rounds: round t of T trains at (1 - (t-1)/T) of it for `linear`."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of `sgd`."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients longer than this are scaled down to it; None leaves them."""

    def most_steps(self, num_examples: int) -> int:
        """The optimiser steps of a client with so many examples in a round."""
        if self.epochs is None:
            return self.steps or 10
        batches = self.epochs * math.ceil(num_examples / self.batch_size)
        return math.ceil(batches / self.gradient_accumulation)

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainingSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("`momentum` belongs to `optimizer: sgd`")
        return self


class FederationSettings(Section):
    """Who takes part, and how often."""

    rounds: int = Field(10, ge=1)
    clients_per_round: int | None = Field(None, ge=1)
    """Drawn at random each round; None is everybody."""
    min_clients: int = Field(1, ge=1)
    """The fewest usable updates that close a round."""
    deadline: float | None = Field(None, gt=0)
    """Seconds that a run waits for its clients to join, and a round for their updates, on networks;
    None waits for all. In one process clients train one after another, and none is late."""
    attempts: int = Field(3, ge=1)
    """How often a round is tried where too few clients answer; then the run stops."""
    backoff: float = Field(10.0, ge=0)
    """Seconds before a round is tried again; twice as many before each further try."""
    seed: int = Field(0, ge=0)
    """All randomness of a run derives from it."""
    keep_updates: bool = False
    """Keep what each client sent under `updates/`."""

    @model_validator(mode="after")
    def _enough_clients(self) -> FederationSettings:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise ValueError(
                f"`min_clients` ({self.min_clients}) is above `clients_per_round` "
                f"({self.clients_per_round})"
            )
        return self


class EvaluationSettings(Section):
    """What is measured on the test data, and how often."""

    every: int = Field(1, ge=1)
    """Rounds between evaluations; the last round is always evaluated."""
    metrics: list[Metric] = ["loss"]
    by: str | None = None
    """A column of the test data: scores are also given for each of its values."""
    batch_size: int = Field(16, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    """Of a greedy answer, for `rouge_l`, `exact_match` and `final_answer`."""


class TrackingSettings(Section):
    """Which trackers are told each round's numbers, beside metrics.jsonl."""

    to: list[str] = []
    """`tensorboard`, `wandb`, `mlflow` or `trackio`, or several of them."""
    project: str = "hedgerow"
    """What runs are grouped under: W&B's and trackio's project, MLflow's experiment."""
    name: str | None = None
    """Of the run; None is the name of its directory."""

    @field_validator("to", mode="before")
    @classmethod
    def _known(cls, to: Any) -> Any:
        names = [to] if isinstance(to, str) else to
        if not isinstance(names, list):
            raise ValueError(f"must be a tracker or a list of them (known: {', '.join(TRACKERS)})")
        for name in names:
            if name not in TRACKERS:
                close = did_you_mean(str(name), TRACKERS)
                raise ValueError(f"there is no {name!r}{close} (known: {', '.join(TRACKERS)})")
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands twice: name it once")
        return names

    @field_validator("project")
    @classmethod
    def _everywhere_a_project(cls, project: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", project):
            raise ValueError(
                "must be up to 128 letters, digits, `.`, `_` or `-`, and begin with a letter or "
                "digit"
            )
        return project


class Experiment(Section):
    """A whole experiment."""

    about: str | None = None
    """What it is for, in a sentence: which table of which paper, say."""
    model: ModelSettings
    data: DataSettings
    method: SerializeAsAny[Method]
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Experiment:
        if self.evaluation.by is not None and self.data.test is None:
            raise ValueError("`evaluation.by` needs `data.test`")
        return self

    def dump(self, include: set[str] | None = None) -> str:
        """The experiment (or some of its sections) as YAML, with every default written out."""
        content = self.model_dump(mode="json", include=include)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


class Comparison(Section):
    """What `hedgerow compare` runs on an experiment where its options do not say it."""

    methods: list[str] = []
    """A method's name each, maybe with options, as `--methods` takes them: "ferret over=lora". If
    the file has no `method`, a run of its own is of the first."""
    sweep: dict[str, list[str]] = {}
    """The values of each key that are tried: `{training.learning_rate: [1e-3, 3e-3]}`."""
    seeds: int = Field(1, ge=1)
    """How many seeds each; they count up from `federation.seed`."""
    target: float | None = None
    """The loss to count bytes and rounds to."""

    @field_validator("sweep", mode="before")
    @classmethod
    def _texts(cls, sweep: Any) -> Any:
        """Each value as it would stand on the command line."""
        if not isinstance(sweep, dict):
            raise ValueError("must be a mapping, as {training.learning_rate: [1e-3, 3e-3]}")
        for key, values in sweep.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{key} needs a list of values, as [1, 2, 3]")

        def text(value: Any) -> str:
            return value if isinstance(value, str) else json.dumps(value, default=str)

        return {key: [text(value) for value in values] for key, values in sweep.items()}


class Evaluation(Section):
    """What `hedgerow evaluate` needs of a model that no experiment has made."""

    model: ModelSettings
    data: TextSettings
    evaluation: EvaluationSettings = EvaluationSettings()


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
    content = _read(Path(path), overrides, smoke)
    content.pop("compare", None)
    return validate(content, str(path), Experiment)


def load_comparison(
    path: Path, overrides: Sequence[str] = (), *, smoke: bool = False
) -> Comparison:
    """What an experiment file says about `hedgerow compare`; for the arguments, see `load`."""
    content = _read(path, overrides, smoke)
    return _comparison(content, path)


def _read(path: Path, overrides: Sequence[str], smoke: bool) -> dict[str, Any]:
    """The content of an experiment file with all that changes it, and with a method."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): give an experiment file"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file: give an experiment file in YAML") from None
    content = parse_yaml(text, str(path))
    trial = content.pop("smoke", None)
    _make_paths_absolute(content, [path.parent])
    if smoke:
        content = _changed(content, _smoke_changes(trial, path), [path.parent])
    compared = _comparison(content, path)
    changes = [split_override(override) for override in overrides]
    if not any(keys in (["method"], ["method", "name"]) for keys, _ in changes):
        changes = [*_default_method(content, compared), *changes]
    content = _changed(content, changes, [Path.cwd(), path.parent])
    _comparison(content, path)  # an override may have changed it
    return content


def _comparison(content: Mapping[str, Any], path: Path) -> Comparison:
    try:
        return Comparison.model_validate(content.get("compare", {}))
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error, Comparison, ('compare',))}") from None


def _smoke_changes(trial: Any, path: Path) -> list[Change]:
    if trial is None:
        raise UserError(f"--smoke: {path} has no `smoke`, which would say how to try it in seconds")
    if not isinstance(trial, dict) or not trial:
        raise UserError(f"{path}: `smoke` must hold pairs as {{training.steps: 2}}")
    for key in trial:
        if not isinstance(key, str) or not all(key.split(".")):
            raise UserError(f"{path}: `smoke`: {key!r} is no key, as training.steps is one")
    return [(key.split("."), value) for key, value in trial.items()]


def _default_method(content: Mapping[str, Any], compared: Comparison) -> list[Change]:
    """Where a file has no `method`, the first of those that it compares."""
    if "method" in content or not compared.methods:
        return []
    return [split_override(change) for change in method_changes(compared.methods[0])]


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
    return _changed(content, [split_override(override) for override in overrides], folders)


def _changed(
    content: dict[str, Any], changes: Iterable[Change], folders: Sequence[Path]
) -> dict[str, Any]:
    """`content` with each value where its keys say."""
    content = copy.deepcopy(content)
    for keys, value in changes:
        nested = {keys[-1]: copy.deepcopy(value)}
        for key in reversed(keys[:-1]):
            nested = {key: nested}
        _make_paths_absolute(nested, folders)
        if isinstance(content.get("method"), str):
            content["method"] = {"name": content["method"]}
        if keys == ["method", "name"]:
            _drop_options_of_another_method(content.get("method"), value)
        section = content
        for key in keys[:-1]:
            nested = nested[key]
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise UserError(f"{'.'.join(keys)}: `{key}` is a value, it has no keys of its own")
        section[keys[-1]] = nested[keys[-1]]
    return content


def _drop_options_of_another_method(options: Any, name: Any) -> None:
    """`method.name=fedavg` on a file for flora leaves out what only adapters have, as `ranks`."""
    if isinstance(options, dict) and name in methods.METHODS:
        known = methods.METHODS[name].model_fields
        before = methods.METHODS.get(options.get("name", ""))
        for key in set(options) - set(known):
            if before is not None and key in before.model_fields:
                del options[key]


def without_folders(experiment: Experiment) -> Experiment:
    """The experiment for others: with its files' names alone, and without its trackers.

    Where the data lie and the run is followed is their owner's business.
    """

    def name(path: str | None) -> str | None:
        # What is not absolute is a name on the Hub, or a built-in one.
        return Path(path).name if path and Path(path).is_absolute() else path

    data, clients = experiment.data, experiment.data.clients
    if isinstance(clients, str):
        clients = name(clients)
    elif isinstance(clients, dict):
        clients = {client: Path(file).name for client, file in clients.items()}
    elif clients is not None:
        clients = [
            Path(c).name if isinstance(c, str) else ClientFile(name=c.name, file=Path(c.file).name)
            for c in clients
        ]
    files = {"source": data.source, "test": data.test, "prompt": data.prompt}
    update = {"clients": clients, **{key: name(path) for key, path in files.items()}}
    changes = {"data": data.model_copy(update=update), "tracking": TrackingSettings()}
    return experiment.model_copy(update=changes)


_Settings = TypeVar("_Settings", bound=BaseModel)


def validate(content: Mapping[str, Any], where: str, kind: type[_Settings]) -> _Settings:
    """Settings of a kind from plain values; a mistake is a `UserError` that begins with `where`."""
    content = dict(content)
    if "method" in content:
        content["method"] = _method(content["method"], where)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error, kind, ())}") from None


def _method(options: Any, where: str) -> Method:
    """The method that `options` name; its own class knows the other keys."""
    options = {"name": options} if isinstance(options, str) else options
    name = options.get("name") if isinstance(options, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{where}: `method` needs a name, as in {{name: flora, ranks: 16}}")
    if name not in methods.METHODS:
        known = ", ".join(methods.METHODS)
        close = did_you_mean(name, methods.METHODS)
        raise UserError(f"{where}: `method.name`: there is no {name!r}{close} (known: {known})")
    kind = methods.METHODS[name]
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error, kind, ('method',))}") from None


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping; a key that stands twice is an error, where plain YAML would keep the last."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a mapping with the keys model, data, method …")
    return content


def split_override(override: str) -> Change:
    """`training.steps=5` as (["training", "steps"], 5)."""
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise UserError(
            f"{override!r} is not an override: write key.path=value, as training.steps=5"
        )
    try:
        return key.split("."), yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {_one_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has one key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {key!r} stands twice in one mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _make_paths_absolute(content: Any, folders: Sequence[Path]) -> None:
    """Replace each relative path in `content` (in place) by the absolute one that is meant."""
    if not isinstance(content, dict):
        return
    model, data = content.get("model"), content.get("data")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = _absolute_unless_hub_name(model["path"], folders)
    if not isinstance(data, dict):
        return
    for key in ("source", "test"):
        if isinstance(data.get(key), str):
            data[key] = _absolute_unless_hub_name(data[key], folders)
    if isinstance(data.get("prompt"), str) and not data["prompt"].replace("-", "").isalpha():
        data["prompt"] = _absolute(data["prompt"], folders)
    clients = data.get("clients")
    if isinstance(clients, str):
        data["clients"] = _absolute(clients, folders)
    elif isinstance(clients, dict):
        data["clients"] = {name: _absolute(file, folders) for name, file in clients.items()}
    elif isinstance(clients, list):
        data["clients"] = [
            client | {"file": _absolute(client["file"], folders)}
            if isinstance(client, dict) and "file" in client
            else _absolute(client, folders)
            for client in clients
        ]


def _absolute_unless_hub_name(path: str, folders: Sequence[Path]) -> Any:
    is_here = any((folder / path).exists() for folder in folders)
    return path if not is_here and may_be_on_hub(path) else _absolute(path, folders)


def _absolute(path: Any, folders: Sequence[Path]) -> Any:
    """`path` in the first folder that has it, or in the last."""
    # What is no text is left as it is: validation will name its key.
    if not isinstance(path, str):
        return path
    places = [os.path.abspath(folder / Path(path).expanduser()) for folder in folders]
    return next((p for p in places if Path(p.replace("{}", "0")).exists()), places[-1])


def _sentence(error: ValidationError, kind: type[BaseModel], prefix: tuple[str, ...]) -> str:
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean …` for the nearest of `known`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean `{close[0]}`?" if close else ""
