"""Exports in the hands of others: older versions of transformers and peft, and simple readers.

Each version is installed beside what is here, into a folder of pytest's cache, where the next run
finds it; torch is the one that is here. Readers are processes of their own, without hedgerow.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import safetensors.numpy
import torch
import transformers
from safetensors import safe_open
from support.models import byte_tokenizer

import hedgerow as hr
from hedgerow import pretrained
from hedgerow.model import Model

pytestmark = pytest.mark.slow

TRANSFORMERS = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
PEFT = ("peft==0.10.0", "peft==0.13.2", "peft==0.14.0")
SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROWS = [
    {"instruction": f"Say {letter}{i}, and some more of it", "output": f"{letter * 3}{i}"}
    for i in range(4)
    for letter in "ab"
]
CLIENTS = {"north": ROWS[:3], "south": ROWS[3:]}


class Kind(NamedTuple):
    """A kind of base model, and of how its folder is written."""

    name: str
    """transformers' prefix of its classes."""
    config: dict[str, Any]
    """What is not as in SMALL."""
    rewrite: Callable[[dict[str, Any]], None] = lambda config: None
    """Changes config.json, as which somebody else has written it."""
    targets: str | list[str] = "all-linear"


def rope(theta: float = 500_000.0, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def old_spelling(config: dict[str, Any]) -> None:
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.0"


FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {
    "llama of version 4": Kind("Llama", rope(), old_spelling),
    "llama of version 5": Kind("Llama", rope()),
    "llama 3": Kind(
        "Llama", rope(kind="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED)
    ),
    "llama, linear": Kind("Llama", rope(kind="linear", factor=4.0)),
    "llama, output layer": Kind("Llama", rope(), targets=["q_proj", "down_proj", "lm_head"]),
    "llama, tied": Kind("Llama", {**rope(), "tie_word_embeddings": True}),
    "qwen2, yarn": Kind("Qwen2", rope(kind="yarn", **SCALED)),
    "mistral": Kind("Mistral", {**rope(), "sliding_window": 16}),
    "gemma2": Kind("Gemma2", {**rope(), "head_dim": 8, "sliding_window": 16}),
    "gemma3": Kind(
        "Gemma3Text",
        {
            **{"head_dim": 8, "sliding_window": 16},
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0},
            },
        },
    ),
    "gpt_neox": Kind("GPTNeoX", rope(partial_rotary_factor=0.5)),
    "gpt2": Kind("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "phi": Kind("Phi", rope(partial_rotary_factor=0.5)),
    "phi3, fused, long": Kind(
        "Phi3",
        {
            **rope(kind="longrope", original_max_position_embeddings=16, **FACTORS),
            "original_max_position_embeddings": 16,
        },
    ),
    "mixtral": Kind(
        "Mixtral", {**rope(), "num_local_experts": 4}, targets=["q_proj", "k_proj", "v_proj"]
    ),
    "qwen3 moe": Kind(
        "Qwen3Moe",
        {
            **rope(),
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        targets=["q_proj", "k_proj", "v_proj"],
    ),
}


class Exported(NamedTuple):
    """A run's exports, and the loss that it has itself."""

    base: Path
    merged: Path
    adapter: Path
    loss: float


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """A run and its exports for each kind of base."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for kind in KINDS:
        place = folder / kind  # with a space, and a comma
        base = save_base(KINDS[kind], place / "base")
        run = hr.run(
            model={"path": str(base)},
            clients=CLIENTS,
            test=ROWS,
            data={"prompt": "plain", "max_length": 96},
            method=hr.methods.FLoRA(ranks=[4, 16], targets=KINDS[kind].targets),
            training={"steps": 4, "batch_size": 4, "learning_rate": 0.01},
            rounds=2,
            out=place / "run",
        )
        loss = run.evaluate()["eval_loss"]
        merged = run.export_merged(place / "merged")
        made[kind] = Exported(base, merged, run.export_adapter(place / "adapter"), loss)
        # Version 4 would read some of the bases themselves as other models.
        shutil.copyfile(merged / "config.json", base / "config.json")
    return made


def save_base(kind: Kind, folder: Path) -> Path:
    small = {} if kind.name == "GPT2" else SMALL
    config = getattr(transformers, f"{kind.name}Config")(
        **{"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, **small, **kind.config}
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # or attention would hardly matter
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    kind.rewrite(content)
    file.write_text(json.dumps(content))
    return folder


READER = """
import json, os, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

rows, folders = json.load(sys.stdin)

def loss(model, tokenizer):
    model.eval()
    total = count = 0
    for row in rows:
        prompt = tokenizer(row["instruction"] + "\\n\\n").input_ids
        answer = tokenizer(row["output"], add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        with torch.inference_mode():
            scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= scores.gather(1, ids[0, len(prompt) :, None]).sum().item()
        count += ids.shape[1] - len(prompt)
    return total / count

found = {}
for kind, (merged, adapter) in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(merged)
    found[kind] = [
        loss(AutoModelForCausalLM.from_pretrained(merged), tokenizer),
        loss(AutoPeftModelForCausalLM.from_pretrained(adapter), tokenizer),
    ]
assert "hedgerow" not in sys.modules
import peft, transformers
print(json.dumps([transformers.__version__, peft.__version__, found]))
"""


@pytest.mark.parametrize("peft", [None, *PEFT], ids=lambda peft: peft or "those that are here")
def test_versions_of_transformers_and_peft_read_the_model_that_was_evaluated(
    exports, peft, request, tmp_path
):
    packages = [*TRANSFORMERS, peft] if peft else []
    path = [str(installed(package, request.config)) for package in packages]
    folders = {kind: [str(made.merged), str(made.adapter)] for kind, made in exports.items()}
    result = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([ROWS, folders]),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,  # bases are found from anywhere
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    *versions, found = json.loads(result.stdout.splitlines()[-1])
    if peft:
        assert versions == [TRANSFORMERS[0].partition("==")[2], peft.partition("==")[2]]
    expected = {kind: pytest.approx([made.loss] * 2, abs=1e-5) for kind, made in exports.items()}
    assert found == expected


@pytest.mark.parametrize("divisor", ["the rank of each tensor", "the rank in the file"])
@pytest.mark.parametrize("kind", ["llama of version 4", "gpt2", "phi3, fused, long"])
def test_a_reader_that_knows_one_rank_and_alpha_computes_the_same_model(exports, kind, divisor):
    """As llama.cpp, which divides by a tensor's own rank, and vLLM, which knows one for all."""
    made = exports[kind]
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    factors = safetensors.numpy.load_file(made.adapter / "adapter_model.safetensors")
    weights = safetensors.numpy.load_file(made.base / "model.safetensors")
    expected = safetensors.numpy.load_file(made.merged / "model.safetensors")
    assert weights.keys() == expected.keys()
    adapted = set()
    for name, weight in weights.items():
        A = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if A is not None:
            B = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            rank = len(A) if divisor.endswith("tensor") else config["r"]
            product = config["lora_alpha"] / rank * (B.astype("f8") @ A.astype("f8"))
            weight = weight + (product.T if kind == "gpt2" else product)
            adapted.add(name.removesuffix(".weight"))
        numpy.testing.assert_allclose(weight, expected[name], rtol=0, atol=1e-6)
    assert adapted == set(config["target_modules"])


def test_weights_have_the_names_that_they_have_in_the_base(exports):
    for made in exports.values():
        keys = []
        for folder in (made.base, made.merged):
            with safe_open(folder / "model.safetensors", "numpy") as file:
                keys.append(sorted(file.keys()))
        assert keys[0] == keys[1]


TOKENS = """
import json, sys
from transformers import AutoTokenizer
for folder in sys.argv[2:]:
    print(json.dumps(AutoTokenizer.from_pretrained(folder)(sys.argv[1]).input_ids))
"""


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Cohere", "CodeLlama", "GPT2", "Qwen2"])
def test_a_tokenizer_of_version_5_makes_the_same_tokens_in_version_4(
    kind, request, tmp_path, tiny_model
):
    """Where version 4's class of this name adds <s>, or a space, by itself."""
    vocab = ["<unk>", "<s>", "</s>", "<x>", "▁", "Ġ", *map(chr, range(33, 127))]
    made = getattr(transformers, f"{kind}Tokenizer")(
        vocab={token: index for index, token in enumerate(vocab)},
        merges=[],
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    )
    made.add_special_tokens({"extra_special_tokens": ["<x>"]})
    text = " Hello,  a<x>b</s> c"
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tmp_path / "merged"
    folder.mkdir()
    pretrained.save(Model(network, made, "base"), folder)
    path = [str(installed(package, request.config)) for package in TRANSFORMERS]
    result = subprocess.run(
        [sys.executable, "-c", TOKENS, text, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout) == made(text).input_ids
    assert (
        transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids == made(text).input_ids
    )


ENDS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.generate(torch.tensor([[5, 6]]), max_new_tokens=1)
print(json.dumps(model.generation_config.eos_token_id))
"""


def test_generate_of_version_4_stops_where_answers_end(request, tmp_path, tiny_model):
    """Also where config.json has settings of generation, from which they are derived anew."""
    base, folder = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(tiny_model, base)
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7}))
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "a"})
    folder.mkdir()
    pretrained.save(Model(network, tokenizer, "base"), folder)
    path = [str(installed(package, request.config)) for package in TRANSFORMERS]
    for places in (path, []):
        result = subprocess.run(
            [sys.executable, "-c", ENDS, folder],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads(result.stdout) == [1, tokenizer.eos_token_id]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_reads_what_was_exported(exports):
    made = exports["llama of version 4"]
    with reachable(made.merged):
        for folder in (made.merged, made.adapter):
            for file in folder.iterdir():
                result = subprocess.run(["cat", file], user=65534, group=65534, capture_output=True)
                assert result.stdout == file.read_bytes(), result.stderr


# --- details ------------------------------------------------------------------------------------


def installed(package: str, config: pytest.Config) -> Path:
    """The folder of a package alone, without what it needs; skips where it is not to be had."""
    version = platform.python_version()
    folder = config.cache.mkdir("consumers") / f"{package}-py{version}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", partial]
        result = subprocess.run([*command, package], capture_output=True, text=True)
        if result.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"{package} cannot be installed: {result.stderr.strip()[-200:]}")
        partial.rename(folder)
    return folder


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    """Let everybody pass through pytest's folders, which are for their owner alone."""
    modes = {folder: folder.stat().st_mode for folder in path.parents}
    closed = {folder: mode for folder, mode in modes.items() if not mode & 0o001}
    for folder, mode in closed.items():
        folder.chmod(mode | 0o011)
    try:
        yield
    finally:
        for folder, mode in closed.items():
            folder.chmod(mode)
