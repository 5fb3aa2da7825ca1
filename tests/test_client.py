"""Scripts with trainers of their own, as sites of a federation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import transformers
import trl
import yaml
from support.network import Network, wait_for
from support.runs import entries, rows_of

from hedgerow.bundled import MODEL, tasks
from hedgerow.client import federate
from hedgerow.client.trainer import ScriptTrainer, check_script, check_types
from hedgerow.data import ClientData
from hedgerow.engines.flower.app import init
from hedgerow.engines.flower.messages import Request
from hedgerow.engines.flower.site import Script, of_script
from hedgerow.errors import RunFailed, UserError
from hedgerow.experiment import load
from hedgerow.model import Model
from hedgerow.seeds import Seeds
from hedgerow.wire import Update

EXAMPLE = Path(__file__).parents[1] / "examples" / "federate_trl.py"
NAME = "client-001"
RUN = "0" * 32
STEP = {"steps": 1, "batch_size": 9, "optimizer": "sgd", "max_grad_norm": None}


def trainer_of(model, tokens, folder, **options):
    """A transformers Trainer of this model's network on a client's tokens."""
    rows = [
        {
            "input_ids": each.tokens.tolist(),
            "labels": [
                int(t) if on else -100 for t, on in zip(each.tokens, each.learnt, strict=True)
            ],
        }
        for each in tokens
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=64,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        optim="sgd",  # whose steps are as near each other as gradients are
        weight_decay=0.0,
        max_grad_norm=0.0,
        learning_rate=123.0,
        max_steps=99,
    )
    return transformers.Trainer(
        **{
            "model": model.network,
            "args": arguments,
            "train_dataset": datasets.Dataset.from_list(rows),
            "processing_class": model.tokenizer,
            "data_collator": transformers.DataCollatorForSeq2Seq(model.tokenizer),
            **options,
        }
    )


@pytest.fixture
def script(experiment, tmp_path):
    """A Trainer on one client's rows, a function that makes its site, and the experiment."""

    def make(method, *overrides, trained_by=trainer_of, **sections):
        path = experiment(**{"training": STEP} | sections)
        text = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(text | {"method": method}))
        loaded = load(path, ["data.test=null", *overrides])
        init(loaded, tmp_path / "app", "tiny")
        model = Model.load(loaded.model)
        data = ClientData(loaded.data, model.tokenizer, Seeds(0))
        tokens = data.tokenize(NAME)
        examples = [tokens[i] for i in range(len(tokens))]
        trainer = trained_by(model, examples, tmp_path / "trainer")

        def site(count=None):
            base = Model(trainer.model, trainer.processing_class, "tiny")
            own = Script(ScriptTrainer.of(trainer), check_script(trainer, count), lambda: base)
            return of_script(tmp_path / "app", NAME, tmp_path / "site", own)

        return path, trainer, site

    return make


@pytest.mark.parametrize(
    "method",
    [
        {"name": "flora", "ranks": [4, 2, 1]},
        {"name": "fedit", "ranks": 2},
        {"name": "fedavg"},
        {"name": "ferret", "compression": 40},
    ],
    ids=lambda method: method["name"],
)
def test_one_step_on_all_rows_is_that_of_a_site_with_a_file(script, hedgerow, tmp_path, method):
    """Whatever learning rate and number of steps the script had for itself."""
    path, trainer, site = script(method)
    first = site().handle(NAME, Request(run=RUN), [])[0]
    assert first.num_examples == 9
    reply, file = site().handle(NAME, Request(run=RUN, train=True), [])
    assert reply.refused is None
    assert reply.failure is None
    local = ["federation.keep_updates=true", "federation.rounds=1"]
    done = hedgerow("run", path, *local, "--out", tmp_path / "local")
    assert done.code == 0, done.err
    theirs = Update.read(file)
    ours = Update.read(tmp_path / f"local/updates/round-0001/{NAME}.safetensors")
    assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-5)
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        near = torch.linalg.vector_norm((theirs.tensors[name] - tensor).float())
        assert near <= 1e-3 * torch.linalg.vector_norm(tensor.float()), name
    assert trainer.args.learning_rate == 123.0
    assert trainer.args.max_steps == 99
    assert not list((tmp_path / "trainer").glob("checkpoint-*"))


def dpo_trainer(model, tokens, folder):
    """TRL's trainer, which keeps a copy of the base to refer to."""
    rows = [{"prompt": f"Say {i}", "chosen": f"{i}" * 3, "rejected": "no"} for i in range(9)]
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return trl.DPOTrainer(
        model=model.network,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=model.tokenizer,
    )


@pytest.mark.parametrize("method", [{"name": "flora", "ranks": [4, 2, 1]}, {"name": "fedavg"}])
def test_dpo_begins_at_the_base_and_goes_on_from_it(script, method):
    steps = {"steps": 3, "batch_size": 4, "learning_rate": 0.01}
    _, trainer, site = script(method, trained_by=dpo_trainer, training=steps)
    reply, file = site().handle(NAME, Request(run=RUN, train=True), [])
    assert reply.failure is None
    first, *_, last = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert float(first) == pytest.approx(math.log(2), rel=1e-3)
    assert float(last) < float(first)
    assert Update.read(file).tensors


def test_a_trainer_whose_loss_diverges_is_the_client_s_failure(script, capsys):
    steps = {"steps": 5, "batch_size": 9, "learning_rate": 1e30, "optimizer": "sgd"}
    _, _, site = script({"name": "fedavg"}, training=steps)
    reply, file = site().handle(NAME, Request(run=RUN, train=True), [])
    assert file is None
    assert "training.learning_rate" in reply.failure
    assert "max_grad_norm" not in reply.failure


def test_the_federation_s_rate_counts_whatever_makes_the_optimiser(script):
    rates = []

    class Noted(torch.optim.SGD):
        def __init__(self, parameters, **options):
            rates.append(options["lr"])
            super().__init__(parameters, **options)

    _, trainer, site = script({"name": "fedavg"})
    trainer.optimizer_cls_and_kwargs = (Noted, {"lr": 7.0, "momentum": 0.5})
    site().handle(NAME, Request(run=RUN, train=True), [])
    assert rates == [0.01]
    assert trainer.optimizer_cls_and_kwargs == (Noted, {"lr": 7.0, "momentum": 0.5})


@pytest.mark.parametrize("other", [False, True])
def test_the_order_of_rows_is_the_experiment_s(script, tmp_path, other):
    """Though the script has a seed of its own for it, which the Trainer hands on early."""
    seen = []

    def noting(model, tokens, folder):
        trainer = trainer_of(model, tokens, folder)
        trainer.accelerator.dataloader_config.data_seed = 1
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: seen.extend(map(str, rows)) or collate(rows)
        return trainer

    _, trainer, site = script({"name": "fedavg"}, trained_by=noting)
    site().handle(NAME, Request(run=RUN, train=True), [])
    first, seen[:] = list(seen), []
    again = site()
    if other:
        again._seeds = Seeds(1)
    again.handle(NAME, Request(run="1" * 32, train=True), [])
    assert len(first) == len(seen) >= 9
    assert (first == seen) is not other
    assert trainer.accelerator.dataloader_config.data_seed == 1


def test_another_process_follows_and_writes_nothing(script, tmp_path):
    """As in several processes of one site; the folder is the first one's."""
    method = {"name": "fedavg", "up": "top_k", "error_feedback": 0.9}
    _, trainer, site = script(method)
    told = []
    main = site()
    main._before = lambda run, date: told.append(run)
    main.handle(NAME, Request(run=RUN, train=True), [])
    assert told == [RUN]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")}
    calls = []
    train = trainer.train
    trainer.train = lambda: calls.append(1) or train()
    site().follow(NAME, RUN, None)
    assert calls == [1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")} == before


def test_a_site_whose_rows_have_become_others_stays_out(script, capsys):
    _, _, site = script({"name": "fedavg"})
    site().handle(NAME, Request(run=RUN), [])
    reply, _ = site(8).handle(NAME, Request(run=RUN), [])
    assert reply.refused == "its data have changed since the run began"


@pytest.mark.parametrize(
    ("method", "sections", "said"),
    [
        ("fedkseed", {}, "local steps of its own"),
        (
            "fedavg",
            {"privacy": {"level": "example", "clip": 1, "noise_multiplier": 1, "delta": 1e-3}},
            "hedgerow's own steps",
        ),
        ("fedavg", {"audit": {"client": NAME}}, "name another client"),
    ],
)
def test_what_a_script_s_trainer_does_not_do_is_said(script, method, sections, said):
    _, _, site = script({"name": method}, **sections)
    with pytest.raises(UserError, match=said):
        site()


def no_length():
    yield {"input_ids": [1], "labels": [1]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda trainer: "a trainer", "is no transformers Trainer"),
        (
            lambda trainer: _with(
                trainer, model=peft.get_peft_model(trainer.model, peft.LoraConfig())
            ),
            "give it the base model alone",
        ),
        (
            lambda trainer: _with(
                trainer, optimizer=torch.optim.SGD(trainer.model.parameters(), lr=1.0)
            ),
            "optim",
        ),
        (lambda trainer: _with(trainer, processing_class=None), "processing_class"),
        (lambda trainer: _with(trainer, model_init=lambda: trainer.model), "model_init"),
        (lambda trainer: _with(trainer, is_fsdp_enabled=True), "FSDP"),
        (lambda trainer: _with_deepspeed(trainer, 3), "take ZeRO 1 or 2"),
        (lambda trainer: _with_deepspeed(trainer, 2, optimizer={}), "a section 'optimizer'"),
        (lambda trainer: _with_deepspeed(trainer, 1, scheduler={}), "a section 'scheduler'"),
        (
            lambda trainer: _with(
                trainer, train_dataset=datasets.IterableDataset.from_generator(no_length)
            ),
            "give num_examples",
        ),
    ],
)
def test_mistakes_are_one_sentence(tiny_model, tmp_path, change, said):
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    trainer = transformers.Trainer(
        model=network,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        train_dataset=datasets.Dataset.from_list([{"input_ids": [1], "labels": [1]}]),
        processing_class=tokenizer,
    )
    with pytest.raises(UserError, match=said):
        federate(change(trainer), superlink="127.0.0.1:1", name="north", insecure=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"private_key": "nowhere.key"}, "private_key: .*nowhere.key is no file"),
        ({"root_certificates": "x"}, "leave one of them out"),
        ({"name": "no/name"}, "give letters"),
        ({"folder": 'a"b'}, "has a quote"),
        ({"num_examples": 0}, "give 1 or more"),
    ],
)
def test_what_is_given_beside_a_trainer_is_checked(script, given, said):
    _, trainer, _ = script({"name": "fedavg"})
    where = {"superlink": "127.0.0.1:1", "name": NAME, "insecure": True}
    with pytest.raises(UserError, match=said):
        federate(trainer, **where | given)


def test_another_base_is_said(script, tmp_path, tiny_model):
    _, trainer, site = script({"name": "fedavg"})
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.add_(1)
    with pytest.raises(UserError, match="is not for the federation's base: its fingerprint"):
        site()


@pytest.mark.slow
def test_a_supernode_that_ends_is_said(script, tmp_path):
    """Nobody answers at this address; one process at a time is a client."""
    _, trainer, _ = script({"name": "fedavg"})
    where = {"superlink": "127.0.0.1:1", "name": NAME, "folder": tmp_path / "site"}
    key = tmp_path / "no.key"
    key.write_text("this is no key")
    with pytest.raises(RunFailed, match="the SuperNode has ended"):
        federate(trainer, **where, insecure=True, private_key=key)


def _with(trainer, **attributes):
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def _with_deepspeed(trainer, stage, **sections):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=sections)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    return _with(trainer, is_deepspeed_enabled=True, accelerator=accelerator)


@pytest.mark.parametrize(
    ("dtypes", "arguments", "said"),
    [
        ([torch.float32], {}, None),
        ([torch.bfloat16], {"bf16": True}, None),
        ([torch.bfloat16, torch.float32], {"bf16": True}, "in bfloat16 alone, .* has float32"),
        ([torch.bfloat16, torch.float32], {}, "in float32 alone, .* has bfloat16"),
        ([torch.float32], {"fp16": True}, "in float16 alone, .* has float32"),
    ],
)
def test_deepspeed_has_one_number_type(dtypes, arguments, said):
    layers = torch.nn.ModuleList(torch.nn.Linear(1, 1, dtype=dtype) for dtype in dtypes)
    trainer = SimpleNamespace(args=SimpleNamespace(**{"bf16": False, "fp16": False} | arguments))
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_types(trainer, layers)


def test_a_process_that_the_trainer_does_not_know_is_named(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = "2 processes were launched, but the trainer uses 1"
    test_mistakes_are_one_sentence(tiny_model, tmp_path, lambda trainer: trainer, said)


@pytest.mark.slow
@pytest.mark.parametrize("several", ["processes", "ZeRO 2"])
def test_scripts_with_trl_are_three_sites_of_a_network(hedgerow, tmp_path, several):
    """One of them trains in three processes, as on three GPUs."""
    names = ["north", "south", "west"]
    for name, rows in zip(names, tasks.clients().values(), strict=False):
        kept = [{key: row[key] for key in ("instruction", "output")} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    content = {
        "model": {"path": str(MODEL), "dtype": "float32"},
        "data": {
            "clients": {name: f"{name}.json" for name in names},
            "prompt": "plain",
            "max_length": 96,
        },
        "method": {"name": "flora", "ranks": [8, 4, 2]},
        "training": {"steps": 4, "learning_rate": 1e-3},
        "federation": {"rounds": 3},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    assert hedgerow("flower", "init", path, tmp_path / "app").code == 0
    # accelerate's own launcher has one process on CPUs, and this one below it on GPUs.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    arguments, kind = "use_cpu=True", "MULTI_CPU"
    if several == "ZeRO 2":
        pytest.importorskip("deepspeed")
        automatic = ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
        divided = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
        arguments += f", deepspeed={divided | dict.fromkeys(automatic, 'auto')}"
        kind = "DEEPSPEED"
    # The example, which then says how it has trained.
    script = tmp_path / "several.py"
    said = "print(trainer.accelerator.num_processes, trainer.accelerator.distributed_type.value)"
    text = EXAMPLE.read_text("utf-8").replace("output_dir=", f"{arguments}, output_dir=")
    script.write_text(f"{text}\n{said}\n")
    scripts = {}
    with Network(tmp_path / "network") as network:
        try:
            for name in names:
                network.register(name)
                command = [*launcher, script] if name == "north" else [sys.executable, EXAMPLE]
                own = [tmp_path / f"{name}.json", name, f"127.0.0.1:{network.port}"]
                own += [network.ca, network.key(name), tmp_path / "sites" / name]
                with (tmp_path / f"{name}.log").open("wb") as log:
                    scripts[name] = subprocess.Popen(
                        [str(part) for part in [*command, *own]],
                        env=os.environ | {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=tmp_path,
                    )
            run = network.submit(tmp_path / "app", tmp_path / "remote")
            assert network.finish(run) == "finished:completed", network.run_log(run)
            for name, process in scripts.items():
                over = wait_for(lambda p=process: p.poll() is not None, f"the end of {name}")
                assert over
                assert process.returncode == 0, (tmp_path / f"{name}.log").read_text()
        finally:
            for process in scripts.values():
                process.kill()
    rows = rows_of(tmp_path / "remote")
    assert [row["clients"] for row in rows] == [0, 3, 3, 3]
    assert all(row["aggregation_error"] < 1e-6 for row in rows[1:])
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]
    assert f"\n3 {kind}\n" in (tmp_path / "north.log").read_text()
    known = json.loads((tmp_path / "remote/flower.json").read_text())["run"]
    for name in names:
        assert entries(tmp_path / "sites" / name / known) == entries(tmp_path / "remote")
        assert (tmp_path / f"tuned-{name}" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_supernode_ends_with_its_script(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hedgerow.engines.flower.supernode import supernode\n"
        "with supernode('north', Path(sys.argv[1]), ['--insecure', '--superlink',"
        " '127.0.0.1:9'], lambda: None):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "here")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"

        def started():
            found = subprocess.run(["pgrep", "-f", str(tmp_path / "here")], capture_output=True)
            return found.stdout.split()

        wait_for(lambda: len(started()) >= 3, "the start of the SuperNode")
        process.kill()
        wait_for(lambda: not started(), "the end of the SuperNode")
