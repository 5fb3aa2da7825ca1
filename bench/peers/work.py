"""The work, as the scripts of all peers read it: model, adapter, and rows as hedgerow draws them.

Runs in the environment of each peer, hence without hedgerow. A script is called with the folder
that the driver has written (`--work`), a number of rounds, and a folder of its own (`--out`), both
absolute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from transformers import AutoModelForCausalLM

ADAPTER = "adapter.safetensors"
"""File of factors, of which everybody begins with one and leaves one."""

Factors = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]
NO_LOSS = -100
FACTOR = ".default.weight"
"""What peft has at the end of a factor's name in a model, and leaves out in a file."""


@dataclass(frozen=True)
class Work:
    """What all peers do."""

    folder: Path
    rounds: int
    out: Path

    @classmethod
    def asked_for(cls) -> Work:
        """The work that the command line names."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--work", type=Path, required=True)
        parser.add_argument("--rounds", type=int, required=True)
        parser.add_argument("--out", type=Path, required=True)
        torch.set_num_threads(1)
        options = parser.parse_args()
        return cls(options.work, options.rounds, options.out)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of the model and of the steps."""
        return dict(json.loads((self.folder / "work.json").read_text()))

    @property
    def clients(self) -> list[int]:
        """Numbers of rows of the clients, by which their factors are weighted."""
        return list(self.settings["clients"])

    @property
    def begins_with(self) -> Factors:
        """The factors that everybody begins with."""
        return load_file(self.folder / ADAPTER)

    def network(self) -> PeftModel:
        """The model with its adapter, which alone trains."""
        settings = self.settings
        base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        config = LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            target_modules=settings["targets"],
            task_type="CAUSAL_LM",
        )
        network = get_peft_model(base, config)
        set_factors(network, self.begins_with)
        return network

    def rows(self, client: int, round: int) -> list[dict[str, list[int]]]:
        """The rows of a client's steps in a round (from 0), one after another, not padded."""
        with safe_open(self.folder / "rows.safetensors", "pt") as file:
            get = file.get_tensor
            drawn = get(f"{client}/drawn")[round].flatten().tolist()
            ends, prompts = get(f"{client}/ends"), get(f"{client}/prompts").tolist()
            starts = torch.cat([ends.new_zeros(1), ends[:-1]]).tolist()
            tokens = get(f"{client}/tokens")
        rows = []
        for index in drawn:
            ids = tokens[starts[index] : int(ends[index])].tolist()
            labels = [NO_LOSS] * prompts[index] + ids[prompts[index] :]
            rows.append({"input_ids": ids, "labels": labels})
        return rows

    def batches(self, client: int, round: int) -> Iterable[Batch]:
        """The rows of each step, padded."""
        rows, size = self.rows(client, round), self.settings["batch_size"]
        for first in range(0, len(rows), size):
            yield self.padded(rows[first : first + size])

    def padded(self, rows: Sequence[Mapping[str, list[int]]]) -> Batch:
        """A batch, padded on the right, where causal attention needs no mask."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.settings["pad_id"], "labels": NO_LOSS}
        return {
            name: torch.tensor([row[name] + [pad] * (longest - len(row[name])) for row in rows])
            for name, pad in fill.items()
        }

    def train(self, network: PeftModel, client: int, round: int) -> float:
        """Take a client's steps of a round in a plain loop; returns the mean loss of a token."""
        trained = [p for p in network.parameters() if p.requires_grad]
        rate = self.settings["learning_rate"]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        network.train()
        sum_of_losses, tokens = 0.0, 0
        for batch in self.batches(client, round):
            loss = network(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, self.settings["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
            count = learnt(batch)
            sum_of_losses, tokens = sum_of_losses + loss.item() * count, tokens + count
        return sum_of_losses / tokens

    def mean(self, values: Sequence[float]) -> float:
        """The mean of clients' values, weighted as their factors are."""
        pairs = zip(self.clients, values, strict=True)
        return sum(rows * value for rows, value in pairs) / sum(self.clients)

    def finish(self, factors: Factors, loss: float, bytes_up: int) -> None:
        """Keep the last factors, and print what the driver reads."""
        save_file({k: v.detach().contiguous() for k, v in factors.items()}, self.out / ADAPTER)
        print(json.dumps({"loss": loss, "bytes_up": bytes_up}))


def learnt(batch: Batch) -> int:
    """Number of tokens of a batch that carry loss."""
    return int((batch["labels"][:, 1:] != NO_LOSS).sum())


def factors_of(network: PeftModel) -> Factors:
    """The factors that a model has now, by the names of peft's files; not copied."""
    return {
        name.replace(FACTOR, ".weight"): parameter.detach()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def set_factors(network: PeftModel, factors: Factors) -> None:
    """Give a model factors."""
    with torch.no_grad():
        for name, own in factors_of(network).items():
            own.copy_(factors[name])


@cache
def network_of(work: Work) -> PeftModel:
    """The model of a process that is asked for clients one after another."""
    return work.network()


def in_turns(work: Work, network: PeftModel, train: Callable[[int, int], float]) -> None:
    """Rounds in this process, for libraries that train one client and know of no federation.

    Args:
        train: takes the steps of a client in a round (from 0) on the network; returns their loss.
    """
    factors, total = work.begins_with, sum(work.clients)
    for round in range(work.rounds):
        mean: Factors = {}
        losses = []
        for client, rows in enumerate(work.clients):
            set_factors(network, factors)
            losses.append(train(client, round))
            sent = save({name: each.contiguous() for name, each in factors_of(network).items()})
            for name, factor in load(sent).items():
                mean[name] = mean.get(name, 0) + factor * (rows / total)
        factors = mean
    work.finish(factors, work.mean(losses), len(sent))
