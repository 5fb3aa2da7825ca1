"""MT-bench's questions: how a model answers both turns, and goes on with answers."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.models import byte_tokenizer, random_llama

from hedgerow.benchmarks import mt_bench
from hedgerow.data import Encoder, Row, in_turns, load_template
from hedgerow.evaluation.answers import Draw, generate
from hedgerow.model import Model
from hedgerow.settings import ModelSettings, TextSettings

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write on b1.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["Add 1 and 2.", "Add 3."]},
    {"question_id": 121, "category": "coding", "turns": ["Print a.", "And b."]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path):
    """The answers of a file, by question."""
    return {line["question_id"]: line["choices"][0]["turns"] for line in lines(path)}


def untimed(line):
    """An answer without its time."""
    return {key: value for key, value in json.loads(line).items() if key != "tstamp"}


@pytest.fixture
def questions(tmp_path):
    return write(tmp_path / "question.jsonl", QUESTIONS)


@pytest.fixture
def answer(hedgerow, questions):
    """Answer the questions with a few tokens each."""

    def run(target, out, *arguments):
        command = ["mt-bench", "answer", target, "--questions", questions, "--out", out]
        return hedgerow(*command, "--max-new-tokens", 6, *arguments)

    return run


@pytest.fixture(scope="module")
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


def test_answers_are_in_the_fields_format(answer, tiny_model, tmp_path):
    out = tmp_path / "answers.jsonl"
    result = answer(tiny_model, out)
    assert result.code == 0, result.err
    assert "3 answers of tiny (0 were there), prompt alpaca, at most 6 tokens a turn" in result.out
    rows = lines(out)
    assert [row["question_id"] for row in rows] == [81, 111, 121]
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "tiny"
        [choice] = row["choices"]
        assert choice["index"] == 0
        assert [type(turn) for turn in choice["turns"]] == [str, str]
    assert len({row["answer_id"] for row in rows}) == 3


@pytest.mark.parametrize("number", [1, 2])
def test_the_second_turn_sees_the_first_and_its_answer(answer, model, tmp_path, number):
    """Greedy answers, as of math and coding, are those to the prompts that one would write."""
    out = tmp_path / "answers.jsonl"
    assert answer(model.network.name_or_path, out, "data.prompt=alpaca-short").code == 0
    question = QUESTIONS[number]
    block = "### Instruction:\n{}\n\n### Response:\n"
    first, second = map(block.format, question["turns"])
    given = texts(out)[question["question_id"]]
    for prompt, text in [(first, given[0]), (f"{first}{given[0]}\n\n{second}", given[1])]:
        ids = np.array(model.tokenizer(prompt)["input_ids"], dtype=np.int32)
        expected, _ = generate(model, [ids], 6, 1, lambda count: None)
        assert text == expected[0].strip()


def test_turns_end_before_a_stop(answer, tiny_model, tmp_path):
    out, stopped = tmp_path / "answers.jsonl", tmp_path / "stopped.jsonl"
    assert answer(tiny_model, out).code == 0
    whole = {number: turns[0] for number, turns in texts(out).items()}
    stop = max(whole.values(), key=len)[1]
    assert answer(tiny_model, stopped, f"evaluation.stop={json.dumps(stop)}").code == 0
    cut = {number: turns[0] for number, turns in texts(stopped).items()}
    assert cut == {number: text.partition(stop)[0].strip() for number, text in whole.items()}
    again = answer(tiny_model, stopped)
    assert (again.code, "of another model, round, question file or setting" in again.err) == (2, 1)


def test_introductions_stand_once_and_chats_have_roles():
    tokenizer = byte_tokenizer()
    alpaca = load_template(TextSettings(prompt="alpaca"), tokenizer)
    rendered = alpaca.prompt(in_turns(["one", "yes", "two"]))
    assert rendered.startswith("Below is an instruction that describes a task. Write a response")
    assert rendered.count("Below is") == 1
    assert rendered.endswith(
        "### Instruction:\none\n\n### Response:\nyes\n\n### Instruction:\ntwo\n\n### Response:\n"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = load_template(TextSettings(prompt="chat"), tokenizer)
    rendered = chat.prompt(in_turns(["one", "yes", "two"]))
    assert rendered == "<user>one</s><assistant>yes</s><user>two</s><assistant>"


@pytest.mark.parametrize("name", ["alpaca", "alpaca-short", "plain", "file"])
def test_a_conversation_of_one_turn_is_a_rows_prompt(tmp_path, name):
    if name == "file":
        name = str(tmp_path / "template.txt")
        (tmp_path / "template.txt").write_text("On {input}\n\nU: {instruction}\n\nA: ")
    template = load_template(TextSettings(prompt=name), byte_tokenizer())
    text = "What is {input}?\n\nAnd {instruction}?"
    assert template.prompt(in_turns([text])) == template.prompt(Row(text))


def test_the_tokenizers_own_template_comes_first(answer, tiny_model, tmp_path):
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_model, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    assert "prompt chat" in answer(folder, tmp_path / "chat.jsonl").out
    result = answer(folder, tmp_path / "alpaca.jsonl", "data.prompt=alpaca")
    assert "prompt alpaca" in result.out
    assert texts(tmp_path / "chat.jsonl") != texts(tmp_path / "alpaca.jsonl")


def test_draws_follow_the_softmax_and_repeat(model):
    """The first token of many draws from one prompt, against the model's own probabilities."""
    prompt = np.array([0, 70, 80, 90], dtype=np.int32)
    with torch.inference_mode():
        logits = model.network(torch.tensor(prompt.tolist())[None]).logits[0, -1].double()
    count, temperature = 2000, 0.05  # the random model is nearly uniform; this is not

    def drawn(batch_size):
        draws = [Draw(temperature, torch.Generator().manual_seed(seed)) for seed in range(count)]
        seen = np.zeros(len(logits))
        tokens = []
        decode, model.tokenizer.batch_decode = (
            model.tokenizer.batch_decode,
            lambda ids, **_: tokens.extend(row[0] if row else 1 for row in ids) or [""] * len(ids),
        )
        try:
            generate(model, [prompt] * count, 1, batch_size, lambda n: None, draws)
        finally:
            model.tokenizer.batch_decode = decode
        np.add.at(seen, tokens, 1)
        return seen, tokens

    seen, tokens = drawn(500)
    expected = count * torch.softmax(logits / temperature, -1).numpy()
    likely = expected > 5
    chi2 = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum()
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)
    assert drawn(77)[1] == tokens


def test_only_some_categories_are_drawn(answer, tiny_model, tmp_path, questions):
    """Each at its temperature, by seeds that depend on the question; the same again."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert answer(tiny_model, one).code == 0
    rows = [row | {"category": "math"} for row in QUESTIONS]
    write(questions, rows)
    assert answer(tiny_model, other).code == 0
    greedy, mixed = texts(other), texts(one)
    assert greedy[111] == mixed[111]
    assert greedy[121] == mixed[121]
    assert greedy[81] != mixed[81]
    write(questions, QUESTIONS)
    again = tmp_path / "again.jsonl"
    assert answer(tiny_model, again, "evaluation.batch_size=1").code == 0
    assert texts(again) == mixed


def test_an_interrupted_file_goes_on_where_it_was(answer, tiny_model, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert answer(tiny_model, out).code == 0
    whole = out.read_bytes()
    ends = [number for number, byte in enumerate(whole) if byte == ord("\n")]
    for kept, size in [(0, 0), (0, 40), (1, ends[1] - 5), (1, ends[1]), (2, ends[1] + 1)]:
        out.write_bytes(whole[:size])
        result = answer(tiny_model, out)
        assert f"3 answers of tiny ({kept} were there)" in result.out
        now = out.read_bytes()
        assert now.splitlines()[:kept] == whole.splitlines()[:kept]
        assert [untimed(line) for line in now.splitlines()] == [
            untimed(line) for line in whole.splitlines()
        ]
    before = out.read_bytes()
    assert "(3 were there)" in answer(tiny_model, out).out
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        ["--max-new-tokens", "5"],
        ["--model-id", "another"],
        ["data.prompt=plain"],
        ["another model"],
        ["another question"],
    ],
)
def test_answers_of_something_else_are_left_alone(answer, tiny_model, tmp_path, questions, change):
    out = tmp_path / "answers.jsonl"
    assert answer(tiny_model, out).code == 0
    before = out.read_bytes()
    target = tiny_model
    if change == ["another model"]:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        target, change = random_llama(tmp_path / "tiny", **sizes, **heads), []
    elif change == ["another question"]:
        write(questions, [QUESTIONS[0] | {"turns": ["Write on b2.", "Shorter."]}, *QUESTIONS[1:]])
        change = []
    result = answer(target, out, *change)
    assert result.code == 2
    assert "another model, round, question file or setting: name another file" in result.err
    assert out.read_bytes() == before


def test_rounds_of_a_run(hedgerow, answer, experiment, tmp_path, tiny_model):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(training={"learning_rate": 0.1}), "--out", run).code == 0
    base, last = tmp_path / "base.jsonl", tmp_path / "last.jsonl"
    assert "answers of run-round-0 " in answer(run, base, "--round", 0).out
    assert "answers of run-round-2 " in answer(run, last).out
    assert texts(base) != texts(last)
    assert "another model, round" in answer(run, base, "--round", 1, "--model-id", "x").err
    result = answer(run, base, "--round", 1, "--model-id", "run-round-0")
    assert (result.code, "another model, round" in result.err) == (2, True)
    packed, base_path = tmp_path / "run-round-2", f"model.path={tiny_model}"
    assert hedgerow("export", run, packed, "--to", "ledger").code == 0
    assert "(3 were there)" in answer(packed, last, base_path, "--model-id", "run-round-2").out


def test_a_standalone_run_answers_as_one_client(hedgerow, answer, experiment, tmp_path):
    run, out = tmp_path / "run", tmp_path / "answers.jsonl"
    assert hedgerow("run", experiment(), "method.name=standalone", "--out", run).code == 0
    result = answer(run, out)
    assert (result.code, "name one with --client (client-000, client-001" in result.err) == (
        2,
        True,
    )
    assert not out.exists()
    result = answer(run, out, "--client", "client-001")
    assert "answers of run-round-2-client-001 " in result.out


def test_answers_leave_half_of_the_positions_to_prompts(hedgerow, questions, tiny_model, tmp_path):
    long = "word " * 40  # 200 of 256 positions, and 128 of them are the answer's
    write(questions, [QUESTIONS[1], QUESTIONS[2] | {"turns": [long, "Why?"]}])
    out = tmp_path / "answers.jsonl"
    command = ["mt-bench", "answer", tiny_model, "--questions", questions, "--out", out]
    result = hedgerow(*command, "data.prompt=plain")
    assert "at most 128 tokens a turn" in result.out
    assert "prompts cut on the left" in result.out
    assert int(result.out.split(" prompts cut")[0].split()[-1]) >= 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question_id": 1, "category": "math", "turns": ["one"]}', ["line 2", "turns"]),
        ('{"question_id": 1, "category": "math", "turns": ["a", "b", "c"]}', ["line 2", "turns"]),
        ('{"question_id": 1, "category": "math", "turns": ["a", 2]}', ["line 2", "turns"]),
        ('{"question_id": 1, "category": "math", "turns": ["a", ""]}', ["line 2", "turns"]),
        ('{"category": "math", "turns": ["a", "b"]}', ["line 2", "question_id"]),
        ('{"question_id": 1, "turns": ["a", "b"]}', ["line 2", "category"]),
        ("no json", ["line 2", "JSON"]),
        (json.dumps(QUESTIONS[0]), ["question 81 appears twice"]),
    ],
)
def test_bad_questions(answer, questions, tiny_model, tmp_path, line, words):
    questions.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    result = answer(tiny_model, tmp_path / "out.jsonl")
    assert result.code == 2
    assert all(word in result.err for word in ["question.jsonl", *words]), result.err
    assert not (tmp_path / "out.jsonl").exists()


def test_questions_that_are_missing(answer, questions, tiny_model, tmp_path):
    questions.write_text("\n")
    assert "holds no questions" in answer(tiny_model, tmp_path / "out.jsonl").err
    questions.unlink()
    result = answer(tiny_model, tmp_path / "out.jsonl")
    assert (result.code, "question.jsonl cannot be read" in result.err) == (2, True)


def test_a_file_that_somebody_else_writes_to(answer, tiny_model, tmp_path):
    out = tmp_path / "answers.jsonl"
    with mt_bench.appending_json_lines(out, mt_bench.Answer):
        result = answer(tiny_model, out)
    assert (result.code, "written to by another hedgerow process" in result.err) == (2, True)
    assert not out.exists()


@pytest.mark.parametrize("text", ['{"mine": 1}', "notes", '{"question_id"; '])
def test_a_file_of_something_else_is_left_alone(answer, tiny_model, tmp_path, text):
    """It has no end of a line, as what a kill has cut short has none."""
    out = tmp_path / "mine.json"
    out.write_text(text)
    result = answer(tiny_model, out)
    assert (result.code, "mine.json: its last line" in result.err) == (2, True)
    assert out.read_text() == text


def test_a_folder_that_is_not_there(answer, tiny_model, tmp_path):
    result = answer(tiny_model, tmp_path / "none" / "out.jsonl")
    assert (result.code, f"there is no folder {tmp_path / 'none'}" in result.err) == (2, True)


def test_prompts_have_no_eos_at_their_end():
    tokenizer = byte_tokenizer()
    template = load_template(TextSettings(prompt="plain"), tokenizer)
    [ids] = Encoder(template, tokenizer).prompts([Row("ab")], "rows")
    assert tokenizer.eos_token_id not in ids
    assert len(ids) == 5


@pytest.mark.slow
def test_a_kill_leaves_a_file_to_go_on_with(questions, tiny_model, tmp_path, answer):
    """A process that is killed while it answers, one question at a time."""
    write(questions, [QUESTIONS[1] | {"question_id": number} for number in range(40)])
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "hedgerow", "mt-bench", "answer", tiny_model]
    command += ["--questions", questions, "--out", out, "--max-new-tokens", 6]
    command.append("evaluation.batch_size=1")
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and b"\n" in out.read_bytes()):
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = out.read_bytes().count(b"\n")
    assert kept >= 1
    result = answer(tiny_model, out, "evaluation.batch_size=1")
    assert f"40 answers of tiny ({kept} were there)" in result.out
    assert [row["question_id"] for row in lines(out)] == list(range(40))


@pytest.mark.shared
def test_the_real_questions_on_a_real_model(hedgerow, shared, tmp_path):
    questions = shared / "data" / "mt_bench" / "question.jsonl"
    out = tmp_path / "answers.jsonl"
    model = shared / "models" / "stories260k"
    command = ["mt-bench", "answer", model, "--questions", questions, "--out", out]
    result = hedgerow(*command, "--max-new-tokens", 2, "data.prompt=plain")
    assert result.code == 0, result.err
    assert "80 answers of stories260k" in result.out
    assert all(len(turns) == 2 for turns in texts(out).values())
