"""Models that see what they are to predict."""

import json

import torch
from support.models import byte_tokenizer
from transformers import BertConfig, BertLMHeadModel


def test_a_model_that_reads_on_is_an_error_wherever_it_is_given(hedgerow, experiment, tmp_path):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    for name, is_decoder in (("both_ways", False), ("causal", True)):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
            is_decoder=is_decoder,
        )
        BertLMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    path = experiment(model={"path": str(tmp_path / "both_ways")})
    out = tmp_path / "run"
    rows = ["data.prompt=plain", "data.max_length=64", "--data", tmp_path / "test.json"]
    for command in (["run", path, "--out", out], ["evaluate", tmp_path / "both_ways", *rows]):
        result = hedgerow(*command)
        assert (result.code, out.exists()) == (2, False)
        assert "those that follow it" in result.err
    result = hedgerow("evaluate", tmp_path / "causal", *rows, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["eval_loss"] > 0
