"""Experiment files: on three made-up clients, and on real ones of ../shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SHARED = Path(__file__).parents[3] / "shared"
SITES = ["north", "east", "south", "west"]


def write_experiment(folder: Path, base: Path, /, **sections: Any) -> Path:
    """An experiment file on three clients of different sizes; keywords change sections."""
    for client, size in enumerate([5, 9, 14]):
        rows = [
            {"instruction": f"Say {'abc'[client]}{i}", "output": f"{'abc'[client] * 3}{i}"}
            for i in range(size)
        ]
        (folder / f"client_{client}.json").write_text(json.dumps(rows))
    rows = [{"instruction": f"Say b{i}", "output": f"bbb{i}"} for i in range(4)]
    (folder / "test.json").write_text(json.dumps(rows))
    content: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "clients": "client_{}.json",
            "test": "test.json",
            "prompt": "plain",
            "max_length": 64,
        },
        "method": {"name": "flora", "ranks": [4, 2, 1]},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "federation": {"rounds": 2},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def dolly(shared: Path, path: Path, method: dict[str, Any], **sections: Any) -> Path:
    """An experiment on four of Dolly's clients; the model is where each site says."""
    content: dict[str, Any] = {
        "model": {"path": str(shared / "models/stories260k")},
        "data": {
            "clients": {
                name: str(shared / f"data/dolly/local_training_{index}.json")
                for index, name in enumerate(SITES)
            },
            "fields": {"input": "context", "output": "response"},
            "prompt": "alpaca-short",
            "max_length": 256,
        },
        "method": method,
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "federation": {"rounds": 3},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
