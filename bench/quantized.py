"""Quantized bases beside a float32 one: final loss, memory of the weights, and what exports give.

    python bench/quantized.py OUT [--data DOLLY --model MODEL] [--kinds nf4 int8 …]
        [--set key=value …]

DOLLY holds local_training_0.json … and global_test.json; MODEL is a model's folder. Without them,
the clients have the built-in tasks and model. FLoRA with its defaults, with `merged_rank`, and
FedIT run on each kind of base. The table has the loss before and after relative to the float32
run's; the bytes of the base's weights, alone and with what was kept beside them, relative to its
bytes in float32; and how far the loss of the merged export is from the run's. Runs that are in OUT
already are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import hedgerow as hr
from hedgerow import console
from hedgerow.adapters import adapter_pairs
from hedgerow.evaluation.scores import evaluate
from hedgerow.experiment import load
from hedgerow.model import Model
from hedgerow.quantized import nbytes
from hedgerow.runs import model_at, opened
from hedgerow.runs.preparation import load_test
from hedgerow.runs.rows import read_rows
from hedgerow.settings import ModelSettings

CLIENTS, MERGED_RANK = 4, 4
BUILT_IN = """
model: {path: demo}
data:
  source: demo
  partition: {kind: iid, clients: 4}
  test: demo
  prompt: plain
  max_length: 96
"""
OF_DOLLY = """
model: {{path: "{model}"}}
data:
  clients: {clients}
  test: "{data}/global_test.json"
  test_share: 0.2
  fields: {{input: context, output: response}}
  prompt: alpaca-short
  max_length: 192
"""
REST = """
method: {name: fedit}
training: {steps: 20, batch_size: 8, learning_rate: 1.0e-3}
federation: {rounds: 5}
evaluation: {every: 5, metrics: [loss], batch_size: 32}
"""
METHODS = {
    "flora": ["method={name: flora, ranks: [8, 8, 4, 4]}"],
    f"flora, merged_rank {MERGED_RANK}": [
        "method={name: flora, ranks: [8, 8, 4, 4]}",
        f"model.merged_rank={MERGED_RANK}",
    ],
    "fedit": ["method={name: fedit, ranks: 8}"],
}


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["nf4"])
    parser.add_argument("--set", nargs="+", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    experiment = options.out / "experiment.yaml"
    content = BUILT_IN
    if options.data is not None:
        data = options.data.absolute()
        clients = [str(data / f"local_training_{index}.json") for index in range(CLIENTS)]
        content = OF_DOLLY.format(model=options.model.absolute(), clients=clients, data=data)
    experiment.write_text(content + REST)
    whole = nbytes(Model.load(load(experiment, options.set).model).network)
    rows = []
    for name, overrides in METHODS.items():
        plain = [each for each in overrides if "merged_rank" not in each]
        _, *_, last = read_rows(run(experiment, options.out, plain, options.set))
        for kind in options.kinds:
            own = [*overrides, f"model.quantization={kind}"]
            folder = run(experiment, options.out, own, options.set)
            first, *_, end = read_rows(folder)
            base, beside = sizes(folder)
            rows.append(
                (
                    f"{name}, {kind}",
                    f"{last['eval_loss']:.4f}",
                    f"{end['eval_loss'] / last['eval_loss']:.4f}",
                    f"{first['eval_loss']:.4f}",
                    f"{base / whole:.3f}",
                    f"{(base + beside) / whole:.3f}",
                    f"{end.get('merged_error', 0):.3f}",
                    f"{abs(exported(folder) - end['eval_loss']):.1e}",
                )
            )
    columns = ["run", "float32", "ratio", "before", "base", "with sums", "error", "export"]
    console.table(f"{whole:,} bytes of weights in float32", columns, rows, numbers=True)


def run(experiment: Path, out: Path, overrides: list[str], more: list[str]) -> Path:
    """Run the experiment with these overrides, unless it is there; returns its directory."""
    name = hashlib.sha256(" ".join([*overrides, *more]).encode()).hexdigest()[:16]
    if not (out / name / "metrics.jsonl").is_file():
        hr.run(experiment, *overrides, *more, out=out / name, progress=False)
    return out / name


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of a run's base, and of all that its last model keeps beside the weights."""
    with opened(folder, []) as (experiment, ledger):
        model = model_at(experiment, ledger, len(ledger))
    pairs = [*model.beside().values(), *(pair for _, pair in adapter_pairs(model.factors or {}))]
    return nbytes(model.network), sum(factor.nbytes for pair in pairs for factor in pair)


def exported(folder: Path) -> float:
    """Loss of the merged export on the run's test data."""
    merged = folder.parent / f"{folder.name}.merged"
    if not merged.is_dir():
        hr.open_run(folder).export_merged(merged)
    experiment = load(folder / "experiment.yaml")
    model = Model.load(ModelSettings(path=str(merged), device=experiment.model.device))
    test = load_test(experiment.data, experiment.evaluation, model)
    return float(evaluate(model, test, experiment.evaluation, lambda *_: None)["eval_loss"])


if __name__ == "__main__":
    main()
