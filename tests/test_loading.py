"""Folders of models that somebody has tampered with: one sentence names the file, and the key."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForCausalLM

from hedgerow import bounded
from hedgerow.bounded.process import Process
from hedgerow.errors import UserError
from hedgerow.loading import load_tokenizer
from hedgerow.model import Model
from hedgerow.settings import ModelSettings
from hedgerow.targets import find


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def adapter(folder, tmp_path):
    """A folder of an adapter of the model in the other."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(network, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def short(monkeypatch):
    """Let expressions take a second at most."""
    monkeypatch.setattr(bounded, "_process", Process(seconds=1))


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder):
    with pytest.raises(UserError) as caught:
        Model.load(ModelSettings(path=str(folder), device="cpu"))
    sentence = str(caught.value)
    assert sentence.startswith(f"model.path: {folder}")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "16"}, "`hidden_size` is of a wrong kind (expected int, got str"),
        ({"vocab_size": None}, "`vocab_size` is of a wrong kind (expected int, got NoneType"),
        ({"num_hidden_layers": [2]}, "`num_hidden_layers` is of a wrong kind (expected int, got l"),
        ({"rms_norm_eps": {}}, "`rms_norm_eps` is of a wrong kind (expected float, got dict"),
        ({"eos_token_id": "1"}, "`eos_token_id` is of a wrong kind (with value '1'"),
        ({"num_attention_heads": 0}, "transformers does not read (integer modulo by zero)"),
        ({"num_hidden_layers": 10**12}, "`num_hidden_layers` is 1,000,000,000,000, where at most"),
        ({"text_config": {"n_routed_experts": 10**9}}, "`n_routed_experts` is 1,000,000,000"),
        ({"hidden_size": 2 * 10**6}, "asks for 1,"),
        ({"vocab_size": 10**9}, "parameters, where its weights are"),
    ],
)
def test_a_config_that_describes_no_model(folder, changes, said):
    change(folder / "config.json", **changes)
    sentence = refusal(folder)
    assert "config.json" in sentence
    assert said in sentence


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[]", b"5", b"null", b'{"a": "\xff"}'])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"],
)
def test_a_file_that_is_no_json_object(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "adapter_config.json"]
)
def test_a_file_that_is_nested_too_deeply(folder, adapter, name):
    path = adapter if name.startswith("adapter") else folder
    (path / name).write_text("[" * 100_000)
    assert f"{name} is not JSON" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"pre_tokenizer": 5},
        {"added_tokens": [{}]},
        {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    ],
)
def test_a_tokenizer_that_tokenizers_does_not_read(folder, changes):
    change(folder / "tokenizer.json", **changes)
    assert f"{folder / 'tokenizer.json'} is not read by tokenizers (" in refusal(folder)
    with pytest.raises(UserError, match="is not read by tokenizers"):
        load_tokenizer(ModelSettings(path=str(folder)))


class Evil:
    """What somebody has pickled: it leaves a file where it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_pickles_are_not_read_wherever_they_are(folder, adapter, tmp_path):
    read = tmp_path / "read"
    content = pickle.dumps({"model.norm.weight": Evil(read)})
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    assert "has no adapter_model.safetensors: save the adapter in that" in refusal(adapter)
    (folder / "pytorch_model.bin").write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}})
    )
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin is not read" in refusal(folder)
    index.unlink()
    assert "pytorch_model.bin is not read" in refusal(folder)
    assert not read.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": r"(\w+\.?)+!"}, "`target_modules` that takes more than 1 seconds"),
        ({"target_modules": r"(\w+"}, "`target_modules` that is none (missing )"),
        ({"exclude_modules": r"(\w+\.?)+!"}, "`exclude_modules` that takes more than 1 seconds"),
        ({"modules_to_save": [r"(\w+\.?)+!"]}, "`modules_to_save` that takes more than 1"),
        ({"rank_pattern": {r"(\w+\.?)+!": 3}}, "`rank_pattern` that takes more than 1 seconds"),
        ({"alpha_pattern": {r"(\w+": 3}}, "`alpha_pattern` that is none (missing )"),
        (
            {"layers_pattern": [r"(\w+\.?)+!"], "layers_to_transform": [0]},
            "`layers_pattern` that takes more than 1 seconds",
        ),
        ({"r": 10**9}, "has a rank of 1,000,000,000 in `r`, where its weights have at most 16"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has a rank of 1,000,000,000 in `rank_pattern`"),
        ({"base_model_name_or_path": 5}, "`base_model_name_or_path: 5`, which is no text"),
        ({"revision": ["main"]}, "`revision: ['main']`, which is no text"),
        ({"peft_type": ["LORA"]}, "which peft"),
    ],
)
def test_an_adapters_values_are_bounded(adapter, short, changes, said):
    change(adapter / "adapter_config.json", **changes)
    sentence = refusal(adapter)
    assert "adapter_config.json" in sentence
    assert said in sentence


def test_an_adapters_expressions_are_pefts(adapter):
    change(adapter / "adapter_config.json", target_modules=r".*\.(q|x)_proj")
    Model.load(ModelSettings(path=str(adapter), device="cpu"))


def test_targets_that_take_too_long_are_refused(tiny_model, short):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"^method\.targets: .* takes more than 1 seconds of comp"):
        find(network, r"(\w+\.?)+!")
    assert len(find(network, r".*\.[qv]_proj").modules) == 4
