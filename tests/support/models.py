"""Random models of a few kilobytes, and what one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT = "Say b2\n\n"


def tiny_llama(folder: Path) -> Path:
    """Save a random Llama of two layers that reads bytes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return random_llama(folder, **sizes, num_attention_heads=2, num_key_value_heads=1)


def random_llama(folder: Path, **sizes: int) -> Path:
    """Save a random Llama that reads bytes in a folder; `sizes` are transformers' names."""
    config = LlamaConfig(
        vocab_size=260,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **sizes,
    )
    with torch.random.fork_rng():
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


def logits(model: Any) -> torch.Tensor:
    """What a model that was loaded from a folder says to a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    with torch.inference_mode():
        return model(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits
