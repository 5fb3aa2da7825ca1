"""The path of one architecture: run, evaluate, export, and what others read of the exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hedgerow as hr

from . import evidence
from .architectures import Architecture, build
from .plain import Reader
from .rows import CLIENTS, MAX_NEW_TOKENS, PROMPT, TEST

METHODS: dict[str, dict[str, Any]] = {
    "flora": {"name": "flora", "ranks": [2, 3], "alpha": "4r"},
    "fedit": {"name": "fedit", "ranks": 2, "alpha": "4r"},
    "ferret over lora": {"name": "ferret", "over": "lora", "ranks": 2, "budget": 100},
    "ferret": {"name": "ferret"},
    "fedavg": {"name": "fedavg"},
}
"""The methods that are tried, with their options."""
WHOLE = {"ferret", "fedavg"}
"""Those of all weights, which make no adapter."""
METRICS = [
    ["loss", evidence.METRICS[0]],
    ["rouge_l", "exact_match", evidence.METRICS[1]],
    ["multiple_choice", evidence.METRICS[2]],
]
"""What a run is evaluated by, in one evaluation each, since not all models can be asked all."""
CLOSE = 1e-5
"""Largest difference of two losses (nats a token) that are of the same model."""


@dataclass
class Outcome:
    """What became of an architecture."""

    architecture: Architecture
    network: str = ""
    """transformers' class."""
    adapted: list[str] = field(default_factory=list)
    """Last words of the names of the weights that the adapter changes."""
    left: list[str] = field(default_factory=list)
    """Last words of the names of matrices that it leaves as they are, embeddings aside."""
    experts: bool | None = None
    """Whether routed experts are among what it changes; None where there are none."""
    deviations: dict[str, float] = field(default_factory=dict)
    """Differences from the run's own numbers, in nats a token, by what was compared."""
    faults: list[str] = field(default_factory=list)
    """What was wrong, one line each."""
    refused: dict[str, str] = field(default_factory=dict)
    """The sentence by which a run was refused before it began, by method."""

    def compare(self, what: str, one: float, other: float) -> None:
        """Note the difference of two losses, and that it is a fault where it is one."""
        self.deviations[what] = max(abs(one - other), self.deviations.get(what, 0.0))
        if not abs(one - other) <= CLOSE:
            self.faults.append(f"{what}: loss {other:.6f} instead of {one:.6f}")

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Note what fails in a step after which the path goes on."""
        try:
            yield
        except Exception as error:
            self.faults.append(f"{what}: {_said(error)}")

    def same(self, what: str, one: Any, other: Any) -> None:
        """Note what should be equal and is not."""
        if one != other:
            self.faults.append(f"{what}: {other!r} instead of {one!r}")


def walk(architecture: Architecture, folder: Path, reader: Reader) -> Outcome:
    """Walk one architecture's path, in a folder of its own.

    What fails on the way is a fault of the outcome, whatever it is.
    """
    outcome = Outcome(architecture)
    base = build(architecture, folder / "base")
    names = ("flora", *architecture.also)
    for name in names:
        try:
            _walk(outcome, name, folder, base, reader)
        except Exception as error:
            refused = isinstance(error, hr.UserError) and not (folder / name).exists()
            said = _said(error).replace(str(folder), "…")
            if refused and architecture.refused in said:
                outcome.refused[name] = said.removeprefix("UserError: ")
            else:
                outcome.faults.append(f"{name}: {said}")
    if architecture.refused and len(outcome.refused) < len(names):
        outcome.faults.append(f"not refused by a sentence with {architecture.refused!r}")
    return outcome


def _walk(outcome: Outcome, name: str, folder: Path, base: Path, reader: Reader) -> None:
    """Walk the path with one of `METHODS`."""
    run = _run(base, folder / name, METHODS[name], rounds=2 if name == "flora" else 1)
    losses = run.metrics["eval_loss"].tolist()
    if not abs(losses[0] - losses[-1]) > 1e-3:
        outcome.faults.append(f"{name} changes nothing: loss {losses[0]} -> {losses[-1]}")
    outcome.network = type(run.model(0)).__name__
    evaluated = _evaluate(outcome, name, run, losses[-1])
    for part in ("merged",) if name in WHOLE else ("adapter", "merged"):
        what = f"{name}, {part}"
        with outcome.step(what):
            out = folder / f"{name}-{part}"
            if part == "adapter":
                _look_at_adapter(outcome, name, run, run.export_adapter(out))
                found = _read(outcome, reader, what, base, out)
            else:
                found = _read(outcome, reader, what, run.export_merged(out), None)
            _compare(outcome, what, losses[-1], evaluated, found)


def _run(base: Path, out: Path, method: dict[str, Any], rounds: int) -> hr.Run:
    return hr.run(
        model=str(base),
        clients=CLIENTS,
        test=TEST,
        method=method,
        data={"prompt": "plain", "max_length": 96},
        training={"steps": 2, "batch_size": 3, "learning_rate": 0.02},
        evaluation={"batch_size": 4, "max_new_tokens": MAX_NEW_TOKENS},
        rounds=rounds,
        out=out,
        progress=False,
    )


def _evaluate(outcome: Outcome, method: str, run: hr.Run, loss: float) -> dict[str, Any]:
    """What the run itself says of each row, one at a time; the same comes of batches of four."""
    found: dict[int, dict[str, Any]] = {}
    for size in (1, 4):
        evidence.forget()
        scores: dict[str, Any] = {}
        for names in METRICS:
            with outcome.step(f"{method}, {names[0]} in batches of {size}"):
                override = f"evaluation.batch_size={size}"
                scores |= run.evaluate(None, override, metrics=names)
        if "eval_loss" in scores:
            outcome.compare(f"{method}, batches of {size}", loss, scores.pop("eval_loss"))
        found[size] = {key: list(kept) for key, kept in evidence.seen.items()}
        found[size]["scores"] = {key: scores.get(key) for key in ("rouge_l", "exact_match")}
    one, four = found[1], found[4]
    outcome.same(f"{method}, answers in batches of 4", one["answers"], four["answers"])
    outcome.same(f"{method}, scores in batches of 4", one["scores"], four["scores"])
    options = _flat(one["options"]), _flat(four["options"])
    _compare_each(outcome, f"{method}, rows in batches of 4", one["nats"], four["nats"])
    _compare_each(outcome, f"{method}, options in batches of 4", *options)
    return one


def _read(
    outcome: Outcome, reader: Reader, what: str, model: Path, adapter: Path | None
) -> dict[str, Any]:
    """What the process without hedgerow says; nothing, and a fault, where it cannot read it."""
    found = reader.read(
        model=str(model),
        adapter=None if adapter is None else str(adapter),
        rows=TEST,
        prompt=PROMPT,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    if "error" in found:
        outcome.faults.append(f"{what} cannot be read: {found['error']}")
        return {}
    outcome.same(f"{what}: tensors that peft leaves out", [], found.get("left out", []))
    return found


def _compare(
    outcome: Outcome, what: str, loss: float, own: dict[str, Any], others: dict[str, Any]
) -> None:
    """Compare what the run says of its model with what others say of the export."""
    if not others:
        return
    outcome.compare(what, loss, sum(others["nats"]) / others["tokens"])
    if own:
        _compare_each(outcome, f"{what}, rows", own["nats"], others["nats"])
        options = _flat(own["options"]), _flat(others["options"])
        _compare_each(outcome, f"{what}, options", *options)
        outcome.same(f"{what}, answers", others["answers"], own["answers"])


def _compare_each(outcome: Outcome, what: str, one: list[float], other: list[float]) -> None:
    """Compare sums over an answer's tokens, of which there are up to 14."""
    if not (one and other):
        return  # what failed has been noted
    apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    if not apart <= 10 * CLOSE:
        outcome.faults.append(f"{what}: {_rounded(other)} instead of {_rounded(one)}")


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _flat(lists: list[list[float]]) -> list[float]:
    return [value for values in lists for value in values]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _look_at_adapter(outcome: Outcome, method: str, run: hr.Run, adapter: Path) -> None:
    """Note what the adapter changes, what it leaves, and whether experts are among it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    targets = config.get("target_parameters") or []
    modules = {_module(name) for name in tensors}
    network = run.model(0)
    changed, experts = set(), set()
    for name, weight in network.named_parameters():
        module, _, last = name.rpartition(".")
        is_target = any(f".{name}".endswith(f".{target}") for target in targets)
        if module in modules and (last == "weight" or is_target):
            changed.add(name)
        if _is_of_experts(name, weight, outcome.architecture):
            experts.add(name)
    outcome.adapted = sorted({_short(name) for name in changed})
    matrices = {n for n, w in network.named_parameters() if w.ndim > 1 and not _ASIDE.search(n)}
    outcome.left = sorted({_short(name) for name in matrices - changed})
    if experts:
        outcome.experts = bool(experts & changed) and outcome.experts is not False
    zeros = sorted({_short(_module(name)) for name, t in tensors.items() if not torch.any(t)})
    if zeros and not method.startswith("ferret"):  # whose coordinates are fewer than the weights
        outcome.faults.append(f"{method}: adapted, and never changed: {', '.join(zeros)}")


_ASIDE = re.compile(r"embed|wte|wpe|lm_head|^head|word_|norm|bias")
"""Names of embeddings, output layers, and what has no matrices."""


def _is_of_experts(name: str, weight: torch.Tensor, architecture: Architecture) -> bool:
    """Whether a weight is of experts among whom a router chooses."""
    if "shared" in name or re.search(r"router|\bgate\b|bias|conv", name) or weight.ndim < 2:
        return False
    return "experts" in name or (weight.ndim == 3 and architecture.kind in ("experts", "hybrid"))


def _short(name: str) -> str:
    """The last words of a weight's name, without numbers: what is alike in all layers."""
    words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
    return ".".join(words[-2:])


def _module(key: str) -> str:
    return re.sub(r"(\.base_layer)*\.lora_[AB]\.weight$", "", key).removeprefix("base_model.model.")
