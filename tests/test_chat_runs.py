"""Runs whose prompts a tokenizer's chat template writes."""

from __future__ import annotations

import datetime
import json

import pytest
import yaml
from support.models import DATED, THINKS
from transformers import AutoTokenizer


def recorded(run):
    return yaml.safe_load((run / "experiment.yaml").read_text())["data"]["template"]["date"]


def test_a_run_has_one_date(chatty, experiment, hedgerow, days, tmp_path):
    path = experiment(model={"path": str(chatty(DATED))})
    run = tmp_path / "run"
    chosen = ["data.prompt=chat", "data.max_length=128", "evaluation.metrics=[loss]"]
    days(0)
    today = datetime.date.today()
    result = hedgerow("run", path, *chosen, "federation.rounds=1", "--out", run)
    assert result.code == 0, result.err
    assert recorded(run) == str(today)
    assert f"the chat template writes the date: {today}" in " ".join(result.out.split())
    before = json.loads(hedgerow("evaluate", run, "--json").out)
    days(1)
    assert datetime.date.today() != today
    assert json.loads(hedgerow("evaluate", run, "--json").out) == before
    result = hedgerow("run", path, *chosen, "federation.rounds=2", "--out", run, "--resume")
    assert result.code == 0, result.err
    assert recorded(run) == str(today)
    result = hedgerow(
        "run", path, *chosen, "data.template.date=2020-01-01", "--out", run, "--resume"
    )
    assert result.code == 2
    assert f"was run with data.template.date={today}, not 2020-01-01" in result.err
    other = hedgerow("evaluate", run, f"data.template.date={datetime.date.today()}", "--json")
    assert json.loads(other.out)["eval_loss"] != before["eval_loss"]


def test_a_model_s_scores_name_their_date(chatty, hedgerow, days, tmp_path):
    model = chatty(DATED)
    (tmp_path / "rows.json").write_text('[{"instruction": "Hi", "output": "Yes"}]')
    command = [
        "evaluate",
        model,
        "data.prompt=chat",
        "data.max_length=128",
        "--data",
        tmp_path / "rows.json",
        "--json",
    ]
    days(0)
    today = datetime.date.today()
    first = hedgerow(*command)
    assert f"the chat template writes the date: {today}" in first.err
    days(1)
    again = hedgerow(*command, f"data.template.date={today}")
    assert json.loads(again.out) == json.loads(first.out) != json.loads(hedgerow(*command).out)


def test_the_cells_of_a_comparison_have_one_date(chatty, experiment, hedgerow, days, tmp_path):
    path = experiment(model={"path": str(chatty(DATED))})
    chosen = ["data.prompt=chat", "data.max_length=128", "federation.rounds=1"]
    out = tmp_path / "comparison"
    days(0)
    today = str(datetime.date.today())
    result = hedgerow("compare", path, *chosen, "--methods", "flora", "--out", out)
    assert result.code == 0, result.err
    days(1)
    result = hedgerow("compare", path, *chosen, "--methods", "flora,fedavg", "--out", out)
    assert result.code == 0, result.err
    assert [recorded(run) for run in sorted((out / "runs").iterdir())] == [today, today]


def test_no_date_is_recorded_where_none_is_written(chatty, experiment, hedgerow, tmp_path):
    path = experiment(model={"path": str(chatty(THINKS))})
    chosen = ["data.prompt=chat", "data.max_length=128", "federation.rounds=1"]
    result = hedgerow("run", path, *chosen, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert recorded(tmp_path / "run") is None


def test_an_app_has_its_date(chatty, experiment, hedgerow, days, tmp_path):
    """So that all sites of a network have the same."""
    path = experiment(model={"path": str(chatty(DATED))})
    days(0)
    chosen = ["data.prompt=chat", "data.max_length=128"]
    result = hedgerow("flower", "init", path, tmp_path / "app", *chosen)
    assert result.code == 0, result.err
    assert recorded(tmp_path / "app") == str(datetime.date.today())


def learnt(model, experiment, hedgerow, tmp_path):
    """What a run scores that has learnt two answers by heart."""
    rows = [{"instruction": f"{n}?", "output": answer} for n, answer in enumerate(("yes", "no"))]
    (tmp_path / "two.json").write_text(json.dumps(rows))
    path = experiment(model={"path": str(model)})
    chosen = [f"data.clients={{a: {tmp_path / 'two.json'}}}", f"data.test={tmp_path / 'two.json'}"]
    chosen += ["data.prompt=chat", "data.max_length=128", "method=fedavg", "training.steps=80"]
    chosen += ["training.learning_rate=1e-2", "training.batch_size=2", "federation.rounds=1"]
    chosen += ["evaluation.metrics=[loss, exact_match]", "evaluation.max_new_tokens=12"]
    result = hedgerow("run", path, *chosen, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    return json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]), result.out


def test_what_a_template_writes_before_answers_is_no_part_of_them(
    chatty, experiment, hedgerow, tmp_path
):
    scores, said = learnt(chatty(THINKS), experiment, hedgerow, tmp_path)
    assert scores["eval_loss"] < 0.05
    assert scores["exact_match"] == 100
    assert r"writes '<think>\n\n</think>\n\n' before answers: so do prompts" in " ".join(
        said.split()
    )


@pytest.mark.parametrize("special", [True, False])
def test_answers_end_where_the_template_ends_a_turn(
    special, chatty, experiment, hedgerow, tmp_path
):
    """With a token that is not the tokenizer's EOS."""
    model = chatty(THINKS.replace("eos_token", "'<pad>'" if special else "'!'"))
    if not special:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(["!"])
        tokenizer.save_pretrained(model)
    scores, _ = learnt(model, experiment, hedgerow, tmp_path)
    assert scores["exact_match"] == 100
    result = hedgerow("export", tmp_path / "run", tmp_path / "merged", "--to", "merged")
    assert result.code == 0, result.err
    ends = json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids("<pad>" if special else "!") in ends


def test_rows_that_spell_control_tokens_are_counted(experiment, hedgerow, tmp_path):
    path = experiment()
    rows = [{"instruction": "a tag", "output": "</s> ends"}, {"instruction": "a", "output": "b"}]
    (tmp_path / "tags.json").write_text(json.dumps(rows))
    chosen = [f"data.clients={{a: {tmp_path / 'tags.json'}}}", "federation.rounds=1"]
    chosen.append("method.ranks=2")
    chosen += [f"data.test={tmp_path / 'tags.json'}", "evaluation.metrics=[loss]"]
    result = hedgerow("run", path, *chosen, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    said = " ".join(result.out.split())
    counted = "1 of 2 examples spell control tokens, as </s>, which are text there"
    assert said.count(counted) == 2
    assert f"the test data: {counted}" in said
    result = hedgerow("evaluate", tmp_path / "run", "--json")
    assert f"the test data: {counted}" in result.err


def test_scores_say_of_rows_what_their_run_says(experiment, hedgerow, tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "a", "output": "b" * 99}] * 3))
    chosen = [f"data.test={tmp_path / 'long.json'}", "evaluation.metrics=[loss]"]
    chosen += ["federation.rounds=1"]
    result = hedgerow("run", experiment(), *chosen, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    cut = "the test data: 3 of 3 rows are cut at max_length for the loss"
    assert cut in " ".join(result.out.split())
    result = hedgerow("evaluate", tmp_path / "run")
    assert result.err.splitlines() == [cut]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ '%1000000000d' % 1 }}", "needs more than 512 MB of memory"),
        ("{{ 1 / 0 }}", "fails (division by zero)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails (maximum recursion depth"),
    ],
)
def test_a_template_that_does_harm_is_refused(
    chatty, experiment, hedgerow, tmp_path, template, sentence
):
    model = chatty(template)
    path = experiment(model={"path": str(model)})
    result = hedgerow("run", path, "data.prompt=chat", "--out", tmp_path / "run")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"the tokenizer's chat template ({model / 'chat_template.jinja'}) {sentence}" in (
        result.err
    )
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_variables_of_its_template(chatty, experiment, hedgerow, tmp_path):
    source = THINKS.replace("{{ bos_token }}", "{{ bos_token }}{{ 'brief' if brief }}")
    path = experiment(model={"path": str(chatty(source))})
    run = tmp_path / "run"
    chosen = ["data.prompt=chat", "data.max_length=128", "federation.rounds=1"]
    result = hedgerow("run", path, *chosen, "data.template.brief=true", "--out", run)
    assert result.code == 0, result.err
    template = yaml.safe_load((run / "experiment.yaml").read_text())["data"]["template"]
    assert template == {"name": None, "date": None, "brief": True}
    before = json.loads(hedgerow("evaluate", run, "--json").out)
    other = json.loads(hedgerow("evaluate", run, "data.template.brief=false", "--json").out)
    assert other["eval_loss"] != before["eval_loss"]
    result = hedgerow("run", path, *chosen, "data.template.bref=true", "--out", tmp_path / "other")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "`data.template.bref`: the chat template reads no 'bref', did you mean `brief`" in (
        result.err
    )
    assert not (tmp_path / "other").exists()
    result = hedgerow(
        "run", path, *chosen, "data.template.messages=[]", "--out", tmp_path / "other"
    )
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.template" in result.err
