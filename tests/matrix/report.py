"""The table of docs/compatibility.md: `python -m tests.matrix.report OUT.md [NAME ...]`.

It walks every architecture's path anew, which takes some minutes, and ends with code 1 where there
are faults, which it prints.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
import transformers

from .architectures import ARCHITECTURES
from .plain import Reader
from .walk import CLOSE, Outcome, walk

_HEAD = """| architecture | class | adapted by `all-linear` | left as it is | adapter | merged | \
largest deviation |
| --- | --- | --- | --- | --- | --- | ---: |
"""


def main(out: Path, names: Iterable[str]) -> int:
    """Write the table of the named architectures, or of all, to a file."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    chosen = [each for each in ARCHITECTURES if not names or each.name in names]
    outcomes = []
    with Reader() as reader:
        for number, architecture in enumerate(chosen, start=1):
            with tempfile.TemporaryDirectory() as folder:
                outcome = walk(architecture, Path(folder), reader)
            outcomes.append(outcome)
            print(f"{number}/{len(chosen)} {architecture.name}", file=sys.stderr)
            for fault in outcome.faults:
                print(f"    {fault}", file=sys.stderr)
    out.write_text(table(outcomes), encoding="utf-8")
    return int(any(outcome.faults for outcome in outcomes))


def table(outcomes: list[Outcome]) -> str:
    """What became of architectures, in Markdown."""
    good = [o for o in outcomes if not o.faults and not o.refused]
    largest = max((max(o.deviations.values()) for o in good), default=0.0)
    experts = sum(o.experts is True for o in good)
    text = (
        f"{len(good)} architectures with torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__} and peft {peft.__version__}: random models of some 30,000 "
        "weights, each trained by `flora` on two clients of different ranks and by a method of all "
        "weights (`fedavg` or `ferret`), evaluated, exported, and read again by transformers and "
        "peft in a process without hedgerow. Losses, log-likelihoods of options and greedy answers "
        "are compared with those of one row at a time, without padding and without a cache; "
        f"{CLOSE:.5f} nats a token may be between two losses, and {largest:.0e} was. The experts "
        f"of {experts} of them are trained.\n\n{_HEAD}"
    )
    text += "".join(f"| {' | '.join(_cells(outcome))} |\n" for outcome in outcomes)
    refused = [(o.architecture.name, said) for o in outcomes for said in set(o.refused.values())]
    if refused:
        text += "\nRefused, by these sentences:\n\n"
        text += "".join(f"- {name}: “{said}”\n" for name, said in refused)
    return text


def _cells(outcome: Outcome) -> list[str]:
    exports = [_export(outcome, part) for part in ("adapter", "merged")]
    deviation = max(outcome.deviations.values(), default=None)
    return [
        outcome.architecture.name,
        f"`{outcome.network}`" if outcome.network else "",
        _grouped(outcome.adapted),
        _grouped(outcome.left),
        *exports,
        "" if deviation is None else f"{deviation:.0e}",
    ]


def _grouped(names: list[str]) -> str:
    """Names of weights by the layer that they are in: `mlp: down_proj, up_proj; attn: qkv`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, _, weight = name.rpartition(".")
        groups.setdefault(layer, []).append(weight)
    return "; ".join(f"{layer}: {', '.join(weights)}" for layer, weights in groups.items())


def _export(outcome: Outcome, part: str) -> str:
    if "flora" in outcome.refused:
        return "refused"
    deviation = outcome.deviations.get(f"flora, {part}")
    wrong = any(f"flora, {part}" in fault for fault in outcome.faults)
    return "yes" if deviation is not None and deviation <= CLOSE and not wrong else "**no**"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
