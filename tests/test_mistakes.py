"""Every mistake is one sentence, exit code 2, and nothing half-written."""

import dataclasses
import fcntl
import json
import resource
import shutil
import signal

import pytest
import safetensors.torch
import torch
from support.experiments import write_experiment
from support.models import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import hedgerow as hr
from hedgerow.ledger import Ledger


def check(result, *words):
    assert result.code == 2, (result.out, result.err)
    lines = [line for line in result.err.splitlines() if line.startswith("hedgerow: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepps=3", ["`training.stepps`", "did you mean `steps`"]),
        ("model.path=./nowhere", ["model.path", "nowhere", "does not exist"]),
        ("data.test=missing.json", ["missing.json"]),
        ("data.clients=gone_{}.json", ["gone_"]),
        ("data.prompt=gone.txt", ["gone.txt"]),
        ("method.ranks=17", ["rank 17", "at most 16"]),
        ("method.ranks=[4, 2]", ["method.ranks has 2 ranks for 3 clients"]),
        ("method.targets=[q_prj]", ["method.targets", "q_prj", "q_proj"]),
        ("method.targets=[embed_tokens]", ["method.targets", "embed_tokens"]),
        ("method.name=fedit", ["fedit averages adapters of one rank"]),
        ("data.clients=[client_0.json, ./client_0.json]", ["client_0", "name"]),
        ("data.clients={a: client_0.json, a: client_1.json}", ["'a' stands twice"]),
        ("data.max_length=3", ["client-000", "data.max_length"]),
        ("data.max_length=1000", ["data.max_length", "256 positions"]),
        (
            "data.fields={instruction: question}",
            ["'question'", "client_0.json", "data.fields.instruction"],
        ),
        (
            "data.fields={prompt: p, completion: c, output: o}",
            ["data.fields", "`prompt` and `completion` are other words for `instruction`"],
        ),
        ("data.fields={prompt: p}", ["data.fields", "`prompt` and `completion` go together"]),
        ("data.prompt=chat", ["chat template"]),
        ("federation.clients_per_round=4", ["federation.clients_per_round", "3 clients"]),
        ("model.device=cuda:9", ["model.device"]),
        ("model.device=meta", ["model.device"]),
        ("method.alpha=0r", ["method.alpha", "above 0"]),
        ("method.ranks=[]", ["method.ranks"]),
        ("method.targets=([", ["method.targets"]),
        (
            "evaluation={metrics: [exact_match], max_new_tokens: 256}",
            ["evaluation.max_new_tokens", "at most 255"],
        ),
        ("evaluation.by=topic", ["evaluation.by", "topic"]),
        ("evaluation.metrics=[multiple_choice]", ["multiple_choice"]),
    ],
)
def test_a_mistake_in_the_experiment(hedgerow, experiment, tmp_path, override, words):
    check(hedgerow("run", experiment(), override, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{'a': 1}]", ["client_1.json", "line 1"]),
        ('[{"instruction": "x"}]', ["client_1.json", "output"]),
    ],
)
def test_a_client_whose_data_are_wrong(hedgerow, experiment, tmp_path, content, words):
    path = experiment()
    (tmp_path / "client_1.json").write_text(content)
    check(hedgerow("run", path, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


UNUSABLE = {
    "no rows": "[]",
    "a prompt too long": '[{"instruction": "%s", "output": "y"}]' % ("x" * 99),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_client_without_usable_data_is_left_out_and_said(hedgerow, experiment, tmp_path, what):
    path, run = experiment(federation={"clients_per_round": 3}), tmp_path / "run"
    (tmp_path / "client_1.json").write_text(UNUSABLE[what])
    result = hedgerow("run", path, "--out", run)
    assert result.code == 0, result.err
    assert "2 clients, 19 examples\nclient client-001 is left out: " in result.out
    assert result.out.count("left out") == 1
    ranks = {
        name: run / "updates" / "round-0001" / f"{name}.safetensors"
        for name in ("client-000", "client-002")
    }
    again = tmp_path / "again"
    kept = ["federation.keep_updates=true", "--out", again]
    assert hedgerow("run", path, *kept, "federation.rounds=1").code == 0
    for (name, file), rank in zip(ranks.items(), (4, 1), strict=True):
        with safetensors.safe_open(again / file.relative_to(run), "pt") as opened:
            assert opened.metadata()["r"] == str(rank), name
    assert hedgerow("run", path, *kept, "--resume").code == 0
    entries = [(folder / "ledger" / "0002.safetensors").read_bytes() for folder in (run, again)]
    assert entries[0] == entries[1]
    (tmp_path / "client_1.json").write_text((tmp_path / "client_0.json").read_text())
    check(hedgerow("run", path, "--out", run, "--resume"), "began without client-001")


@pytest.mark.parametrize("what", UNUSABLE)
def test_where_no_client_has_usable_data_there_is_no_run(hedgerow, experiment, tmp_path, what):
    path = experiment()
    for number in range(3):
        (tmp_path / f"client_{number}.json").write_text(UNUSABLE[what])
    check(hedgerow("run", path, "--out", tmp_path / "run"), "client")
    assert not (tmp_path / "run").exists()


ADVICE = "a lower training.learning_rate may help"


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("method", ["fedavg", "fedit", "fedkseed", "ferret"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_that_diverges_says_what_may_help(
    hedgerow, experiment, tmp_path, optimizer, method, steps
):
    options = {"fedit": {"ranks": 2}, "ferret": {"compression": 64}}.get(method, {})
    changes = [f"training.optimizer={optimizer}", f"training.steps={steps}"]
    rate = ["training.learning_rate=1e36", "training.max_grad_norm=null", "data.test=null"]
    path = experiment(federation={"rounds": 1})
    method = f"method={json.dumps({'name': method, **options})}"
    result = hedgerow("run", path, method, *changes, *rate, "--out", tmp_path / "run")
    assert result.code == 1
    assert ADVICE in result.err


def test_a_missing_experiment_file(hedgerow, tmp_path):
    check(hedgerow("run", tmp_path / "none.yaml", "--out", tmp_path / "run"), "none.yaml")


def test_a_run_directory_that_exists_already(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    check(hedgerow("run", experiment(), "--out", run), "exists already", "--resume")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    check(hedgerow("run", experiment(), "--out", tmp_path / "file"), "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    check(hedgerow("run", experiment(), "--out", tmp_path / "full"), "exists already")
    check(hedgerow("run", experiment(), "--out", tmp_path / "full", "--resume"), "exists already")


def test_resuming_another_experiment(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    result = hedgerow("run", experiment(), "training.steps=3", "--out", run, "--resume")
    check(result, "training.steps", "2", "3")


def another_model(folder):
    """GPT-2 where the run had a Llama."""
    config = GPT2Config(vocab_size=260, n_positions=256, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_a_base_of_another_architecture_or_with_other_weights(hedgerow, experiment, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    another_model(other)
    for command in (["evaluate", run], ["export", run, tmp_path / "out", "--to", "merged"]):
        result = hedgerow(*command, f"model.path={other}")
        check(result, "is not the base of the ledger", "architecture is GPT2LMHeadModel")
    assert not (tmp_path / "out").exists()
    check(
        hedgerow("run", experiment(), f"model.path={other}", "--out", run, "--resume"),
        "model.path",
    )


def test_a_gpt2_runs_too(hedgerow, experiment, tmp_path):
    """Its linear layers keep their weights transposed."""
    another_model(tmp_path / "gpt2")
    path = experiment(model={"path": str(tmp_path / "gpt2")}, training={"steps": 10})
    assert hedgerow("run", path, "--out", tmp_path / "run").code == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["eval_loss"] < json.loads(rows[0])["eval_loss"]
    for to in ("merged", "adapter"):
        assert hedgerow("export", tmp_path / "run", tmp_path / to, "--to", to).code == 0
        data = ["--data", tmp_path / "test.json", "data.prompt=plain", "data.max_length=64"]
        result = hedgerow("evaluate", tmp_path / to, *data, "--json")
        assert json.loads(result.out)["eval_loss"] == pytest.approx(
            json.loads(rows[-1])["eval_loss"], abs=1e-4
        )


@pytest.mark.parametrize("how", ["corrupted", "truncated", "missing"])
def test_a_damaged_ledger(hedgerow, experiment, tmp_path, how):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    entry = run / "ledger" / "0002.safetensors"
    data = entry.read_bytes()
    if how == "missing":
        entry.unlink()
    else:
        entry.write_bytes(data[:-9] if how == "truncated" else data[:-1] + b"\x00")
    for command in (
        ["ledger", "verify", run],
        ["ledger", "show", run],
        ["evaluate", run],
        ["export", run, tmp_path / "out", "--to", "merged"],
        ["export", run, tmp_path / "out", "--to", "adapter"],
        ["export", run, tmp_path / "out", "--to", "ledger"],
        ["run", experiment(), "federation.rounds=3", "--out", run, "--resume"],
    ):
        check(hedgerow(*command), "0002.safetensors")
    assert not (tmp_path / "out").exists()


def test_what_is_no_run(hedgerow, tmp_path):
    (tmp_path / "file").write_text("not a ledger")
    for target in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        check(hedgerow("ledger", "show", target), str(target))
        check(hedgerow("evaluate", target), str(target))


def test_exports_do_not_write_over_anything(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    (tmp_path / "taken").write_text("mine")
    for to in ("adapter", "merged", "ledger"):
        check(hedgerow("export", run, tmp_path / "taken", "--to", to), "exists already")
        check(hedgerow("export", run, tmp_path / "no" / "where", "--to", to), "does not exist")
    assert (tmp_path / "taken").read_text() == "mine"
    check(
        hedgerow("export", run, tmp_path / "x", "--to", "merged", "--round", 3),
        "round 3: the ledger has",
    )
    check(hedgerow("export", run, tmp_path / "x", "--to", "adapter", "--round", 0), "round 0")
    check(hedgerow("export", run, tmp_path / "x", "--to", "merged", "--rank", 3), "--to adapter")


def test_no_room_left(hedgerow, experiment, tmp_path):
    """A limit on file sizes stands for a full disk: the ledger keeps what it has, and goes on."""
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "federation.rounds=1", "--out", run).code == 0
    size = (run / "ledger" / "0001.safetensors").stat().st_size
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, hard))
    try:
        check(hedgerow("run", experiment(), "--out", run, "--resume"), "0002", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert hedgerow("ledger", "verify", run).code == 0
    assert hedgerow("run", experiment(), "--out", run, "--resume").code == 0
    whole = tmp_path / "whole"
    assert hedgerow("run", experiment(), "--out", whole).code == 0
    for name in ("0001.safetensors", "0002.safetensors", "ledger.json"):
        assert (run / "ledger" / name).read_bytes() == (whole / "ledger" / name).read_bytes()


def test_weights_that_are_pickles_are_not_loaded(hedgerow, experiment, tmp_path, tiny_model):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check(
        hedgerow("run", experiment(), f"model.path={folder}", "--out", tmp_path / "run"),
        "model.path",
    )


def test_commands_without_what_they_need(hedgerow):
    assert hedgerow("run").code == 2
    assert hedgerow("nonsense").code == 2


def test_a_base_that_lacks_weights(hedgerow, experiment, tmp_path, tiny_model):
    folder = tmp_path / "incomplete"
    shutil.copytree(tiny_model, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = hedgerow("run", experiment(), f"model.path={folder}", "--out", tmp_path / "run")
    check(result, "has no weights for model.layers.1.self_attn.q_proj.weight")
    data = (tiny_model / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    result = hedgerow("run", experiment(), f"model.path={folder}", "--out", tmp_path / "run")
    check(result, "model.path", "incomplete")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("ledger/ledger.json", None, ["ledger.json is missing"]),
        ("ledger/ledger.json", b"{}", ["ledger.json is damaged"]),
        ("metrics.jsonl", b"rubbish\n", ["metrics.jsonl is damaged"]),
        ("metrics.jsonl", b"[]\n", ["metrics.jsonl is damaged"]),
        ("metrics.jsonl", b'{"round": 0}\n', ["metrics.jsonl is damaged", "`participants`"]),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", ["metrics.jsonl is damaged"]),
        ("metrics.jsonl", b'{"\xff": 0}\n', ["metrics.jsonl is damaged"]),
        ("data.json", b"[]", ["data.json is missing or damaged"]),
        ("data.json", b'{"client-000": 5}', ["data.json is missing or damaged"]),
        ("data.json", b'[["client-000", "a"]]', ["data.json is missing or damaged"]),
        ("experiment.yaml", b"\xff\xfe", ["experiment.yaml", "not a text file"]),
    ],
)
def test_a_damaged_run_directory(hedgerow, experiment, tmp_path, file, content, words):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    entry = (run / "ledger" / "0001.safetensors").read_bytes()
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    check(hedgerow("run", experiment(), "--out", run, "--resume"), *words)
    assert (run / "ledger" / "0001.safetensors").read_bytes() == entry


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model):
    """A run of two rounds, not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    hr.run(write_experiment(folder, tiny_model), out=folder / "run", progress=False)
    return folder


def changed(row, **values):
    return {**row, **values}


WRONG_ROWS = {
    "a key missing": (lambda rows: [{"round": 0}, *rows[1:]], "line 1 has no right `participants`"),
    "a text": (lambda rows: [*rows[:2], changed(rows[2], eval_loss="x")], "line 3 has no right"),
    "a list": (lambda rows: [changed(rows[0], mine=[1]), *rows[1:]], "no right `mine`"),
    "no numbers": (lambda rows: [*rows[:2], changed(rows[2], bytes_up=None)], "`bytes_up`"),
    "a truth": (lambda rows: [*rows[:2], changed(rows[2], round=True)], "`round`"),
    "doubled": (lambda rows: [*rows[:2], rows[1], rows[2]], "line 3 is of round 1, not of round 2"),
    "one missing": (lambda rows: [rows[0], rows[2]], "line 2 is of round 2, not of round 1"),
    "the first missing": (lambda rows: rows[1:], "line 1 is of round 1, not of round 0"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_of_metrics_that_nobody_wrote(hedgerow, done, tmp_path, case):
    """They are refused by whoever reads them, and nothing is changed."""
    change, words = WRONG_ROWS[case]
    run = shutil.copytree(done / "run", tmp_path / "run")
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ["federation.rounds=3", "--out", run, "--resume"]
    for command in (
        ["run", done / "experiment.yaml", *more],
        ["report", run, "--out", tmp_path / "page.html", "--answers", 0],
        ["export", run, tmp_path / "merged", "--to", "merged"],
    ):
        check(hedgerow(*command), str(file), words, "restore it from a copy")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_rows_of_other_participants_than_the_ledger_s(hedgerow, done, tmp_path):
    run = shutil.copytree(done / "run", tmp_path / "run")
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("client-002", "client-003"))
    result = hedgerow("run", done / "experiment.yaml", "--out", run, "--resume")
    check(result, str(file), "round 1 names other participants")


def test_a_ledger_whose_hashes_were_made_anew_has_another_head(hedgerow, done, tmp_path):
    """It fits itself; whoever knows the head sees that it is another."""
    path = done / "run"
    head = Ledger.open(path / "ledger").head
    result = hedgerow("ledger", "verify", path)
    assert (result.code, head in result.out) == (0, True)
    assert hedgerow("ledger", "verify", path, "--head", head.upper()).code == 0
    check(hedgerow("ledger", "verify", path, "--head", head[:12]), "--head", "all 64 digits")
    run = shutil.copytree(path, tmp_path / "run")
    old = Ledger.open(path / "ledger")
    new = Ledger.create(run / "ledger", old.base, old.trained)
    for entry in old.entries():
        strangers = [
            dataclasses.replace(p, client=f"stranger-{p.client}") for p in entry.participants
        ]
        new.append(dataclasses.replace(entry, parent=new.head, participants=strangers))
    assert hedgerow("ledger", "verify", run).code == 0
    result = hedgerow("ledger", "verify", run, "--head", head)
    check(result, str(run), "another history", head, new.head)


def test_an_entry_without_a_loss_is_shown(hedgerow, done, tmp_path):
    """As one of a private run."""
    run = shutil.copytree(done / "run", tmp_path / "run")
    old = Ledger.open(done / "run" / "ledger")
    new = Ledger.create(run / "ledger", old.base, old.trained)
    new.append(dataclasses.replace(old.read(1), metrics={"epsilon": 1.5}))
    result = hedgerow("ledger", "show", run)
    assert result.code == 0, result.err
    assert new.head[:12] in result.out
    result = hedgerow("export", run, tmp_path / "merged", "--to", "merged")
    assert result.code == 0, result.err
    new.truncate(0)
    new.append(dataclasses.replace(old.read(1), metrics={}))
    assert hedgerow("ledger", "show", run).code == 0
    result = hedgerow("export", run, tmp_path / "no", "--to", "merged")
    check(result, "the entry of round 1 does not fit: metrics must have train_loss")


def test_files_that_nobody_wrote_are_nobody_s_memory(hedgerow, done, tmp_path):
    run = shutil.copytree(done / "run", tmp_path / "run")
    (run / "clients/.DS_Store").write_text("")
    (run / "clients/stray").mkdir()
    for name in ("notes.safetensors", "9x.safetensors", "²²²².safetensors", "0001.txt"):
        (run / "clients/client-000" / name).write_text("")
    more = ["federation.rounds=3", "--out", run, "--resume"]
    result = hedgerow("run", done / "experiment.yaml", *more)
    assert result.code == 0, result.err
    assert (run / "clients/client-000/notes.safetensors").exists()


def test_resuming_what_cannot_end_the_same(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    path = experiment(training={"schedule": "linear"})
    assert hedgerow("run", path, "--out", run).code == 0
    more = ["federation.rounds=3", "--out", run, "--resume"]
    check(hedgerow("run", path, *more), "linear", "federation.rounds=2")
    fewer = ["federation.rounds=1", "--out", run, "--resume"]
    check(hedgerow("run", path, *fewer), "federation.rounds=1", "has 2 already")


def test_resuming_on_other_data(hedgerow, experiment, tmp_path):
    run, path = tmp_path / "run", experiment()
    assert hedgerow("run", path, "--out", run).code == 0
    rows = json.loads((tmp_path / "client_1.json").read_text())
    rows[3]["output"] = "something else"
    (tmp_path / "client_1.json").write_text(json.dumps(rows))
    result = hedgerow("run", path, "federation.rounds=3", "--out", run, "--resume")
    check(result, "the data of client-001 have changed")


def test_a_run_that_somebody_else_is_writing(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write('{"round": 3')  # the other is writing a row just now
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(hedgerow("run", experiment(), "--out", run, "--resume"), "another hedgerow process")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_client_is_named_only_where_each_has_a_model(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    for command in (["evaluate", run], ["export", run, tmp_path / "x", "--to", "adapter"]):
        check(hedgerow(*command, "--client", "client-000"), "flora has one model")
    alone = tmp_path / "alone"
    assert hedgerow("run", experiment(), "method.name=standalone", "--out", alone).code == 0
    check(hedgerow("evaluate", alone, "--client", "bob"), "client-000, client-001, client-002")


def test_exporting_leaves_neighbours_alone(hedgerow, experiment, tmp_path):
    run = tmp_path / "run"
    assert hedgerow("run", experiment(), "--out", run).code == 0
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "thesis.tex").write_text("mine")
    assert hedgerow("export", run, tmp_path / "x", "--to", "merged").code == 0
    assert (tmp_path / "x.partial" / "thesis.tex").read_text() == "mine"


def test_an_output_below_a_file(hedgerow, experiment, tmp_path):
    (tmp_path / "file").write_text("mine")
    check(hedgerow("run", experiment(), "--out", tmp_path / "file" / "run"), "file")
    check(hedgerow("demo", "--out", tmp_path / "file" / "run"), "file")


@pytest.mark.parametrize("command", ["run", "flower init"])
def test_without_flower_its_commands_say_how_to_get_it(
    hedgerow, experiment, tmp_path, monkeypatch, command
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    place = tmp_path / "made"
    arguments = {
        "run": ["run", experiment(), "--engine", "flower", "--out", place],
        "flower init": ["flower", "init", experiment(), place],
    }
    check(hedgerow(*arguments[command]), "pip install 'hedgerow[flower]'")
    assert not place.exists()
