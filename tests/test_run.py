"""Whole runs through the command line: every method, its metrics, resuming, exactness."""

import gzip
import json
import re
import shutil
import sys

import pytest
import safetensors
import torch
from support.runs import ledger_bytes, rows_of
from transformers import AutoModelForCausalLM

from hedgerow.errors import Diverged
from hedgerow.ledger import Ledger
from hedgerow.methods import METHODS
from hedgerow.training import first_order

PROMISED = {
    "round",
    "eval_loss",
    "train_loss",
    "bytes_up",
    "bytes_down",
    "seconds",
    "train_seconds",
    "clients",
    "failed",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_learns(hedgerow, experiment, tmp_path, method):
    path = experiment(training={"steps": 20}, federation={"rounds": 3})
    content = METHODS[method]().model_dump()
    changes = ["method.ranks=4"] if "ranks" in content else []
    if method == "ferret":
        changes = ["method.compression=40"]
    if method == "demo_sgd":  # a round is a step of SGD
        changes = ["training.optimizer=sgd", "training.steps=1"]
        changes += ["method.server.name=sign", "method.server.learning_rate=0.01"]
    if "epsilon" in content:  # zeroth-order steps are many and small
        changes = ["training.learning_rate=1e-3", "training.steps=80"]
    result = hedgerow("run", path, f"method.name={method}", *changes, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert all(row.keys() >= PROMISED for row in rows)
    assert rows[-1]["train_loss"] < rows[1]["train_loss"] - 0.02
    if method != "standalone":  # most of its clients never see what the test asks
        assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.02
    if "ranks" in content and method != "ferret":
        assert rows[-1]["aggregation_error"] is not None
    assert hedgerow("ledger", "verify", tmp_path / "run").code == 0


def test_bytes_are_those_of_what_was_serialised(hedgerow, experiment, tmp_path):
    path = experiment(method={"restart": "own"}, federation={"rounds": 2, "keep_updates": True})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    for row in rows_of(tmp_path / "run")[1:]:
        kept = (tmp_path / "run" / "updates" / f"round-{row['round']:04d}").iterdir()
        entry = tmp_path / "run" / "ledger" / f"{row['round']:04d}.safetensors"
        assert row["bytes_up"] == sum(file.stat().st_size for file in kept)
        assert row["bytes_down"] == entry.stat().st_size * 3


def test_a_client_that_was_away_is_charged_for_what_it_missed(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 6, "clients_per_round": 1})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    sizes = [
        (tmp_path / "run" / "ledger" / f"{r:04d}.safetensors").stat().st_size for r in range(1, 7)
    ]
    last = {}
    for row in rows_of(tmp_path / "run")[1:]:
        (client,) = row["participants"]
        assert row["bytes_down"] == sum(sizes[last.get(client, 0) : row["round"]])
        last[client] = row["round"]


CASES = {
    "different ranks": {"method": {"ranks": [4, 2, 1]}},
    "equal ranks": {"method": {"ranks": 3}},
    "from zero": {"method": {"ranks": [4, 2, 1], "restart": "zero"}},
    "from their own": {"method": {"ranks": [4, 2, 1], "restart": "own"}},
    "from the average": {"method": {"ranks": [4, 2, 1], "restart": "shared"}},
    "other weights": {"method": {"ranks": [4, 2, 1], "scaling": "uniform"}},
    "alpha other than 2r": {"method": {"ranks": [4, 2, 1], "alpha": 5}},
    "rank-stabilised": {"method": {"ranks": [4, 2, 1], "rslora": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_flora_is_exact_from_outside(hedgerow, experiment, tmp_path, case):
    """Σ p_k s_k B_k A_k of the kept files is what the exported weights differ by."""
    path = experiment(**CASES[case], federation={"rounds": 2, "keep_updates": True})
    run = tmp_path / "run"
    assert hedgerow("run", path, "--out", run).code == 0
    weights = []
    for round in range(3):
        out = tmp_path / f"merged-{round}"
        assert hedgerow("export", run, out, "--to", "merged", "--round", round).code == 0
        weights.append(AutoModelForCausalLM.from_pretrained(out).state_dict())
    for round in (1, 2):
        sums, total = {}, 0
        for file in (run / "updates" / f"round-{round:04d}").iterdir():
            with safetensors.safe_open(file, framework="pt") as update:
                about = update.metadata()
                r, alpha, n = (
                    int(about["r"]),
                    float(about["lora_alpha"]),
                    int(about["num_examples"]),
                )
                scale = alpha / (r**0.5 if "use_rslora" in about else r)
                n = 1 if "scaling" in CASES[case]["method"] else n
                total += n
                for key in update.keys():  # noqa: SIM118  (no mapping)
                    if ".lora_A." in key:
                        A = update.get_tensor(key).double()
                        B = update.get_tensor(key.replace(".lora_A.", ".lora_B.")).double()
                        name = re.sub(r"base_model\.model\.|\.lora_A", "", key)
                        sums[name] = sums.get(name, 0) + n * scale * B @ A
        for name, value in sums.items():
            change = weights[round][name].double() - weights[round - 1][name].double()
            error = torch.linalg.matrix_norm(change - value / total)
            assert error < 1e-5 * torch.linalg.matrix_norm(value / total), name
        untouched = weights[0].keys() - sums.keys()
        assert all(torch.equal(weights[round][name], weights[0][name]) for name in untouched)
    assert all(row["aggregation_error"] < 1e-6 for row in rows_of(run)[1:])


def test_averaging_shows_its_noise(hedgerow, experiment, tmp_path):
    for method, ranks in (("fedit", "4"), ("zero_padding", "[4,2,1]")):
        arguments = [f"method.name={method}", f"method.ranks={ranks}", "--out", tmp_path / method]
        assert hedgerow("run", experiment(), *arguments).code == 0
        assert all(row["aggregation_error"] > 1e-3 for row in rows_of(tmp_path / method)[1:])


@pytest.mark.parametrize("method", ["flora", "zero_padding", "standalone"])
def test_the_same_experiment_gives_the_same_bytes_and_so_does_going_on(
    hedgerow, experiment, tmp_path, method
):
    changes = [f"method.name={method}", "method.dropout=0.1", "federation.clients_per_round=2"]
    path = experiment()
    for name, rounds in (("whole", 4), ("parts", 2)):
        arguments = [path, *changes, f"federation.rounds={rounds}", "--out", tmp_path / name]
        assert hedgerow("run", *arguments).code == 0
    arguments = [path, *changes, "federation.rounds=4", "--out", tmp_path / "parts", "--resume"]
    assert hedgerow("run", *arguments).code == 0
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "parts")

    def lasting(run):
        return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows_of(run)]

    assert lasting(tmp_path / "whole") == lasting(tmp_path / "parts")


def test_a_row_that_a_kill_prevented_is_written_on_resume(hedgerow, experiment, tmp_path):
    path, run = experiment(), tmp_path / "run"
    assert hedgerow("run", path, "--out", run).code == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"round": 2, "eval')
    before = json.loads(lines[-1])
    result = hedgerow("run", path, "--out", run, "--resume")
    assert result.code == 0
    assert "metrics.jsonl has no row of round 2" in result.out
    assert "train_loss_by_client" in result.out  # which is not in the ledger
    after = rows_of(run)[-1]
    assert len(rows_of(run)) == 3
    for key in ("round", "eval_loss", "train_loss", "bytes_up", "bytes_down", "clients"):
        assert after[key] == before[key]


def test_rows_that_are_gone_are_written_again_from_the_ledger(hedgerow, experiment, tmp_path):
    """All that they say but for scores and times, of bytes as well; the ledger is the same."""
    path, run = experiment(federation={"clients_per_round": 2}), tmp_path / "run"
    assert hedgerow("run", path, "--out", run).code == 0
    before = rows_of(run)
    (run / "metrics.jsonl").unlink()
    more = ["federation.rounds=3", "--out", run, "--resume"]
    result = hedgerow("run", path, *more)
    assert result.code == 0, result.err
    assert "metrics.jsonl has no row of rounds 0 to 2" in result.out
    rows = rows_of(run)
    for old, new in zip(before, rows, strict=False):
        kept = set(old) - {"eval_loss", "eval_perplexity", "train_loss_by_client"}
        kept -= {"sent_by_client", "revealed_clients"}
        kept -= {key for key in kept if key.endswith("seconds")}
        assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    assert [row["eval_loss"] is None for row in rows] == [True, True, False, False]
    whole = tmp_path / "whole"
    assert hedgerow("run", path, "federation.rounds=3", "--out", whole).code == 0
    assert ledger_bytes(run) == ledger_bytes(whole)
    assert rows[3]["bytes_down"] == rows_of(whole)[3]["bytes_down"]


def test_resume_before_anything_was_written_starts(hedgerow, experiment, tmp_path):
    assert hedgerow("run", experiment(), "--out", tmp_path / "run", "--resume").code == 0
    assert len(rows_of(tmp_path / "run")) == 3


@pytest.mark.parametrize("left", ["data.json.partial", "data.json", "experiment.yaml.partial"])
def test_resume_after_a_kill_at_the_very_first_step(hedgerow, experiment, tmp_path, left):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("half")
    assert hedgerow("run", experiment(), "--out", tmp_path / "run", "--resume").code == 0
    assert len(rows_of(tmp_path / "run")) == 3


def test_resume_after_a_kill_before_the_ledger_was_begun(hedgerow, experiment, tmp_path):
    path, run = experiment(), tmp_path / "run"
    assert hedgerow("run", path, "--out", run).code == 0
    for child in run.iterdir():
        if child.name not in ("experiment.yaml", "data.json"):
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    assert hedgerow("run", path, "--out", run, "--resume").code == 0
    assert len(rows_of(run)) == 3


def test_the_order_of_training_does_not_matter_to_a_client(hedgerow, experiment, tmp_path):
    """What client 1 sends is the same whoever else takes part."""
    path = experiment(method={"restart": "own"}, federation={"rounds": 1, "keep_updates": True})
    assert hedgerow("run", path, "--out", tmp_path / "all").code == 0
    one = "{client-001: client_1.json}"
    arguments = [f"data.clients={one}", "method.ranks=[2]", "--out", tmp_path / "one"]
    assert hedgerow("run", path, *arguments).code == 0
    file = "updates/round-0001/client-001.safetensors"
    assert (tmp_path / "all" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_a_client_may_have_several_files(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1})
    assert hedgerow("run", path, "--out", tmp_path / "one").code == 0
    rows = json.loads((tmp_path / "client_1.json").read_text())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    (tmp_path / "b.tsv").write_text(
        "\n".join(["instruction\toutput", *("\t".join(row.values()) for row in rows[1:])])
    )
    own = "{client-000: client_0.json, client-001: [a.jsonl.gz, b.tsv], client-002: client_2.json}"
    assert hedgerow("run", path, f"data.clients={own}", "--out", tmp_path / "two").code == 0
    assert ledger_bytes(tmp_path / "one") == ledger_bytes(tmp_path / "two")

    (tmp_path / "b.tsv").write_text("instruction\toutput\nSay\t1\nSay\0\t1\nonly\n")
    result = hedgerow("run", path, f"data.clients={own}", "--out", tmp_path / "three")
    assert result.code == 2
    assert "b.tsv: line 4 has 1 cells" in result.err
    for wrong, said in [
        ("[]", "data.clients"),
        ("[a.jsonl.gz, a.jsonl.gz]", "a.jsonl.gz stands twice for 'x'"),
        ("[a.jsonl.gz, 7]", "data.clients"),
    ]:
        result = hedgerow("run", path, f"data.clients={{x: {wrong}}}", "--out", tmp_path / "three")
        assert (result.code, said in result.err) == (2, True), result.err
    assert not (tmp_path / "three").exists()


def test_the_first_rows_are_learnt_and_scored(hedgerow, experiment, tmp_path):
    path = experiment(federation={"rounds": 1})
    changes = ["data.rows=5", "data.test_rows=3", "--out", tmp_path / "first"]
    assert hedgerow("run", path, *changes).code == 0
    for name, most in [("client_0", 5), ("client_1", 5), ("client_2", 5), ("test", 3)]:
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[:most]))
    assert hedgerow("run", path, "--out", tmp_path / "cut").code == 0
    assert ledger_bytes(tmp_path / "first") == ledger_bytes(tmp_path / "cut")
    first, cut = (rows_of(tmp_path / name)[-1]["eval_loss"] for name in ("first", "cut"))
    assert first == cut


def test_a_round_in_which_every_client_diverges_ends_the_run(hedgerow, experiment, tmp_path):
    path = experiment(
        method={"name": "fedavg"},
        training={"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": None, "steps": 5},
    )
    result = hedgerow("run", path, "method=fedavg", "--out", tmp_path / "run")
    assert result.code == 1
    assert "round 1 has no usable update" in result.err
    assert "its loss was" in result.err
    assert hedgerow("ledger", "verify", tmp_path / "run").code == 0


def test_a_client_that_fails_is_named_and_the_round_goes_on(
    hedgerow, experiment, tmp_path, monkeypatch
):
    trained = first_order.continue_training

    def fails_for_nine_examples(job, parameters, state, **options):
        if len(job.data) == 9:
            raise Diverged("its loss was nan at step 1")
        return trained(job, parameters, state, **options)

    monkeypatch.setattr(first_order, "continue_training", fails_for_nine_examples)
    path = experiment(federation={"rounds": 2})
    result = hedgerow("run", path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "client-001 failed: its loss was nan" in result.out
    for row in rows_of(tmp_path / "run")[1:]:
        assert (row["clients"], row["failed"]) == (2, 1)
        assert list(row["train_loss_by_client"]) == row["participants"]
        assert row["participants"] == ["client-000", "client-002"]
        assert "nan" in row["failures"]["client-001"]
    entry = next(Ledger.open(tmp_path / "run" / "ledger").entries())
    assert [p.weight for p in entry.participants] == [5 / 19, 14 / 19]


def test_standalone_counts_clients_that_have_not_trained_yet(hedgerow, experiment, tmp_path):
    path = experiment(federation={"clients_per_round": 1})
    result = hedgerow("run", path, "method.name=standalone", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    base = rows_of(tmp_path / "run")[0]["eval_loss"]
    row = rows_of(tmp_path / "run")[1]
    losses = {name: scores["eval_loss"] for name, scores in row["by_client"].items()}
    assert len(losses) == 3
    assert row["eval_loss"] == pytest.approx(sum(losses.values()) / 3)
    for name, loss in losses.items():
        assert (loss == pytest.approx(base)) == (name not in row["participants"])


def test_source_and_partition_instead_of_files(hedgerow, experiment, tmp_path):
    rows = [
        {"question": f"Say {kind}{i}", "answer": kind * 3, "kind": kind}
        for kind in "ab"
        for i in range(20)
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = experiment(method={"ranks": 2})
    for partition, clients in (
        ("{kind: iid, clients: 4}", 4),
        ("{kind: dirichlet, clients: 3, column: kind, alpha: 0.5}", 3),
        ("{kind: shard, clients: 4, column: kind, shards: 1}", 4),
        ("{kind: column, column: kind}", 2),
    ):
        out = tmp_path / partition.split(",")[0].split()[-1].rstrip("}")
        result = hedgerow(
            "run",
            path,
            "data.clients=null",
            f"data.source={tmp_path / 'all.jsonl'}",
            f"data.partition={partition}",
            "data.fields={instruction: question, input: null, output: answer}",
            f"data.test={tmp_path / 'all.jsonl'}",
            "federation.rounds=1",
            "--out",
            out,
        )
        assert result.code == 0, result.err
        assert rows_of(out)[-1]["clients"] == clients


def test_bfloat16_does_not_lose_small_updates(hedgerow, experiment, tmp_path):
    path = experiment(model={"dtype": "bfloat16"}, training={"steps": 10})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


@pytest.mark.parametrize(
    "training",
    [
        {"steps": None, "epochs": 1},
        {"gradient_accumulation": 2, "schedule": "cosine"},
        {"optimizer": "sgd", "momentum": 0.9, "schedule": "linear", "max_grad_norm": None},
        {"local_schedule": "cosine", "warmup_steps": 1},
    ],
)
def test_ways_of_training(hedgerow, experiment, tmp_path, training):
    assert hedgerow("run", experiment(training=training), "--out", tmp_path / "run").code == 0
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_a_metric_that_fails_in_the_first_evaluation_leaves_nothing(
    hedgerow, experiment, tmp_path, monkeypatch
):
    """So that the same command does once the metric is mended."""
    (tmp_path / "breaks.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "runs" / "first"
    run = ["run", experiment(), "evaluation.metrics=[breaks:Breaks]", "--out", out]
    result = hedgerow(*run)
    assert result.code == 2, result.err
    assert not out.exists()
    monkeypatch.setattr(sys.modules["breaks"].Breaks, "fails", False)
    assert hedgerow(*run).code == 0


FAILING = """
from typing import ClassVar

from hedgerow.evaluation.metrics import AnswerMetric, Score


class Breaks(AnswerMetric):
    scores = (Score("breaks", label="breaks"),)
    fails: ClassVar[bool] = True

    def score(self, reference, answer):
        if self.fails:
            raise ValueError("it breaks")
        return 1.0
"""
