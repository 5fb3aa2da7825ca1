"""Runs that go on elsewhere: what decides is the base's fingerprint and the data's digests."""

import json
import os
import shutil

import pytest
import yaml
from support.runs import ledger_bytes, rows_of

from hedgerow.data.tokens import Tokenized
from hedgerow.ledger import Ledger


@pytest.fixture
def project(experiment, tiny_model, tmp_path):
    """A folder with a model, data and an experiment of three rounds."""
    folder = tmp_path / "project"
    folder.mkdir()
    path = experiment(model={"path": "model"}, federation={"rounds": 3}, method={"restart": "own"})
    for file in [*tmp_path.glob("*.json"), path]:
        file.rename(folder / file.name)
    shutil.copytree(tiny_model, folder / "model")
    return folder


def killed_in_round(monkeypatch, number):
    append = Ledger.append

    def killed(ledger, entry, *checks):
        if entry.round == number:
            raise SystemExit(9)
        return append(ledger, entry, *checks)

    monkeypatch.setattr(Ledger, "append", killed)


@pytest.fixture
def begun(hedgerow, project, tmp_path, monkeypatch):
    """The project's run `run`, killed in its second round, and the whole of it."""
    whole = tmp_path / "whole"
    assert hedgerow("run", project / "experiment.yaml", "--out", whole).code == 0
    with monkeypatch.context() as patch:
        killed_in_round(patch, 2)
        assert hedgerow("run", project / "experiment.yaml", "--out", project / "run").code == 9
    return whole


def test_a_project_that_was_killed_and_moved_ends_as_it_would_have(
    hedgerow, project, begun, tmp_path
):
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    project.rename(moved)
    result = hedgerow("run", moved / "experiment.yaml", "--out", moved / "run", "--resume")
    assert result.code == 0, result.err
    assert ledger_bytes(moved / "run") == ledger_bytes(begun)
    assert result.out.count("another copy of the same base") == 1
    assert result.out.count("the clients' examples are the same") == 1
    assert result.out.count("the test data are the same") == 1
    written = yaml.safe_load((moved / "run" / "experiment.yaml").read_text())
    assert written["model"]["path"] == str(moved / "model")
    assert written["data"]["test"] == str(moved / "test.json")
    again = hedgerow("run", moved / "experiment.yaml", "--out", moved / "run", "--resume")
    assert "same" not in again.out  # it is said once


CHANGES = {
    "evaluation.batch_size=2": "evaluation.batch_size was 16, now 2: rounds from 2 on",
    "evaluation.metrics=[loss, exact_match]": "evaluation.metrics was",
    "evaluation.max_new_tokens=5": "evaluation.max_new_tokens was 64, now 5: rounds from 2 on",
    "federation.keep_updates=true": "federation.keep_updates was false, now true: rounds from 2",
    "tracking.name=b": "tracking.name was null, now b",
    "data.test=null": "now null: rounds from 2 on are not scored",
    "data.test=other.json": "the test data are others than before: scores of rounds from 2 on",
    "data.max_length=65": "test rows are scored up to so many tokens in rounds from 2 on",
    "data.clients={client-000: a.json, client-001: client_1.json, client-002: client_2.json}": (
        "data.clients: other than before, and the clients' examples are the same"
    ),
    "data.fields={input: null}": "data.fields: other than before",
    "model.device=cpu": "model.device was auto, now cpu: rounds from 2 on",
    "model.revision=main": "model.revision was null, now main: another copy of the same base",
    "training.optimizer={name: adamw}": "",
    "federation.clients_per_round=null": "",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_no_entry_is_said_and_goes_on(hedgerow, project, begun, change):
    shutil.copy(project / "client_0.json", project / "a.json")
    rows = json.loads((project / "test.json").read_text())
    (project / "other.json").write_text(json.dumps(rows[1:]))
    run = project / "run"
    result = hedgerow("run", project / "experiment.yaml", change, "--out", run, "--resume")
    assert result.code == 0, result.err
    assert CHANGES[change] in result.out
    if not CHANGES[change]:
        assert " was " not in result.out
    assert ledger_bytes(run) == ledger_bytes(begun)


SCORED = "evaluation.metrics=[multiple_choice]"
OTHERS = "the test data are others than before"


@pytest.fixture
def asked(hedgerow, project, tmp_path):
    """A function that asks other questions, and the project's run on the first ones."""

    def write(*options, answer=0):
        rows = [{"instruction": "Which?", "choices": list(options), "answer": answer}] * 2
        (project / "test.json").write_text(json.dumps(rows))

    write("one", "two")
    command = ["run", project / "experiment.yaml", "--out", project / "run"]
    assert hedgerow(*command, SCORED, "federation.rounds=1").code == 0
    return write


@pytest.mark.parametrize("how", ["options", "answer", "order"])
def test_other_options_of_the_same_questions_are_other_test_data(hedgerow, project, asked, how):
    command = ["run", project / "experiment.yaml", SCORED, "--out", project / "run", "--resume"]
    result = hedgerow(*command, "federation.rounds=2")
    assert result.code == 0, result.err
    assert OTHERS not in result.out
    if how == "options":
        asked("one", "three")
    elif how == "answer":
        asked("one", "two", answer=1)
    else:
        asked("two", "one", answer=1)
    result = hedgerow(*command)
    assert result.code == 0, result.err
    assert OTHERS in " ".join(result.out.split())


def test_digests_without_options_stay_those_of_runs_that_were_begun_before(
    hedgerow, project, asked
):
    """A run of an earlier version has no digest of options, nor has one that scores none."""
    file = project / "run" / "data.json"
    digests = json.loads(file.read_text())
    before, options = digests["(test data)"].split("+")
    assert len(before) == len(options) == 64
    file.write_text(json.dumps(digests | {"(test data)": before}))
    command = ["run", project / "experiment.yaml", "--out", project / "run", "--resume"]
    result = hedgerow(*command, SCORED, "federation.rounds=2")
    assert result.code == 0, result.err
    assert OTHERS not in result.out
    assert json.loads(file.read_text()) == digests


def test_the_cells_of_a_comparison_have_the_same_options(hedgerow, project, asked):
    compare = ["compare", project / "experiment.yaml", SCORED, "federation.rounds=1"]
    compare += ["--out", project / "all", "--methods"]
    assert hedgerow(*compare, "fedavg").code == 0
    asked("one", "three")
    result = hedgerow(*compare, "fedavg,fedit ranks=2")
    assert result.code == 1
    assert "were scored on other test data" in result.out


REFUSED = {
    "method.ranks=2": "method.ranks=[4, 2, 1], not 2",
    "training.learning_rate=0.02": "training.learning_rate=0.01, not 0.02",
    "training.optimizer={name: adamw, betas: [0.5, 0.9]}": "training.optimizer.betas=",
    "federation.seed=1": "federation.seed=0, not 1",
    "federation.clients_per_round=2": "federation.clients_per_round=null, not 2",
    "data.loss_on=all": "the data of client-000 have changed",
    "data.prompt=./short.md": "the data of client-000 have changed",
    "data.max_length=10": "the data of client-000 have changed",
    "data.clients=[client_0.json, client_1.json, client_2.json]": "began with client-000",
    "data.clients={client-000: client_0.json, client-001: client_1.json}": "ranks",
    "data.clients={client-001: client_1.json, client-000: client_0.json, "
    "client-002: client_2.json}": "another order",
    "model.dtype=bfloat16": "dtype is bfloat16",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_change_entries_is_refused(hedgerow, project, begun, change):
    run = project / "run"
    (project / "short.md").write_text("Q: {instruction}\n")
    before = ledger_bytes(run), (run / "experiment.yaml").read_bytes()
    result = hedgerow("run", project / "experiment.yaml", change, "--out", run, "--resume")
    assert result.code == 2, result.out
    assert REFUSED[change] in result.err
    assert before == (ledger_bytes(run), (run / "experiment.yaml").read_bytes())


def test_out_may_be_another_path_or_a_link_to_it(hedgerow, project, begun, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(project / "run")
    monkeypatch.chdir(project)
    first = hedgerow("run", "experiment.yaml", "federation.rounds=2", "--out", "run", "--resume")
    assert first.code == 0, first.err
    monkeypatch.chdir(tmp_path / "whole")
    file = os.path.relpath(project / "experiment.yaml")
    assert hedgerow("run", file, "--out", "../link", "--resume").code == 0
    assert ledger_bytes(project / "run") == ledger_bytes(begun)


def test_a_moved_comparison_goes_on_and_is_done_once(hedgerow, project, tmp_path, monkeypatch):
    methods = ["--methods", "fedavg,ferret compression=64", "federation.rounds=1"]
    compare = ["compare", project / "experiment.yaml", *methods, "--out", project / "all"]
    assert hedgerow(*compare).code == 0
    moved = tmp_path / "moved"
    project.rename(moved)
    digest, tokenized = Tokenized.digest, []
    monkeypatch.setattr(Tokenized, "digest", lambda it: tokenized.append(it) or digest(it))
    compare = ["compare", moved / "experiment.yaml", *methods, "--out", moved / "all"]
    result = hedgerow(*compare)
    assert result.code == 0, result.out
    assert result.out.count("another copy of the same base") == 1
    assert tokenized
    tokenized.clear()
    assert hedgerow(*compare).code == 0
    assert not tokenized  # what is done is not done again


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_comparison_is_scored_on_one_test_set(hedgerow, project, rounds):
    methods = ["--methods", "fedavg,ferret compression=64"]
    compare = ["compare", project / "experiment.yaml", *methods, "--out", project / "all"]
    assert hedgerow(*compare, "federation.rounds=1").code == 0
    rows = json.loads((project / "test.json").read_text())
    (project / "test.json").write_text(json.dumps(rows[1:]))
    if rounds == 1:  # what is done already stays, however the file is now
        shutil.rmtree(next((project / "all" / "runs").glob("fedavg*")))
    result = hedgerow(*compare, f"federation.rounds={rounds}")
    assert result.code == 1
    assert "were scored on other test data" in result.out
    result = hedgerow(*compare, "evaluation.metrics=[loss, exact_match]")
    assert result.code == 2
    assert "was scored with evaluation.metrics" in result.err


def test_a_packed_or_moved_run_without_its_base_says_what_to_add(hedgerow, project, tmp_path):
    run = project / "run"
    assert hedgerow("run", project / "experiment.yaml", "--out", run).code == 0
    (project / "model").rename(tmp_path / "base")
    for command in (["evaluate", run], ["export", run, tmp_path / "out", "--to", "merged"]):
        result = hedgerow(*command)
        assert result.code == 2
        assert "model.path=FOLDER" in result.err
        mended = hedgerow(*command, f"model.path={tmp_path / 'base'}")
        assert mended.code == 0, mended.err
    assert rows_of(run)
