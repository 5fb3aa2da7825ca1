import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.experiments import SHARED
from support.models import byte_tokenizer
from tokenizers import processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
)

from hedgerow.console import named_scores
from hedgerow.console import score as console_score
from hedgerow.data import Records, Row, check, collate, read
from hedgerow.errors import UserError
from hedgerow.evaluation.answers import check_positions, generate
from hedgerow.evaluation.choices import log_likelihoods, read_question
from hedgerow.evaluation.metrics.final_answer import FinalAnswer
from hedgerow.evaluation.scores import TestSet, evaluate
from hedgerow.files import to_json
from hedgerow.model import Model, max_positions
from hedgerow.settings import DataSettings, EvaluationSettings, Fields, ModelSettings
from hedgerow.training.loss import batch_loss

ALL = ["loss", "rouge_l", "exact_match", "multiple_choice"]
ROWS = [
    {"instruction": "Which?", "input": "Options: A. sea, B. big sky", "output": "B. big sky"},
    {"instruction": "Which is it?", "input": "Options: A. oak, B. ash, C. fir", "output": "A. oak"},
    {"instruction": "And of these?", "input": "Options: A. x, B. y", "output": "A. x"},
    {"instruction": "Why?", "input": "", "output": "because it is so"},
]
ROWS = [row | {"kind": kind} for row, kind in zip(ROWS, ["b", "a", "b", "a"], strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that reads bytes."""
    tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform, so that no two scores are nearly equal
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return Model.load(ModelSettings(path=str(folder), device="cpu"))


def prepare(model, rows=ROWS, max_length=128, prompt="plain", **evaluation):
    data = DataSettings(clients="c_{}.json", test="test.json", prompt=prompt, max_length=max_length)
    settings = EvaluationSettings(**{"max_new_tokens": 8} | evaluation)
    answered = settings.metrics != ["multiple_choice"]
    rows = check(Records.of(rows, "test.json"), data.fields, answered=answered)
    return TestSet.prepare(rows, data, settings, model.tokenizer), settings


def score(model, rows=ROWS, **options):
    test, settings = prepare(model, rows, **options)
    return evaluate(model, test, settings)


# --- loss -----------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_answer_tokens(model):
    test, settings = prepare(model)
    total, tokens = 0.0, 0
    for index in range(len(test)):
        batch = collate([test.examples[index]], 2)
        count = int((batch["labels"] != -100).sum())
        total += float(model.network(**batch).loss) * count
        tokens += count
    scores = evaluate(model, test, settings)
    assert scores["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert scores["eval_perplexity"] == pytest.approx(torch.tensor(total / tokens).exp().item())
    assert set(scores) == {"eval_loss", "eval_perplexity"}


def test_long_answers_are_cut_and_rows_without_an_answer_do_not_count(model):
    rows = [*ROWS, {"instruction": "long " * 20, "output": "ash"}]
    test, settings = prepare(model, rows, max_length=21)
    # "Why?" and two newlines, after <s>, leave 14 of the 16 bytes of its answer; the rest, none.
    assert (len(test), test.truncated, test.dropped) == (5, 1, 4)
    example = test.examples[3]
    input_ids = torch.tensor(example.tokens[:21].tolist())[None]
    labels = input_ids.clone()
    labels[:, : example.prompt_length] = -100
    expected = model.network(input_ids=input_ids, labels=labels).loss.item()
    assert evaluate(model, test, settings)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_nothing_is_left_of_is_an_error(model):
    with pytest.raises(UserError, match=r"data\.max_length.*has 7 tokens.*fills 5"):
        prepare(model, max_length=5)


# --- all metrics ----------------------------------------------------------------------------------


def test_batch_size_changes_nothing(model):
    one = score(model, metrics=ALL, batch_size=1)
    assert set(one) == {
        "eval_loss",
        "eval_perplexity",
        "rouge_l",
        "exact_match",
        "answer_prompts_cut",
        "accuracy",
        "accuracy_norm",
        "accuracy_chance",
        "choice_prompts_cut",
    }
    assert score(model, metrics=ALL, batch_size=3) == pytest.approx(one, rel=1e-5)
    assert score(model, metrics=ALL, batch_size=64) == pytest.approx(one, rel=1e-5)


def test_scores_by_a_column_average_to_the_total(model):
    scores = score(model, ROWS[:3] + ROWS[1:], metrics=ALL, by="kind")
    for name in ["rouge_l", "exact_match", "accuracy", "accuracy_norm", "accuracy_chance"]:
        a, b = scores[f"{name}_by"]["a"], scores[f"{name}_by"]["b"]
        in_a, in_b = (3, 3) if name in ("rouge_l", "exact_match") else (2, 3)
        assert (a * in_a + b * in_b) / (in_a + in_b) == pytest.approx(scores[name])
    answers = {
        kind: [r["output"] for r in ROWS[:3] + ROWS[1:] if r["kind"] == kind] for kind in "ab"
    }
    tokens = {kind: sum(len(text) + 1 for text in texts) for kind, texts in answers.items()}
    total = sum(scores["eval_loss_by"][kind] * tokens[kind] for kind in "ab")
    assert total / sum(tokens.values()) == pytest.approx(scores["eval_loss"])
    assert list(scores["eval_loss_by"]) == ["a", "b"]


def test_a_model_need_not_say_how_many_positions_it_has(model, monkeypatch):
    limited = score(model, metrics=ALL)
    monkeypatch.setattr(model.network, "config", MambaConfig())
    assert max_positions(model.network) == sys.maxsize
    monkeypatch.undo()
    for module in ("answers", "choices"):
        name = f"hedgerow.evaluation.{module}.max_positions"
        monkeypatch.setattr(name, lambda network: sys.maxsize)
    assert score(model, metrics=ALL) == limited


def test_an_attached_adapter_counts(model):
    plain = score(model, metrics=ALL)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    torch.manual_seed(0)
    factors = {
        f"{name}.lora_A.weight": torch.randn(2, 32),
        f"{name}.lora_B.weight": torch.zeros(64, 2),
    }
    with model.with_factors(factors):
        assert score(model, metrics=ALL) == pytest.approx(plain, rel=1e-5)
    factors[f"{name}.lora_B.weight"] = torch.randn(64, 2)
    with model.with_factors(factors):
        assert score(model, metrics=ALL)["eval_loss"] != pytest.approx(plain["eval_loss"], rel=1e-3)


def test_progress_reaches_its_total(model):
    test, settings = prepare(model, metrics=ALL, batch_size=2)
    steps = []
    evaluate(model, test, settings, lambda done, total: steps.append((done, total)))
    total = 4 + 4 + (2 + 3 + 2)
    assert steps[-1] == (total, total)
    assert steps == sorted(set(steps))


def test_groups_of_values_that_are_no_texts(model):
    kinds = [None, True, float("nan"), "x" * 300]
    rows = [row | {"kind": kind} for row, kind in zip(ROWS, kinds, strict=True)]
    scores = score(model, rows, metrics=["loss"], by="kind")
    assert list(scores["eval_loss_by"]) == ["null", "true", "x" * 300]


def test_a_model_that_has_diverged_has_no_accuracy_and_no_nan_in_its_json(taught):
    weight = taught.network.lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
        scores = score(taught, metrics=["loss", "multiple_choice"])
        weight.copy_(before)
    assert math.isnan(scores["eval_loss"])
    assert math.isnan(scores["accuracy"])
    assert json.loads(to_json(scores), parse_constant=pytest.fail)["eval_loss"] is None
    named = named_scores(json.loads(to_json(scores)), ["loss", "multiple_choice"])
    assert {label: console_score(value) for label, value in named.items()} == {
        "loss": "nan",
        "perplexity": "nan",
        "accuracy": "nan",
        "accuracy (normalised)": "nan",
        "chance": "44.44",
    }


def test_a_folder_s_scores_are_json_whatever_they_are(hedgerow, folder, tmp_path, model):
    model.network.lm_head.weight.fill_(math.nan)
    model.network.save_pretrained(tmp_path / "nan")
    model.tokenizer.save_pretrained(tmp_path / "nan")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    command = ["evaluate", tmp_path / "nan", "data.prompt=plain", "data.max_length=64"]
    command += ["--data", tmp_path / "rows.json", "--by", "kind"]
    result = hedgerow(*command, "--json")
    assert result.code == 0, result.err
    scores = json.loads(result.out, parse_constant=pytest.fail)
    assert (scores["eval_loss"], scores["eval_loss_by"]) == (None, {"a": None, "b": None})
    assert "nan" in hedgerow(*command).out


def test_answers_end_before_a_stop(taught):
    prompts = [
        np.array(taught.tokenizer(f"{row['instruction']}\n\n{row['input']}\n\n")["input_ids"])
        for row in ROWS[:2]
    ] + [np.array(taught.tokenizer("Why?\n\n")["input_ids"])]
    prompts = [prompt.astype(np.int32) for prompt in prompts]
    whole, _ = generate(taught, prompts, 32, 3, lambda count: None)
    assert whole == ["B. big sky", "A. oak", "because it is so"]
    steps = []
    taught.network.register_forward_hook(lambda *_: steps.append(1))
    cut, _ = generate(taught, prompts, 32, 3, lambda count: None, stop=[" is", "sky", "oak"])
    assert cut == ["B. big ", "A. ", "because it"]
    assert len(steps) < len(" because it is so")
    assert generate(taught, prompts, 32, 3, lambda count: None, stop=["B", "zz"])[0][0] == ""
    stopped = score(taught, metrics=["exact_match"], max_new_tokens=32, stop=" is so")
    assert stopped["exact_match"] == 75


@pytest.mark.parametrize("stop", [[""], [1], {"a": 1}])
def test_stops_that_are_no_texts(stop):
    with pytest.raises(ValueError, match="a list of texts that are not empty"):
        EvaluationSettings(stop=stop)


def test_a_missing_column_is_named(model):
    with pytest.raises(UserError, match=r"evaluation\.by.*row 1 of test\.json.*'class'.*'kind'"):
        prepare(model, by="class")


def test_no_rows_are_an_error(model):
    with pytest.raises(UserError, match=r"test\.json"):
        prepare(model, [])


def test_an_empty_prompt_is_an_error_where_an_answer_is_asked_for(model, tmp_path):
    template = tmp_path / "bare.txt"
    template.write_text("{instruction}")
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    rows = [{"instruction": "", "input": "not used", "output": "an answer"}]
    assert len(prepare(model, rows, prompt=str(template))[0]) == 1
    with pytest.raises(UserError, match="empty prompt"):
        prepare(model, rows, prompt=str(template), metrics=["exact_match"])


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(folder):
    """A model that knows the answers of ROWS by heart."""
    model = Model.load(ModelSettings(path=str(folder), device="cpu"))
    test, _ = prepare(model)
    batch = collate([test.examples[index] for index in range(len(test))], 2)
    optimizer = torch.optim.AdamW(model.unfreeze().values(), lr=3e-3)
    for _ in range(200):
        loss, count = batch_loss(model.network, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss / count < 0.01:
            break
    return model


def test_a_model_that_knows_the_answers_is_right(taught):
    scores = score(taught, metrics=ALL, max_new_tokens=32)
    assert scores["exact_match"] == scores["rouge_l"] == scores["accuracy"] == 100
    assert scores["eval_loss"] < 0.02


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("4 + 5 = 9\n#### 9", "So it is 9.\n#### 9", True),
        ("#### 1,000", "The answer is $1000.00.", True),
        ("#### -3", "10 - 13 = -3", True),
        ("#### 5", "10-5", True),
        ("#### 9", "#### 9\n\nQuestion: what is 7?\n#### 7", True),
        ("#### 9", "9 apples and 8 pears", False),
        ("#### 9", "#### nine, and 9 before it is not after the mark", True),
        ("#### 9", "nine", False),
        ("nine", "nine", False),
        ("", "", False),
    ],
)
def test_a_final_answer_is_the_number_after_the_mark_or_the_last(reference, answer, right):
    assert FinalAnswer().score(reference=reference, answer=answer) == 100 * right


def test_final_answers_are_scored(taught):
    rows = [{"instruction": "sky?", "output": "#### 4"}]
    assert score(taught, rows, metrics=["final_answer"], max_new_tokens=8)["final_answer"] == 0


def test_exact_match_is_blind_to_white_space_only(taught):
    said = [row | {"output": " because  it\nis so "} for row in ROWS[3:]]
    assert score(taught, said, metrics=["exact_match"], max_new_tokens=32)["exact_match"] == 100
    loud = [row | {"output": "Because it is so"} for row in ROWS[3:]]
    scores = score(taught, loud, metrics=["exact_match", "rouge_l"], max_new_tokens=32)
    assert (scores["exact_match"], scores["rouge_l"]) == (0, 100)


def test_the_model_s_own_way_of_generating_does_not_leak_in(taught, caplog, monkeypatch):
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.9, repetition_penalty=9.0, max_length=3
    )
    monkeypatch.setattr(taught.network, "generation_config", own)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.cache_clear()
    scores = score(taught, metrics=["exact_match"], max_new_tokens=32)
    assert scores["exact_match"] == 100
    assert taught.network.generation_config is own
    assert caplog.messages == []


def test_prompts_that_do_not_fit_are_cut_on_the_left_and_counted(taught):
    rows = [ROWS[3] | {"instruction": "x" * 200 + "Why?"}, *ROWS]
    scores = score(taught, rows, max_length=512, metrics=["exact_match"], max_new_tokens=32)
    assert scores["answer_prompts_cut"] == 1
    prompt = np.arange(100) % 90 + 3
    both, cut = generate(taught, [prompt, prompt[-28:]], 100, 2, lambda count: None)
    assert (both[0], cut) == (both[1], 1)
    with pytest.raises(UserError, match=r"max_new_tokens.*128 positions: set at most 127"):
        check_positions(taught, EvaluationSettings(metrics=["rouge_l"], max_new_tokens=128))


# --- multiple choice ------------------------------------------------------------------------------


def ask(options, output, **row):
    return read_question(Row("Q", options, output, columns=row))


@pytest.mark.parametrize(
    ("options", "output", "candidates", "right"),
    [
        ("Options: A. x, B. y", "It is: B. y", ("It is: A. x", "It is: B. y"), 1),
        ("Options:\nA. x\nB. y\nC. z", "C", ("A", "B", "C"), 2),
        ("Options: A. yes, B. no", "no", ("yes", "no"), 1),
        ("Options: A. 4, B. 45, C. 5", "B. 45", ("A. 4", "B. 45", "C. 5"), 1),
        ("Options: A. one, two., B. U.S. law", "A. one, two.", ("A. one, two.", "B. U.S. law"), 0),
        # What looks like a further option is part of one.
        ("Options: A. cat, B. dog, C. fly", "B. dog, C. fly", ("A. cat", "B. dog, C. fly"), 1),
        ("Not these Options: A. a, B. b; Options: A. c, B. d", "A. c", ("A. c", "B. d"), 0),
    ],
)
def test_options_are_read_from_the_input(options, output, candidates, right):
    question = ask(options, output)
    assert (question.candidates, question.right) == (candidates, right)


@pytest.mark.parametrize(
    ("options", "output"),
    [
        ("", "B. y"),
        ("A. x, B. y", "B. y"),
        ("Options: A. x", "A. x"),
        ("Options: A. x, B. y", "C. z"),
        ("Options: A. x, B. y", ""),
    ],
)
def test_what_cannot_be_told_is_no_question(options, output):
    assert ask(options, output) is None


TEXT = st.text("aBé 1.,'()\n", min_size=1).map(str.strip).filter(bool)


@given(st.lists(TEXT, min_size=2, max_size=6), st.data())
def test_any_options_are_told_apart(texts, data):
    right = data.draw(st.integers(0, len(texts) - 1))
    labels = [f"{letter}. {text}" for letter, text in zip("ABCDEF", texts, strict=False)]
    output = f"The answer is: {labels[right]}"
    question = ask("Options: " + ", ".join(labels), output)
    assert question.candidates[question.right] == output
    if not any("B. " in text.replace("\n", " ") for text in texts):
        assert question.candidates == tuple(f"The answer is: {label}" for label in labels)
        assert labels[question.right] == labels[right]


def test_choices_may_be_given_as_a_list():
    assert ask("", "", choices=["x", "y"], answer=1).right == 1
    assert ask("", "", choices=["x", 2], answer="B").candidates == ("x", "2")
    for wrong in [2, -1, "C", "", None, "z", 1.5]:
        assert ask("", "", choices=["x", "y"], answer=wrong) is None
    assert ask("", "", choices=["x"], answer=0) is None
    assert ask("", "", choices="xy", answer=0) is None


FOUR = ["one", "two", "three", "four"]
FORMS = {
    "HellaSwag": {"endings": FOUR, "label": "2"},
    "ARC": {"choices": {"text": FOUR, "label": ["A", "B", "C", "D"]}, "answerKey": "C"},
    "ARC, numbered": {"choices": {"text": FOUR, "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
    "ARC, raw": {
        "choices": [
            {"text": text, "label": label} for text, label in zip(FOUR, "ABCD", strict=True)
        ],
        "answerKey": "C",
    },
    "MMLU": {"choices": FOUR, "answer": 2},
    "MMLU, letters": {"choices": FOUR, "answer": "(c)."},
    "a text": {"choices": FOUR, "answer": "three"},
    "the output": {"choices": FOUR, "output": "three"},
    "MedQA": {"options": dict(zip("ABCD", FOUR, strict=True)), "answer": "three"},
    "CSV, JSON": {"choices": '["one", "two", "three", "four"]', "answer": "2"},
    "CSV, as pandas writes it": {"choices": "['one', 'two', 'three', 'four']", "answer": "C"},
    "CSV, columns": dict(zip("ABCD", FOUR, strict=True)) | {"answer": "C"},
    "CSV, fewer options": dict(zip("ABCDE", [*FOUR, ""], strict=True)) | {"answer": "C"},
    "a column with nulls": {"choices": [*FOUR, None], "answer": 2.0},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_options_come_in_many_forms(row):
    question = read_question(Row("Q", output=str(row.get("output", "")), columns=row))
    assert (question.candidates, question.right) == (tuple(FOUR), 2)


def test_options_in_the_columns_of_a_table(hedgerow, folder, tmp_path):
    table = "question,A,B,C,answer\nWhich?,sea,sky,,B\nWho?,x,y,z,A\nWhat?,x,,z,A\n"
    (tmp_path / "mc.csv").write_text(table)
    command = ["evaluate", folder, "data.prompt=plain", "data.fields.instruction=question"]
    command += ["--data", tmp_path / "mc.csv", "--metrics", "multiple_choice", "--json"]
    result = hedgerow(*command)
    assert result.code == 0, result.err
    scores = json.loads(result.out)
    assert (scores["rows"], scores["skipped"]) == (3, 1)
    assert scores["accuracy_chance"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["2", "4", "1"], "answer": "2"},  # the text, or the third
        {"choices": ["B", "A"], "answer": "A"},
        {"choices": ["same", "same"], "answer": "same"},
        {"choices": ["x", None, "y"], "answer": 0},
        {"choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"},
        {"endings": ["x", "y"], "label": ""},
        {"choices": "x, y", "answer": 0},
        {"choices": ["x", "y"], "answer": True},
        {"A": "x", "answer": "A"},
    ],
)
def test_options_or_answers_that_can_be_read_in_two_ways_or_none_are_none(row):
    assert read_question(Row("Q", output=str(row.get("output", "")), columns=row)) is None


def test_answers_that_count_from_one_are_an_error(model):
    rows = [{"instruction": "Q", "choices": ["x", "y"], "answer": answer} for answer in (1, 2)]
    with pytest.raises(UserError, match=r"test\.json: row 2: the answer 2 is none of 2 options"):
        prepare(model, rows, metrics=["multiple_choice"])
    rows.append(rows[0] | {"answer": 0})
    assert prepare(model, rows, metrics=["multiple_choice"])[0].skipped == 1


CHOICES = [["a", "Some more", "b"], ["Kite", "no"], ["an oak", "ash", "fir"], ["x", "y", "zebra"]]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_log_likelihoods_equal_those_of_one_option_at_a_time(model, batch_size):
    # Prompts of equal length share a batch where they offer equally many options.
    rows = [{"instruction": f"Q{i}", "choices": c, "answer": 0} for i, c in enumerate(CHOICES)]
    test, _ = prepare(model, rows, metrics=["multiple_choice"])
    expected = []
    for row in rows:
        prompt = model.tokenizer(row["instruction"] + "\n\n")["input_ids"]
        for choice in row["choices"]:
            answer = model.tokenizer(choice, add_special_tokens=False)["input_ids"]
            logits = model.network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            expected.append(logs.sum().item())
    ours, cut = log_likelihoods(model, test.choices, batch_size, lambda count: None)
    assert [len(options) for options in ours] == [3, 2, 3, 3]
    assert [value for options in ours for value in options] == pytest.approx(expected, rel=1e-4)
    assert cut == 0


TURNS = {
    "one token": "</s>",
    "a space and a token": " </s>",
    "lines and a token": "\n\n</s>\n",
    "letters": "\n### End",
}


@pytest.mark.parametrize("end", TURNS.values(), ids=TURNS)
def test_what_ends_answers_is_no_part_of_an_option(model, end):
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}] "
        "{% else %}{{ m.content }}{{ END }}{% endif %}{% endfor %}"
    ).replace("END", json.dumps(end))
    rows = [{"instruction": f"Q{i}", "choices": c, "answer": 0} for i, c in enumerate(CHOICES)]
    test, _ = prepare(model, rows, prompt="chat", metrics=["multiple_choice"])
    ours, _ = log_likelihoods(model, test.choices, 8, lambda count: None)
    expected = []
    for row in rows:
        asked = model.tokenizer(f"[{row['instruction']}] ", add_special_tokens=False).input_ids
        for choice in row["choices"]:
            answer = model.tokenizer(choice, add_special_tokens=False).input_ids
            logits = model.network(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            logs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            expected.append(logs.sum().item())
    assert [value for options in ours for value in options] == pytest.approx(expected, rel=1e-4)


def test_accuracy_compares_sums_and_accuracy_norm_compares_them_per_character(model):
    rows = [{"instruction": f"Q{i}", "choices": c, "answer": 0} for i, c in enumerate(CHOICES)]
    test, _ = prepare(model, rows, metrics=["multiple_choice"])
    likelihoods, _ = log_likelihoods(model, test.choices, 8, lambda count: None)
    lengths = [[len(choice) for choice in choices] for choices in CHOICES]
    best = [values.argmax() for values in likelihoods]
    norm = [(v / n).argmax() for v, n in zip(likelihoods, lengths, strict=True)]
    assert best != norm
    for name, answers in [("accuracy", best), ("accuracy_norm", norm)]:
        right = [row | {"answer": int(a)} for row, a in zip(rows, answers, strict=True)]
        assert score(model, right, metrics=["multiple_choice"])[name] == 100
    chance = score(model, rows, metrics=["multiple_choice"])["accuracy_chance"]
    assert chance == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 3 + 1 / 3) / 4)


def test_rows_without_options_are_counted_and_prompts_that_do_not_fit_are_cut(model):
    rows = [*ROWS, ROWS[0] | {"instruction": "x" * 300}]
    test, settings = prepare(model, rows, metrics=["multiple_choice"])
    assert test.skipped == 1
    assert evaluate(model, test, settings)["choice_prompts_cut"] == 1


def test_no_options_at_all_are_an_error(model):
    with pytest.raises(UserError, match=r"evaluation\.metrics.*multiple_choice.*test\.json"):
        prepare(model, ROWS[3:], metrics=["multiple_choice"])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_mmlu():
    path = SHARED / "data/mmlu/mmlu_test_1444.jsonl"
    rows = read(str(path), "test").rows
    for row in check(Records.of(rows, "mmlu"), Fields()):
        question = read_question(row)
        assert len(question.candidates) == 4
        assert question.candidates[question.right] == row.output.strip()
    model = Model.load(ModelSettings(path=str(SHARED / "models/stories260k"), device="cpu"))
    scores = score(model, rows[:60], max_length=512, metrics=["multiple_choice"], by="class")
    assert scores["accuracy_chance"] == 25
    assert list(scores["accuracy_by"]) == sorted({row["class"] for row in rows[:60]})
