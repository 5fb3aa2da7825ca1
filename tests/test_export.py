"""Exports load in the tools that people have, and are what was evaluated."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import logits
from support.runs import rows_of, run_hedgerow
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hedgerow as hr
from hedgerow import pretrained
from hedgerow.errors import UserError
from hedgerow.loading import name_of


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


def test_evaluate_agrees_with_the_run_on_every_form(hedgerow, experiment, tmp_path, tiny_model):
    run = run_and_export(
        hedgerow, experiment, tmp_path, exports=[("merged",), ("adapter",), ("ledger",)]
    )
    expected = rows_of(run)[-1]["eval_loss"]
    data = ["--data", tmp_path / "test.json", "data.prompt=plain"]
    for target in (run, tmp_path / "ledger", tmp_path / "merged", tmp_path / "adapter"):
        base = [f"model.path={tiny_model}"] if target.name == "ledger" else []
        result = hedgerow("evaluate", target, *data, *base, "--json")
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


def test_a_packed_ledger_says_nothing_of_this_machine(hedgerow, experiment, tmp_path, tiny_model):
    """Neither where base and data lie; and it says what it needs instead."""
    run_and_export(hedgerow, experiment, tmp_path, exports=[("ledger",)])
    packed = tmp_path / "ledger"
    content = packed.read_bytes()
    for place in (tmp_path, tiny_model.parent):
        assert str(place).encode() not in content
    result = hedgerow("export", packed, tmp_path / "out", "--to", "merged")
    assert result.code == 2
    assert "tiny, the run's base, is not there" in result.err
    assert "add model.path=FOLDER" in result.err
    result = hedgerow("export", packed, tmp_path / "out", "--to", "adapter")
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    result = hedgerow("export", packed, tmp_path / "again", "--to", "ledger")
    assert result.code == 0, result.err
    assert (tmp_path / "again").read_bytes() == content


def test_what_killed_exports_have_left_is_in_nobody_s_way(
    hedgerow, experiment, tmp_path, tiny_model, monkeypatch
):
    """Beside the folder to make or in it, and of ledgers that were unpacked."""
    run_and_export(hedgerow, experiment, tmp_path, exports=[("ledger",)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    beside, unpacked = tmp_path / ".hedgerow-0123abcd", "temporary/hedgerow-ledger-0123abcd"
    inside = tmp_path / "volume/.hedgerow-0123abcd"
    for folder in (beside, inside, tmp_path / unpacked):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
    for out in ("new", "volume"):
        base = f"model.path={tiny_model}"
        result = hedgerow("export", tmp_path / "ledger", tmp_path / out, base, "--to", "merged")
        assert result.code == 0, result.err
        assert (tmp_path / out / "config.json").exists()
    assert not any(folder.exists() for folder in (beside, inside))
    assert not list((tmp_path / "temporary").iterdir())


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


# --- files that others read ---------------------------------------------------------------------


def own_files(base: Path, folder: Path) -> None:
    """A base as transformers 4 writes them, and beside it what an export has to leave alone."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"] * 50
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["extra"] = "ü"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    generation = {"temperature": 0.6, "do_sample": False, "eos_token_id": [1]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for name in ("modeling_x.py", "tokenization_x.py", "pytorch_model.bin", "tokenizer.pkl"):
        (folder / name).write_text("raise SystemExit")


def test_a_merged_export_has_the_bases_own_files(hedgerow, experiment, tmp_path, tiny_model):
    base = tmp_path / "a base, ü"
    own_files(tiny_model, base)
    run_and_export(hedgerow, experiment, tmp_path, f"model.path={base}", exports=[("merged",)])
    merged = tmp_path / "merged"
    kept = {"config", "generation_config", "special_tokens_map", "tokenizer", "tokenizer_config"}
    names = {f"{name}.json" for name in kept} | {"chat_template.jinja"}
    assert {path.name for path in merged.iterdir()} == {*names, "model.safetensors", "README.md"}
    for name in names:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name


def test_of_a_configuration_that_names_another_dtype_only_that_changes(
    hedgerow, experiment, tmp_path, tiny_model
):
    base = tmp_path / "base"
    own_files(tiny_model, base)
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    run_and_export(hedgerow, experiment, tmp_path, f"model.path={base}", exports=[("merged",)])
    made = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert list(made.items()) == list((config | {"torch_dtype": "float32"}).items())


def test_a_base_that_only_transformers_5_reads_gets_the_words_of_4_as_well(
    hedgerow, experiment, tmp_path, tiny_model
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "x.X"}, "note": "ü"}
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    file = base / "tokenizer_config.json"
    own = json.loads(file.read_text()) | {"extra_special_tokens": ["a"]}
    file.write_text(json.dumps(own))
    run_and_export(hedgerow, experiment, tmp_path, f"model.path={base}", exports=[("merged",)])
    made = json.loads((tmp_path / "merged" / "config.json").read_text())
    del config["auto_map"]
    assert made == config | {
        "torch_dtype": "float32",
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    made = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    del own["extra_special_tokens"]
    assert made == own | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["a"],
    }
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters["rope_theta"] == 500
    vocabulary = [AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "merged")]
    assert vocabulary[0].extra_special_tokens == vocabulary[1].extra_special_tokens == ["a"]


def test_an_answers_end_is_where_generate_finds_it(hedgerow, experiment, tmp_path, tiny_model):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "a"})
    tokenizer.save_pretrained(base)
    run_and_export(hedgerow, experiment, tmp_path, f"model.path={base}", exports=[("merged",)])
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [1, tokenizer.convert_tokens_to_ids("a")]
    del config["eos_token_id"]
    own = json.loads((base / "generation_config.json").read_text())
    assert config.items() <= own.items()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 0), ("bfloat16", 4e-3), ("float16", 5e-4)]
)
def test_weights_are_exported_in_the_dtype_that_is_asked_for(
    hedgerow, experiment, tmp_path, dtype, tolerance
):
    options = ["--dtype", dtype]
    exports = [("merged", *options), ("adapter", *options)]
    run = run_and_export(hedgerow, experiment, tmp_path, exports=exports)
    hr.open_run(run).export_merged(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    made = load_file(tmp_path / "merged" / "model.safetensors")
    assert made.keys() == whole.keys()
    for name, tensor in made.items():
        assert tensor.dtype == getattr(torch, dtype)
        torch.testing.assert_close(tensor.float(), whole[name], rtol=tolerance, atol=1e-7)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in factors.values()} == {getattr(torch, dtype)}
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.dtype == getattr(torch, dtype)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == dtype


def test_what_a_dtype_cannot_hold_is_refused(hedgerow, experiment, tmp_path, tiny_model):
    base = tmp_path / "base"
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        network.model.norm.weight[0] = 70000
    network.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    run = run_and_export(hedgerow, experiment, tmp_path, f"model.path={base}", exports=[])
    result = hedgerow("export", run, tmp_path / "x", "--to", "merged", "--dtype", "float16")
    assert result.code == 2
    assert "model.norm.weight has a value of 70000, and float16 goes to 65504" in result.err
    assert not (tmp_path / "x").exists()
    result = hedgerow("export", run, tmp_path / "x", "--to", "merged", "--dtype", "bfloat16")
    assert result.code == 0
    result = hedgerow("export", run, tmp_path / "y", "--to", "ledger", "--dtype", "float32")
    assert (result.code, "--to adapter or --to merged" in result.err) == (2, True)
    with pytest.raises(UserError, match="give float32, bfloat16 or float16"):
        hr.open_run(run).export_merged(tmp_path / "z", dtype="int8")


def test_weights_that_are_no_numbers_are_not_exported():
    with pytest.raises(UserError, match=r"x\.weight has values .* the run has diverged"):
        pretrained.cast({"x.weight": torch.tensor([1.0, float("nan")])}, None)


def test_an_adapter_has_one_rank_of_at_most_the_matrices_and_only_keys_that_all_know(
    hedgerow, experiment, tmp_path, tiny_model
):
    run = run_and_export(
        hedgerow,
        experiment,
        tmp_path,
        "federation.rounds=4",
        exports=[("adapter",)],
    )
    assert hedgerow("export", run, tmp_path / "less", "--to", "adapter", "--energy", 0.6).code == 0
    for name in ("adapter", "less"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config.keys() == {
            *("peft_type", "task_type", "base_model_name_or_path", "inference_mode"),
            *("r", "lora_alpha", "lora_dropout", "bias", "target_modules"),
        }
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        ranks = {t.shape[0] if ".lora_A." in key else t.shape[1] for key, t in tensors.items()}
        assert ranks == {config["r"]} == {config["lora_alpha"]}
    # 4 · (4 + 2 + 1) rows were stacked, and no matrix has more than 16 or 24.
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank == 16
    assert config["r"] < 16
    found = hr.open_run(run).evaluate()["eval_loss"]
    scored = hedgerow(
        *("evaluate", tmp_path / "adapter", "--data", tmp_path / "test.json"),
        *("data.prompt=plain", "--json"),
    )
    assert json.loads(scored.out)["eval_loss"] == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_for_whom_the_umask_leaves_them(hedgerow, experiment, tmp_path, mask):
    before = os.umask(mask)
    try:
        exports = [("merged",), ("adapter",), ("ledger",)]
        run_and_export(hedgerow, experiment, tmp_path, exports=exports)
    finally:
        os.umask(before)
    places = [tmp_path / name for name in ("run", "merged", "adapter", "ledger")]
    for path in [*places, *(path for place in places for path in place.rglob("*"))]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(path.stat().st_mode & 0o777) == oct(wanted), path


def test_an_empty_folder_is_filled_and_keeps_its_mode(hedgerow, experiment, tmp_path, monkeypatch):
    run = run_and_export(hedgerow, experiment, tmp_path, exports=[])
    (tmp_path / "volume").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("volume")
    monkeypatch.chdir(tmp_path)
    assert hedgerow("export", run, "link/", "--to", "adapter").code == 0
    assert (tmp_path / "volume").stat().st_mode & 0o777 == 0o750
    names = {path.name for path in (tmp_path / "volume").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow
def test_a_base_of_the_hub_keeps_its_whole_name(experiment, tmp_path, tiny_model, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "home" / "hub" / "models--acme--tiny-llama"
    own_files(tiny_model, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, path = tmp_path / "run", experiment()
    run_hedgerow("run", path, "model.path=acme/tiny-llama", "--out", run)
    for to in ("adapter", "merged"):
        run_hedgerow("export", run, tmp_path / to, "--to", to)
        card = (tmp_path / to / "README.md").read_text()
        assert "base_model: acme/tiny-llama\n" in card
        assert "# acme/tiny-llama, fine-tuned" in card
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny-llama"
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        own = (cache / "snapshots" / commit / name).read_bytes()
        assert (tmp_path / "merged" / name).read_bytes() == own
    assert name_of(str(cache / "snapshots" / commit)) == "acme/tiny-llama"
    assert name_of(str(tiny_model)) == "tiny"


def test_a_base_in_memory_that_has_changed_is_written_as_it_is(tmp_path, tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    network.resize_token_embeddings(264)
    rows = [{"instruction": "Say <new>", "output": "<new>"}] * 2
    run = hr.run(
        model=network,
        tokenizer=tokenizer,
        clients={"a": rows},
        test=rows,
        data={"prompt": "plain", "max_length": 64},
        method=hr.methods.FLoRA(ranks=2),
        training={"steps": 2, "batch_size": 2, "learning_rate": 0.01},
        rounds=1,
        out=tmp_path / "run",
    )
    merged = run.export_merged(tmp_path / "merged")
    made = AutoTokenizer.from_pretrained(merged)
    assert made("<new>").input_ids == tokenizer("<new>").input_ids
    assert made.chat_template == tokenizer.chat_template
    config = json.loads((merged / "config.json").read_text())
    assert (config["vocab_size"], config["rope_theta"]) == (264, 10000.0)
    found = run.model()(torch.tensor([[0, 5, 6, 263]])).logits
    again = AutoModelForCausalLM.from_pretrained(merged)(torch.tensor([[0, 5, 6, 263]])).logits
    torch.testing.assert_close(again, found)
    adapter = json.loads((run.export_adapter(tmp_path / "x") / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_model)
