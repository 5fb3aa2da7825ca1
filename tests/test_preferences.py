"""Learning from preferences: rows, tokens, references, runs and metrics."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from support.models import byte_tokenizer
from support.runs import entries, rows_of

import hedgerow as hr
from hedgerow.bundled import tasks
from hedgerow.data import Encoder, Records, Spool, Tokenized, check
from hedgerow.data.preferences import learnt_rows
from hedgerow.data.templates import TEXTS, TextTemplate
from hedgerow.errors import UserError
from hedgerow.experiment import load
from hedgerow.model import Model
from hedgerow.settings import Fields, ModelSettings, TrainingSettings
from hedgerow.training import first_order
from hedgerow.training.job import Job
from hedgerow.training.objectives import OBJECTIVES, objective_of
from hedgerow.training.objectives.answers import referenced

PAIRS = {"fields": {"prompt": "instruction", "chosen": "good", "rejected": "bad"}}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def read(*records, **fields):
    return check(Records.of(records, "a.json"), Fields(**fields))


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [user("2 + 2?")], "chosen": [said("4")], "rejected": [said("5")]},
        {"chosen": [user("2 + 2?"), said("4")], "rejected": [user("2 + 2?"), said("5")]},
        # As UltraFeedback has them, with the prompt's text beside.
        {
            "prompt": "2 + 2?",
            "chosen": [user("2 + 2?"), said("4")],
            "rejected": [user("2 + 2?"), said("5")],
        },
    ],
    ids=["text", "messages", "implicit prompt", "both"],
)
def test_pairs_are_read_in_the_forms_of_trl(record):
    for fields in ({}, {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}):
        if "prompt" not in record and fields:
            fields = {"chosen": "chosen", "rejected": "rejected"}
        [row] = read(record, **fields)
        assert (row.instruction, row.input, row.history) == ("2 + 2?", "", ())
        assert (row.output, row.other) == ("4", "5")


def test_the_turns_before_both_answers_are_their_prompt():
    before = [user("hi"), said("hello"), user("2 + 2?")]
    [row] = read({"chosen": [*before, said("4")], "rejected": [*before, said("5")]})
    assert [turn.content for turn in row.history] == ["hi", "hello"]
    assert (row.instruction, row.output, row.other) == ("2 + 2?", "4", "5")


def test_pairs_of_no_use_are_left_out_and_counted():
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = read(
        good,
        {**good, "rejected": ""},
        {**good, "rejected": " b\n"},
        {"chosen": [user("x"), said("y")], "rejected": [user("z"), said("w")]},
    )
    assert len(rows) == 1
    assert rows.remarks.counts == {
        "left out: no pair of answers": 1,
        "left out: both answers of a pair are the same": 1,
        "left out: answers of a pair that differ before their last turns": 1,
        "read from prompt, chosen, rejected, for want of instruction": 1,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "good"}, "`chosen` and `rejected` go together"),
        ({"chosen": "a", "rejected": "b", "output": "c"}, "are both answers of a row"),
        ({"chosen": "a", "rejected": "b", "label": "c"}, "are both answers of a row"),
        ({"prompt": "a"}, "go together: give both"),
        ({"messages": "a", "label": "b"}, "`label` is of one answer"),
    ],
)
def test_columns_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Fields(**fields)


def test_a_missing_column_of_a_pair_is_named():
    with pytest.raises(UserError, match=r"no row has a column 'worse': set `data.fields.rejected`"):
        read({"prompt": "a", "good": "b"}, prompt="prompt", chosen="good", rejected="worse")
    with pytest.raises(UserError, match=r"row 1: column 'good' is a text without its prompt"):
        read({"good": "b", "bad": "c"}, chosen="good", rejected="bad")


def test_labels_are_booleans_also_as_words_and_numbers():
    columns = {"prompt": "p", "completion": "c", "label": "l"}
    rows = read(*({"p": "a", "c": "b", "l": label} for label in (True, 0, "TRUE", "0")), **columns)
    assert [row.desirable for row in rows] == [True, False, True, False]
    with pytest.raises(UserError, match=r"row 1: column 'l' must be true or false, not 'maybe'"):
        read({"p": "a", "c": "b", "l": "maybe"}, **columns)


def test_what_is_learnt_follows_from_the_objective():
    rows = read(
        {"prompt": "a", "chosen": "1", "rejected": "2"},
        {"prompt": "b", "chosen": "3", "rejected": "4"},
    )
    assert [row.output for row in learnt_rows(rows, "answers", "x")] == ["1", "3"]
    assert learnt_rows(rows, "pairs", "x") is rows
    labelled = learnt_rows(rows, "labels", "x")
    assert [(r.instruction, r.output, r.other, r.desirable) for r in labelled] == [
        ("a", "1", "4", True),
        ("b", "3", "1", True),
        ("a", "2", "3", False),
        ("b", "4", "2", False),
    ]
    plain = read({"instruction": "a", "output": "b"})
    with pytest.raises(UserError, match=r"north: .* learns from pairs .* `data.fields.chosen`"):
        learnt_rows(plain, "pairs", "north")


# --- tokens -------------------------------------------------------------------------------------


def tokenized(spool, name, rows, learns="pairs", max_length=64):
    encoder = Encoder(TextTemplate(TEXTS["plain"], "plain"), byte_tokenizer())
    rows = learnt_rows(rows, learns, name)
    return spool.tokenize(name, rows, encoder, max_length, "answer", paired=learns != "answers")


def test_both_answers_are_examples_with_one_prompt_and_an_end():
    rows = read(
        {"prompt": "a", "chosen": "1", "rejected": "22"},
        {"prompt": "a" * 70, "chosen": "1", "rejected": "2"},  # fills all
        {"prompt": "b" * 58, "chosen": "1", "rejected": "2" * 9},  # is cut
    )
    pairs = tokenized(Spool(), "x", rows)
    assert (len(pairs), len(pairs.other), pairs.dropped, pairs.truncated) == (2, 2, 1, 1)
    assert pairs.rows.tolist() == pairs.other.rows.tolist() == [0, 2]
    tokenizer = byte_tokenizer()
    for index in range(2):
        better, worse = pairs[index], pairs.other[index]
        start = better.prompt_length
        assert start == worse.prompt_length
        assert (better.tokens[:start] == worse.tokens[:start]).all()
        row = rows[int(pairs.rows[index])]
        for example, text in ((better, row.output), (worse, row.other)):
            whole = f"{text}{tokenizer.eos_token}"
            assert whole.startswith(tokenizer.decode(example.tokens[start:]))
    assert pairs.widths.tolist() == pairs.other.lengths.tolist()
    alone = tokenized(Spool(), "x", rows, learns="answers")
    assert alone.other is None
    assert alone.digest() != pairs.digest()


def test_parts_are_concatenated_with_their_other_answers_and_labels():
    spool = Spool()
    rows = [read({"prompt": p, "chosen": "1", "rejected": "2"}) for p in "ab"]
    parts = [tokenized(spool, p, r, learns="labels") for p, r in zip("ab", rows, strict=True)]
    whole = Tokenized.concatenate(parts)
    assert whole.desirable.tolist() == [True, False] * 2
    for index in range(4):
        part = parts[index // 2]
        assert (whole.other[index].tokens == part.other[index % 2].tokens).all()


# --- objectives ---------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model)))


def pairs_of(count=6, learns="pairs"):
    records = [
        {"prompt": f"Say {i}", "chosen": f"{i}" * 3, "rejected": f"no {i}"} for i in range(count)
    ]
    return tokenized(Spool(), "x", read(*records), learns=learns)


def job(model, examples, objective, **training):
    settings = TrainingSettings(objective=objective, batch_size=2, **training)
    return Job(
        network=model.network,
        data=examples,
        settings=settings,
        learning_rate=0.01,
        pad_id=model.pad_id,
        order=np.random.default_rng(0),
        dropout_seed=0,
    )


@pytest.mark.parametrize("learns", ["pairs", "labels"])
def test_losses_begin_where_the_papers_have_them(model, learns):
    examples = pairs_of(learns=learns)
    name = {"pairs": "dpo", "labels": "kto"}[learns]
    steps = list(job(model, examples, {"name": name, "reference": "round"}, steps=3).steps())
    objective = objective_of(TrainingSettings(objective=name))
    for batches, count in steps:
        assert count == 2
        loss = sum(float(objective.total(model.network, batch)) for batch in batches) / count
        # -log σ(0), and 1 - σ(0), of a model that is its own reference
        assert loss == pytest.approx({"dpo": math.log(2), "kto": 0.5}[name], abs=1e-5)


def test_the_round_s_start_is_asked_once_and_of_the_examples_that_are_used(model):
    examples, seen = pairs_of(20), []
    forward = model.network.forward

    def counted(*args, input_ids, **kwargs):
        seen.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    model.network.forward = counted
    for _ in job(model, examples, {"name": "dpo", "reference": "round"}, steps=3).steps():
        assert sum(seen) == 2 * 3 * 2, "three steps of two pairs, before the first"


def test_a_reference_of_nobody_is_a_mistake_of_the_engine(model):
    with pytest.raises(UserError, match="reference have not been computed"):
        list(job(model, pairs_of(), "dpo", steps=1).steps())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "supervised"])
def test_a_step_makes_better_answers_likelier_beside_worse_ones(model, name):
    objective = objective_of(TrainingSettings(objective=name))
    examples = pairs_of(learns=objective.learns)
    pairs = pairs_of()
    chosen = {"name": name} | ({} if objective.refers_to is None else {"reference": "round"})

    def margin():
        both = [referenced(model.network, part, 0, 4).reference for part in (pairs, pairs.other)]
        return float(both[0].sum() - both[1].sum())

    before = margin()
    model.network.requires_grad_(True)
    first_order.train(
        job(model, examples, chosen, epochs=4), dict(model.network.named_parameters())
    )
    assert margin() > before


def test_objectives_are_listed_without_torch():
    code = "import sys; from hedgerow.training.objectives import OBJECTIVES; list(OBJECTIVES); "
    code += "assert 'dpo' in OBJECTIVES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def preferring(experiment, tmp_path):
    """Write the tiny experiment with pairs for its clients and its test."""

    def write(objective, **sections):
        sections.setdefault("data", {})
        sections["data"] = PAIRS | sections["data"]
        training = {"objective": objective, **sections.pop("training", {})}
        metrics = ["loss", "exact_match", "reward_accuracy", "reward_margin"]
        evaluation = {"metrics": metrics, "max_new_tokens": 8}
        path = experiment(training=training, evaluation=evaluation, **sections)
        for file in [*tmp_path.glob("client_*.json"), tmp_path / "test.json"]:
            rows = json.loads(file.read_text())
            wrong = {"bad": "nothing"}
            pairs = [{"instruction": r["instruction"], "good": r["output"], **wrong} for r in rows]
            file.write_text(json.dumps(pairs))
        return path

    return write


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", {"name": "dpo", "loss": "ipo"}])
@pytest.mark.parametrize("method", ["flora", "ferret"])
def test_runs_learn_to_prefer(preferring, hedgerow, tmp_path, objective, method):
    path = preferring(objective, training={"steps": 8})
    result = hedgerow("run", path, f"method={method}", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    first, *_, last = rows_of(tmp_path / "run")
    assert (first["reward_accuracy"], first["reward_margin"]) == (50.0, 0.0)
    assert last["reward_accuracy"] > 50
    assert last["reward_margin"] > 0


METHODS = [
    "fedavg",
    "fedit ranks=2",
    "ffa_lora ranks=2",
    "flora_adalora ranks=2",
    "flora ranks=2 scaling=adaptive",
    "fedkseed",
    "scaffold",
    "ditto ranks=2",
    "standalone",
    "centralized",
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_along_an_objective(preferring, tmp_path, method):
    name, *options = method.split()
    options = {k: int(v) if v.isdigit() else v for k, v in (o.split("=") for o in options)}
    objective = {"name": "dpo", "reference": "round"}
    path = preferring(objective, federation={"rounds": 1})
    content = load(path).model_dump(exclude={"method", "training"})
    training = {"objective": objective, "steps": 1, "batch_size": 2}
    experiment = hr.Experiment(**content, method={"name": name, **options}, training=training)
    run = hr.run(experiment, out=tmp_path / "run")
    assert math.isfinite(run.metrics["reward_margin"].iloc[-1])


def test_a_resumed_run_compares_with_the_base_that_it_began_with(preferring, hedgerow, tmp_path):
    path = preferring("dpo", federation={"rounds": 3})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert hedgerow("run", path, "--out", whole).code == 0
    assert hedgerow("run", path, "federation.rounds=1", "--out", resumed).code == 0
    assert hedgerow("run", path, "--out", resumed, "--resume").code == 0
    assert entries(resumed) == entries(whole)
    keys = ("reward_margin", "reward_accuracy", "eval_loss")
    for one, other in zip(rows_of(whole), rows_of(resumed), strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]


def test_a_finished_run_is_evaluated_beside_its_base(preferring, hedgerow, tmp_path):
    path = preferring("dpo", data={**PAIRS, "client_test": 0.2})
    run = tmp_path / "run"
    assert hedgerow("run", path, "--out", run).code == 0
    again = hr.open_run(run).evaluate()
    last = rows_of(run)[-1]
    for key in ("reward_margin", "reward_margin_over_clients", "exact_match"):
        assert again[key] == pytest.approx(last[key], rel=1e-6)
    assert hedgerow("export", run, "--to", "merged", tmp_path / "merged").code == 0
    data = ["--data", tmp_path / "test.json", "data.prompt=plain", "data.max_length=64"]
    fields = [f"data.fields.{k}={v}" for k, v in PAIRS["fields"].items()]
    alone = hedgerow("evaluate", tmp_path / "merged", *data, *fields, "--metrics", "loss")
    assert alone.code == 0, alone.err
    refused = hedgerow(
        "evaluate", tmp_path / "merged", *data, *fields, "--metrics", "reward_margin"
    )
    assert refused.code == 2
    assert "rewards are beside the base of a run" in refused.err


def test_supervised_runs_learn_the_better_answers(preferring, hedgerow, experiment, tmp_path):
    path = preferring("supervised")
    assert hedgerow("run", path, "--out", tmp_path / "of-pairs").code == 0
    for file in [*tmp_path.glob("client_*.json"), tmp_path / "test.json"]:
        rows = json.loads(file.read_text())
        plain = [{"instruction": r["instruction"], "output": r["good"]} for r in rows]
        file.write_text(json.dumps(plain))
    plain = ["data.fields={}", "evaluation.metrics=[loss]"]
    assert hedgerow("run", path, *plain, "--out", tmp_path / "plain").code == 0
    assert entries(tmp_path / "of-pairs") == entries(tmp_path / "plain")


def test_labelled_answers_are_learnt_and_scored(preferring, hedgerow, tmp_path):
    path = preferring("kto")
    for file in tmp_path.glob("client_*.json"):
        rows = []
        for row in json.loads(file.read_text()):
            rows += [{"p": row["instruction"], "c": row["good"], "l": True}]
            rows += [{"p": row["instruction"], "c": row["bad"], "l": False}]
        file.write_text(json.dumps(rows))
    fields = "data.fields={prompt: p, completion: c, label: l}"
    tests = f"data.test_fields={json.dumps(PAIRS['fields'])}"
    more = ["training.steps=8"]
    result = hedgerow("run", path, fields, tests, *more, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert rows_of(tmp_path / "run")[-1]["reward_margin"] > 0


PRIVATE = {"level": "example", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3, "seed": 5}


@pytest.mark.parametrize("objective", ["dpo", "orpo", {"name": "dpo", "reference": "round"}])
def test_pairs_are_hidden_by_noise(preferring, hedgerow, tmp_path, objective):
    path = preferring(objective, privacy=PRIVATE)
    result = hedgerow("run", path, "method=fedavg", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert rows_of(tmp_path / "run")[-1]["epsilon"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["training.objective=dop"], "there is no 'dop'"),
        (["training.objective.beta=-1"], "`training.objective.beta`"),
        (["training.objective.loss=ipo", "training.objective.label_smoothing=0.1"], "counts with"),
        (["data.loss_on=all"], "data.loss_on all: training.objective dpo has its loss on answer"),
        (["audit={client: client-000}"], "audit: canaries are answers without a worse one"),
        (
            ["training.objective=kto", f"privacy={json.dumps(PRIVATE)}", "method=fedavg"],
            "privacy.level example: the loss of an example in training.objective kto depends on",
        ),
        (["data.fields={messages: m}"], "data.fields.messages: training.objective dpo learns from"),
        (
            ["data.fields={prompt: p, completion: c, label: l}"],
            "data.fields.label: training.objective dpo learns from pairs",
        ),
        (
            ["data.fields={output: good}"],
            "`training.objective` learns from pairs of answers, and the rows have one answer each",
        ),
        (
            ["data.test_fields={output: good}"],
            "reward_margin compares pairs of answers, and the rows of",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused_in_a_sentence(
    preferring, hedgerow, tmp_path, change, message
):
    path = preferring({"name": "dpo"})
    result = hedgerow("run", path, *change, "--out", tmp_path / "run")
    assert result.code == 2, result.err
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()


def test_the_built_in_tasks_have_wrong_answers():
    rows = tasks.with_wrong(tasks.test_rows())
    assert [{k: v for k, v in row.items() if k != "wrong"} for row in rows] == tasks.test_rows()
    pairs = check(Records.of(rows, "tasks"), Fields(chosen="output", rejected="wrong"))
    assert 0.95 * len(rows) < len(pairs) <= len(rows)
    assert all(row.output != row.other for row in pairs)


# --- the built-in tasks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """A folder with pairs for eight clients and a test, and a model that follows instructions."""
    folder = tmp_path_factory.mktemp("preferences")
    for name, rows in tasks.clients().items():
        (folder / f"{name}.json").write_text(json.dumps(tasks.with_wrong(rows)))
    (folder / "test.json").write_text(json.dumps(tasks.with_wrong(tasks.test_rows())))
    training = {"steps": 20, "batch_size": 8, "learning_rate": 3e-3}
    run = hr.run(
        on_tasks(folder, "demo", {"name": "flora", "ranks": 8}, training, 8), out=folder / "run"
    )
    run.export_merged(folder / "start")
    return folder


def on_tasks(folder, model, method, training, rounds):
    metrics = ["loss", "exact_match", "reward_accuracy", "reward_margin"]
    return hr.Experiment(
        model={"path": str(model)},
        data={
            "clients": {name: str(folder / f"{name}.json") for name in tasks.CLIENTS},
            "test": str(folder / "test.json"),
            "fields": {"chosen": "output", "rejected": "wrong"},
            "prompt": "plain",
            "max_length": 96,
        },
        method=method,
        training=training,
        federation={"rounds": rounds},
        evaluation={"every": rounds, "metrics": metrics, "max_new_tokens": 24, "batch_size": 100},
    )


FLORA = {"name": "flora", "ranks": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "method", "rate", "rounds", "least"),
    [
        ({"name": "dpo", "beta": 0.1}, FLORA, 3e-7, 4, 90),
        ({"name": "dpo", "beta": 0.1}, {"name": "ferret"}, 1e-5, 4, 90),
        ({"name": "kto", "beta": 0.1}, FLORA, 1e-4, 4, 80),
        ({"name": "orpo", "beta": 10.0}, FLORA, 3e-3, 8, 80),
    ],
    ids=["dpo with flora", "dpo with ferret", "kto", "orpo"],
)
def test_eight_clients_learn_to_prefer(
    supervised, tmp_path, objective, method, rate, rounds, least
):
    """Rates were chosen on other questions: larger ones prefer more, and answer worse.

    DPO with flora loses no answer at 3e-7, where rewards differ by 3e-4 nats, and two of 199 at
    3e-5, where they differ by 0.03. Ferret has lost none at 1e-5.
    """
    training = {"steps": 8, "batch_size": 8, "learning_rate": rate, "objective": objective}
    experiment = on_tasks(supervised, supervised / "start", method, training, rounds)
    rows = hr.run(experiment, out=tmp_path / "run").metrics
    first, last = rows.iloc[0], rows.iloc[-1]
    assert first["reward_accuracy"] == 50
    assert last["reward_accuracy"] > least
    assert last["exact_match"] > first["exact_match"] - 1.5
