"""Runs of earlier versions: what keys meant that their experiment.yaml does not have yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    # Version 0.1: warm FLoRA alone kept moments, and every method but FLoRA weighed by size.
    warm = method.get("name") == "flora" and method.get("restart", "warm") != "zero"
    training = {"keep_optimizer": warm, **training}
    if method.get("name") == "ferret":
        method = {"weights": "size", **method}
    return {**content, "method": method, "training": training}
