"""Random models of a few kilobytes, and what a model comes to, whatever is attached to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hedgerow.loading import bars_in_terminals_only

if TYPE_CHECKING:
    from torch import Tensor

    from hedgerow.model import Model


def tiny_llama(folder: Path) -> Path:
    """Save a random Llama of two layers that reads bytes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return random_llama(folder, **sizes, num_attention_heads=2, num_key_value_heads=1)


def random_llama(folder: Path, **sizes: int) -> Path:
    """Save a random Llama that reads bytes in a folder; `sizes` are transformers' names."""
    config = LlamaConfig(
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **{"vocab_size": 260, "max_position_embeddings": 256, **sizes},
    )
    with torch.random.fork_rng(), bars_in_terminals_only():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def effective_weights(model: Model) -> dict[str, Tensor]:
    """Copies of the weights as which the layers act, adapters and all, by name, in float64.

    Of linear layers without a bias they are found by what the layer makes of unit vectors.
    """
    network = model.network.eval()
    found: dict[str, Tensor] = {}
    tied: set[int] = set()
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if ".lora_" in name or name.endswith(".base_layer") or not isinstance(weight, torch.Tensor):
            continue
        if id(weight) in tied:
            continue
        tied.add(id(weight))
        if weight.ndim == 2 and not isinstance(module, torch.nn.Embedding):
            with torch.no_grad():
                inputs = getattr(module, "in_features", weight.shape[1])
                weight = module(torch.eye(inputs, dtype=network.dtype)).T
        found[name] = weight.detach().double().clone()
    return found
