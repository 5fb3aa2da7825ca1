"""The sections of an experiment: typed, validated, every default documented."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from hedgerow.errors import did_you_mean
from hedgerow.names import NAME

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
    optimizer: str | dict[str, Any] = "adamw"
    """An optimiser's name, or {name: …} with the options that its file has in
    `hedgerow/training/optimizers/`; your own is `package.module:Class`."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """The optimiser's own option of this name, where it has one, as `sgd`."""
    weight_decay: float = Field(0.0, ge=0)
    """The optimiser's own option of this name."""
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
    metrics: list[str] = ["loss"]
    """Names of metrics, each once: those that are listed, or `package.module:Class`."""
    by: str | None = None
    """A column of the test data: scores are also given for each of its values."""
    batch_size: int = Field(16, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a greedy answer at most, for the metrics that need answers."""

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: list[str]) -> list[str]:
        for name in metrics:
            if metrics.count(name) > 1:
                raise ValueError(f"{name!r} stands twice: name it once")
        return metrics


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
