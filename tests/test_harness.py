"""lm-evaluation-harness on runs and model folders, without any network."""

import json
import random
import socket

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from hedgerow import demo
from hedgerow.benchmarks import harness
from hedgerow.data import Encoder, Records, check, load_template
from hedgerow.evaluation.choices import Choices, log_likelihoods
from hedgerow.runs.scoring import loaded

ROWS = [
    {"instruction": f"Say {word}", "choices": [word * 3, word.upper(), "no"], "answer": 0}
    for word in ("ab", "sea", "b", "oak", "sky")
]
TEMPLATE = "Q: {instruction} A:"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network is touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of each kind, and a group of them, on rows of our own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(rows)},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "doc_to_text": "Q: {{instruction}} A:",
    }
    choice = {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    answer = {
        "task": "own_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    likely = {
        "task": "own_likely",
        "output_type": "loglikelihood",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    long = answer | {"task": "own_long", "generation_kwargs": {"max_gen_toks": 256}}
    column = choice | {"task": "own_column", "doc_to_text": "{{question}}"}
    for task in (choice, answer, likely, long, column):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture
def run(hedgerow, experiment, tmp_path):
    """Two rounds of a method on the built-in model, whose prompts are those of the tasks."""

    def made(*overrides):
        (tmp_path / "prompt.txt").write_text(TEMPLATE)
        path = experiment(
            model={"path": str(demo.MODEL)},
            data={"prompt": "prompt.txt", "fields": {"input": None}},
            training={"steps": 4},
        )
        result = hedgerow("run", path, *overrides, "--out", tmp_path / "run")
        assert result.code == 0, result.err
        return tmp_path / "run"

    return made


def likelihoods(target, round):
    """Of each option of each row: as the harness finds it, and as hedgerow does."""
    with loaded(target, [], round, None) as it:
        for _ in it.models():
            network = harness._Network(
                pretrained=it.model.network, tokenizer=it.model.tokenizer, batch_size=4
            )
            requests = [
                Instance("loglikelihood", row, (f"Q: {row['instruction']} A:", choice), 0)
                for row in ROWS
                for choice in row["choices"]
            ]
            theirs = [likelihood for likelihood, _ in network.loglikelihood(requests)]
            tokenizer = it.model.tokenizer
            encoder = Encoder(load_template(it.data, tokenizer), tokenizer)
            rows = check(Records.of(ROWS, "rows"), it.data.fields, answered=False)
            choices = Choices.prepare("multiple_choice", "rows", rows, encoder)
            with torch.inference_mode():
                ours, _ = log_likelihoods(it.model, choices, 4, lambda count: None)
    return np.array(theirs), np.concatenate(ours)


@pytest.mark.parametrize("method", ["flora", "method={name: fedit, ranks: 4}"])
def test_likelihoods_agree_with_hedgerows_own_in_every_round(run, method):
    """FLoRA merges what it adds into the weights; FedIT keeps an adapter beside them."""
    path = run(*([method] if "=" in method else []))
    base, _ = likelihoods(demo.MODEL, None)
    for round in (0, 1, 2):
        theirs, ours = likelihoods(path, round)
        assert theirs == pytest.approx(ours, abs=1e-4)
        changed = abs(theirs - base).max()
        assert changed < 1e-6 if round == 0 else changed > 0.01


def test_accuracies_are_those_of_multiple_choice(hedgerow, run, tasks):
    path = run()
    command = ["evaluate", path, "--harness", "own_choice", "--include-path", tasks]
    result = hedgerow(*command, "--json")
    assert result.code == 0, result.err
    scores = json.loads(result.out)
    rows = ["--data", tasks / "rows.jsonl", "--metrics", "multiple_choice"]
    own = json.loads(hedgerow("evaluate", path, *rows, "--json").out)
    theirs = scores["results"]["own_choice"]
    assert 100 * theirs["acc,none"] == pytest.approx(own["accuracy"])
    assert 100 * theirs["acc_norm,none"] == pytest.approx(own["accuracy_norm"])
    assert theirs["acc_stderr,none"] >= 0
    assert scores["n-samples"]["own_choice"] == {"original": 5, "effective": 5}
    assert (scores["n-shot"]["own_choice"], scores["prompts_cut"]) == (0, 0)
    assert "own_choice" in hedgerow(*command).out


def test_options_reach_the_harness_and_scores_repeat(hedgerow, tasks):
    command = ["evaluate", demo.MODEL, "--harness", "own_choice, own_answer"]
    command += ["--include-path", tasks, "--num-fewshot", 2, "--limit", 3, "--json"]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = hedgerow(*command)
    assert first.code == 0, first.err
    scores = json.loads(first.out)
    assert scores["n-shot"] == {"own_choice": 2, "own_answer": 2}
    assert scores["n-samples"]["own_choice"]["effective"] == 3
    assert "exact_match,none" in scores["results"]["own_answer"]
    assert hedgerow(*command).out == first.out
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states


def test_json_is_all_that_is_printed(hedgerow, tasks, monkeypatch):
    """The harness prints as it draws samples for standard errors."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    command = ["evaluate", demo.MODEL, "--harness", "own_likely", "--include-path", tasks]
    result = hedgerow(*command, "--limit", 2, "--json")
    assert json.loads(result.out)["results"]["own_likely"]["perplexity_stderr,none"] > 0
    assert "bootstrapping" in result.err
    assert "Running loglikelihood" not in result.err


def test_prompts_that_do_not_fit_are_counted(hedgerow, tasks):
    lines = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    lines[1]["instruction"] = "long " * 60
    (tasks / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["evaluate", demo.MODEL, "--harness", "own_choice,own_answer"]
    result = hedgerow(*command, "--include-path", tasks)
    assert "4 prompts cut on the left" in result.out  # three options, and an answer


def test_each_client_of_a_standalone_run_has_its_own_scores(hedgerow, run, tasks):
    path = run("method.name=standalone")
    command = ["evaluate", path, "--harness", "own_choice", "--include-path", tasks]
    scores = json.loads(hedgerow(*command, "--json").out)
    clients = [f"client-{number:03}" for number in range(3)]
    assert list(scores["by_client"]) == clients
    accuracies = [
        scores["by_client"][name]["results"]["own_choice"]["acc,none"] for name in clients
    ]
    assert scores["results"]["own_choice"]["acc,none"] == pytest.approx(np.mean(accuracies))
    alone = json.loads(hedgerow(*command, "--client", clients[1], "--json").out)
    assert alone["by_client"] == {clients[1]: scores["by_client"][clients[1]]}
    assert clients[2] in hedgerow(*command).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--harness", "own_choise"], ["own_choise", "did you mean `own_choice`"]),
        (["--harness", "own_*", "--metrics", "loss"], ["leave out --data, --metrics, --by"]),
        (["--harness", ","], ["needs a task"]),
        (["--harness", "own_choice", "--limit", "0"], ["--limit a question"]),
        (["--harness", "own_choice", "--limit", "nan"], ["--limit a question"]),
        (["--harness", "own_long"], ["own_long", "256 tokens", "256 positions"]),
        (["--harness", "own_column"], ["own_column cannot be loaded", "question"]),
        (["--num-fewshot", "2"], ["belong to --harness"]),
    ],
)
def test_a_mistake(hedgerow, tasks, monkeypatch, arguments, words):
    manager = harness.TaskManager
    monkeypatch.setattr(  # thousands of the harness's own files, which take seconds
        harness, "TaskManager", lambda **options: manager(**options | {"include_defaults": False})
    )
    if "--num-fewshot" not in arguments:
        arguments = [*arguments, "--include-path", tasks]
    result = hedgerow("evaluate", demo.MODEL, *arguments)
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("hedgerow: ")
    assert all(word in last for word in words), result.err


def test_a_folder_of_tasks_that_is_not_there(hedgerow, tmp_path):
    result = hedgerow("evaluate", demo.MODEL, "--harness", "x", "--include-path", tmp_path / "none")
    assert (result.code, "--include-path" in result.err) == (2, True)


@pytest.mark.slow  # the harness's own files are thousands
def test_the_harness_knows_its_own_tasks_beside_a_folder(tasks):
    manager = harness._manager(["own_choice", "mmlu_anatomy"], tasks)
    assert {"own_choice", "mmlu_anatomy", "gsm8k"} <= set(manager.all_tasks)


def test_without_lm_eval(hedgerow, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = hedgerow("evaluate", demo.MODEL, "--harness", "mmlu")
    assert (result.code, "pip install 'hedgerow[harness]'" in result.err) == (2, True)
