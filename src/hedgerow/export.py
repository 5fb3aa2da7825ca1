"""Exports: a run's model in the formats that other tools load.

What is exported is what was evaluated: the ledger is replayed on the base, or, for an adapter, its
factors are put together without the base. Everybody may read what everybody may read of other new
files here, whichever library has written it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import safetensors.torch
import transformers
import yaml
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hedgerow import base_adapter, experts, lowrank, pretrained, targets
from hedgerow.adapters import adapter_pairs, adapter_tensors, embedding_tensors
from hedgerow.base_adapter import Joined
from hedgerow.data import load_template
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, without_folders
from hedgerow.files import passing_folder, remove_left
from hedgerow.ledger import Ledger
from hedgerow.loading import location, name_of, skeleton
from hedgerow.lowrank import Factors
from hedgerow.model import Model
from hedgerow.names import MEMORY
from hedgerow.runs import Loader, RunModels, check_client, check_round, model_at, opened
from hedgerow.runs.rows import read_rows

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes in which weights are exported."""


class AdapterSize(NamedTuple):
    """Size of an exported adapter."""

    matrices: int
    """Number of adapted matrices."""
    rank: int
    """The one rank of all their factors."""


def to_merged(
    run: Path,
    out: Path,
    round: int | None,
    client: str | None,
    overrides: list[str],
    *,
    dtype: str | None = None,
    load: Loader = Model.load,
) -> None:
    """Write the whole model as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        run: the run's directory, or its packed ledger.
        out: the folder to make.
        round: the round, None for the last.
        client: whose model, for methods without a global one.
        overrides: `key.path=value`, on top of the run's experiment.
        dtype: of the weights, one of `DTYPES`; None for the run's own.
        load: gives the base model.

    Raises:
        UserError: `out` is there already, there is no such round or client, or weights are no
            finite numbers.
    """
    _check_dtype(dtype)
    with opened(run, overrides) as (experiment, ledger), _new_folder(out) as folder:
        round = check_round(ledger, round)
        check_client(experiment, ledger, client)
        model = model_at(experiment, ledger, round, load)
        model.make_float()
        RunModels(experiment.method, ledger, round).merge(model, client)
        is_chat = experiment.data.prompt == "chat"  # a file of a prompt may have stayed behind
        template = load_template(experiment.data, model.tokenizer) if is_chat else None
        pretrained.save(
            model,
            folder,
            revision=experiment.model.revision,
            dtype=dtype,
            ends=template.ends if template else (),
        )
        _write_card(folder, run, experiment, ledger, round, "transformers", dequantized=True)


def to_adapter(
    run: Path,
    out: Path,
    round: int | None,
    client: str | None,
    overrides: list[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    base: str | None = None,
    load: Loader = Model.load,
) -> AdapterSize:
    """Write all that the run adds to its base as an adapter that peft loads.

    Nothing is lost unless `rank` or `energy` asks for it. All factors have the rank of the largest,
    smaller ones are filled with zeros: servers know one rank for all.

    Args:
        rank: keep at most this rank of each matrix (the best approximation of it).
        energy: keep the fewest singular values whose squares sum to this share of all.
        dtype: of the factors, one of `DTYPES`; None for the run's own.
        base: folder or name on the Hub that readers of the adapter load; None for the run's own.
        load: gives the base model.

    Raises:
        UserError: the method makes no adapter, `out` is there already, there is no such round or
            client, or factors are no finite numbers.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}: give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy}: give a share above 0 and at most 1")
    _check_dtype(dtype)
    with opened(run, overrides) as (experiment, ledger), _new_folder(out) as folder:
        round = check_round(ledger, round)
        check_client(experiment, ledger, client)
        load_model = partial(model_at, experiment, ledger, round, load)
        own = RunModels(experiment.method, ledger, round)
        tensors = own.adapter(client, load_model)
        if experiment.model.merged_rank is not None:
            model = load_model()  # which has not kept all of what the entries have
            model.unbind()
            own.merge(model, client)
            tensors |= adapter_tensors(model.beside())
        pretrained.cast(tensors, None)
        whole = Joined(dict(adapter_pairs(tensors)))
        path, revision = experiment.model.path, experiment.model.revision
        place = ledger.base.name if path == MEMORY else location(path)
        if Path(place).is_absolute() and not Path(place).exists():
            place = ledger.base.name  # of a packed ledger, which does not say where it lies
        below = None
        # Ledgers of version 0.1 do not say it.
        if ledger.base.adapter_of is not None or base_adapter.is_adapter(Path(location(path))):
            model = model_at(experiment, ledger, 0, load)  # sees that it is still the run's base
            below = model.origin.adapter
            assert below is not None
            whole = below.joined(whole.pairs)
            place, revision = below.base, below.revision
            if base_adapter.has_tokenizer(below.folder):
                pretrained.save_tokenizer(model.tokenizer, folder)
        whole = whole.each(lowrank.fitted)
        if rank is not None or energy is not None:
            whole = whole.each(partial(lowrank.truncate, rank=rank, energy=energy))
        network = _renamed_base(whole.pairs, experiment, ledger, load)
        size = _save_adapter(whole, network, base or place, revision, folder, dtype)
        made_for = None if below is None else name_of(below.base)
        _write_card(folder, run, experiment, ledger, round, "peft", made_for)
        return size


def to_ledger(run: Path, out: Path, overrides: list[str]) -> None:
    """Write the ledger and its experiment as one file, from which `opened` rebuilds the model.

    Of base and data, the experiment in it keeps the files' names, but not where they lie.
    """
    _check_new(out)
    with opened(run, overrides) as (experiment, ledger):
        for _ in ledger.entries():
            pass  # a damaged ledger is refused here, not by whoever receives it
        ledger.pack(out, without_folders(experiment).dump())


def _save_adapter(
    whole: Joined,
    network: Any | None,
    base: str,
    revision: str | None,
    folder: Path,
    dtype: str | None,
) -> AdapterSize:
    rank = max(pair.rank for pair in (*whole.pairs.values(), *whole.embeddings.values()))
    padded = whole.each(lambda pair: pair.padded(rank))
    stacked = [] if network is None else list(targets.expert_parameters(network))
    groups = experts.grouped(padded.pairs, stacked)
    of_experts = {f"{name}.{n}" for name, group in groups.items() for n in range(len(group))}
    layers = {module: pair for module, pair in padded.pairs.items() if module not in of_experts}
    together = adapter_tensors(layers | experts.joined(groups))
    together |= embedding_tensors(padded.embeddings) | dict(whole.saved)
    tensors = {key: tensor.contiguous() for key, tensor in together.items()}
    pretrained.cast(tensors, dtype)
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    # What every reader asks for, and nothing that is a default: older ones refuse keys that they
    # do not know, or drop all the others with them.
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the scale is in the factors
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({**layers, **whole.embeddings}),
        **whole.options,
    }
    if stacked:
        # peft takes some layers' names for those of experts of old, but not those of weights. All
        # others are named as ever: other readers look for them there alone.
        taken = {name for name in layers if name.rpartition(".")[2] in experts.OLD_NAMES}
        config["target_modules"] = sorted({*layers, *whole.embeddings} - taken)
        if parameters := [*(f"{name}.weight" for name in taken), *groups]:
            config["target_parameters"] = sorted(parameters)
    if revision is not None:
        config["revision"] = revision
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    if network is not None:
        _check_read_back(network, folder, tensors)
    return AdapterSize(len(whole.pairs) + len(whole.embeddings), rank)


def _renamed_base(
    pairs: Mapping[str, Factors], experiment: Experiment, ledger: Ledger, load: Loader
) -> Any | None:
    """The base's network, maybe without values, where adapters' files need a look at it.

    They do where an adapter has experts, and where peft changes the names in files: for
    architectures whose layers transformers names otherwise than in checkpoints.
    """
    network = getattr(transformers, ledger.base.architecture, None)
    kind = getattr(getattr(network, "config_class", None), "model_type", None)
    has_experts = any(module.rpartition(".")[2].isdecimal() for module in pairs)
    if not has_experts and get_checkpoint_conversion_mapping(kind) is None:
        return None
    if experiment.model.path == MEMORY:
        return load(experiment.model).network
    return skeleton(experiment.model)


def _check_read_back(network: Any, folder: Path, tensors: Mapping[str, Any]) -> None:
    """Raise a `UserError` where peft would not read an adapter as it was written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(network, str(folder))
        found = peft.set_peft_model_state_dict(adapted, dict(tensors))
        read = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    written = {name for name in tensors if ".lora_" in name}
    if lost := [*found.unexpected_keys, *({name for name in read if ".lora_" in name} ^ written)]:
        raise UserError(
            f"peft {peft.__version__} changes the names of adapters of {type(network).__name__}, "
            f"and would lose {min(lost)}: export the whole model with --to merged"
        )


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


def _check_new(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name an output that is not there yet")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent} does not exist: make that folder first")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` only when it is complete; an empty one there is filled."""
    remove_left(out, _PARTIAL)  # or it would not be empty
    _check_new(out)
    fills = out.is_dir()
    with ExitStack() as stack:
        try:
            parent = out if fills else out.absolute().parent
            partial = stack.enter_context(passing_folder(parent, _PARTIAL))
        except OSError as error:
            error.filename = str(out)
            raise
        yield partial
        mode = partial.stat().st_mode & 0o777  # what the umask leaves of a new folder's
        for path in partial.rglob("*"):
            wanted = mode if path.is_dir() else mode & 0o666
            if path.stat().st_mode & 0o777 != wanted:  # not every file system lets one change it
                path.chmod(wanted)
        if fills:
            for path in list(partial.iterdir()):
                path.rename(out / path.name)
        else:
            partial.rename(out)


_PARTIAL = ".hedgerow-"
"""Beginning of the name of a folder that is not whole yet."""


def _write_card(
    folder: Path,
    run: Path,
    experiment: Experiment,
    ledger: Ledger,
    round: int,
    library: str,
    made_for: str | None = None,
    *,
    dequantized: bool = False,
) -> None:
    """A model card: what the model is, and how it came to be.

    Args:
        made_for: name of the model that an adapter is for, where it is not the run's base.
        dequantized: whether the weights are whole again, where the base's are quantized.
    """
    method, base = experiment.method, _base_name(experiment, ledger)
    rows = read_rows(run) if run.is_dir() else []
    score = rows[round].get("eval_loss") if round < len(rows) else None
    of_base = ""
    if (kind := ledger.base.quantization) is not None:
        of_base = f"; quantized to {kind} by bitsandbytes when it was loaded"
        if dequantized:
            of_base += ", and here dequantized, with what was learnt added"
        else:
            of_base += ", as it has to be for this adapter, too"
    loss = "" if score is None else f"\n- loss on the test data: {score:.4f}"
    secret = any(ledger.names_all(each) for each in range(1, round + 1) if ledger.has(each))
    took = "may have taken" if secret else "took"
    # Where the data lies is nobody's business but the owner's.
    settings = experiment.dump(include={"method", "training", "federation"})
    (folder / "README.md").write_text(
        f"""---
{yaml.safe_dump({"base_model": made_for or base}, allow_unicode=True).strip()}
library_name: {library}
pipeline_tag: text-generation
tags: [federated-learning, hedgerow, {method.name}]
---

# {base}, fine-tuned by {method.name}

Made with hedgerow: {method.summary} ({method.reference}).

- base: {base} ({ledger.base.architecture}, {ledger.base.parameters:,} parameters{of_base})
- fingerprint of the base: `{ledger.base.fingerprint}`
- rounds: {round}, clients that {took} part: {len(ledger.clients(round))}{loss}

How it was trained:

```yaml
{settings}```
""",
        encoding="utf-8",
    )


def _base_name(experiment: Experiment, ledger: Ledger) -> str:
    """The base's name, with whose it is on the Hub, which ledgers of version 0.1 leave out."""
    given = name_of(experiment.model.path)
    return given if given.endswith(f"/{ledger.base.name}") else ledger.base.name
