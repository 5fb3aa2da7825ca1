"""Random models of a few kilobytes, and what one says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from hedgerow.testing.models import byte_tokenizer, random_llama, tiny_llama

__all__ = ["PROMPT", "byte_tokenizer", "logits", "random_llama", "tiny_llama"]

PROMPT = "Say b2\n\n"


def logits(model: Any) -> torch.Tensor:
    """What a model that was loaded from a folder says to a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    with torch.inference_mode():
        return model(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits
