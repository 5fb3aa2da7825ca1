"""FLoRA beside the family of LoRA methods that came after, at the same local work.

    python bench/flora_family.py OUT --data DOLLY --model MODEL [--settings a b c] [--only NAME …]

DOLLY holds local_training_0.json … and global_test.json, of which the first 300 rows of each client
are taken; MODEL is a model's folder. All methods have adapters of rank 8 on the query and value
projections (Fed-SB a core of rank 27, which is less), batches of 4 and sequences of up to 128
tokens (instruction and answer), in three settings:

    a   ten clients, 60 rounds of 3 local steps
    b   ten clients, 10 rounds of 30 local steps
    c   a client for each category, 4 rounds of 100 local steps

Each method runs at three learning rates with one seed. After a quarter of the rounds a rate is
given up that is more than 0.5% behind another one of the same method, and a method that is more
than 2% behind the best. With the best rate two more seeds follow where a method is within 1% of the
best. Every run that is done is a line of OUT/results.jsonl, and a run that was interrupted goes on,
so the script can be stopped and started at will. Two runs are at work at a time, with a thread
each. At the end there is a table for each setting, and OUT/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

RANK = 8
METHODS: dict[str, dict[str, Any]] = {
    "FLoRA warm": {"name": "flora"},
    "FLoRA zero": {"name": "flora", "restart": "zero"},
    "FedIT": {"name": "fedit"},
    "FlexLoRA": {"name": "flexlora"},
    "FedEx-LoRA": {"name": "fedex_lora"},
    "FFA-LoRA": {"name": "ffa_lora"},
    "RoLoRA": {"name": "rolora"},
    "FedSVD": {"name": "fedsvd"},
    "FLoRIST": {"name": "florist", "threshold": 0.95},
    "Fed-SB": {"name": "fed_sb", "ranks": 27},
    "FLoRA AdaLoRA": {"name": "flora_adalora"},
}
SETTINGS = {"a": (3, 60), "b": (30, 10), "c": (100, 4)}
"""Local steps and rounds."""
RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
BEHIND = 1.005
"""A rate that is further behind another one after a quarter of the rounds is given up."""
HOPELESS = 1.02
"""A method that is further behind the best one then is given up as well, with all its rates."""
CLOSE = 1.01
"""Methods within this of the best one with the first seed get the other seeds."""
ROWS = 300
"""Examples of a client."""


class Cell(NamedTuple):
    """One run of the grid."""

    setting: str
    method: str
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        """Its run directory's name."""
        name = self.method.lower().replace(" ", "-")
        return f"{self.setting}-{name}-{self.rate:g}-{self.seed}"


class Result(NamedTuple):
    """What a cell came to."""

    loss: float
    """On the test answers after the last round that was run; infinite where it diverged."""
    rounds: int
    bytes_up: float
    """Per client and round."""
    bytes_down: float


class Grid:
    """The cells that are done, on disk."""

    def __init__(self, out: Path, data: Path, model: Path) -> None:
        self.out, self.data, self.model = out, data, model
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / "results.jsonl"
        self.done: dict[tuple[Cell, int], Result] = {}
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        for cell, result in map(json.loads, lines):
            key = Cell(*cell), Result(*result)
            self.done[key[0], key[1].rounds] = key[1]

    def add(self, cell: Cell, rounds: int, result: Result) -> None:
        """Write down a result."""
        result = result._replace(rounds=rounds)
        self.done[cell, rounds] = result
        with self._file.open("a") as file:
            file.write(json.dumps([cell, result]) + "\n")

    def experiment(self, cell: Cell, rounds: int) -> dict[str, Any]:
        """The experiment of a cell."""
        steps, _ = SETTINGS[cell.setting]
        data: dict[str, Any] = {"clients": str(self.out / "client_{}.json")}
        if cell.setting == "c":
            partition = {"kind": "column", "column": "category"}
            data = {"source": str(self.out / "all.json"), "partition": partition}
        fields = {"instruction": "instruction", "input": None, "output": "response"}
        data |= {"test": str(self.data / "global_test.json"), "fields": fields}
        data |= {"prompt": "plain", "max_length": 128}
        adapter = {"ranks": RANK, "targets": ["q_proj", "v_proj"]}
        return {
            "model": {"path": str(self.model)},
            "data": data,
            "method": adapter | METHODS[cell.method],
            "training": {"steps": steps, "batch_size": 4, "learning_rate": cell.rate},
            "federation": {"rounds": rounds, "seed": cell.seed},
            "evaluation": {"every": 1000},
        }

    def missing(self, wanted: list[tuple[Cell, int]]) -> list[tuple[Cell, int]]:
        """Those that are not done."""
        return [key for key in wanted if key not in self.done]


class Silent:
    """A watcher that says nothing: two runs share the terminal."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def run_cell(folder: str, content: dict[str, Any]) -> Result:
    """Run an experiment, or go on with it (in a process of its own, with one thread)."""
    from hedgerow.engines import local
    from hedgerow.errors import RunFailed
    from hedgerow.experiment import Experiment, validate
    from hedgerow.model import Model
    from hedgerow.runs.rows import read_rows

    experiment = validate(content, "flora_family.py", Experiment)
    rounds = experiment.federation.rounds
    out = Path(folder)
    model = Model.load(experiment.model)
    model.network.set_attn_implementation(_register_attention())
    try:
        local.run(experiment, out, Silent(), resume=True, model=model)
    except RunFailed:
        return Result(math.inf, rounds, 0, 0)
    rows = read_rows(out)
    clients = rows[-1]["clients"]
    up, down = (sum(row[key] for row in rows) / clients / rounds for key in BYTES)
    loss = rows[-1]["eval_loss"]
    return Result(math.inf if loss is None else loss, rounds, up, down)


BYTES = ("bytes_up", "bytes_down")


def _register_attention() -> str:
    """Attention whose heads of 8 are padded to 16, which torch does twice as fast on a CPU."""
    from torch.nn.functional import pad, scaled_dot_product_attention
    from transformers import AttentionInterface

    def padded(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        groups, size = module.num_key_value_groups, query.shape[-1]
        heads = [query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)]
        heads = [pad(head, (0, 16 - size)) for head in heads]
        output = scaled_dot_product_attention(*heads, is_causal=True, scale=scaling)
        return output[..., :size].transpose(1, 2).contiguous(), None

    AttentionInterface.register("padded", padded)
    return "padded"


def run_all(grid: Grid, wanted: list[tuple[Cell, int]]) -> None:
    """Run the cells that are missing, two at a time, and write each down as it comes."""
    todo = grid.missing(wanted)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        futures = {}
        for cell, rounds in todo:
            folder = str(grid.out / cell.folder)
            futures[pool.submit(run_cell, folder, grid.experiment(cell, rounds))] = cell, rounds
        for count, future in enumerate(as_completed(futures), start=1):
            cell, rounds = futures[future]
            result = future.result()
            grid.add(cell, rounds, result)
            print(
                f"{count}/{len(todo)} {cell.folder} {rounds} rounds: {result.loss:.4f}", flush=True
            )
            if rounds == SETTINGS[cell.setting][1]:
                shutil.rmtree(grid.out / cell.folder, ignore_errors=True)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    grid = Grid(*(path.absolute() for path in (arguments.out, arguments.data, arguments.model)))
    prepare_data(grid)
    text = []
    for setting in arguments.settings:
        best = best_rates(grid, setting, arguments.only)
        text += table(setting, arguments.only, seeds(grid, setting, best))
    text += divergence(grid, arguments.settings, arguments.only)
    (grid.out / "results.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


def best_rates(grid: Grid, setting: str, methods: list[str]) -> list[Cell]:
    """The run with the first seed at its best rate, of each method that is not given up."""
    rounds = SETTINGS[setting][1]
    cells = [Cell(setting, method, rate, SEEDS[0]) for method in methods for rate in RATES]
    run_all(grid, [(cell, rounds // 4) for cell in cells])
    early = {cell: grid.done[cell, rounds // 4].loss for cell in cells}
    best = {m: min(loss for cell, loss in early.items() if cell.method == m) for m in methods}
    first = min(best.values())
    kept = [c for c in cells if early[c] <= min(BEHIND * best[c.method], HOPELESS * first)]
    run_all(grid, [(cell, rounds) for cell in kept])
    return [
        min((c for c in kept if c.method == method), key=lambda c: grid.done[c, rounds].loss)
        for method in methods
        if best[method] <= HOPELESS * first
    ]


def seeds(grid: Grid, setting: str, best: list[Cell]) -> dict[Cell, list[Result]]:
    """The results of each method at its best rate, with all seeds where it is close."""
    rounds = SETTINGS[setting][1]
    first = min(grid.done[cell, rounds].loss for cell in best)
    wanted = {
        cell: [cell._replace(seed=seed) for seed in SEEDS]
        if grid.done[cell, rounds].loss <= CLOSE * first
        else [cell]
        for cell in best
    }
    run_all(grid, [(cell, rounds) for cells in wanted.values() for cell in cells])
    return {cell: [grid.done[c, rounds] for c in cells] for cell, cells in wanted.items()}


def prepare_data(grid: Grid) -> None:
    """The first rows of each client, and of all together."""
    rows = []
    for index, file in enumerate(sorted(grid.data.glob("local_training_*.json"))):
        own = json.loads(file.read_text())[:ROWS]
        (grid.out / f"client_{index}.json").write_text(json.dumps(own))
        rows += own
    (grid.out / "all.json").write_text(json.dumps(rows))


def table(setting: str, methods: list[str], results: dict[Cell, list[Result]]) -> list[str]:
    """A setting's methods, the best first, in Markdown."""
    steps, rounds = SETTINGS[setting]
    losses = {cell: [result.loss for result in each] for cell, each in results.items()}
    mean = {cell: statistics.fmean(each) for cell, each in losses.items()}
    lines = [f"### ({setting}) {rounds} rounds of {steps} local steps", ""]
    lines += ["| method | seeds | loss | spread | beside the best | rate | kB up | kB down |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for cell in sorted(mean, key=mean.__getitem__):
        spread = max(losses[cell]) - min(losses[cell])
        up, down = (results[cell][0][index] / 1000 for index in (2, 3))
        lines.append(
            f"| {cell.method} | {len(losses[cell])} | {mean[cell]:.4f} | {spread:.4f} | "
            f"{mean[cell] / min(mean.values()) - 1:+.2%} | {cell.rate:g} | {up:.1f} | {down:.1f} |"
        )
    given_up = [m for m in methods if m not in {cell.method for cell in results}]
    return [*lines, "", f"Given up after a quarter: {', '.join(given_up) or 'none'}.", ""]


def divergence(grid: Grid, settings: list[str], only: list[str]) -> list[str]:
    """Whether a rate at which FedIT trains makes a method diverge."""
    lines = []
    for setting in settings:
        for method in only:
            worse = [
                f"{rate:g}"
                for rate in RATES
                if trains(grid, setting, "FedIT", rate) and not trains(grid, setting, method, rate)
            ]
            if worse:
                lines.append(
                    f"* ({setting}) {method} does not train at {', '.join(worse)}, FedIT does"
                )
    return lines or ["No method diverges at a rate at which FedIT trains."]


BASE = 4.6
"""stories260k's loss on Dolly's test answers, rounded up: who is above it has not trained."""


def trains(grid: Grid, setting: str, method: str, rate: float) -> bool:
    """Whether all runs of a method at a rate are below the base model, however long they were."""
    of = (setting, method, rate)
    losses = [r.loss for (cell, _), r in grid.done.items() if cell[:3] == of]
    return all(loss < BASE for loss in losses)


if __name__ == "__main__":
    main()
