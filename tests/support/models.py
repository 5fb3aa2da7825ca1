"""Random models of a few kilobytes, and what one says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from hedgerow.testing.models import byte_tokenizer, random_llama, tiny_llama

__all__ = ["DATED", "PROMPT", "THINKS", "byte_tokenizer", "logits", "random_llama", "tiny_llama"]

THINKS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Chat template that writes empty thoughts before an answer."""
DATED = "{{ strftime_now('%d %b %Y') }}\n" + THINKS.replace("<think>\n\n</think>\n\n", "")
"""Chat template that writes the date."""
PROMPT = "Say b2\n\n"


def logits(model: Any) -> torch.Tensor:
    """What a model that was loaded from a folder says to a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    with torch.inference_mode():
        return model(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits
