"""The task: hedgerow's experiment, and the same written for peers that know nothing of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Failed
from safetensors.torch import load_file, save_file
from work import ADAPTER

from hedgerow import demo, export
from hedgerow.data import batches
from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.methods.factors import draw_adapter
from hedgerow.runs.preparation import prepare as prepared_of
from hedgerow.runs.rows import read_rows
from hedgerow.seeds import Seeds

SETTINGS = {
    "rank": 8,
    "alpha": 16,
    "targets": ["q_proj", "v_proj"],
    "steps": 10,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
}
OVERRIDES = [
    f"method={{name: fedit, ranks: {SETTINGS['rank']}, alpha: {SETTINGS['alpha']}, "
    f"targets: {json.dumps(SETTINGS['targets'])}}}",
    f"training.steps={SETTINGS['steps']}",
    f"training.batch_size={SETTINGS['batch_size']}",
    f"training.learning_rate={SETTINGS['learning_rate']}",
    f"training.max_grad_norm={SETTINGS['max_grad_norm']}",
    "data.max_length=128",
    "data.test=null",
    "evaluation.by=null",
]
CLIENTS = "local_training_{}.json"


@dataclass(frozen=True)
class Task:
    """The work, as hedgerow and as its peers read it."""

    title: str
    experiment: Path
    folder: Path
    """What peers read."""

    def ours(self, out: Path, rounds: int) -> list[str]:
        """The arguments of hedgerow's own run."""
        command = ["-m", "hedgerow", "run", str(self.experiment), *OVERRIDES]
        return [*command, f"federation.rounds={rounds}", "--out", str(run_of(out))]

    def args(self, out: Path, rounds: int) -> list[str]:
        """The arguments of a peer's script."""
        return [f"--work={self.folder}", f"--rounds={rounds}", f"--out={out}"]

    def said(self, out: Path) -> dict[str, Any]:
        """What hedgerow's run says: its loss, and the bytes of a client."""
        last = read_rows(run_of(out))[-1]
        return {
            "loss": last["train_loss"],
            "bytes_up": last["bytes_up"] / len(last["participants"]),
        }


def run_of(out: Path) -> Path:
    """The run directory of hedgerow's run, which has to be new."""
    return out / "run"


def finished(output: str) -> dict[str, Any]:
    """What a peer's script has printed in its last line.

    Raises:
        Failed: it has printed nothing of the kind.
    """
    try:
        return dict(json.loads(output.splitlines()[-1]))
    except (IndexError, ValueError):
        raise Failed(f"it printed no result, but {output.strip()[-200:]!r}") from None


def prepare(out: Path, model: Path | None, data: Path | None, rounds: int) -> Task:
    """Write the experiment, and what peers read of it.

    Raises:
        UserError: data or model cannot be read, or `out` holds measurements of other work.
    """
    if data is None or model is None:
        experiment, title = demo.prepare(out / "demo"), "the demo's clients"
    else:
        title = f"{data.name}, {model.name}"
        experiment = out / "experiment.yaml"
        text = experiment_text(model.resolve(), data.resolve())
        out.mkdir(parents=True, exist_ok=True)
        experiment.write_text(text)
    settings = load(experiment, [*OVERRIDES, f"federation.rounds={rounds}"])
    prepared, seeds = prepared_of(settings), Seeds(settings.federation.seed)
    tensors: dict[str, torch.Tensor] = {}
    for number, client in enumerate(prepared.clients):
        shard = prepared.shards[client.name]
        examples = [shard[index] for index in range(len(shard))]
        drawn = [
            batches(
                shard.widths,
                settings.training.batch_size,
                SETTINGS["steps"],
                seeds.numpy("batches", round, client.name),
            )
            for round in range(1, rounds + 1)
        ]
        arrays = {
            "tokens": np.concatenate([example.tokens for example in examples]),
            "ends": np.cumsum(shard.lengths, dtype=np.int64),
            "prompts": shard.prompt_lengths,
            "drawn": np.array(drawn),
        }
        tensors |= {f"{number}/{k}": torch.from_numpy(v.copy()) for k, v in arrays.items()}
    shapes = settings.method.matrix_shapes(prepared.model)
    adapter = draw_adapter(shapes, seeds.torch("adapter"), SETTINGS["rank"])
    said = {
        **SETTINGS,
        "model": str(Path(settings.model.path).absolute()),
        "pad_id": prepared.model.pad_id,
        "clients": [client.num_examples for client in prepared.clients],
        "rows": hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest(),
    }
    folder = (out / "work").absolute()
    place, text = folder / "work.json", json.dumps(said, indent=1)
    if (out / "measured.jsonl").exists() and place.is_file() and place.read_text() != text:
        raise UserError(f"--out {out} holds measurements of other work: name another folder")
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "rows.safetensors")
    save_file({k: v.contiguous() for k, v in adapter.items()}, folder / ADAPTER)
    place.write_text(text)
    return Task(title, experiment, folder)


def experiment_text(model: Path, data: Path) -> str:
    """The experiment of a folder of clients.

    Raises:
        UserError: there is no first client, or no model.
    """
    if not (data / CLIENTS.format(0)).is_file():
        raise UserError(f"--data {data} has no {CLIENTS.format(0)}: name a folder that has")
    if not (model / "config.json").is_file():
        raise UserError(f"--model {model} has no config.json: name a folder of a model")
    return "\n".join(
        [
            f"model: {{path: {json.dumps(str(model))}}}",
            "data:",
            f"  clients: {json.dumps(str(data / CLIENTS))}",
            "  fields: {instruction: instruction, input: context, output: response}",
            "",
        ]
    )


def apart(task: Task, out: Path, rounds: int) -> float:
    """Distance of a peer's adapter from hedgerow's, beside what hedgerow's changes in the model."""
    ours = out.parent / "ours"
    if not ours.exists():
        done = next(out.parent.glob(f"hedgerow-{rounds}-*/run"), None)
        if done is None:
            raise UserError(f"{out.parent} has no run of hedgerow any more: name another --out")
        export.to_adapter(done, ours, None, None, [])
    config = json.loads((ours / "adapter_config.json").read_text())
    own = products(out / ADAPTER, SETTINGS["alpha"] / SETTINGS["rank"])
    other = products(ours / "adapter_model.safetensors", config["lora_alpha"] / config["r"])
    difference = sum(float((own[name] - other[name]).square().sum()) for name in other)
    return (difference / sum(float(each.square().sum()) for each in other.values())) ** 0.5


def products(path: Path, scale: float) -> dict[str, torch.Tensor]:
    """What an adapter adds to each matrix."""
    factors = load_file(path)
    end = ".lora_A.weight"
    return {
        name.removesuffix(end): scale * factors[name.replace("lora_A", "lora_B")] @ factor
        for name, factor in factors.items()
        if name.endswith(end)
    }
