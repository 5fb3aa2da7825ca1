"""The built-in demo: its model, its experiment file, and its comparison in small."""

from support.runs import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hedgerow import demo
from hedgerow.experiment import load


def test_the_bundled_model_is_small_and_says_nothing_of_where_it_was_made():
    files = list(demo.MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    config = AutoModelForCausalLM.from_pretrained(demo.MODEL).config
    assert config.model_type == "llama"
    assert "_name_or_path" not in (demo.MODEL / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    text = "Reverse the word:\n\nacorn  x"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_its_experiment_runs_as_it_is_and_does_not_solve_the_tasks_before(hedgerow, tmp_path):
    path = demo.prepare(tmp_path / "demo")
    assert set(load(path).data.clients) == set(demo.tasks.CLIENTS)
    small = ["federation.rounds=1", "training.steps=2"]
    assert hedgerow("run", path, *small, "--out", tmp_path / "run").code == 0
    before = rows_of(tmp_path / "run")[0]
    assert before["exact_match"] <= 5
    assert set(before["exact_match_by"]) == set(demo.tasks.KINDS)


def test_it_compares_and_leaves_its_runs(hedgerow, tmp_path, monkeypatch):
    small = demo.EXPERIMENT
    for long, short in (("rounds: 8", "rounds: 1"), ("steps: 15", "steps: 1"), ("s: 24", "s: 4")):
        assert small.count(long) == 1
        small = small.replace(long, short)
    monkeypatch.setattr(demo, "EXPERIMENT", small)
    out = tmp_path / "demo"
    result = hedgerow("demo", "--out", out)
    assert result.code == 0, result.err
    for label in ("base model", *demo.METHODS.values()):
        assert label in result.out
    for method in demo.METHODS:
        assert hedgerow("ledger", "verify", out / method).code == 0
    again = hedgerow("demo", "--out", out)  # nothing is left to do but the table
    assert again.code == 0
    assert "FLoRA" in again.out
    (out / "experiment.yaml").write_text("mine")
    again = hedgerow("demo", "--out", out)
    assert (again.code, "exists already" in again.err) == (2, True)
