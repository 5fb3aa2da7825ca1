"""Bases in 4 and 8 bits: what is learnt stays beside their weights, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from support.models import byte_tokenizer
from support.runs import ledger_bytes, rows_of
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from hedgerow import quantized
from hedgerow.api import open_run
from hedgerow.ledger import Base
from hedgerow.lowrank import Factors
from hedgerow.model import Model
from hedgerow.quantized import SumBeside
from hedgerow.settings import ModelSettings
from hedgerow.testing.models import effective_weights, random_llama

KINDS = ["nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random Llama whose linear layers have some blocks of 64 weights each."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("model") / "small"
    return random_llama(folder, **sizes, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """One whose rows are whole blocks, which bitsandbytes' own layers get right on every CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("model") / "wide"
    return random_llama(folder, **sizes, num_attention_heads=2, num_key_value_heads=1)


def loaded(folder: Path, **options) -> Model:
    return Model.load(ModelSettings(path=str(folder), device="cpu", **options))


def by_others(folder: Path):
    """The network in nf4, as transformers loads it."""
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    network = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=own, device_map={"": "cpu"}
    )
    for _, layer in quantized.layers(network):
        layer.support_avx512bf16_for_cpu = False  # or some CPUs would round what they compute with
    return network


def written(path: Path, **sections) -> Path:
    """The experiment file with whole sections in place of its own."""
    content = yaml.safe_load(path.read_text()) | sections
    path.write_text(yaml.safe_dump(content))
    return path


# --- the layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_and_nothing_else(small, kind):
    model = loaded(small, quantization=kind)
    assert model.quantization == kind
    whole = AutoModelForCausalLM.from_pretrained(small)
    tokens = torch.tensor([[0, 5, 9, 77, 130]])
    by_name = dict(quantized.layers(model.network))
    assert len(by_name) == 2 * 7
    for name, layer in by_name.items():
        weight = quantized.dequantized(layer)
        plain = whole.get_submodule(name).weight
        # 13 % is what fp4 takes from normal numbers.
        assert 0 < (weight - plain).norm() < 0.15 * plain.norm()
        plain.data.copy_(weight)
    with torch.no_grad():
        rounded = whole(tokens).logits
        torch.testing.assert_close(model.network(tokens).logits, rounded, rtol=0, atol=1e-5)
    assert quantized.nbytes(model.network) < quantized.nbytes(whole)


def test_what_is_not_quantized_leaves_the_file(small):
    """Or all of the file would stay in memory, since it was read to be quantized."""
    model = loaded(small, quantization="nf4")
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("only Linux says what is mapped")
    assert str(small) not in maps.read_text()
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_as_through_the_rounded_weights(small, kind):
    layer = next(iter(dict(quantized.layers(loaded(small, quantization=kind).network)).values()))
    inputs = torch.randn(2, 3, layer.in_features, requires_grad=True)
    layer(inputs).square().sum().backward()
    again = inputs.detach().clone().requires_grad_()
    torch.nn.functional.linear(again, quantized.dequantized(layer)).square().sum().backward()
    torch.testing.assert_close(inputs.grad, again.grad, rtol=1e-4, atol=1e-5)


def random_pair(generator: torch.Generator, m: int, n: int, rank: int) -> Factors:
    draw = [torch.randn(shape, generator=generator) for shape in ((rank, n), (m, rank))]
    return Factors(*draw)


class _Layer(torch.nn.Linear):
    pass


@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=30)
def test_a_sum_is_exact_whatever_its_rank(seed, ranks):
    generator = torch.Generator().manual_seed(seed)
    layer = _Layer(7, 5, bias=False)
    beside = SumBeside(layer, None)
    exact = layer.weight.detach().double()
    for rank in ranks:
        pair = random_pair(generator, 5, 7, rank)
        beside.add(pair)
        exact = exact + pair.double().product()
        assert beside.factors.rank <= 5 or len(ranks) == 1
    found = layer(torch.eye(7)).detach().T.double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    assert beside.lost == 0
    beside.remove()
    assert torch.equal(layer(torch.eye(7)).T, layer.weight)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=30)
def test_the_error_of_a_bounded_sum_is_known(seed, ranks):
    generator = torch.Generator().manual_seed(seed)
    beside = SumBeside(_Layer(7, 6, bias=False), 3)
    exact = torch.zeros(6, 7, dtype=torch.float64)
    for rank in ranks:
        pair = random_pair(generator, 6, 7, rank)
        beside.add(pair)
        exact += pair.double().product()
        assert beside.factors.rank <= 3
        error = float((beside.factors.double().product() - exact).norm())
        assert error <= beside.lost + 1e-5
    if sum(ranks) <= 3:
        assert beside.lost == 0
    if len(ranks) > 1 and sum(ranks[:2]) > 3 and max(ranks) <= 3:
        assert beside.lost > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_counts_and_is_gone_after_a_reset(small, kind):
    model = loaded(small, quantization=kind)
    state, before, fingerprint = model.state(), effective_weights(model), model.fingerprint()
    pair = random_pair(torch.Generator().manual_seed(0), 48, 32, 3)
    name = "model.layers.1.mlp.up_proj"
    for _ in range(2):
        model.merge(name, pair)
    after = effective_weights(model)
    expected = before[name] + 2 * pair.double().product()
    torch.testing.assert_close(after.pop(name), expected, rtol=0, atol=1e-4)
    assert all(torch.equal(weight, before[other]) for other, weight in after.items())
    assert model.fingerprint() == fingerprint
    [(changed, change)] = [each for each in model.changes(state) if each[1].any()]
    assert changed == f"{name}.weight"
    torch.testing.assert_close(change, 2 * pair.product())
    model.reset(state)
    assert all(torch.equal(w, before[n]) for n, w in effective_weights(model).items())


def test_singular_vectors_are_those_of_all_that_a_layer_computes_with(small):
    model = loaded(small, quantization="nf4")
    name = "model.layers.0.mlp.down_proj"
    model.merge(name, random_pair(torch.Generator().manual_seed(0), 32, 48, 2))
    weight = effective_weights(model)[name]
    _, values, right = torch.linalg.svd(weight)
    found = model.singular_vectors(name, 2)
    torch.testing.assert_close(
        (found.A.double() @ right[:2].T).abs().diagonal(), torch.ones(2).double()
    )
    assert values[1] > values[2]


def test_gpt_2_s_layers_are_turned_and_turned_back(tmp_path):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = loaded(tmp_path, quantization="nf4")
    assert model.adapted_shapes(["c_attn"]) == {"transformer.h.0.attn.c_attn": (96, 32)}
    model.merge(
        "transformer.h.0.attn.c_attn", random_pair(torch.Generator().manual_seed(0), 96, 32, 2)
    )
    tokens = torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        before = model.network(tokens).logits
        model.make_float()
        torch.testing.assert_close(model.network(tokens).logits, before, rtol=0, atol=1e-5)
    assert type(model.network.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


# --- runs -----------------------------------------------------------------------------------------

METHODS = [
    {"name": "flora", "ranks": [4, 2, 1]},
    {"name": "flora", "ranks": [4, 2, 1], "restart": "zero"},
    {"name": "fedit", "ranks": 2},
    {"name": "fed_sb", "ranks": 2},
    {"name": "flora_adalora", "ranks": [3, 2, 1]},
    {"name": "flexlora", "ranks": [4, 2, 1]},
    {"name": "ferret", "over": "lora", "ranks": 2},
    {"name": "standalone", "ranks": 2},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
def test_a_run_learns_resumes_and_exports_what_it_evaluated(
    method, small, experiment, hedgerow, tmp_path
):
    path = written(experiment(model={"path": str(small), "quantization": "nf4"}), method=method)
    for name, *overrides in (["whole"], ["part", "federation.rounds=1"]):
        result = hedgerow("run", path, *overrides, "--out", tmp_path / name)
        assert result.code == 0, result.err
    result = hedgerow("run", path, "--out", tmp_path / "part", "--resume")
    assert result.code == 0, result.err
    whole, rows = tmp_path / "whole", rows_of(tmp_path / "whole")
    assert ledger_bytes(tmp_path / "part") == ledger_bytes(whole)
    assert rows_of(tmp_path / "part")[-1]["eval_loss"] == rows[-1]["eval_loss"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    own = [] if method["name"] != "standalone" else ["--client", "client-002"]
    result = hedgerow("export", whole, "--to", "merged", tmp_path / "merged", *own)
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "quantized to nf4 by bitsandbytes when it was loaded, and here dequantized" in card
    result = hedgerow("evaluate", tmp_path / "merged", f"data.test={tmp_path / 'test.json'}",
                      "data.prompt=plain", "data.max_length=64", "--json")  # fmt: skip
    assert result.code == 0, result.err
    scored = rows[-1]["by_client"]["client-002"] if own else rows[-1]
    assert json.loads(result.out)["eval_loss"] == pytest.approx(scored["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_other_kinds_export_what_they_evaluated_too(kind, small, experiment, hedgerow, tmp_path):
    path = experiment(model={"path": str(small), "quantization": kind, "dtype": "float32"})
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "run")
    assert hedgerow("export", tmp_path / "run", "--to", "merged", tmp_path / "merged").code == 0
    result = hedgerow("evaluate", tmp_path / "merged", f"data.test={tmp_path / 'test.json'}",
                      "data.prompt=plain", "data.max_length=64", "--json")  # fmt: skip
    assert json.loads(result.out)["eval_loss"] == pytest.approx(rows[-1]["eval_loss"], abs=1e-4)


def test_an_adapter_gives_the_same_on_the_base_quantized_by_others(
    wide, experiment, hedgerow, tmp_path
):
    path = experiment(model={"path": str(wide), "quantization": "nf4"})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    assert hedgerow("export", tmp_path / "run", "--to", "adapter", tmp_path / "adapter").code == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "quantized to nf4 by bitsandbytes when it was loaded, as it has to be" in card
    adapted = PeftModel.from_pretrained(by_others(wide), tmp_path / "adapter").eval()
    tokens = torch.tensor([[0, 5, 9, 77, 130]])
    with torch.no_grad():
        merged = open_run(tmp_path / "run").model()(tokens).logits
        torch.testing.assert_close(adapted(tokens).logits, merged, rtol=0, atol=1e-4)


def test_a_bounded_sum_says_its_error_and_decides_the_run(wide, experiment, hedgerow, tmp_path):
    model = {"path": str(wide), "quantization": "nf4", "merged_rank": 5}
    path = experiment(model=model, federation={"rounds": 3})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    errors = [row["merged_error"] for row in rows_of(tmp_path / "run")]
    assert errors[0] == 0 < errors[-1] < 1
    assert hedgerow("export", tmp_path / "run", "--to", "adapter", tmp_path / "adapter").code == 0
    adapted = PeftModel.from_pretrained(by_others(wide), tmp_path / "adapter").eval()
    tokens = torch.tensor([[0, 5, 9, 77, 130]])
    with torch.no_grad():
        merged = open_run(tmp_path / "run").model()(tokens).logits
        torch.testing.assert_close(adapted(tokens).logits, merged, rtol=0, atol=1e-4)
    more = ["federation.rounds=4", "model.merged_rank=6"]
    result = hedgerow("run", path, *more, "--out", tmp_path / "run", "--resume")
    assert result.code == 2
    assert "model.merged_rank" in result.err


def test_bfloat16_computes_beside_adapters_in_float32(small, experiment, hedgerow, tmp_path):
    model = loaded(small, quantization="nf4", dtype="bfloat16")
    assert model.network.dtype == torch.bfloat16
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    assert {p.dtype for p in model.attach(config).values()} == {torch.float32}
    layer = model.network.model.layers[0].self_attn.q_proj
    assert layer.base_layer.compute_dtype == torch.bfloat16
    model.release()
    path = experiment(model={"path": str(small), "quantization": "nf4", "dtype": "bfloat16"})
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_a_comparison_s_runs_begin_with_the_base_alone(small, experiment, hedgerow, tmp_path):
    """One model is lent to all of them, and given back."""
    path = experiment(model={"path": str(small), "quantization": "int8"})
    result = hedgerow("compare", path, "--methods", "flora,fedit ranks=2", "--out", tmp_path / "c")
    assert result.code == 0, result.err
    first = [rows_of(run)[0]["eval_loss"] for run in (tmp_path / "c").rglob("metrics.jsonl")
             for run in [run.parent]]  # fmt: skip
    assert len(first) == 2
    assert len(set(first)) == 1


def test_a_checkpoint_that_is_quantized_already_is_a_base(small, experiment, hedgerow, tmp_path):
    by_others(small).save_pretrained(tmp_path / "four")
    byte_tokenizer().save_pretrained(tmp_path / "four")
    path = experiment(model={"path": str(tmp_path / "four")})
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert Base.of(loaded(tmp_path / "four")).quantization == "nf4"
    result = hedgerow("run", path, "method=fedavg", "--out", tmp_path / "all")
    assert (result.code, (tmp_path / "all").exists()) == (2, False)
    assert "model.path" in result.err
    assert "fedavg with these options changes all weights" in result.err


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "ferret", "fedkseed", "diloco"])
def test_methods_of_all_weights_are_refused_as_the_file_is_read(
    method, small, experiment, hedgerow, tmp_path
):
    path = experiment(model={"path": str(small), "quantization": "nf4"})
    result = hedgerow("run", path, f"method={method}", "--out", tmp_path / "run")
    assert (result.code, (tmp_path / "run").exists()) == (2, False)
    assert f"model.quantization: {method} with these options changes all weights" in result.err
    assert "flora" in result.err


def test_another_kind_of_the_base_is_another_base(small, experiment, hedgerow, tmp_path):
    path = experiment(model={"path": str(small), "quantization": "nf4"})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    more = ["federation.rounds=3", "model.quantization=fp4"]
    result = hedgerow("run", path, *more, "--out", tmp_path / "run", "--resume")
    assert result.code == 2
    assert "its quantization is fp4, the ledger's base small has nf4" in result.err


def test_without_bitsandbytes_there_is_a_sentence(experiment, hedgerow, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = experiment(model={"quantization": "nf4"})
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert (result.code, (tmp_path / "run").exists()) == (2, False)
    assert "pip install 'hedgerow[quantized]'" in result.err


def test_a_bound_without_anything_to_bound_is_refused(experiment, hedgerow, tmp_path):
    result = hedgerow("run", experiment(model={"merged_rank": 4}), "--out", tmp_path / "run")
    assert result.code == 2
    assert "merged_rank" in result.err
