"""Exports: a run's model in the formats that other tools load.

What is exported is what was evaluated: the ledger is replayed on the base, or, for an adapter, its
factors are put together without the base.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import peft
import safetensors.torch

from hedgerow import lowrank
from hedgerow.adapters import adapter_pairs, adapter_tensors
from hedgerow.errors import UserError
from hedgerow.experiment import Experiment, without_folders
from hedgerow.ledger import Ledger
from hedgerow.loading import location
from hedgerow.lowrank import Factors
from hedgerow.model import Model
from hedgerow.names import MEMORY
from hedgerow.runs import Loader, check_client, check_round, model_at, opened
from hedgerow.runs.rows import read_rows


def to_merged(
    run: Path,
    out: Path,
    round: int | None,
    client: str | None,
    overrides: list[str],
    *,
    load: Loader = Model.load,
) -> None:
    """Write the whole model as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        run: the run's directory, or its packed ledger.
        out: the folder to make.
        round: the round, None for the last.
        client: whose model, for methods without a global one.
        overrides: `key.path=value`, on top of the run's experiment.
        load: gives the base model.
    """
    with opened(run, overrides) as (experiment, ledger), _new_folder(out) as folder:
        round = check_round(ledger, round)
        check_client(experiment, ledger, client)
        model = model_at(experiment, ledger, round, load)
        experiment.method.merge(model, client)
        model.network.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        _write_card(folder, run, experiment, ledger, round, "transformers")


def to_adapter(
    run: Path,
    out: Path,
    round: int | None,
    client: str | None,
    overrides: list[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    load: Loader = Model.load,
) -> dict[str, int]:
    """Write all that the run adds to its base as an adapter that peft loads.

    Args:
        rank: keep at most this rank of each matrix (the best approximation of it).
        energy: keep the fewest singular values whose squares sum to this share of all.
        load: gives the base model.

    Returns:
        The rank of each adapted module.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank}: give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy}: give a share above 0 and at most 1")
    with opened(run, overrides) as (experiment, ledger), _new_folder(out) as folder:
        round = check_round(ledger, round)
        check_client(experiment, ledger, client)
        load_model = partial(model_at, experiment, ledger, round, load)
        tensors = experiment.method.adapter(ledger.entries(round), client, load_model)
        pairs = dict(adapter_pairs(tensors))
        if rank is not None or energy is not None:
            pairs = {m: lowrank.truncate(p, rank=rank, energy=energy) for m, p in pairs.items()}
        _save_adapter(pairs, experiment, ledger, folder)
        _write_card(folder, run, experiment, ledger, round, "peft")
        return {module: pair.rank for module, pair in pairs.items()}


def to_ledger(run: Path, out: Path, overrides: list[str]) -> None:
    """Write the ledger and its experiment as one file, from which `opened` rebuilds the model.

    Of the data, the experiment in it keeps the files' names, but not where they lie.
    """
    _check_new(out)
    with opened(run, overrides) as (experiment, ledger):
        for _ in ledger.entries():
            pass  # a damaged ledger is refused here, not by whoever receives it
        ledger.pack(out, without_folders(experiment).dump())


def _save_adapter(
    pairs: dict[str, Factors], experiment: Experiment, ledger: Ledger, folder: Path
) -> None:
    path = experiment.model.path
    ranks = {module: pair.rank for module, pair in pairs.items()}
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    # The scale is in the factors, so every module's alpha is its rank.
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=ledger.base.name if path == MEMORY else location(path),
        revision=experiment.model.revision,
        inference_mode=True,
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(pairs),
        rank_pattern=smaller,
        alpha_pattern=smaller,
    )
    config.save_pretrained(folder)
    tensors = {key: tensor.contiguous() for key, tensor in adapter_tensors(pairs).items()}
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )


def _check_new(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name an output that is not there yet")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent} does not exist: make that folder first")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` only when it is complete."""
    _check_new(out)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        partial.chmod(0o755)  # mkdtemp's are for the owner alone
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_card(
    folder: Path, run: Path, experiment: Experiment, ledger: Ledger, round: int, library: str
) -> None:
    """A model card: what the model is, and how it came to be."""
    method = experiment.method
    scores = {row["round"]: row["eval_loss"] for row in (read_rows(run) if run.is_dir() else [])}
    loss = "" if scores.get(round) is None else f"\n- loss on the test data: {scores[round]:.4f}"
    # Where the data lies is nobody's business but the owner's.
    settings = experiment.dump(include={"method", "training", "federation"})
    (folder / "README.md").write_text(
        f"""---
base_model: {ledger.base.name}
library_name: {library}
pipeline_tag: text-generation
tags: [federated-learning, hedgerow, {method.name}]
---

# {ledger.base.name}, fine-tuned by {method.name}

Made with hedgerow: {method.summary} ({method.reference}).

- base: {ledger.base.name} ({ledger.base.architecture}, {ledger.base.parameters:,} parameters)
- fingerprint of the base: `{ledger.base.fingerprint}`
- rounds: {round}, clients that took part: {len(ledger.clients(round))}{loss}

How it was trained:

```yaml
{settings}```
""",
        encoding="utf-8",
    )
