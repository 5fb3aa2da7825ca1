"""Every method, in every configuration whose updates and entries are of another kind."""

from __future__ import annotations

from typing import Any

TARGETS = ["q_proj", "v_proj"]

METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "flora": {"ranks": [4, 2, 1], "targets": TARGETS, "restart": "own", "broadcast": "stack"},
    "flora orthogonal": {"ranks": [4, 2, 1], "targets": TARGETS, "restart": "own"},
    "flora shared": {"ranks": [4, 2, 1], "targets": TARGETS, "restart": "shared"},
    "flora shared, cut": {
        **{"ranks": [4, 2, 1], "targets": TARGETS, "restart": "shared"},
        **{"compress": True, "upload_bits": 16},
    },
    "flora own, cut": {"ranks": 2, "targets": TARGETS, "compress": {"bits": 8}, "upload_bits": 8},
    "fedit": {"ranks": 2, "targets": TARGETS},
    "fedit sparse": {
        **{"ranks": 2, "targets": TARGETS, "up": {"name": "top_k", "k": 8, "tile": 64}},
        **{"error_feedback": True},
    },
    "zero_padding": {"ranks": [4, 2, 1], "targets": TARGETS},
    "flexlora": {"ranks": [4, 2, 1], "targets": TARGETS},
    "florist": {"ranks": [4, 2, 1], "targets": TARGETS},
    # Nothing is pruned here, so that what there is at first has to be within the budget.
    "flora_adalora": {
        **{"ranks": [4, 2, 1], "initial": 1, "targets": TARGETS, "broadcast": "stack"},
    },
    "flora_adalora orthogonal": {"ranks": [4, 2, 1], "initial": 1, "targets": TARGETS},
    "fedex_lora": {"ranks": 2, "targets": TARGETS},
    "ffa_lora": {"ranks": [4, 2, 1], "targets": TARGETS},
    "rolora": {"ranks": 2, "targets": TARGETS},
    "fedsvd": {"ranks": 2, "targets": TARGETS},
    "fed_sb": {"ranks": 2, "targets": TARGETS},
    "fedsa_lora": {"ranks": 2, "targets": TARGETS},
    "ditto": {"ranks": 2, "targets": TARGETS},
    "ferret": {"coordinates": "random", "compression": 64},
    "ferret of the largest": {"compression": 64},
    "ferret of the largest, both ways": {"compression": 32, "broadcast_compression": 32},
    "ferret of the largest, both ways, owed": {
        **{"compression": 32, "broadcast_compression": 32, "broadcast_feedback": 0.9},
    },
    "ferret over lora": {"over": "lora", "ranks": 2, "targets": TARGETS, "budget": 100},
    "ferret of the paper": {"paper": True},
    "ferret by norm": {"compression": 64, "allocation": "norm"},
    "ferret by norm, dense": {"budget": 500, "allocation": "norm", "basis": "rademacher"},
    "fedavg": {},
    "fedavg in bits": {"up": {"name": "bits", "bits": 2}, "down": {"name": "bits", "bits": 8}},
    "fedavg of rotated values": {
        **{"up": {"name": "top_k", "k": 4, "tile": 64, "bits": 1, "transform": "hadamard"}},
        **{"down": {"name": "top_k", "k": 9, "tile": 64, "group": "all", "transform": "hadamard"}},
    },
    "fedadam": {},
    "fedprox": {"mu": 0.1},
    "scaffold": {},
    "diloco": {},
    "demo_sgd": {"up": {"name": "top_k", "k": 4, "tile": 64, "bits": 8, "transform": "dct"}},
    "sparseloco": {"up": {"name": "top_k", "k": 4, "tile": 64}},
    "stc": {
        **{"up": {"name": "top_k", "k": 1, "tile": 50, "group": "all", "bits": 1}},
        **{"down": {"name": "top_k", "k": 1, "tile": 50, "group": "all", "bits": 1}},
    },
    "fedkseed": {"candidates": 64},
    "fedzo": {"directions_per_step": 2},
    "centralized": {"ranks": [4, 2, 1], "targets": TARGETS},
    "standalone": {"ranks": [4, 2, 1], "targets": TARGETS, "alpha": 3},
}

MORE_OPTIONS: dict[str, dict[str, Any]] = {
    "flora zero": {"ranks": [4, 2, 1], "restart": "zero", "broadcast": "stack"},
    "flora zero, orthogonal": {"ranks": [4, 2, 1], "restart": "zero"},
    "flora warm": {"ranks": [4, 2, 1], "dropout": 0.1, "rslora": True},
    "flora zero, rank": {"ranks": 4, "restart": "zero", "compress": {"rank": 3, "bits": 16}},
    "flora zero, energy": {"ranks": 4, "restart": "zero", "compress": {"energy": 0.9, "bits": 32}},
    "flora own, nothing carried": {
        **{"ranks": [4, 2, 1], "restart": "own", "compress": {"rank": 2, "carry": False}},
    },
    "flora adaptive": {
        **{"ranks": [4, 2, 1], "scaling": "adaptive", "restart": "own", "broadcast": "stack"},
    },
    "flora uniform": {"ranks": [4, 2, 1], "scaling": "uniform", "alpha": 8},
    "flora by a list": {
        **{"ranks": 2, "scaling": [0.5, 0.25, 0.5], "restart": "zero", "broadcast": "stack"},
    },
    "ferret with error feedback": {
        "coordinates": "random",
        "compression": 64,
        "error_feedback": True,
    },
    "ferret with momentum": {
        "coordinates": "random",
        "compression": 64,
        "momentum": 0.9,
        "anneal": 0.9,
    },
    "ferret clipped": {"compression": 64, "clip": 0.01, "server_learning_rate": 0.7},
    "ferret, a seed for each client": {"compression": 64, "seeds": "client", "shrink": False},
    "ferret in 8 bits": {"compression": 32, "bits": 8, "broadcast_bits": 8, "basis": "gaussian"},
    "ferret unrounded": {
        "coordinates": "random",
        "compression": 32,
        "bits": 32,
        "broadcast_bits": 32,
    },
    "ferret over lora, with momentum": {
        **{"over": "lora", "ranks": 2, "budget": 100, "momentum": 0.5, "error_feedback": True},
    },
    "ferret of the largest, fed back": {
        **{"compression": 32, "bits": 2, "error_feedback": True, "momentum": 0.5},
        **{"over": "lora", "ranks": 2},
    },
    "ferret with nesterov": {
        "coordinates": "random",
        "compression": 64,
        "server": "nesterov",
        "weights": "uniform",
    },
    "fedavg with adam": {"server": {"name": "adam", "learning_rate": 0.001}},
    "fedavg, sparse": {
        **{"up": {"name": "top_k", "k": 2, "tile": 32, "bits": 4}, "error_feedback": True},
        **{"down": {"name": "top_k", "k": 2, "tile": 32}, "broadcast_feedback": 0.9},
    },
    "fedit with adam": {"ranks": 2, "server": {"name": "adam", "learning_rate": 0.01}},
    "zero_padding in bits": {"ranks": [4, 2, 1], "up": {"name": "bits", "bits": 4}},
    "rolora, sparse": {
        **{"ranks": 2, "up": "top_k", "error_feedback": 0.9, "server": "momentum"},
        **{"weights": "uniform"},
    },
    "ffa_lora in bits": {"ranks": [4, 2, 1], "up": {"name": "bits", "bits": 8}},
    "fedsa_lora, sparse": {
        **{"ranks": 2, "up": "top_k", "error_feedback": True, "server": "momentum"},
    },
    "ditto in bits": {"ranks": 2, "up": {"name": "bits", "bits": 8}, "proximal": 1.0},
    "fed_sb with nesterov": {"ranks": 2, "up": {"name": "bits", "bits": 8}, "server": "nesterov"},
    "florist at 0.5": {"ranks": [4, 2, 1], "threshold": 0.5},
    "flora_adalora, pruned": {"ranks": [4, 2, 1], "broadcast": "stack"},
}
"""More configurations, whose ledgers are pinned too: other numbers of the same kinds."""


def method_of(name: str) -> dict[str, Any]:
    """The section `method` of a configuration; its name begins with the method's."""
    options = (METHOD_OPTIONS | MORE_OPTIONS)[name]
    return {"name": name.split()[0].rstrip(","), **options}
