"""AdamW with averages in 8 bits, which go to the host's memory where the GPU's is full.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3, as
bitsandbytes has it (NVIDIA's unified memory).
"""

from __future__ import annotations

from typing import ClassVar

from hedgerow.training.optimizers.adamw_8bit import AdamW8bit


class PagedAdamW8bit(AdamW8bit):
    """bitsandbytes' PagedAdamW8bit, which needs a GPU."""

    name: str = "paged_adamw_8bit"

    is_paged: ClassVar[bool] = True
