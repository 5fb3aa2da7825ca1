"""What it costs to lend the base model to a client: peft's wrapping against swapping layers.

    python bench/attach.py [MODEL_FOLDER]

Both are done in turn in one process, on the same model and configuration.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import peft

from hedgerow import console
from hedgerow.bundled import MODEL
from hedgerow.model import Model
from hedgerow.settings import ModelSettings

warnings.simplefilter("ignore")


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print both medians and their ratio."""
    model = Model.load(ModelSettings(path=sys.argv[1] if len(sys.argv) > 1 else str(MODEL)))
    rows = []
    for rank in (4, 16, 32):
        config = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)

        def by_peft(config: peft.LoraConfig = config) -> None:
            peft.get_peft_model(model.network, config).unload()

        def by_swapping(config: peft.LoraConfig = config) -> None:
            model.attach(config)
            model.release()

        by_swapping()  # wraps the layers, once for all clients of this rank
        pairs = [(seconds(by_peft), seconds(by_swapping)) for _ in range(15)]
        first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(
            (str(rank), f"{first * 1e3:.1f}", f"{second * 1e3:.1f}", f"{first / second:.0f}x")
        )
    console.table(
        "attach and release an adapter, milliseconds", ["rank", "peft", "swap", "ratio"], rows
    )


if __name__ == "__main__":
    main()
