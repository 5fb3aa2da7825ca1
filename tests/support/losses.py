"""The loss of a model on rows, as transformers alone computes it; nothing here knows hedgerow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def own_loss(model: Any, tokenizer: Any, file: Path) -> float:
    """Mean loss of the answers' tokens, of rows in a JSON file, one by one and unpadded."""
    model.eval()
    total, count = 0.0, 0
    for row in json.loads(file.read_text()):
        prompt = tokenizer(row["instruction"] + "\n\n").input_ids
        answer = tokenizer(row["output"], add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.inference_mode():
            scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= scores.gather(1, ids[0, len(prompt) :, None]).sum().item()
        count += ids.shape[1] - len(prompt)
    return total / count
