"""NVFlare: its FedAvg recipe in its simulator, as many clients at once as there are (its default).

With fewer, it would begin a process, and load the model, for each client in each round.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv
from safetensors.torch import load_file
from work import ADAPTER, Work

DOT = "/"
"""What stands for a dot in a name, which a module's parameter cannot have."""


class Adapter(torch.nn.Module):
    """The factors alone: the server has no need of the model."""

    def __init__(self, path: str) -> None:
        super().__init__()
        for name, factor in load_file(path).items():
            self.register_parameter(name.replace(".", DOT), torch.nn.Parameter(factor))


def main() -> None:
    """Train."""
    work = Work.asked_for()
    count = len(work.clients)
    reports = work.out / "reports"
    reports.mkdir()
    recipe = FedAvgRecipe(
        name="peers",
        model={
            "class_path": "nvflare_simulator.Adapter",
            "args": {"path": str(work.folder / ADAPTER)},
        },
        min_clients=count,
        num_rounds=work.rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=f"--work {work.folder} --rounds {work.rounds} --out {reports}",
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="",
    )
    here = Path.cwd()
    with contextlib.redirect_stdout(sys.stderr):
        recipe.execute(SimEnv(num_clients=count, workspace_root=str(work.out)))
    os.chdir(here)
    (last,) = work.out.rglob("FL_global_model.pt")
    saved = torch.load(last, weights_only=True)["model"]
    factors = {name.replace(DOT, "."): torch.as_tensor(v) for name, v in saved.items()}
    said = [json.loads((reports / f"{client}.json").read_text()) for client in range(count)]
    work.finish(factors, work.mean([each["loss"] for each in said]), said[0]["bytes_up"])


if __name__ == "__main__":
    main()
