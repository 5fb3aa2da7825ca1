"""The shared model: lent to clients and given back as it was."""

import json
import shutil

import peft
import pytest
import sentencepiece
import torch

from hedgerow.adapters import adapter_pairs
from hedgerow.lowrank import Factors
from hedgerow.model import Model
from hedgerow.settings import ModelSettings


@pytest.fixture
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model)))


def test_the_fingerprint_is_of_weights_and_tokenizer_not_of_their_use(model, tiny_model):
    before = model.fingerprint()
    model.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    model.attach(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.release()
    assert model.fingerprint() == before
    assert Model.load(ModelSettings(path=str(tiny_model))).fingerprint() == before
    model.add("model.norm.weight", torch.full((16,), 1e-3))
    assert model.fingerprint() != before


def test_a_tokenizer_of_other_words_has_another_fingerprint(model):
    before = model.fingerprint()
    model.tokenizer.add_tokens(["hedgerow"])
    assert model.fingerprint() != before


def test_a_tokenizer_may_be_of_sentencepiece_alone(tiny_model, tmp_path):
    """As OpenLLaMA's on the Hub, which has no tokenizer.json."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A hedgerow divides fields and joins them again."] * 9),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=40,
        minloglevel=2,
    )
    words = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    tokenizer = Model.load(ModelSettings(path=str(folder))).tokenizer
    tokens = tokenizer("hedgerow fields", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == "hedgerow fields"


def test_a_released_model_is_the_base_again(model):
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    for rank in (2, 4, 2):
        config = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        for parameter in model.attach(config).values():
            parameter.data.fill_(1.0)
        assert model.network.state_dict().keys() != before.keys()
        model.release()
    for parameter in model.unfreeze().values():
        parameter.data.add_(1.0)
    model.release()
    after = model.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_swapped_layers_are_pefts_own(model):
    """The parameters that are attached have the names that peft would save them under."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    ours = model.attach(config).keys()
    model.release()
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(model.network, config)).keys()
    assert ours == theirs


def test_bfloat16_keeps_what_rounding_takes(tiny_model):
    model = Model.load(ModelSettings(path=str(tiny_model), dtype="bfloat16"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.network.get_parameter(name)
    before = weight.float().clone()
    step = torch.full(weight.shape, 1e-5)  # far below the resolution of most weights
    for _ in range(1000):
        model.add(name, step)
    torch.testing.assert_close(weight.float() - before, 1000 * step, rtol=0.1, atol=1e-3)


def test_merging_is_adding_the_product(model):
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    shapes = {m: (p.B.shape[0], p.A.shape[1]) for m, p in adapter_pairs(model.attach(config))}
    model.release()
    for module, (m, n) in shapes.items():
        before = model.network.get_submodule(module).weight.clone()
        factors = Factors(torch.randn(2, n), torch.randn(m, 2))
        model.merge(module, factors)
        after = model.network.get_submodule(module).weight
        torch.testing.assert_close(after - before, factors.product(), rtol=1e-4, atol=1e-5)
