"""A step whose output layer sees the tokens that are learnt, beside one that sees their columns.

    OMP_NUM_THREADS=1 python bench/logits.py [VOCABULARY]

A random Llama of 8 layers of 512 and batches of four texts of 40 to 128 tokens, of which the second
half is learnt; forward and backward, in turns. The difference of gradients is beside their length.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgerow import console
from hedgerow.training import loss

TIMES = 3


@contextmanager
def all_columns(*arguments: Any) -> Iterator[list[bool]]:
    """Logits at all positions where some text of the batch is learnt."""
    yield []


def main() -> None:
    """Print the ratio of processor time, and how far gradients are apart."""
    vocabulary = int(sys.argv[1]) if len(sys.argv) > 1 else 32_000
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    network = LlamaForCausalLM(config)
    ratios, apart = [], []
    for _ in range(TIMES):
        for batch in batches(vocabulary):
            ours, gradient = step(network, batch)
            with mock.patch.object(loss, "_only_at", all_columns):
                theirs, other = step(network, batch)
            ratios.append(ours / theirs)
            apart.append(float((gradient - other).norm() / other.norm()))
    rows = [(f"{vocabulary:,}", f"{median(ratios):.2f}", f"{max(apart):.0e}")]
    console.table("a step, beside one with all columns", ["vocabulary", "CPU", "apart"], rows)


def batches(vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """Six batches of four texts."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(6):
        lengths = torch.randint(40, 129, (4,), generator=draws).tolist()
        input_ids = torch.zeros(4, max(lengths), dtype=torch.long)
        labels = torch.full_like(input_ids, -100)
        for row, length in enumerate(lengths):
            text = torch.randint(1, vocabulary, (length,), generator=draws)
            input_ids[row, :length] = text
            labels[row, length // 2 : length] = text[length // 2 :]
        yield {"input_ids": input_ids, "labels": labels}


def step(network: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Processor seconds of a step, and its gradient."""
    network.zero_grad()
    began = time.process_time()
    total, _ = loss.batch_loss(network, batch)
    total.backward()  # type: ignore[no-untyped-call]
    took = time.process_time() - began
    return took, torch.cat([p.grad.flatten() for p in network.parameters()])


if __name__ == "__main__":
    main()
