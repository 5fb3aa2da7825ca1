"""What a network keeps of a text that it has read, and what may be done with it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hedgerow.model import max_positions

_TEXTS = ((0, 1, 2, 1, 0), (2, 0, 0, 1, 1))
"""Two texts for trials: any ids that every vocabulary has."""


@torch.inference_mode()
def keeps_keys_only(network: Any, longest: int) -> bool:
    """Whether the network keeps nothing but the keys and values of tokens, each by itself.

    Args:
        network: a causal language model of transformers.
        longest: number of tokens in the longest text that it is to read and write.

    Then several texts can go on from one prompt, and padding on the left is no part of a text where
    a mask says so. Recurrent and convolutional layers keep a state of the whole text instead, which
    padding would change, and positions that are scaled for long texts change all keys.
    """
    if longest > _unscaled(network):
        return False
    input_ids = torch.tensor([_TEXTS[0][:1]], device=network.device)
    try:
        output = network.base_model(input_ids=input_ids, use_cache=True)
    except Exception:  # of a network whose state cannot be kept at all, as xLSTM's
        return False
    cache: Any = getattr(output, "past_key_values", None)
    kinds = {DynamicLayer, DynamicSlidingWindowLayer}
    return type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= kinds


@torch.inference_mode()
def goes_on_from_state(network: Any) -> bool:
    """Whether generation with what the network keeps agrees with reading the whole text again.

    It is tried on two tokens of two texts: of some recurrent networks the state is lost on the way,
    or mixed among the texts of a batch.
    """
    input_ids = torch.tensor(_TEXTS, device=network.device)
    options = {
        "max_new_tokens": 2,
        "min_new_tokens": 2,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def second_logits(use_cache: bool) -> torch.Tensor:
        config = GenerationConfig(**options, use_cache=use_cache)
        mask = torch.ones_like(input_ids)
        made = network.generate(input_ids, attention_mask=mask, generation_config=config)
        logits: torch.Tensor = made.logits[1].float()
        return logits

    afresh = second_logits(use_cache=False)
    try:
        kept = second_logits(use_cache=True)
    except Exception:  # as above
        return False
    return bool((kept - afresh).abs().max() <= 0.05 * afresh.std())


def _unscaled(network: Any) -> int:
    """Number of positions up to which rotary frequencies do not depend on the longest text."""
    kinds = " ".join(str(getattr(module, "rope_type", "")) for module in network.modules())
    if "dynamic" not in kinds and "longrope" not in kinds:
        return sys.maxsize
    parameters = getattr(network.config.get_text_config(), "rope_parameters", None) or {}
    # They may be given for each kind of layer by itself.
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    known = [one.get("original_max_position_embeddings") for one in each]
    return min([count for count in known if count], default=max_positions(network))
