"""The Python API: files and objects in, a run out; memory is given back; Ctrl-C loses nothing."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from support.runs import hear_interrupts, ledger_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hedgerow as hr
from hedgerow.errors import UserError

ROWS = {
    name: [{"instruction": f"Say {letter}{i}", "output": f"{letter * 3}{i}"} for i in range(size)]
    for name, letter, size in [("north", "a", 5), ("south", "b", 9), ("west", "c", 14)]
}
TEST = [{"instruction": f"Say b{i}", "output": f"bbb{i}"} for i in range(4)]
TEXT = {"prompt": "plain", "max_length": 64}
TRAINING = {"steps": 2, "batch_size": 4, "learning_rate": 0.01}


@pytest.fixture
def network(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def memory(tiny_model: Path, network: PreTrainedModel) -> dict:
    """What `hr.run` takes to train on objects alone."""
    return {
        "model": network,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model),
        "clients": ROWS,
        "test": TEST,
        "data": TEXT,
        "training": TRAINING,
        "method": hr.methods.FLoRA(ranks=[4, 2, 1]),
    }


def files(folder: Path) -> dict[str, str]:
    """The same rows in files, by client."""
    for name, rows in ROWS.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(TEST))
    return {name: str(folder / f"{name}.json") for name in ROWS}


# --- from files ---------------------------------------------------------------------------------


def test_a_file_runs_as_on_the_command_line(experiment, hedgerow, tmp_path):
    path = experiment()
    run = hr.run(path, "training.steps=1", out=tmp_path / "a")
    assert hedgerow("run", path, "training.steps=1", "--out", tmp_path / "b").code == 0
    assert ledger_bytes(tmp_path / "a") == ledger_bytes(tmp_path / "b")
    assert list(run.metrics["round"]) == [0, 1, 2]
    assert run.rounds == 2
    assert run.experiment.training.steps == 1


def test_sections_count_before_the_file_and_overrides_before_both(experiment, tmp_path):
    run = hr.run(
        experiment(),
        "training.batch_size=3",
        out=tmp_path / "a",
        training={"steps": 1, "batch_size": 2},
        method="fedit",
        rounds=1,
    )
    settings = run.experiment
    assert (settings.training.steps, settings.training.batch_size) == (1, 3)
    assert settings.training.learning_rate == 0.01  # the file's
    assert settings.method.name == "fedit"
    assert run.rounds == 1


def test_an_experiment_in_python_is_one_in_yaml(experiment, tmp_path, tiny_model):
    names = files(tmp_path)
    made = hr.Experiment(
        model={"path": str(tiny_model)},
        data={"clients": names, "test": str(tmp_path / "test.json"), **TEXT},
        method={"name": "flora", "ranks": [4, 2, 1]},
        training=TRAINING,
        federation={"rounds": 1},
    )
    run = hr.run(made, out=tmp_path / "a")
    assert isinstance(run.experiment.method, hr.methods.FLoRA)
    again = hr.run(run.experiment, out=tmp_path / "b")
    assert ledger_bytes(tmp_path / "a") == ledger_bytes(tmp_path / "b")
    assert again.experiment == run.experiment


def test_an_experiment_in_python_that_is_wrong_is_one_sentence(tiny_model):
    with pytest.raises(UserError, match=r"method\.name.*did you mean `flora`"):
        hr.Experiment(model={"path": "x"}, data={"clients": "c_{}.json"}, method="flor")
    with pytest.raises(UserError, match=r"`training\.step` is not a known key"):
        hr.Experiment(
            model={"path": "x"},
            data={"clients": "c_{}.json"},
            method="flora",
            training={"step": 1},
        )


# --- from memory --------------------------------------------------------------------------------


def test_memory_gives_the_bytes_of_files(memory, tiny_model, tmp_path):
    named = files(tmp_path)
    ours = hr.run(**memory, rounds=2, out=tmp_path / "memory")
    sections = {key: memory[key] for key in ("data", "training", "method")}
    theirs = hr.run(
        model=tiny_model,
        clients=named,
        test=tmp_path / "test.json",
        **sections,
        rounds=2,
        out=tmp_path / "files",
    )
    one, other = (ledger_bytes(tmp_path / name) for name in ("memory", "files"))
    assert {n: b for n, b in one.items() if n != "ledger.json"} == {
        n: b for n, b in other.items() if n != "ledger.json"
    }
    assert list(ours.metrics["eval_loss"]) == list(theirs.metrics["eval_loss"])


@pytest.mark.parametrize("method", ["flora", "fedavg", "ferret", "fedit"])
def test_the_model_is_given_back_as_it_was(memory, network, tmp_path, method):
    network.train()
    next(network.parameters()).requires_grad_(False)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    flags = [parameter.requires_grad for parameter in network.parameters()]
    options = {"name": method} | ({"compression": 64} if method == "ferret" else {})
    hr.run(**memory | {"method": options}, rounds=1, out=tmp_path / "a")
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert network.training
    assert not hasattr(network, "peft_config")


@pytest.mark.parametrize(
    "kind",
    [
        datasets.Dataset.from_list,
        pd.DataFrame,
        tuple,
        iter,
        lambda rows: [dict(row, extra=np.float32(1.5)) for row in rows],
    ],
)
def test_rows_may_be_in_anything_that_holds_rows(memory, tmp_path, kind):
    clients = {name: kind(rows) for name, rows in ROWS.items()}
    run = hr.run(**memory | {"clients": clients}, rounds=1, out=tmp_path / "a")
    plain = hr.run(**memory, rounds=1, out=tmp_path / "b")
    assert list(run.metrics["eval_loss"]) == list(plain.metrics["eval_loss"])


def test_a_missing_value_of_a_data_frame_is_no_text(memory, tmp_path):
    frame = pd.DataFrame(ROWS["north"]).assign(input=[None, np.nan, "", pd.NA, "x"])
    run = hr.run(
        **memory | {"clients": {"north": frame, "south": ROWS["south"]}, "method": "fedit"},
        rounds=1,
        out=tmp_path / "a",
    )
    filled = frame.assign(input=["", "", "", "", "x"])
    other = hr.run(
        **memory | {"clients": {"north": filled, "south": ROWS["south"]}, "method": "fedit"},
        rounds=1,
        out=tmp_path / "b",
    )
    assert list(run.metrics["eval_loss"]) == list(other.metrics["eval_loss"])


def test_one_source_in_memory_is_divided(memory, tmp_path):
    rows = [row for rows in ROWS.values() for row in rows]
    data = TEXT | {"source": rows, "partition": {"kind": "iid", "clients": 3}}
    parts = {key: value for key, value in memory.items() if key not in ("clients", "data")}
    run = hr.run(**parts, data=data, rounds=1, out=tmp_path / "a")
    assert run.metrics["clients"].iloc[-1] == 3


def test_some_clients_may_have_files(memory, tmp_path):
    named = files(tmp_path)
    clients = ROWS | {"south": named["south"]}
    run = hr.run(**memory | {"clients": clients}, rounds=1, out=tmp_path / "a")
    plain = hr.run(**memory, rounds=1, out=tmp_path / "b")
    assert list(run.metrics["eval_loss"]) == list(plain.metrics["eval_loss"])


def test_a_client_may_have_several_files(memory, tmp_path):
    named = files(tmp_path)
    together = {"both": [Path(named["south"]), named["north"]]}
    memory["method"] = "fedavg"
    run = hr.run(**memory | {"clients": together}, rounds=1, out=tmp_path / "a")
    rows = {"both": [*ROWS["south"], *ROWS["north"]]}
    plain = hr.run(**memory | {"clients": rows}, rounds=1, out=tmp_path / "b")
    assert list(run.metrics["eval_loss"]) == list(plain.metrics["eval_loss"])


def test_a_run_from_memory_goes_on_with_the_same_objects(memory, tmp_path):
    whole = hr.run(**memory, rounds=3, out=tmp_path / "whole")
    hr.run(**memory, rounds=1, out=tmp_path / "part")
    part = hr.run(**memory, rounds=3, out=tmp_path / "part", resume=True)
    assert ledger_bytes(tmp_path / "whole") == ledger_bytes(tmp_path / "part")
    assert part.rounds == whole.rounds == 3


def test_a_run_from_memory_does_not_go_on_with_others(memory, network, tmp_path):
    hr.run(**memory, rounds=1, out=tmp_path / "a")
    again = {"rounds": 2, "out": tmp_path / "a", "resume": True}
    changed = ROWS | {"west": [*ROWS["west"], {"instruction": "Say d", "output": "d"}]}
    with pytest.raises(UserError, match="the data of west have changed"):
        hr.run(**memory | {"clients": changed}, **again)
    with torch.no_grad():
        network.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(UserError, match="is not the base of the ledger"):
        hr.run(**memory, **again)
    assert hr.open_run(tmp_path / "a").rounds == 1


def test_what_memory_cannot_do_is_said(memory, tmp_path, hedgerow):
    run = hr.run(**memory, rounds=1, out=tmp_path / "a")
    with pytest.raises(UserError, match="do not see models and data in this one's memory"):
        hr.run(**memory, out=tmp_path / "b", engine="flower")
    assert not (tmp_path / "b").exists()
    elsewhere = hr.open_run(run.path)
    with pytest.raises(UserError, match=r"model\.path=FOLDER"):
        elsewhere.model()
    result = hedgerow("evaluate", run.path)
    assert result.code == 2
    assert "model.path=FOLDER" in result.err
    result = hedgerow("run", run.path / "experiment.yaml", "--out", tmp_path / "c")
    assert result.code == 2
    assert not (tmp_path / "c").exists()


def test_the_advice_for_a_run_from_memory_works(memory, tiny_model, tmp_path, hedgerow):
    run = hr.run(**memory, rounds=1, out=tmp_path / "a")
    files(tmp_path)
    here = [f"model.path={tiny_model}", f"data.test={tmp_path / 'test.json'}"]
    result = hedgerow("evaluate", run.path, *here, "--json")
    assert result.code == 0, result.err
    loss = run.metrics["eval_loss"].iloc[-1]
    assert json.loads(result.out)["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer": None}, "give its tokenizer= as well"),
        ({"model": torch.nn.Linear(2, 2)}, "must be a causal language model"),
        ({"model": None}, "tokenizer= belongs to a model in memory"),
        ({"clients": 3}, "clients= must be a mapping"),
        ({"clients": {"north": 3}}, "the data of north must be rows"),
        ({"clients": {"north": [1, 2]}}, "the data of north: row 1 must be a dictionary"),
        ({"clients": {"north": []}}, "the data of north: holds no rows"),
        ({"clients": {"no/rth": ROWS["north"]}}, "client name 'no/rth'"),
        ({"test": [{"question": "?"}]}, "instruction"),
        ({"method": "nope"}, "there is no 'nope'"),
        ({"method": {"ranks": 3}}, "`method` needs a name"),
        ({"training": {"stepps": 3}}, "did you mean `steps`"),
        ({"training": 3}, "training= must be a mapping"),
        ({"evaluation": {"metrics": ["nope"]}}, "there is no 'nope'"),
        ({"smoke": True}, "smoke=True is for experiment files"),
        ({"method": "hedgerow.methods.lora:LoraMethod"}, "lacks the function"),
        ({"data": TEXT | {"max_length": 1}}, r"data\.max_length"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(memory, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        hr.run(**memory | change, rounds=1, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_in_half_precision_or_with_an_adapter_is_refused(memory, network, tmp_path):
    import peft

    adapted = peft.get_peft_model(network, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge_and_unload"):
        hr.run(**memory | {"model": adapted}, out=tmp_path / "a")
    with pytest.raises(UserError, match="is in float16"):
        hr.run(**memory | {"model": adapted.unload().half()}, out=tmp_path / "a")


def test_what_training_changes_beside_weights_is_given_back(memory, network, tmp_path):
    layer = network.get_submodule("model.layers.0")
    layer.eval()
    network.lm_head.train()
    weight = network.get_input_embeddings().weight
    weight.grad = torch.ones_like(weight)
    hr.run(**memory | {"method": "fedavg"}, rounds=1, out=tmp_path / "a")
    assert not layer.training
    assert network.lm_head.training
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize(
    "place",
    [
        "hedgerow.adapter_layers.AdapterLayers.around",
        "hedgerow.training.objectives.supervised.batch_loss",
    ],
)
def test_an_interrupted_run_gives_the_model_back(memory, network, tmp_path, monkeypatch, place):
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    hr.run(**memory, rounds=1, out=tmp_path / "a")
    original, calls = pkgutil.resolve_name(place), []
    name = original.__name__

    def interrupted(*arguments, **options):
        calls.append(1)
        result = original(*arguments, **options)
        if len(calls) > 2 or name == "around":
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        with pytest.raises(KeyboardInterrupt) as stop:
            hr.run(**memory, rounds=2, out=tmp_path / "a", resume=True)
    assert any("resume=True" in note for note in stop.value.__notes__)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(before[n], w) for n, w in network.state_dict().items())
    assert hr.run(**memory, rounds=2, out=tmp_path / "a", resume=True).rounds == 2


def test_a_comparison_may_load_another_model_beside_the_one_in_memory(
    memory, network, tiny_model, tmp_path
):
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    shared = {key: value for key, value in memory.items() if key != "method"}
    found = hr.compare(
        **shared,
        methods=["fedavg", f"fedavg model.path={tiny_model}", "fedavg training.steps=1"],
        rounds=1,
        out=tmp_path / "a",
    )
    assert not found.failures
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())
    first, second, _ = found.runs.values()
    assert list(first.metrics["eval_loss"]) == list(second.metrics["eval_loss"])


def test_relative_paths_are_from_where_the_program_is(tiny_model, tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    content = {
        "model": {"path": str(tiny_model)},
        "data": {"clients": {"a": "north.json", "b": "south.json"}, "test": "test.json", **TEXT},
        "method": {"name": "fedit", "ranks": 2},
        "training": TRAINING,
        "federation": {"rounds": 1},
    }
    for made in (content, hr.Experiment(**content)):
        run = hr.run(made, out=f"run-{type(made).__name__}")
        assert Path(run.experiment.data.test).is_absolute()
        monkeypatch.chdir(tmp_path / "..")
        assert run.evaluate()["rows"] == 4
        monkeypatch.chdir(tmp_path)
        assert hr.run(made, rounds=2, out=f"run-{type(made).__name__}", resume=True).rounds == 2


def test_rows_of_arrays_become_lists():
    from hedgerow.data import as_records

    frame = pd.DataFrame({"choices": [np.array(["a", "b"])], "n": [np.int64(3)], "x": [np.nan]})
    assert as_records(frame, "rows").rows == [{"choices": ["a", "b"], "n": 3, "x": None}]
    assert as_records([{"a": {"b": [float("nan")]}}], "rows").rows == [{"a": {"b": [None]}}]


def test_another_optimiser_does_not_inherit_a_default(memory, tmp_path):
    first = hr.run(
        **memory | {"training": TRAINING | {"optimizer": "muon"}}, out=tmp_path / "a", rounds=1
    )
    again = hr.run(
        **memory | {"training": {"optimizer": "sgd"}, "clients": ROWS},
        experiment=first.experiment,
        out=tmp_path / "b",
    )
    assert again.experiment.training.momentum == 0
    assert again.experiment.training.steps == 2


# --- what a run can do --------------------------------------------------------------------------


def test_a_run_has_models_of_every_round(memory, network, tmp_path):
    run = hr.run(**memory, rounds=2, out=tmp_path / "a")
    base = run.model(round=0)
    assert base is not network
    assert all(
        torch.equal(p, q) for p, q in zip(base.parameters(), network.parameters(), strict=True)
    )
    ids = torch.arange(10, 30)[None]
    logits = [run.model(round=number)(ids).logits for number in (0, 1, 2)]
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(run.model()(ids).logits, logits[2])
    exported = AutoModelForCausalLM.from_pretrained(run.export_merged(tmp_path / "merged"))
    torch.testing.assert_close(exported(ids).logits, logits[2])
    run.export_adapter(tmp_path / "adapter", rank=2)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="rounds 0"):
        run.model(round=3)


def test_a_run_evaluates_and_answers(memory, tmp_path):
    run = hr.run(**memory, rounds=2, out=tmp_path / "a")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.metrics["eval_loss"].iloc[-1])
    assert run.evaluate(round=0)["eval_loss"] == pytest.approx(run.metrics["eval_loss"].iloc[0])
    scores = run.evaluate(ROWS["west"], metrics=["loss", "exact_match"], by="output")
    assert scores["rows"] == 14
    assert len(scores["eval_loss_by"]) == 14
    answers = run.answer(["Say b0", "Say a1"], max_new_tokens=4)
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)
    assert run.answer([]) == []
    with pytest.raises(UserError, match="must be a list of texts"):
        run.answer("Say b0")
    with pytest.raises(UserError, match="max_new_tokens=9999: give 1 to 255"):
        run.answer(["Say b0"], max_new_tokens=9999)
    with pytest.raises(UserError, match=r"metrics= must be a list"):
        run.evaluate(metrics="loss")


def test_models_of_clients_are_named(memory, tmp_path):
    run = hr.run(**memory | {"method": "standalone"}, rounds=1, out=tmp_path / "a")
    ids = torch.arange(10, 30)[None]
    north, south = (run.model(client=name)(ids).logits for name in ("north", "south"))
    assert not torch.equal(north, south)
    with pytest.raises(UserError, match="name one with"):
        run.model()


def test_a_run_shows_itself(memory, tmp_path):
    run = hr.run(**memory, rounds=1, out=tmp_path / "a")
    assert "flora, 1 rounds" in repr(run)
    assert "<table" in run._repr_html_()
    values = run.chart("train_loss").to_dict()["datasets"]
    assert [row["round"] for rows in values.values() for row in rows] == [1]
    with pytest.raises(UserError, match="no score 'accuracy'"):
        run.chart("accuracy")


def test_a_packed_ledger_opens_as_a_run(experiment, tmp_path):
    run = hr.run(experiment(), out=tmp_path / "a")
    packed = hr.open_run(
        run.export_ledger(tmp_path / "a.ledger"),
        f"model.path={run.experiment.model.path}",
        f"data.test={run.experiment.data.test}",
    )
    assert packed.rounds == 2
    assert packed.evaluate()["eval_loss"] == pytest.approx(run.metrics["eval_loss"].iloc[-1])
    with pytest.raises(UserError, match="has no metrics"):
        _ = packed.metrics


def test_a_stranger_s_packed_ledger_imports_nothing_unasked(experiment, tmp_path, hedgerow):
    """Whoever opens it names its plug-in again, and so says that it is trusted."""
    import zipfile

    path = experiment(method={"name": "fedit", "ranks": 2})
    run = hr.run(path, out=tmp_path / "a")
    packed = run.export_ledger(tmp_path / "a.ledger")
    other = tmp_path / "b.ledger"
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "experiment.yaml":
                content = content.replace(b"name: fedit", b"name: hedgerow.methods.fedit:FedIT")
            target.writestr(name, content)
    with pytest.raises(UserError, match="names the plug-in") as refused:
        hr.open_run(other)
    assert 'method.name="hedgerow.methods.fedit:FedIT"' in str(refused.value)
    assert hedgerow("ledger", "verify", other).code == 0


def test_a_model_in_memory_is_no_other(memory, tmp_path):
    with pytest.raises(UserError, match=r"model\.dtype is 'bfloat16', but the model in memory"):
        hr.run(None, "model.dtype=bfloat16", **memory, out=tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": "flora"}, "methods"),
        ({"seeds": 0}, "seeds"),
        ({"sweep": {"training.steps": 3}}, "needs a list of values"),
        ({"sweep": {"training.steps": []}}, "needs a list of values"),
    ],
)
def test_a_comparison_s_mistakes_are_one_sentence(experiment, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        hr.compare(experiment(), **{"methods": ["fedit"]} | change, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_opens_a_run_whose_model_was_in_memory(memory, tiny_model, tmp_path):
    run = hr.run(**memory, rounds=1, out=tmp_path / "a")
    opened = hr.open_run(run.path, model=tiny_model, test=TEST)
    assert opened.evaluate()["eval_loss"] == run.metrics["eval_loss"].iloc[-1]


def test_nothing_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        hr.open_run(tmp_path)


# --- several ------------------------------------------------------------------------------------


def test_methods_are_compared_on_memory_and_reported(memory, network, tmp_path):
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    shared = {key: value for key, value in memory.items() if key != "method"}
    found = hr.compare(
        **shared,
        methods=["flora ranks=2", "fedavg"],
        sweep={"training.steps": [1, 2]},
        rounds=1,
        out=tmp_path / "all",
    )
    assert len(found.table) == len(found.runs) == found.count == 4
    assert repr(found) == f"Comparison({str(tmp_path / 'all')!r}: 4 of 4 runs)"
    assert not found.failures
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())
    alone = hr.run(
        **shared | {"training": TRAINING | {"steps": 2}},
        method="fedavg",
        rounds=1,
        out=tmp_path / "alone",
    )
    compared = found.runs["fedavg, steps=2, seed 0"]
    assert ledger_bytes(alone.path) == ledger_bytes(compared.path)
    assert compared.evaluate()["eval_loss"] == alone.metrics["eval_loss"].iloc[-1]
    notes = hr.report(found, alone, out=tmp_path / "page.html", answers=1)
    assert (tmp_path / "page.html").is_file()
    assert not notes
    assert "Say b0" in (tmp_path / "page.html").read_text()
    elsewhere = hr.report(found.path, out=tmp_path / "other.html", answers=1)
    assert any("in the memory of the program" in note for note in elsewhere)


def test_a_comparison_of_other_objects_is_not_taken_for_done(memory, network, tmp_path):
    shared = {key: value for key, value in memory.items() if key != "method"}
    options = {"methods": ["fedit ranks=2"], "rounds": 1, "out": tmp_path / "a"}
    hr.compare(**shared, **options)
    assert not hr.compare(**shared, **options).failures
    fewer = hr.compare(**shared | {"test": TEST[:2]}, **options)
    assert "scored on other test data" in next(iter(fewer.failures.values()))
    others = hr.compare(**shared | {"clients": ROWS | {"west": ROWS["north"]}}, **options)
    assert "the data of west have changed" in next(iter(others.failures.values()))
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(2)
    assert "is not the base" in next(iter(hr.compare(**shared, **options).failures.values()))


def test_a_run_goes_on_in_its_order_of_clients_and_says_that_test_data_differ(
    memory, tmp_path, capsys
):
    hr.run(**memory, rounds=1, out=tmp_path / "a")
    again = {"rounds": 2, "out": tmp_path / "a", "resume": True}
    hr.run(**memory | {"test": TEST[:2]}, **again, progress=True)
    assert (
        "the test data are others than before: scores of rounds from 2" in capsys.readouterr().out
    )
    backwards = dict(reversed(ROWS.items()))
    with pytest.raises(UserError, match="another order"):
        hr.run(**memory | {"clients": backwards}, **again)


class Mine(hr.methods.FLoRA):
    """A method that calls itself as one of hedgerow's own."""

    name: str = "flora"

    def aggregate(self, updates, server_round):
        raise UserError("mine was called")


def test_a_method_of_one_s_own_is_never_taken_for_another(memory, tmp_path):
    with pytest.raises(UserError, match="mine was called"):
        hr.run(**memory | {"method": Mine(ranks=[4, 2, 1])}, rounds=1, out=tmp_path / "a")
    with pytest.raises(UserError, match=r"give FLoRA\(…\)"):
        hr.run(**memory | {"method": hr.methods.FLoRA}, out=tmp_path / "b")
    with pytest.raises(UserError, match="names 1 twice"):
        hr.run(**memory | {"clients": {1: ROWS["north"], "1": ROWS["south"]}}, out=tmp_path / "b")


# --- the package --------------------------------------------------------------------------------


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def test_importing_hedgerow_imports_no_tensors():
    result = python(
        """
        import sys, hedgerow as hr
        at_first = {name.partition(".")[0] for name in sys.modules}
        rooms = {name for name in sys.modules if name.startswith("hedgerow.")}
        assert rooms == {"hedgerow.environment"}, rooms  # which keeps other libraries quiet
        assert not {"pydantic", "numpy", "rich", "typer"} & at_first, at_first
        assert set(dir(hr)) >= {"run", "open_run", "compare", "report", "Experiment", "methods"}
        hr.run, hr.methods.FLoRA(ranks=[8, 4]), hr.Experiment
        heavy = {"torch", "transformers", "peft", "numba", "pandas", "datasets"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    assert result.returncode == 0, result.stderr


def test_a_script_is_quiet_and_a_mistake_has_no_page_of_trace(experiment, tmp_path):
    path = experiment()
    result = python(f"import hedgerow as hr; hr.run({str(path)!r}, out={str(tmp_path / 'a')!r})")
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")


def test_an_interrupted_run_goes_on(experiment, tmp_path):
    """Ctrl-C in the middle of a round: what is written is valid, and the bytes are the same."""
    path = experiment()
    rounds = "federation.rounds=20"
    code = f"import hedgerow as hr; hr.run({str(path)!r}, {rounds!r}, out='part', resume=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )
    metrics = tmp_path / "part" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert "resume=True goes on with it" in said
    assert 1 <= hr.open_run(tmp_path / "part").rounds < 20
    part = hr.run(path, rounds, out=tmp_path / "part", resume=True)
    whole = hr.run(path, rounds, out=tmp_path / "whole")
    assert part.rounds == 20
    assert ledger_bytes(part.path) == ledger_bytes(whole.path)
