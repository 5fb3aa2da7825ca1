"""The bytes of a short run of every configuration, as they were before the code was rebuilt.

`python tests/support/pins.py NAME …` records those of some configurations for this processor, or of
all, which is right only where they are new, or the mathematics of a method is meant to change.
Other processors' are kept, but for the configurations that are named.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from torch import nn

HASHES = Path(__file__).parents[1] / "pinned" / "ledgers.json"


def arithmetic() -> str:
    """A hash of what this machine makes of plain sums, products and decompositions.

    Another processor adds in another order: its ledgers have other bits, whatever the code.
    """
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    layer = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.RMSNorm(24), nn.Linear(24, 260))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(3):
        inputs = torch.randn(4, 17, 16, generator=generator)
        labels = torch.randint(0, 260, (68,), generator=generator)
        attended = nn.functional.scaled_dot_product_attention(inputs, inputs, inputs)
        nn.functional.cross_entropy(layer(attended).flatten(0, 1), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    matrix = torch.randn(24, 16, generator=generator, dtype=torch.float64)
    results = [*layer.parameters(), *torch.linalg.svd(matrix), *torch.linalg.qr(matrix)]
    for result in results:
        digest.update(result.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def entry_hashes(run: Path) -> list[str]:
    """The SHA-256 of each entry of a run, oldest first."""
    index = json.loads((run / "ledger" / "ledger.json").read_text())
    return [entry["sha256"] for entry in index["entries"]]


def overrides(name: str) -> list[str]:
    """What a run is given beside its method; moments were not kept where hashes are older."""
    kept = name.partition(" ")[0].rstrip(",") not in ("ferret", "fedavg")
    return ["federation.rounds=3", *([] if kept else ["training.keep_optimizer=false"])]


def main() -> None:
    """Record the hashes of the configurations that are named, or of all."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from hedgerow.engines import local
    from hedgerow.experiment import load
    from hedgerow.federation.fleet import Unwatched
    from support.configurations import METHOD_OPTIONS, MORE_OPTIONS, method_of
    from support.experiments import write_experiment
    from support.models import tiny_llama

    torch.set_num_threads(1)
    pinned = json.loads(HASHES.read_text())
    known = list(METHOD_OPTIONS | MORE_OPTIONS)
    hashes = pinned["entries"].setdefault(arithmetic(), {})
    for name in sys.argv[1:] or known:
        for others in pinned["entries"].values():
            others.pop(name, None)
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_llama(Path(folder) / "tiny")
            path = write_experiment(Path(folder), model)
            content = yaml.safe_load(path.read_text()) | {"method": method_of(name)}
            path.write_text(yaml.safe_dump(content))
            local.run(load(path, overrides(name)), Path(folder) / "run", Unwatched())
            hashes[name] = entry_hashes(Path(folder) / "run")
        print(name, hashes[name][-1][:12], flush=True)
    entries = {
        processor: {name: own[name] for name in known if name in own}
        for processor, own in pinned["entries"].items()
    }
    content = {"torch": torch.__version__, "entries": entries}
    HASHES.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
