"""What a step of example-level privacy costs beside a plain one: processor time, and memory.

    python bench/private_step.py [MODEL_FOLDER ...] [--batch 8] [--tokens 128] [--steps 2]

On each folder's model, and on a random Llama of 110 million parameters, AdamW takes as many plain
steps as private ones, over as many examples of half to all of the tokens. Each is in a process of
its own, so that its peak is its own too; times are of the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hedgerow import console
from hedgerow.data.tokens import Example, learnt_from
from hedgerow.privacy.example_level import GaussianSteps
from hedgerow.privacy.noise import NoiseKey
from hedgerow.settings import TrainingSettings
from hedgerow.training import first_order
from hedgerow.training.job import Job

RANDOM = "110M random"


class Texts:
    """Examples of random tokens."""

    def __init__(self, count: int, tokens: int, vocabulary: int) -> None:
        generator = np.random.default_rng(0)
        self.lengths = generator.integers(tokens // 2, tokens, size=count, endpoint=True)
        self.widths = self.lengths
        self._texts = [
            generator.integers(vocabulary, size=n).astype(np.int32) for n in self.lengths
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        tokens = self._texts[index]
        return Example(tokens, prompt_length=0, learnt=learnt_from(1, len(tokens)))


@dataclass(frozen=True)
class Timed(GaussianSteps):
    """As many examples in each step as a plain one has."""

    def sampled(self, num_examples: int, step: int) -> Iterator[tuple[int, int]]:
        """The next ones."""
        first = step * self.expected
        yield from ((int(index) % num_examples, 0) for index in range(first, first + self.expected))


def main() -> None:
    """Print times, peaks and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options, *options.one.split(":"))))
        return
    rows = []
    for model in [*options.models, RANDOM]:
        for what in ("all weights", "LoRA of rank 16"):
            plain, private = (
                own_process(f"{model}:{what}:{kind}") for kind in ("plain", "private")
            )
            rows.append(
                (
                    *(Path(model).name, what, f"{plain['seconds']:.2f}"),
                    *(f"{private['seconds']:.2f}", f"{private['seconds'] / plain['seconds']:.2f}"),
                    *(f"{plain['peak'] / 1e6:.0f}", f"{private['peak'] / 1e6:.0f}"),
                    f"{private['peak'] / plain['peak']:.2f}",
                )
            )
    console.table(
        f"a step of {options.batch} examples of up to {options.tokens} tokens",
        ["model", "trains", "plain, s", "private, s", "ratio", "plain, MB", "private, MB", "ratio"],
        rows,
    )


def own_process(one: str) -> dict[str, float]:
    """`measured` in a process of its own."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--one", one], stdout=subprocess.PIPE, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(options: Any, model: str, what: str, kind: str) -> dict[str, float]:
    """Seconds of a step, and the peak beside what the process has before it loads a model."""
    torch.set_num_threads(1)
    floor = status("VmRSS")
    network = load(model)
    if what == "all weights":
        parameters = dict(network.named_parameters())
    else:
        wrapped = peft.get_peft_model(network, peft.LoraConfig(r=16, target_modules="all-linear"))
        parameters = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    steps = options.steps + 1
    settings = TrainingSettings(steps=steps, batch_size=options.batch)
    private = Timed(1.0, 1.0, 0.01, options.batch, steps, NoiseKey.of_seed(0))
    job = Job(
        network=network,
        data=Texts(steps * options.batch, options.tokens, network.config.vocab_size),  # type: ignore[arg-type]
        settings=settings,
        learning_rate=1e-4,
        pad_id=0,
        order=np.random.default_rng(0),
        dropout_seed=0,
        private=private if kind == "private" else None,
    )
    marks: list[float] = []

    def mark(_: object) -> None:
        marks.append(time.process_time())

    first_order.train(job, parameters, after_backward=mark)
    return {"seconds": (marks[-1] - marks[0]) / options.steps, "peak": status("VmHWM") - floor}


def load(model: str) -> Any:
    """A model in float32."""
    if model != RANDOM:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        num_hidden_layers=12,
        intermediate_size=2_048,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
