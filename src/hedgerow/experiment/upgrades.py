"""Runs of earlier versions: what keys meant that their experiment.yaml does not have yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hedgerow.methods import METHODS
from hedgerow.methods.lora import LoraOptions


def is_of_a_run(path: Path) -> bool:
    """Whether an experiment file is the resolved one in a run's directory."""
    return (path.parent / "ledger" / "ledger.json").is_file()


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a run's resolved file, in which every key that counts for its entries is given.

    A version writes all keys that it knows; one that is missing is younger than the run, and may
    have another default than what was done before there was a choice.
    """
    method, training = content.get("method"), content.get("training")
    if not isinstance(method, dict) or not isinstance(training, dict):
        return dict(content)
    # Version 0.1: FLoRA alone kept moments, as it does, and every other method weighed by size.
    if "keep_optimizer" not in training:
        kept = None if method.get("name") == "flora" else False
        training = {"keep_optimizer": kept, **training}
        if method.get("name") == "ferret":
            method = _ferret(method)
    name = method.get("name")
    if isinstance(name, str) and (name in METHODS or ":" in name):
        kind = METHODS.find(name, "method.name")
        method = {**kind.before_choice(method), **method}
    return {**content, "method": method, "training": training}


def _ferret(options: Mapping[str, Any]) -> dict[str, Any]:
    """Ferret's options, of which LoRA's were idle, and `clip` was of steps of the server's rate."""
    idle = LoraOptions.model_fields if options.get("over", "full") == "full" else ()
    options = {
        "weights": "size",
        "coordinates": "random",
        **{k: v for k, v in options.items() if k not in idle},
    }
    if options.get("clip") and options.get("anneal", 1) == 1:
        options["clip"] /= options.get("server_learning_rate", 1)
    return options
