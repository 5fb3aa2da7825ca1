"""An experiment as Python hands it over: a file, sections as mappings, and objects in memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hedgerow.data.in_memory import Held, as_records
from hedgerow.data.rows import Records
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, validate
from hedgerow.experiment.file import comparison_of, read, resolve
from hedgerow.experiment.overrides import forget_defaults, forget_kept
from hedgerow.experiment.paths import make_paths_absolute
from hedgerow.methods import METHODS, Method
from hedgerow.names import MEMORY
from hedgerow.plugins import dotted_name
from hedgerow.settings import Comparison, Section

PathLike = str | os.PathLike[str]
SectionLike = Mapping[str, Any] | Section
"""A section of an experiment: a mapping of its keys, or its settings."""


@dataclass(frozen=True, eq=False)
class Draft:
    """What an experiment is made of, before it is checked."""

    content: Mapping[str, Any]
    """As an experiment file would have it; `(memory)` where objects were handed over."""
    where: str
    """What it is called in messages: the file, or the function that was called."""
    folders: Sequence[Path]
    """Where an override's relative path is looked for."""
    held: Held
    network: Any = None
    """transformers model, where it is in memory."""
    tokenizer: Any = None

    @property
    def has_rows(self) -> bool:
        """Whether some of the data are in memory."""
        held = self.held
        rows = held.clients or held.client_tests
        return bool(rows) or held.source is not None or held.test is not None

    def load(self, overrides: Sequence[str] = ()) -> Experiment:
        """The experiment, checked.

        Raises:
            UserError: naming the key that is wrong.
        """
        content = resolve(self.content, overrides, self.folders, self.where)
        content.pop("compare", None)
        return validate(content, self.where, Experiment)

    def check_model(self, experiment: Experiment) -> None:
        """Raise a `UserError` where an override would have a model in memory be another."""
        if self.network is None:
            return
        handed = memory_model(self.network, self.tokenizer)
        for key, value in experiment.model.model_dump().items():
            if key in handed and value != handed[key]:
                raise UserError(
                    f"model.{key} is {value!r}, but the model in memory has {handed[key]!r}: leave "
                    "it out, or convert the model before"
                )

    def comparison(self, overrides: Sequence[str] = ()) -> Comparison:
        """What the experiment says about comparing."""
        resolved = resolve(self.content, overrides, self.folders, self.where)
        return comparison_of(resolved, self.where)


def draft(
    experiment: PathLike | Experiment | Mapping[str, Any] | None,
    *,
    where: str,
    smoke: bool,
    model: Any,
    tokenizer: Any,
    clients: Any,
    test: Any,
    method: str | Mapping[str, Any] | Method | None,
    sections: Mapping[str, SectionLike | None],
    rounds: int | None,
) -> Draft:
    """Put a draft together.

    Args:
        experiment: a file, an experiment, or its content; None where all is said by the others.
        where: the function that was called, for messages.
        smoke: of a file: put in what it says under `smoke`.
        model: a folder, a name on the Hub, the section's keys, or a transformers model.
        tokenizer: of a model in memory.
        clients: a pattern, or a mapping from names to files or rows.
        test: a file, or rows.
        method: a name, a mapping with a name, or a method.
        sections: further keys of the other sections, by the section's name.
        rounds: `federation.rounds`.

    Raises:
        UserError: something is of no kind that is known.
    """
    folders, content = [Path.cwd()], {}
    if smoke and not isinstance(experiment, str | os.PathLike):
        raise UserError(f"{where}: smoke=True is for experiment files, which say what it puts in")
    if isinstance(experiment, Experiment | Mapping):
        content = plain(experiment)
        make_paths_absolute(content, [Path.cwd()])
    elif experiment is not None:
        path = Path(experiment)
        where, content = str(path), read(path, smoke=smoke)
        folders.append(path.parent)
    for name, section in sections.items():
        if not isinstance(section, Mapping | Section | None):
            raise UserError(f"{where}: {name}= must be a mapping, not {type(section).__name__}")
    given: dict[str, Any] = {
        name: plain(section) for name, section in sections.items() if section is not None
    }
    network = None
    if isinstance(model, str | os.PathLike):
        given["model"] = {"path": os.fspath(model)}
    elif isinstance(model, Mapping | Section):
        given["model"] = plain(model)
    elif model is not None:
        network = model
        given["model"] = memory_model(model, tokenizer)
    if network is None and tokenizer is not None:
        raise UserError(f"{where}: tokenizer= belongs to a model in memory: give model= as well")
    data = given.setdefault("data", {})
    held: dict[str, Any] = {}
    if clients is None and isinstance(data.get("clients"), Mapping | list):
        clients = data["clients"]
    if clients is not None:
        data["clients"], held["clients"] = _clients(clients)
    if isinstance(data.get("client_test"), Mapping | list):
        data["client_test"], held["client_tests"] = _clients(data["client_test"], "client_test=")
    if not isinstance(data.get("source"), str | None):
        held["source"] = as_records(data["source"], "data.source")
        data["source"] = MEMORY
    if test is not None:
        data["test"] = plain(test) if isinstance(test, os.PathLike) else test
    if not isinstance(data.get("test"), str | None):
        held["test"] = as_records(data["test"], "the test data")
        data["test"] = MEMORY
    if rounds is not None:
        given.setdefault("federation", {})["rounds"] = rounds
    if method is not None:
        given["method"] = _method(method)
    make_paths_absolute(given, [Path.cwd()])
    return Draft(_merged(content, given), where, folders, Held(**held), network, tokenizer)


def plain(value: Any) -> Any:
    """A section of settings, however nested, as a file would hold it; other objects stay."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def memory_model(network: Any, tokenizer: Any) -> dict[str, Any]:
    """Section `model` of a model in memory.

    Raises:
        UserError: it is none that can be trained, or has no tokenizer.
    """
    if not hasattr(network, "get_input_embeddings") or not hasattr(network, "generate"):
        raise UserError(
            "model= must be a causal language model of transformers, a folder or a name on the "
            f"Hub, not {type(network).__name__}"
        )
    if tokenizer is None:
        raise UserError("model= is a model in memory: give its tokenizer= as well")
    if not hasattr(tokenizer, "eos_token_id") or not hasattr(tokenizer, "get_vocab"):
        inner = ": give its .tokenizer" * hasattr(tokenizer, "tokenizer")
        raise UserError(
            f"tokenizer= must be a tokenizer of transformers, not {type(tokenizer).__name__}{inner}"
        )
    dtype = str(network.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"model= is in {dtype}: convert it with model.float() or model.bfloat16()")
    from hedgerow.loading import check_adds, check_network

    check_network(network, "model=")
    check_adds(network, "model=")
    return {"path": MEMORY, "dtype": dtype, "device": str(network.device)}


def _method(method: Any) -> Any:
    """Section `method` of a name, of options, or of a method."""
    if isinstance(method, str):
        return {"name": method}
    if isinstance(method, type):
        raise UserError(f"method= must be a method, not its class: give {method.__name__}(…)")
    options = plain(method)
    if isinstance(method, Method):
        if METHODS.get(method.name) is not type(method):
            options["name"] = dotted_name(type(method))
        if type(method).model_validate(options) != method.model_copy(
            update={"name": options["name"]}
        ):
            raise UserError(
                f"method={method!r} does not come back from its options: whatever it depends on "
                "must be a field that YAML can hold"
            )
    return options


def _clients(clients: Any, key: str = "clients=") -> tuple[Any, dict[str, Records]]:
    """Clients' files, and the rows of those whose data are in memory; `key` names the argument."""
    if isinstance(clients, str | os.PathLike):
        return os.fspath(clients), {}
    if isinstance(clients, Mapping):
        named: Iterable[tuple[Any, Any]] = clients.items()
    elif isinstance(clients, list | tuple):
        named = ((f"client-{number:03d}", data) for number, data in enumerate(clients))
    else:
        raise UserError(
            f"{key} must be a mapping from names to rows or files, a list of them, or a pattern "
            f"such as train_{{}}.json, not {type(clients).__name__}"
        )
    files: dict[str, str | list[str]] = {}
    held: dict[str, Records] = {}
    for name, data in named:
        if str(name) in files:
            raise UserError(f"{key} names {name} twice: give each a name of its own")
        if isinstance(data, str | os.PathLike):
            files[str(name)] = os.fspath(data)
        elif isinstance(data, list | tuple) and data and all(map(_is_path, data)):
            files[str(name)] = [os.fspath(file) for file in data]
        else:
            held[str(name)] = as_records(data, f"the data of {name}")
            files[str(name)] = MEMORY
    return files, held


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _merged(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's content with the sections that were given beside it."""
    merged = copy.deepcopy(dict(content))
    for name, section in given.items():
        if name == "method" or not isinstance(section, dict):
            if name == "method":
                forget_kept(merged)
            merged[name] = section
            continue
        own = merged.get(name)
        own = own if isinstance(own, dict) else {}
        if name == "training" and section.keys() & {"optimizer", "trainer"}:
            forget_kept(merged)
        if name == "training" and "optimizer" in section:
            forget_defaults(own)
        merged[name] = own | section
    data, new = merged.get("data", {}), given.get("data", {})
    # Files for each client, and one source to divide, exclude each other: the later one counts.
    if "clients" in new and "source" not in new:
        data.pop("source", None)
        data.pop("partition", None)
    elif "source" in new and "clients" not in new:
        data.pop("clients", None)
    if not data:
        merged.pop("data", None)
    return merged
