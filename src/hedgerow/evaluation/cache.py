"""What a network keeps of a text that it has read, and what may be done with it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hedgerow.training.loss import unscaled_positions

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
    if longest > unscaled_positions(network):
        return False
    input_ids = torch.tensor([_TEXTS[0][:1]], device=network.device)
    try:
        output = network.base_model(input_ids=input_ids, use_cache=True)
    except Exception:  # of a network whose state cannot be kept at all, as xLSTM's
        return False
    cache: Any = getattr(output, "past_key_values", None)
    kinds = {DynamicLayer, DynamicSlidingWindowLayer}
    plain = type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= kinds
    return plain and _reads_past_padding(network)


def _reads_past_padding(network: Any) -> bool:
    """Whether a text comes to the same behind padding: not where positions count the padding."""
    text = torch.tensor([_TEXTS[0]], device=network.device)

    def logits(padding: int) -> torch.Tensor:
        pad = text.new_zeros(1, padding)
        ids, mask = (torch.cat(pair, 1) for pair in ((pad, text), (pad, torch.ones_like(text))))
        return _last_logits(network, ids, mask, new_tokens=1)

    alone, behind = logits(0), logits(3)
    return not bool((behind - alone).abs().max() > 0.05 * alone.std())


@torch.inference_mode()
def goes_on_from_state(network: Any) -> bool:
    """Whether generation with what the network keeps agrees with reading the whole text again.

    It is tried on two tokens of two texts: of some recurrent networks the state is lost on the way,
    or mixed among the texts of a batch.
    """
    input_ids = torch.tensor(_TEXTS, device=network.device)

    def second_logits(use_cache: bool) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        return _last_logits(network, input_ids, mask, new_tokens=2, use_cache=use_cache)

    afresh = second_logits(use_cache=False)
    try:
        kept = second_logits(use_cache=True)
    except Exception:  # as above
        return False
    return bool((kept - afresh).abs().max() <= 0.05 * afresh.std())


def _last_logits(
    network: Any, input_ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, **options: Any
) -> torch.Tensor:
    """Logits of the last of some new tokens, with nothing of the model's own way of generating."""
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    own, network.generation_config = network.generation_config, config
    try:
        made = network.generate(input_ids, attention_mask=mask, generation_config=config)
    finally:
        network.generation_config = own
    logits: torch.Tensor = made.logits[-1].float()
    return logits
