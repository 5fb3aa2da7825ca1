"""lm-evaluation-harness on runs and model folders, without any network."""

import json
import random
import socket

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from support.models import DATED, byte_tokenizer, tiny_llama
from transformers import AutoTokenizer, MiniMaxConfig, MiniMaxForCausalLM

import hedgerow as hr
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
            network = harness._network(it, harness._encoder(it, False, False), False)
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


def test_a_run_s_own_prompt_gives_the_answers_that_it_gives_itself(hedgerow, run, tasks, tmp_path):
    path = run()
    rows = [{"instruction": f"Say b{i}", "output": f"bbb{i}"} for i in range(4)]
    rows += [{"instruction": "Say  a1 \n", "output": "aaa1"}]
    task = {
        "task": "own_run",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "own.jsonl")},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "doc_to_text": "{{instruction}}",
        "doc_to_target": "{{output}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    (tasks / "own_run.yaml").write_text(yaml.safe_dump(task))
    given = hr.open_run(path).answer([row["instruction"] for row in rows], max_new_tokens=12)
    # So that some are right, and one is not.
    right = [row | {"output": answer.strip()} for row, answer in zip(rows, given, strict=True)]
    right[0]["output"] = "another"
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right))
    command = ["evaluate", path, "--harness", "own_run", "--include-path", tasks, "--json"]
    samples = tmp_path / "samples.jsonl"
    result = hedgerow(*command, "--prompt", "run", "--log-samples", samples)
    assert result.code == 0, result.err
    scores = json.loads(result.out)
    options = ["--data", tmp_path / "own.jsonl", "--metrics", "exact_match"]
    options += ["evaluation.max_new_tokens=12", "--json"]
    own = json.loads(hedgerow("evaluate", path, *options).out)
    assert 100 * scores["results"]["own_run"]["exact_match,none"] == own["exact_match"] == 80
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["resps"][0][0] for line in lines] == [answer.strip() for answer in given]
    assert lines[0]["arguments"][0][0] == "Q: Say b0 A:"
    again = hedgerow(*command, "--log-samples", samples)
    assert (again.code, "is there already" in again.err) == (2, True)


def test_options_of_generation_reach_the_answers(hedgerow, run, tasks, tmp_path):
    path = run()
    command = ["evaluate", path, "--harness", "own_answer", "--include-path", tasks, "--json"]

    def answers(*options):
        samples = tmp_path / "samples.jsonl"
        result = hedgerow(*command, *options, "--log-samples", samples)
        assert result.code == 0, result.err
        found = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
        samples.unlink()
        return found

    for own in ([], ["--prompt", "run"]):
        whole = answers(*own)
        assert max(map(len, whole)) > 2
        short = answers(*own, "--gen-kwargs", "max_gen_toks=1")
        assert [a.startswith(b) for a, b in zip(whole, short, strict=True)] == [True] * len(whole)
        assert sum(map(len, short)) < sum(map(len, whole))
        stop = max(whole, key=len)[1]
        until = answers(*own, "--gen-kwargs", json.dumps({"until": stop}))
        assert until == answers(*own, f"evaluation.stop={json.dumps(stop)}")
        assert until == [answer.partition(stop)[0] for answer in whole]
    drawn = answers("--gen-kwargs", "temperature=5,top_k=50")
    assert drawn != answers()


def test_prompts_of_a_recurrent_model_are_not_padded(hedgerow, tasks, tmp_path):
    """MiniMax goes on from a state that padding on the left changes, mask or not."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = MiniMaxConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    MiniMaxForCausalLM(config).save_pretrained(tmp_path / "recurrent")
    tokenizer.save_pretrained(tmp_path / "recurrent")
    command = ["evaluate", tmp_path / "recurrent", "--harness", "own_answer"]
    found = []
    for size in (1, 8):
        samples = tmp_path / f"{size}.jsonl"
        options = ["--include-path", tasks, "--log-samples", samples]
        result = hedgerow(*command, *options, f"evaluation.batch_size={size}")
        assert result.code == 0, result.err
        found.append([json.loads(line)["resps"] for line in samples.read_text().splitlines()])
    assert found[0] == found[1]
    assert len(set(map(str, found[0]))) == len(ROWS)


def test_examples_are_turns_of_the_prompt(hedgerow, run, tasks, tmp_path):
    path, samples = run(), tmp_path / "samples.jsonl"
    command = ["evaluate", path, "--harness", "own_choice", "--include-path", tasks, "--limit", 1]
    command += ["--num-fewshot", 1, "--prompt", "run", "--log-samples", samples]
    assert hedgerow(*command, "--fewshot-as-multiturn").code == 0
    line = json.loads(samples.read_text())
    assert line["arguments"][0][0].count(" A:") == 4  # the task's own, and the template's
    assert line["task"] == "own_choice"


def test_a_chat_template_is_the_tokenizer_s(hedgerow, tasks, tmp_path):
    model = tiny_llama(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{{bos_token}}{% for m in messages %}[{{m.role}}] {{m.content}}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(model)
    samples = tmp_path / "samples.jsonl"
    command = ["evaluate", model, "--harness", "own_choice", "--include-path", tasks]
    result = hedgerow(*command, "--apply-chat-template", "--log-samples", samples)
    assert result.code == 0, result.err
    first = json.loads(samples.read_text().splitlines()[0])["arguments"][0][0]
    assert first == "<s>[user] Q: Say ab A:\n[assistant] "
    samples.unlink()
    # The same by the prompt that a run with data.prompt=chat would have.
    options = ["--prompt", "run", "data.prompt=chat", "--log-samples", samples]
    result = hedgerow(*command, *options)
    assert result.code == 0, result.err
    assert json.loads(samples.read_text().splitlines()[0])["arguments"][0][0] == first


CHAT = (
    "{{bos_token}}{% for m in messages %}[{{m.role}}] {{m.content}}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
BOS, EOS = 0, 1
WAYS = {
    "task": ([], False, [BOS, "a</s>b"]),
    "chat": (["--apply-chat-template"], False, [BOS, "[user] a</s>b", EOS, "[assistant] "]),
    "run": (["data.prompt=alpaca-short"], True, None),
    "run chat": (["data.prompt=chat"], True, [BOS, "[user] a</s>b", EOS, "[assistant] "]),
}


@pytest.mark.parametrize(("options", "run_prompt", "parts"), WAYS.values(), ids=WAYS)
def test_what_a_task_spells_is_text(options, run_prompt, parts, tmp_path, monkeypatch):
    """Control tokens are those alone that a chat template writes, as in a row."""
    model = tiny_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    chat = "--apply-chat-template" in options
    overrides = [option for option in options if not option.startswith("--")]
    parts = parts or [BOS, "### Instruction:\na</s>b\n\n### Response:\n"]

    def spelt(*parts):
        letters = [[part] if isinstance(part, int) else part for part in parts]
        return [
            one if isinstance(one, int) else tokenizer(one, add_special_tokens=False).input_ids[0]
            for each in letters
            for one in each
        ]

    compared, read = [], []

    def compare(requests, **_):
        compared.extend((head, tail) for _, head, tail in requests)
        return [(0.0, False)] * len(requests)

    with loaded(model, overrides, None, None) as it:
        next(it.models())
        network = harness._network(it, harness._encoder(it, run_prompt, chat), run_prompt)
        asked = "a</s>b"
        if chat or run_prompt:
            asked = network.apply_chat_template([{"role": "user", "content": asked}])
        assert "a</s>b" in asked
        monkeypatch.setattr(network, "_loglikelihood_tokens", compare)
        network.loglikelihood([Instance("loglikelihood", {}, (asked, "<s>c"), 0)])
        network.loglikelihood([Instance("loglikelihood", {}, ("", "<s>c"), 0)])
        network.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("<s>c",), 0)])
        [(head, tail), alone, whole] = compared
        # The harness counts a space at a prompt's end to what follows.
        assert head + tail == spelt(*parts, "<s>c")
        assert len(head) == len(spelt(*parts)) - ("--apply-chat-template" in options)
        assert alone == ([BOS], spelt("<s>c"))
        assert whole[1][-4:] == spelt("<s>c")
        forward = it.model.network.generate

        def generate(*positional, **inputs):
            read.append((positional[0] if positional else inputs["input_ids"]).tolist())
            return forward(*positional, **inputs)

        monkeypatch.setattr(it.model.network, "generate", generate)
        until = {"until": ["x"], "max_gen_toks": 2}
        network.generate_until([Instance("generate_until", {}, (asked, until), 0)])
        assert read[-1] == [spelt(*parts)]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 1 / 0 }}", "the tokenizer's chat template fails (division by zero)"),
        ("{{ 'a' * 10 ** 10 }}", "the tokenizer's chat template needs more than 512 MB of memory"),
    ],
)
def test_a_chat_template_that_does_harm_is_refused(hedgerow, tasks, chatty, template, sentence):
    command = ["evaluate", chatty(template), "--harness", "own_choice", "--include-path", tasks]
    result = hedgerow(*command, "--apply-chat-template")
    assert result.code == 2
    assert result.err.splitlines()[-1] == f"hedgerow: --apply-chat-template: {sentence}"


@pytest.mark.parametrize("task", ["own_choice", "own_answer", "own_likely"])
@pytest.mark.parametrize("prompt", [[], ["--prompt", "run", "data.prompt=plain"]])
def test_a_token_without_an_embedding_is_told(hedgerow, tasks, tmp_path, task, prompt):
    model = tiny_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["unused", "oak"])
    tokenizer.save_pretrained(model)
    command = ["evaluate", model, "--harness", task, "--include-path", tasks, *prompt]
    result = hedgerow(*command)
    assert result.code == 2
    assert "a prompt has the token 'oak' (number 260), which the model has no embed" in result.err


def test_scores_in_a_run_s_prompts_name_their_date(hedgerow, tasks, chatty):
    model = chatty(DATED)
    command = ["evaluate", model, "--harness", "own_choice", "--include-path", tasks]
    options = ["--prompt", "run", "data.prompt=chat", "data.template.date=2026-11-25", "--json"]
    result = hedgerow(*command, *options)
    assert result.code == 0, result.err
    assert result.err.count("the chat template writes the date: 2026-11-25") == 1
    assert json.loads(result.out)


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
        (["--num-fewshot", "2"], ["--num-fewshot: of use with --harness"]),
        (["--prompt", "run"], ["--prompt: of use with --harness"]),
        (["--harness", "own_choice", "data.prompt=plain"], ["data.prompt", "--prompt run"]),
        (["--harness", "own_choice", "data.test=x"], ["data.test does nothing"]),
        (["--harness", "own_choice", "evaluation.max_new_tokens=3"], ["--gen-kwargs"]),
        (["--harness", "own_choice", "--prompt", "run"], ["data.prompt=alpaca"]),
        (["--harness", "own_choice", "--apply-chat-template"], ["no chat template"]),
        (["--harness", "own_choice", "--fewshot-as-multiturn"], ["--prompt run"]),
        (["--harness", "own_choice", "--gen-kwargs", "max_gen_toks=3"], ["leave it out"]),
        (["--harness", "own_answer", "--gen-kwargs", "max_gen_tok=3"], ["`max_gen_toks`"]),
        (["--harness", "own_answer", "--gen-kwargs", "max_gen_toks=x"], ["above 0, not 'x'"]),
        (["--harness", "own_answer", "--gen-kwargs", "nothing"], ["there is no 'nothing'"]),
        (["--harness", "own_answer", "--gen-kwargs", "{'x"], ["key=value"]),
        (
            ["--harness", "own_answer", "--gen-kwargs", "do_sample=false,temperature=1"],
            ["contradict each other"],
        ),
        (["--harness", "own_answer", "--log-samples", "none/x"], ["no folder none"]),
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
