"""Sections of an experiment: typed, validated, each key documented for `hedgerow explain`.

The text below a key is its entry there: it begins with the noun, and says the unit, what null means
and what type and bounds leave open.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hedgerow.errors import ClientFailed, did_you_mean
from hedgerow.names import NAME
from hedgerow.sentences import check_no_boolean

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Section(BaseModel):
    """Part of the experiment file; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    by_word: ClassVar[bool] = False
    """Whether it may be given as `true`, with all its defaults, or `false`, which is null."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys that other libraries have, and what to do here instead, for a sentence to end with."""

    @field_validator("*", mode="before")
    @classmethod
    def _words(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if any(section.by_word for section in sections(annotation)):
                return {} if value else None
        check_no_boolean(value, cls, info.field_name)
        return value


def sections(annotation: Any) -> list[type[Section]]:
    """Sections that a value with such an annotation may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


class ModelSettings(Section):
    """Base model, which stays where it is and is never changed on disk."""

    elsewhere: ClassVar = {
        "load_in_4bit": "give `quantization: nf4`",
        "load_in_8bit": "give `quantization: int8`",
        "torch_dtype": "give `dtype`",
        "device_map": "a model is on one device, which `device` names; `quantization`, "
        "`dtype: bfloat16` and `training.gradient_checkpointing` have it take less memory",
        "trust_remote_code": "code that comes with a model is never run; give a model of an "
        "architecture that transformers has itself",
    }

    path: str
    """Folder in Hugging Face format, or name of a model on the Hub, or `demo`: the bundled tiny
    model, where no folder of that name is beside the experiment file."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; with null, its default branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the base weights while training and evaluating; adapters are always
    float32. With `quantization`, the number type that is computed with."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Number type that the weights of linear layers are quantized to when they are loaded, by
    bitsandbytes: `nf4` or `fp4`, of 4 bits, or `int8`. They stay as they are from then on: methods
    of adapters alone can have such a base, and what would be added to its weights is kept beside
    them. With null, weights are as the checkpoint has them."""
    merged_rank: int | None = Field(None, ge=1)
    """Largest rank of what is kept beside a quantized weight: the sum of all that was learnt so far
    is cut to it, and `merged_error` in the rows of rounds that are scored says what the cuts amount
    to at most. With null, nothing is cut."""
    device: str = "auto"
    """Device that trains and evaluates: `cpu`, `cuda`, `cuda:1` …; `auto` takes a GPU if there is
    one, else the CPU."""


OwnFiles = str | Annotated[list[str], Field(min_length=1)]
"""A client's file, or several."""


class ClientFile(Section):
    """Data of one client, by its name."""

    name: str
    """Name of the client: up to 200 letters, digits, `.`, `_` or `-`, the first a letter or
    digit."""
    file: OwnFiles
    """File of the client's rows, or a list of several: JSON, JSONL, CSV, TSV or Parquet, text ones
    maybe packed (`.gz`, `.bz2`, `.xz`, `.zst`), or folders that hold a dataset."""


class Fields(Section):
    """Columns of the data that hold the instruction, its input and the answer, or a conversation.

    Where rows have prompts and completions, `prompt` and `completion` name them as well. A column
    inside another is named with a dot, as `answers.text`.
    """

    instruction: str = "instruction"
    """Column of the instruction: a text, or the messages before the answer. With the default, rows
    that have `messages`, `conversations` or `prompt` and `completion` instead are read too."""
    input: str | None = "input"
    """Column of the instruction's context, which rows may leave empty or out; with null, there is
    no such column."""
    output: str = "output"
    """Column of the answer; rows without one are left out, and counted."""
    prompt: str | None = None
    """Column of the prompt, which is another word for `instruction`; with null, that names it. It
    goes with `completion`, or with `chosen` and `rejected`."""
    completion: str | None = None
    """Column of the completion, which is another word for `output` and goes with `prompt`; with
    null, `output` names it."""
    messages: str | None = None
    """Column of conversations, instead of all others: lists of {role, content} or of {from, value},
    whose last answer counts, or all with `loss_on: turns`; with null, there is none. Turns may call
    tools (`tool_calls`), and be what these return (role `tool`), where `prompt` is `chat` and the
    chat template writes them."""
    tools: str | None = "tools"
    """Column of the tools that an answer may call, which rows may leave empty or out: a list of
    functions' schemas, as OpenAI and transformers have them, or its JSON. With null, there is no
    such column."""
    chosen: str | None = None
    """Column of the better answer of a pair, instead of `output`: a text, or messages, also with
    those of the prompt before them where the row has none of its own. With the defaults, rows that
    have `chosen` and `rejected` instead of answers are read too; with null, there is none."""
    rejected: str | None = None
    """Column of the worse answer of a pair, which goes with `chosen`; with null, there is none."""
    label: str | None = None
    """Column that says whether the answer is a good one (true) or a bad one (false), as
    `training.objective: kto` learns from; with null, all are good."""

    @model_validator(mode="after")
    def _one_kind(self) -> Fields:
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("`chosen` and `rejected` go together: give both")
        if self.chosen is not None and (
            self.completion is not None
            or self.label is not None
            or self.messages is not None
            or self._names("output")
        ):
            raise ValueError(
                "`chosen` and `rejected` are both answers of a row: leave out `output`, "
                "`completion`, `messages` and `label`"
            )
        if self.label is not None and self.messages is not None:
            raise ValueError("`label` is of one answer: give its column, not `messages`")
        if self.chosen is None and (self.prompt is None) != (self.completion is None):
            raise ValueError(
                "`prompt` and `completion` go together: give both (or `chosen` and `rejected`)"
            )
        if self.prompt is not None and self._names("instruction", "output"):
            raise ValueError(
                "`prompt` and `completion` are other words for `instruction` and `output`: give "
                "one pair or the other"
            )
        if self.messages is not None and (
            self.prompt is not None or self._names("instruction", "input", "output")
        ):
            raise ValueError("give `messages`, or the columns of instruction, input and output")
        return self

    def _names(self, *keys: str) -> bool:
        """Whether any of the keys names another column than it does by default."""
        return any(getattr(self, key) != type(self).model_fields[key].default for key in keys)


class Partition(Section):
    """Division of one source into clients."""

    kind: Literal["iid", "dirichlet", "shard", "column"]
    """Kind of division. `iid`: equal random parts; `dirichlet`: each value of `column` spread over
    the clients by Dirichlet(`alpha`); `shard`: the rows sorted by `column`, and `shards` pieces for
    each client; `column`: a client for each value."""
    clients: int | None = Field(None, ge=1)
    """Number of clients, which every kind needs but `column`, where the values decide (null)."""
    column: str | None = None
    """Column to divide by, or one inside another, as `meta.topic`, which every kind needs but `iid`
    (null)."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of `dirichlet`, without a unit: small is very uneven, large nearly as `iid`."""
    shards: int = Field(2, ge=1)
    """Number of pieces that each client gets, for `shard`."""

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


class TemplateSettings(Section):
    """The tokenizer's chat template, for `prompt: chat`, and variables that it reads.

    A key that is not below is such a variable, as `enable_thinking: false`.
    """

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    """Name of the chat template, of a tokenizer that has several; with null, its default."""
    date: datetime.date | None = None
    """Day that a chat template which writes the date is given, as 2026-11-25; with null, the day on
    which the run begins, which its experiment.yaml says from then on."""

    @field_validator("date", mode="before")
    @classmethod
    def _day(cls, date: Any) -> Any:
        if date is None or isinstance(date, datetime.date):
            return date
        try:
            return datetime.date.fromisoformat(str(date))
        except ValueError:
            raise ValueError(f"{date!r} is no day: write it as 2026-11-25") from None

    @property
    def variables(self) -> dict[str, Any]:
        """Variables that the template is given."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _usable(self) -> TemplateSettings:
        for name, value in self.variables.items():
            if not name.isidentifier() or name in _TAKEN or name.endswith(("_token", "_tokens")):
                why = (
                    "is hedgerow's or the tokenizer's to give" if name.isidentifier() else "is none"
                )
                raise ValueError(f"{name!r} {why}, and no variable of yours: choose another name")
            if not _is_plain(value):
                raise ValueError(
                    f"the variable {name!r} must be text, a finite number, true, false or null, or "
                    "a list or mapping of these"
                )
        return self


_TAKEN = frozenset(
    {
        *("messages", "message", "tools", "documents", "conversation", "conversations"),
        *("chat_template", "add_generation_prompt", "continue_final_message"),
        *("return_assistant_tokens_mask", "date_string", "strftime_now", "raise_exception"),
        *("hedgerow_day", "loop", "namespace", "range", "dict", "self", "variables"),
    }
)
"""Names that a chat template is given anyway, or that Jinja has a meaning for."""


def _is_plain(value: Any) -> bool:
    """Whether a value is one that JSON has."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value is None or isinstance(value, str) or is_number


class TextSettings(Section):
    """Text and tokens that rows become, and the rows to evaluate on."""

    test: str | None = None
    """Rows to evaluate on: a file, a dataset or `demo`, as for `source`; with null, nothing is
    evaluated."""
    test_subset: str | None = None
    """Subset (configuration) to evaluate on where `test` is a Hub dataset that has some; with null,
    the dataset's default."""
    test_split: str = "test"
    """Split to evaluate on where `test` is a Hub dataset; files have none."""
    test_share: float = Field(1.0, gt=0, le=1)
    """Share of the rows of `test` that counts, drawn at random but the same in every run."""
    test_rows: int | None = Field(None, ge=1)
    """Number of rows of `test` that are read, as `rows` has it; with null, all."""
    fields: Fields = Fields()
    """Columns of the clients' data, and of the test data unless `test_fields` says otherwise."""
    test_fields: Fields | None = None
    """Columns of the test data; with null, they are called as `fields` says."""
    prompt: str = "alpaca"
    """Template that makes a prompt of a row: `alpaca`, `alpaca-short`, `plain`, `chat` (the
    tokenizer's own), or a text file with `{instruction}` and `{input}`, and `{?input}…{/input}`
    around what belongs to an input."""
    template: TemplateSettings = TemplateSettings()
    """Choice of the tokenizer's chat template, and what it is given."""
    max_length: int = Field(512, ge=2)
    """Number of tokens of prompt and answer together; what is longer is cut at the end, and
    counted."""
    loss_on: Literal["answer", "turns", "all"] = "answer"
    """Tokens that the training loss counts: those of the `answer`, the last one of a conversation;
    of all answers of its `turns`, each of which is scored too; or `all`, with the prompt's. With
    `turns`, every answer in a prompt that is no tokenizer's own ends with EOS."""

    @model_validator(mode="after")
    def _has_a_chat_template(self) -> TextSettings:
        if self.prompt != "chat" and self.template.variables:
            name = next(iter(self.template.variables))
            raise ValueError(
                f"`template.{name}` is a variable of the tokenizer's chat template, which is used "
                "with `prompt: chat` alone: set that, or leave it out"
            )
        return self

    @property
    def fields_of_test(self) -> Fields:
        """Columns of the test data."""
        return self.test_fields or self.fields


DEFAULT_TEST = [
    f"data.{key}={json.dumps(field.default)}"
    for key, field in TextSettings.model_fields.items()
    if key.startswith("test_")
]
"""Overrides for other test data than an experiment's, whose own say how those were to be read."""


class DataSettings(TextSettings):
    """Data: a file for each client, or one source and its division; and what to evaluate on."""

    clients: str | dict[str, OwnFiles] | list[ClientFile | str] | None = None
    """Files of the clients: a pattern as `train_{}.json` ({} = 0, 1, 2 …), a mapping of names to
    files, or to a list of several, as `{north: [2024.csv, 2025.jsonl.gz]}`, or a list of files or
    of {name, file}; with null, `source` is given instead."""
    source: str | None = None
    """Rows of all clients together: a JSON, JSONL, CSV, TSV or Parquet file, text ones maybe packed
    (`.gz`, `.bz2`, `.xz`, `.zst`), a dataset's name on the Hub or a folder that holds one, or
    `demo`: the built-in tasks, where no file of that name is beside the experiment file; with null,
    `clients` is given instead."""
    subset: str | None = None
    """Subset (configuration) to train on where `source` is a Hub dataset that has some; with null,
    the dataset's default."""
    split: str = "train"
    """Split to train on where `source` is a Hub dataset; files have none."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the rows of `source`, or of each client's file, that counts; drawn at random but the
    same in every run."""
    rows: int | None = Field(None, ge=1)
    """Number of rows of `source`, or of each client's file, that are read: the first ones, in the
    order that the source has them, of which `share` is drawn. Of a Hub dataset no more is loaded
    then, and nothing kept (it is streamed), so that it may be larger than the disk. With null,
    all."""
    partition: Partition | None = None
    """Division of `source` into clients, which belongs to it; null where `clients` are given."""
    client_test: (
        Annotated[float, Field(gt=0, lt=1)] | str | dict[str, OwnFiles] | list[ClientFile] | None
    ) = None
    """Rows that each client is scored on by itself, with the model that it has: a share of its own
    rows, above 0 and below 1, which is drawn by the run's seed and not trained on; or files, as a
    pattern, whose numbers are the clients' places (0, 1, 2 …), a mapping of clients' names to
    files (a list of several, too), or a list of {name, file}, with columns as `fields` has them.
    With null, there are none."""

    @model_validator(mode="after")
    def _one_kind_of_clients(self) -> DataSettings:
        if (self.clients is None) == (self.source is None):
            raise ValueError("give either `clients` (files) or `source` with `partition`")
        if (self.source is None) != (self.partition is None):
            raise ValueError("`source` and `partition` go together")
        return self

    @field_validator("clients", mode="before")
    @classmethod
    def _names(cls, clients: Any) -> Any:
        names = list(clients) if isinstance(clients, dict) else []
        if isinstance(clients, list):
            names = [c["name"] for c in clients if isinstance(c, dict) and "name" in c]
        for name in names:
            if not isinstance(name, str):
                kind = {bool: "a boolean", type(None): "no value"}.get(type(name), "a number")
                raise ValueError(
                    f"client name {json.dumps(name, default=str)} is {kind} in YAML, not text: "
                    "write it in quotes"
                )
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"client name {name!r} must be letters, digits, `.`, `_` or `-`, "
                    "and begin with a letter or digit"
                )
        return clients


class TrainingSettings(Section):
    """Training of a client in a round."""

    beside: ClassVar = ("gradient_checkpointing",)
    """Keys that the entries of a run do not depend on, and that one which goes on may change."""
    elsewhere: ClassVar = {
        "lr": "give `learning_rate`",
        "max_steps": "give `steps`, of a client in a round",
        "num_train_epochs": "give `epochs`, of a client in a round",
        "per_device_train_batch_size": "give `batch_size`",
        "gradient_accumulation_steps": "give `gradient_accumulation`",
        "lr_scheduler_type": "give `local_schedule`, over a client's steps in a round, or "
        "`schedule`, over rounds",
        "optim": "give `optimizer`",
        "bf16": "give `model.dtype: bfloat16`",
        "max_length": "give `data.max_length`",
        "max_seq_length": "give `data.max_length`",
    }

    steps: int | None = Field(None, ge=1)
    """Number of optimiser steps of a client in a round; with null, `epochs` decides, or there are
    10 steps where that is null too."""
    epochs: int | None = Field(None, ge=1)
    """Number of passes over the client's data in a round, instead of `steps`; with null, `steps`
    decides."""
    objective: str | dict[str, Any] = "supervised"
    """Objective of the local steps: `supervised` (the likelihood of answers), or a preference's,
    `dpo`, `kto` or `orpo`; a name, or a mapping with options, as {name: dpo, beta: 0.1}; your own
    is `package.module:Class`."""
    batch_size: int = Field(8, ge=1)
    """Number of examples in one forward pass: of sequences, or of pairs of them."""
    gradient_accumulation: int = Field(1, ge=1)
    """Number of forward passes whose gradients make one optimiser step."""
    gradient_checkpointing: bool = False
    """Whether layers keep their inputs alone while training, and are computed again going backward:
    less memory for activations, a third more time, and the same losses."""
    learning_rate: float = Field(3e-4, gt=0)
    """Learning rate of the first round, and of all others with a constant `schedule`; what is good
    differs by method and optimiser."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate over rounds. In round t of T it is `learning_rate` times 1 for
    `constant`, 1 - (t-1)/T for `linear`, and (1 + cos(π·(t-1)/T))/2 for `cosine`."""
    local_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate over a client's steps of a round, from the round's own to 0
    after the last step, as transformers' Trainer has it: `linear`, as in the FLoRA authors' script,
    or half a `cosine`."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps at the beginning of each client's round over which its learning rate rises
    from 0 in equal parts, the first step's being 0, as transformers' Trainer has it; 0 is none."""
    optimizer: str | dict[str, Any] = "adamw"
    """Optimiser of the local steps: a name, or a mapping with options, as {name: adamw, betas:
    [0.9, 0.99]}; your own is `package.module:Class`."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of an optimiser that has one, as `sgd`: the share of its last step that each step
    repeats; 0 is plain SGD."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the optimiser: the share of each weight, times the learning rate, that a step
    takes away; with `sgd` and `momentum` it is part of the gradient. 0 is none."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Longest gradient, as the 2-norm over all parameters that train; longer ones are scaled down
    to it. With null, they are left as they are."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Coefficient of the auxiliary loss by which the routers of a mixture of experts spread tokens
    evenly, as transformers' models have it (over all tokens of a batch); losses that are reported
    are without it. 0 is none."""
    trainer: str | dict[str, Any] | None = None
    """Trainer that takes the local steps instead of hedgerow's own loop: `transformers` (its
    Trainer, along the experiment's objective), `trl` (SFTTrainer, or DPOTrainer for the
    objective `dpo`), as {name: trl, arguments: {packing: true}}; your own is
    `package.module:Class`. With null, there is none."""
    keep_optimizer: bool | None = None
    """Whether each client keeps its optimiser's moments for its next round, on its own disk; they
    are never sent. With null, as the method has it: yes for `fedavg`, `diloco`, `sparseloco`,
    `ferret` and `flora`, whose papers do not say otherwise, and no for others, and with a
    `trainer`."""

    def most_steps(self, num_examples: int) -> int:
        """Number of optimiser steps of a client with so many examples in a round."""
        if self.epochs is None:
            return self.steps or 10
        batches = self.epochs * math.ceil(num_examples / self.batch_size)
        return math.ceil(batches / self.gradient_accumulation)

    def sample_size(self, num_examples: int) -> int:
        """Number of examples of an optimiser step, on average where they are sampled (privacy)."""
        return min(self.batch_size * self.gradient_accumulation, num_examples)

    def sampled_steps(self, num_examples: int) -> int:
        """Number of optimiser steps of a client in a round where their examples are sampled.

        In as many, `epochs` examples are drawn for each that there is, on average.
        """
        if self.epochs is None:
            return self.steps or 10
        return math.ceil(self.epochs * num_examples / self.sample_size(num_examples))

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainingSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.epochs is None and self.warmup_steps >= self.most_steps(1):
            raise ValueError(
                f"`warmup_steps` must be below the number of steps, {self.most_steps(1)}, or no "
                "step would have the whole learning rate"
            )
        return self


class SecureSettings(Section):
    """Secure sums: of clients' updates the server learns their sum, and of none of them alone."""

    by_word: ClassVar = True

    bits: Literal[16, 32, 64] = 32
    """Number of bits of a fixed-point code: 32 are as many as numbers of dense updates have."""
    largest: float = Field(10.0, gt=0)
    """Largest magnitude of one number of an update; a client with a larger one has none to send.
    Codes are the finer, the smaller it is."""
    threshold: int | None = Field(None, ge=2)
    """Number of clients t without which a round has no result: any t of them can take the masks
    from the sum of those who sent their updates, and fewer can do nothing; with null, one more than
    two thirds of those who are asked."""
    masks: bool = True
    """Whether codes are masked; without, they add up to the same, and the server sees each, for
    comparisons."""

    def needed(self, asked: int) -> int:
        """Number of clients without which there is no sum, t; at least 2, since a sum of one
        client is its update.

        Args:
            asked: number of clients that take part in a round.
        """
        return self.threshold or max(2, 2 * asked // 3 + 1)


COORDINATE_WISE = ("median", "trimmed_mean")
"""Values of `federation.weights` that take the middle of each coordinate."""


class SaysSettings(Section):
    """Words beside an update: what a client says of itself, by which it counts or is followed."""

    decide: ClassVar = ("losses", "examples")
    """Keys that the entries of a run depend on."""

    losses: bool | None = None
    """Whether updates have the mean training loss, and rows and entries a mean of them; with null,
    they do but for `privacy`, under which none leaves a client."""
    examples: Literal["exact", "rounded", "withheld"] | None = None
    """Number of examples that a client says it has, and is weighed by: the `exact` one, `rounded`
    up to a power of two, or `withheld`, which is 1 for each, so that all weigh the same; its own
    test rows are counted so, too. With null, it is exact; with `privacy` of level `client`, where
    it counts for nothing, withheld."""
    failures: Literal["full", "kind"] | None = None
    """Sentence of a client that has no update: in `full`, or only of which `kind` its failure is,
    without a number, while the client's own log has all of it. With null, it is in full; with
    `privacy` of level `example`, the kind."""

    def count(self, examples: int) -> int:
        """Number that a client with so many examples says."""
        if self.examples == "withheld":
            return 1
        return 1 << (examples - 1).bit_length() if self.examples == "rounded" else examples

    def sentence(self, failure: ClientFailed) -> str:
        """Sentence that a client says of its failure."""
        return failure.kind if self.failures == "kind" else str(failure)


class FederationSettings(Section):
    """Rounds: how many there are, and who takes part."""

    decide: ClassVar = (
        "clients_per_round",
        "seed",
        "weights",
        "largest_share",
        "trusted",
        "secure",
    )
    """Keys that the entries of a run depend on; a run that goes on may change all others."""

    rounds: int = Field(10, ge=1)
    """Number of rounds of the whole run; a finished run goes on where it is raised (`--resume`)."""
    clients_per_round: int | None = Field(None, ge=1)
    """Number of clients that are drawn at random for each round; with null, all take part. With
    `privacy` of level `client`, each is drawn in secret and independently of the others, so that it
    is their number on average, and rounds cost less ε."""
    min_clients: int = Field(1, ge=1)
    """Number of usable updates that a round needs at least; where fewer clients were drawn in
    secret, all of theirs."""
    deadline: float | None = Field(None, gt=0)
    """Seconds that a run waits for its clients to join, and a round for their updates, on networks;
    with null, it waits for all but sites that refuse to take part. In one process clients train one
    after another, and none is late."""
    attempts: int = Field(3, ge=1)
    """Number of times that a round is tried where too few clients answer, or not the `trusted`
    one; then the run stops."""
    backoff: float = Field(10.0, ge=0)
    """Seconds before a round is tried again; twice as many before each further try."""
    seed: int = Field(0, ge=0)
    """Seed that all randomness of the run derives from."""
    weights: (
        Literal[
            "size",
            "uniform",
            "krum",
            "multi_krum",
            "geometric_median",
            "norm_bound",
            "trust",
            "median",
            "trimmed_mean",
        ]
        | None
    ) = None
    """Weights of clients' updates. `size` and `uniform`: by number of examples, or all the same.
    The others bear hostile clients, by how updates agree: `krum` takes the one that is nearest to
    most others, `multi_krum` those that are, `geometric_median` weighs by the distance from the
    others, `norm_bound` shortens updates to the median length, and `trust` weighs by how far they
    point where the update of `trusted` does. `median` and `trimmed_mean` (without a quarter at each
    end) take the middle of each coordinate, for methods of sums. The Krums bear (N - 3)/2 of N
    clients, so none of four, `trust` any, the trimmed mean a quarter, the others less than half. By
    all of these, clients weigh the same to begin with, or by `largest_share`. With null, as the
    method has it."""
    trusted: str | None = None
    """Name of the client whose update others are weighed by (`weights: trust`); null is nobody."""
    largest_share: float | None = Field(None, gt=0, le=1)
    """Largest share of a round that one client may claim by its number of examples; what is above
    goes to the others. With null, claims are believed where weights are by size."""
    secure: SecureSettings | None = None
    """Secure sums, `true` or as {bits: 32, largest: 1.0}: the server learns the sum of a round's
    updates, and none of them alone; with null, it sees each."""
    says: SaysSettings = SaysSettings()
    keep_updates: bool = False
    """Whether what each client sent is kept, under `updates/` in the run's directory."""

    @model_validator(mode="after")
    def _weights_fit(self) -> FederationSettings:
        if (self.weights == "trust") != (self.trusted is not None):
            raise ValueError("`trusted` names the client that `weights: trust` needs: give both")
        if self.largest_share is not None and self.weights in ("trust", *COORDINATE_WISE):
            raise ValueError(
                f"`largest_share`: with `weights: {self.weights}` no client weighs by what it "
                "claims: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _nothing_of_one_client(self) -> FederationSettings:
        if self.secure is None:
            return self
        if self.weights not in (None, "size", "uniform") or self.largest_share is not None:
            key = "weights" if self.largest_share is None else "largest_share"
            raise ValueError(
                f"`{key}` compares clients' updates, of which the server sees none alone with "
                "`secure`: leave one of them out"
            )
        if self.keep_updates:
            raise ValueError(
                "`keep_updates`: with `secure` the server has no update that it could keep: leave "
                "one of them out"
            )
        return self

    @model_validator(mode="after")
    def _enough_clients(self) -> FederationSettings:
        if self.clients_per_round is not None and self.min_clients > self.clients_per_round:
            raise ValueError(
                f"`min_clients` ({self.min_clients}) is above `clients_per_round` "
                f"({self.clients_per_round})"
            )
        return self

    def drawn_of(self, clients: int) -> int | None:
        """Number of clients that are drawn for a round of so many; None: all take part."""
        drawn = self.clients_per_round
        return None if drawn is None or drawn >= clients else drawn


class PrivacySettings(Section):
    """Differential privacy: whose presence nobody can tell from what leaves, and by how much."""

    level: Literal["example", "client"]
    """Level of the promise. `example`: one row of a client's data, hidden by noise that its own
    site adds to its gradients (DP-SGD). `client`: all that one client has, hidden by noise that the
    server adds to the sum of updates."""
    clip: float = Field(gt=0)
    """Largest 2-norm of what one of them contributes, of an example's gradient or of a client's
    update, by `level`; longer ones are scaled down to it."""
    quantile: float | None = Field(None, gt=0, lt=1)
    """Share of the clients that `clip` is to leave as they are: from round to round it follows the
    lengths of updates, by a count with noise (level `client`); with null, it stays as it is."""
    bands: int | None = Field(None, ge=2)
    """Number b of rounds over which noise is correlated, so that later rounds take back most of
    what one adds, and the final model has less of it for the same ε (level `client`). Clients take
    part in turns, one of b groups in each round; `noise_multiplier` is of the independent noise
    that this is made of. With null, all may take part in each round, whose noise is its own."""
    noise_multiplier: float | None = Field(None, ge=0.01)
    """Standard deviation of the noise, in units of `clip`; with null, the least with which all
    rounds together keep to `epsilon`, which each client finds for its own number of examples
    (level `example`)."""
    epsilon: float | None = Field(None, gt=0)
    """Budget ε of the whole run. Where `noise_multiplier` is given too, a client whose budget is
    spent stops there (level `example`), or a run whose rounds would spend more does not begin
    (level `client`); with null, there is no budget."""
    delta: float = Field(gt=0, lt=1)
    """Probability δ with which the promise may fail, to be well below one over the number of
    examples or clients."""
    accountant: Literal["rdp", "pld"] = "rdp"
    """Accountant of what is spent: `rdp`, Rényi differential privacy, or `pld`, privacy loss
    distributions, which find a smaller ε for the same noise and take longer."""
    seed: int | None = Field(None, ge=0)
    """Seed of the noise, for experiments that have to be repeated: whoever knows it can take the
    noise away, so that nothing is promised. With null, the noise has a secret key."""

    @model_validator(mode="after")
    def _some_noise(self) -> PrivacySettings:
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("give `epsilon`, the budget, or `noise_multiplier`, or both")
        if self.quantile is not None and self.level != "client":
            raise ValueError("`quantile` counts with `level: client` alone: leave it out")
        if self.bands is not None and self.level != "client":
            raise ValueError("`bands` counts with `level: client` alone: leave it out")
        if self.bands is not None and self.quantile is not None:
            raise ValueError(
                "`bands` correlates the noise of rounds whose `clip` is the same, and `quantile` "
                "changes it: leave one of them out"
            )
        return self


class AuditSettings(Section):
    """Audit: made-up rows (canaries) in one client's data, by which `hedgerow audit` finds out what
    can be guessed of a row from the model."""

    client: str
    """Name of the client whose training rows the canaries are added to, where they count among its
    number of examples."""
    canaries: int = Field(100, ge=2, le=100_000)
    """Number of canaries, each of which is trained on or left out as a fair coin of the run's seed
    says."""
    repeat: int = Field(1, ge=1, le=1000)
    """Number of rows that each canary which is trained on becomes; with more than 1, `privacy` of
    level `example` promises less of it, as of so many rows."""


class EvaluationSettings(Section):
    """Evaluation: what is measured on the test data, and how often."""

    every: int = Field(1, ge=1)
    """Number of rounds from one evaluation to the next; the last round is always evaluated."""
    answers_every: int | None = Field(None, ge=1)
    """Number of rounds from one evaluation by metrics of greedy answers to the next, which take far
    longer than losses: those whose number it divides, of the rounds that `every` evaluates, and the
    last. With null, all of them."""
    metrics: list[str] = ["loss"]
    """Names of the metrics of the global model, each once; your own is `package.module:Class`."""
    by: str | None = None
    """Column of the test data, or one inside another, as `meta.topic`, for each of whose values
    there are scores too; with `data.loss_on: turns`, `turn` is the place of an answer in its
    conversation, from 1. With null, there are those of all rows alone."""
    batch_size: int = Field(16, ge=1)
    """Number of sequences in one forward pass."""
    max_new_tokens: int = Field(64, ge=1)
    """Number of tokens that a greedy answer has at most, for the metrics that need answers."""
    stop: list[str] = []
    """Texts before the first of which an answer ends, as ["\\n\\nQuestion:"], or one text alone; by
    default none, so that answers end with the model's own end or at `max_new_tokens`."""

    @property
    def measured(self) -> str:
        """What is measured, and how, in whatever rounds, as JSON."""
        return self.model_dump_json(exclude={"every", "answers_every"})

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, stop: Any) -> Any:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError('must be a list of texts that are not empty, as ["\\n\\n"]')
        return texts

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: list[str]) -> list[str]:
        for name in metrics:
            if metrics.count(name) > 1:
                raise ValueError(f"{name!r} stands twice: name it once")
        return metrics


class TrackingSettings(Section):
    """Trackers that are told each round's numbers, beside metrics.jsonl."""

    to: list[str] = []
    """Trackers: `tensorboard`, `wandb`, `mlflow` or `trackio`, or a list of several; by default
    none."""
    project: str = "hedgerow"
    """Name that runs are grouped under: W&B's and trackio's project, MLflow's experiment; up to 128
    letters, digits, `.`, `_` or `-`, the first a letter or digit."""
    name: str | None = None
    """Name of the run in the trackers; with null, that of its directory."""

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
    """Comparison: what `hedgerow compare` runs on the experiment, unless its options say it."""

    methods: list[str] = []
    """Methods to compare, each a name, maybe with options, as `--methods` takes them: "ferret
    over=lora". By default none, so that `--methods` has to name them. If the file has no
    `method`, a run of its own is of the first."""
    sweep: dict[str, list[str]] = {}
    """Values to try of each key: `{training.learning_rate: [1e-3, 3e-3]}`; by default none."""
    seeds: int = Field(1, ge=1)
    """Number of seeds of each cell; they count up from `federation.seed`."""
    target: float | None = None
    """Loss, in nats for each token, to which bytes and rounds are counted; with null, the lowest
    that all runs have reached that learn anything."""

    @field_validator("sweep", mode="before")
    @classmethod
    def _texts(cls, sweep: Any) -> Any:
        """Each value as it would stand on the command line."""
        if not isinstance(sweep, dict):
            raise ValueError("must be a mapping, as {training.learning_rate: [1e-3, 3e-3]}")
        for key, values in sweep.items():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"{key} needs a list of values, as [1, 2, 3]")

        def text(value: Any) -> str:
            if isinstance(value, str | float):
                return str(value)
            return json.dumps(value, default=str)

        return {key: [text(value) for value in values] for key, values in sweep.items()}


class Evaluation(Section):
    """Settings that `hedgerow evaluate` needs of a model that no experiment has made."""

    model: ModelSettings
    data: TextSettings
    evaluation: EvaluationSettings = EvaluationSettings()
