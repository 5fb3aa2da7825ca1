"""Cross-entropy of a large vocabulary some rows at a time, beside all rows at once.

    OMP_NUM_THREADS=1 python bench/cross_entropy.py [VOCABULARY]

Forward and backward passes of a random bfloat16 Llama of one layer on four texts of 512 tokens that
are all learnt, in turns. The kernel's high-water mark of the process is reset before each, and what
it had before is taken off. Linux only.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from memory import high_water, resident
from transformers import LlamaConfig, LlamaForCausalLM

from hedgerow import allocator, console
from hedgerow.training import loss

TIMES = 3


def main() -> None:
    """Print the ratios of processor time and of memory."""
    vocabulary = int(sys.argv[1]) if len(sys.argv) > 1 else 128_256
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=1,
        num_attention_heads=8,
    )
    network = LlamaForCausalLM(config).bfloat16()
    tokens = torch.randint(0, vocabulary, (4, 513))
    batch = {"input_ids": tokens, "labels": tokens}
    step(network, batch)
    ratios, memory, equal = [], [], True
    for _ in range(TIMES):
        with mock.patch.object(loss, "_AT_ONCE", sys.maxsize):
            whole = step(network, batch)
        parts = step(network, batch)
        ratios.append(parts[0] / whole[0])
        memory.append(parts[1] / whole[1])
        equal = equal and torch.equal(parts[2], whole[2])
    rows = [
        (
            f"{vocabulary:,}",
            f"{median(ratios):.2f}",
            f"{median(memory):.2f}",
            "yes" if equal else "no",
        )
    ]
    header = ["vocabulary", "CPU", "peak memory", "same bits of the gradient"]
    console.table("a step, beside one with all rows at once", header, rows)


def step(
    network: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> tuple[float, int, torch.Tensor]:
    """Processor seconds, most bytes beside those before, and the output layer's gradient."""
    network.zero_grad(set_to_none=True)
    allocator.give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before, began = resident(), time.process_time()
    total, _ = loss.batch_loss(network, batch)
    total.backward()
    seconds, most = time.process_time() - began, high_water() - before
    return seconds, most, network.lm_head.weight.grad.clone()


if __name__ == "__main__":
    main()
