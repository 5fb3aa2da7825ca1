"""Exports load in the tools that people have, and are what was evaluated."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from support.models import logits
from support.runs import rows_of
from transformers import AutoModelForCausalLM


def run_and_export(hedgerow, experiment, tmp_path, *changes, exports=(("merged",), ("adapter",))):
    run = tmp_path / "run"
    path = experiment(training={"steps": 8})
    result = hedgerow("run", path, *changes, "--out", run)
    assert result.code == 0, result.err
    for to, *options in exports:
        result = hedgerow("export", run, tmp_path / to, "--to", to, *options)
        assert result.code == 0, result.err
    return run


@pytest.mark.parametrize(
    "changes",
    [
        ["method.alpha=5"],
        ["method.name=fedit", "method.ranks=3"],
        ["method.name=zero_padding"],
        ["method.name=centralized", "method.ranks=2"],
        ["model.dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_adapter_and_merged_weights_are_one_model(
    hedgerow, experiment, tmp_path, tiny_model, changes
):
    run_and_export(hedgerow, experiment, tmp_path, *changes)
    dtype = torch.bfloat16 if "model.dtype=bfloat16" in changes else torch.float32
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(adapted, merged, rtol=0, atol=tolerance)
    assert (merged - before).abs().max() > 1e-3


def test_what_is_exported_is_what_was_evaluated_without_hedgerow(
    hedgerow, experiment, tmp_path, tiny_model
):
    """Another process, which never imports hedgerow, computes the loss of the last row."""
    run = run_and_export(hedgerow, experiment, tmp_path)
    script = f"""
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
rows = json.load(open({str(tmp_path / "test.json")!r}))
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r})
base = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})
for model in (
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}),
    PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}),
):
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
    print(total / count)
assert "hedgerow" not in sys.modules
"""
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    merged, adapter = map(float, output.split())
    assert merged == pytest.approx(rows_of(run)[-1]["eval_loss"], abs=1e-4)
    assert adapter == pytest.approx(rows_of(run)[-1]["eval_loss"], abs=1e-4)


def test_an_adapters_rank_is_the_sum_of_what_was_stacked_or_what_is_asked(
    hedgerow, experiment, tmp_path
):
    run = run_and_export(hedgerow, experiment, tmp_path, exports=[("adapter",)])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 * (4 + 2 + 1)
    out = tmp_path / "rank"
    result = hedgerow("export", run, out, "--to", "adapter", "--rank", 3)
    assert "rank 3 (vLLM: --max-lora-rank 16)" in result.out
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    # All of a full-rank stack's energy is in as many directions as the matrix has.
    out = tmp_path / "energy"
    assert hedgerow("export", run, out, "--to", "adapter", "--energy", 0.9).code == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] < 14


def test_energy_one_is_the_same_model(hedgerow, experiment, tmp_path, tiny_model):
    run_and_export(
        hedgerow, experiment, tmp_path, exports=[("merged",), ("adapter", "--energy", "1")]
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)


def test_evaluate_agrees_with_the_run_on_every_form(hedgerow, experiment, tmp_path):
    run = run_and_export(
        hedgerow, experiment, tmp_path, exports=[("merged",), ("adapter",), ("ledger",)]
    )
    expected = rows_of(run)[-1]["eval_loss"]
    data = ["--data", tmp_path / "test.json", "data.prompt=plain"]
    for target in (run, tmp_path / "ledger", tmp_path / "merged", tmp_path / "adapter"):
        result = hedgerow("evaluate", target, *data, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["eval_loss"] == pytest.approx(expected, abs=1e-5)
    first = json.loads(hedgerow("evaluate", run, "--round", 0, "--json").out)
    assert first["eval_loss"] == pytest.approx(rows_of(run)[0]["eval_loss"], abs=1e-6)
    assert "eval_loss" not in hedgerow("evaluate", run, "--metrics", "exact_match", "--json").out


def test_a_packed_ledger_rebuilds_the_model_from_a_base_elsewhere(
    hedgerow, experiment, tmp_path, tiny_model
):
    run_and_export(hedgerow, experiment, tmp_path, exports=[("merged",), ("ledger",)])
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_model)
    out = tmp_path / "rebuilt"
    result = hedgerow("export", tmp_path / "ledger", out, f"model.path={moved}", "--to", "merged")
    assert result.code == 0, result.err
    file = "model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_a_standalone_run_exports_each_clients_model(hedgerow, experiment, tmp_path):
    run = run_and_export(hedgerow, experiment, tmp_path, "method.name=standalone", exports=[])
    assert "name one with --client (client-000, client-001, client-002)" in (
        hedgerow("export", run, tmp_path / "x", "--to", "adapter").err
    )
    losses = rows_of(run)[-1]["by_client"]
    for client in ("client-000", "client-002"):
        out = tmp_path / client
        assert hedgerow("export", run, out, "--to", "adapter", "--client", client).code == 0
        scored = hedgerow(
            "evaluate", out, "--data", tmp_path / "test.json", "data.prompt=plain", "--json"
        )
        loss = json.loads(scored.out)["eval_loss"]
        assert loss == pytest.approx(losses[client]["eval_loss"], abs=1e-5)


def test_fedavg_exports_weights_but_no_adapter(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "method=fedavg", "--out", run).code == 0
    result = hedgerow("export", run, tmp_path / "adapter", "--to", "adapter")
    assert (result.code, "export --to merged or" in result.err) == (2, True)
    assert not list(tmp_path.glob("adapter*"))
    assert hedgerow("export", run, tmp_path / "merged", "--to", "merged").code == 0


def test_a_card_says_how_but_not_where_the_data_lies(hedgerow, experiment, tmp_path):
    run_and_export(hedgerow, experiment, tmp_path)
    for name in ("merged", "adapter"):
        card = (tmp_path / name / "README.md").read_text()
        assert "base_model: tiny" in card
        assert "ranks:" in card
        assert str(tmp_path) not in card
