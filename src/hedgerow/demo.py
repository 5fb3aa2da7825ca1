"""The built-in demo: eight clients, ten kinds of task, adapters of different ranks.

The bundled model was pretrained on the skills but never on the instructions (`pretrain`), the
clients' data are generated (`tasks`), and nobody has all kinds of task. FLoRA is compared with what
each client reaches alone and with zero-padding, on the same local work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hedgerow import console
from hedgerow.bundled import MODEL, tasks
from hedgerow.engines import local
from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.runs.lender import Lender
from hedgerow.runs.rows import read_rows
from hedgerow.runs.shelf import Shelf
from hedgerow.workers import Workers

EXPERIMENT = """\
model:      {{path: {model}}}
data:
  clients:  {clients}
  test:     data/test.json
  prompt:   plain
  max_length: 96
method:     {{name: flora, ranks: [32, 32, 16, 16, 8, 8, 4, 2], alpha: 2r}}
training:   {{steps: 15, batch_size: 8, learning_rate: 3.0e-3}}
federation: {{rounds: 8}}
evaluation:
  every:    1
  answers_every: 8
  metrics:  [loss, exact_match]
  max_new_tokens: 24
  batch_size: 64
  by:       kind
"""
METHODS = {"standalone": "standalone mean", "zero_padding": "zero-padding", "flora": "FLoRA"}
"""What is compared, and what the table calls it."""
OWN = {"standalone": ["training.learning_rate=1e-3", "evaluation.every=8"]}
"""Changes that are better for one method: alone, clients forget more at the others' rate, and have
eight models to score. Rates were chosen on clients and questions that another seed draws."""


def prepare(out: Path) -> Path:
    """Write the clients' data and the experiment file into a new folder.

    Returns:
        The experiment file, which `hedgerow run` takes as it is.

    Raises:
        UserError: the folder is there, and holds something else than this demo.
    """
    experiment = out / "experiment.yaml"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        if not experiment.is_file() or experiment.read_text() != _experiment():
            raise UserError(f"{out} exists already: name another place with --out, or remove it")
        return experiment
    (out / "data").mkdir(parents=True)
    clients = tasks.clients()
    for name, rows in clients.items():
        (out / "data" / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (out / "data" / "test.json").write_text(json.dumps(tasks.test_rows(), indent=1))
    experiment.write_text(_experiment())  # last, so that it stands for the whole
    return experiment


def run(out: Path) -> None:
    """Train and compare, or go on with a demo that was interrupted; the runs stay in `out`.

    Raises:
        UserError: `out` is there and is not empty.
    """
    experiment, workers = prepare(out), Workers.of("auto")
    lender, shelf = Lender(), Shelf()
    for method, label in METHODS.items():
        chosen = load(experiment, [f"method.name={method}", *OWN.get(method, [])])
        with console.ProgressWatcher(label, chosen.evaluation.metrics) as watcher:
            local.run(
                chosen,
                out / method,
                watcher,
                resume=True,
                model=lender.lend(chosen.model),
                workers=workers,
                shelf=shelf,
            )
    rows = {method: read_rows(out / method) for method in METHODS}
    console.table(
        "eight clients, ten kinds of task, held-out questions of every kind",
        ["", "loss", "exact match", "bytes up", "bytes down", "time"],
        [
            _line("base model", rows["flora"][:1]),
            *(_line(label, rows[method]) for method, label in METHODS.items()),
        ],
    )
    console.out.print(
        f"the same again: hedgerow run {experiment} --workers auto --out another-run\n"
        f"a page to look at: hedgerow report {out} --out page.html\n"
        f"an adapter for peft: hedgerow export {out / 'flora'} adapter --to adapter"
    )


def _experiment() -> str:
    files = {name: f"data/{name}.json" for name in tasks.CLIENTS}
    return EXPERIMENT.format(model=json.dumps(str(MODEL)), clients=json.dumps(files))


def _line(label: str, rows: list[dict[str, Any]]) -> list[str]:
    last = rows[-1]
    return [
        label,
        f"{last['eval_loss']:.3f}",
        f"{last['exact_match']:.1f}%",
        *(console.size(sum(row[key] for row in rows)) for key in ("bytes_up", "bytes_down")),
        f"{sum(row['seconds'] or 0 for row in rows):.0f} s" if last["round"] else "",
    ]
