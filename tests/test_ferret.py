"""Ferret: what travels, what is rebuilt from it, and who needs the model for that."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import rows_of

from hedgerow import federation, runs
from hedgerow.engines import local
from hedgerow.errors import InvalidMessage
from hedgerow.evaluation.scores import evaluate
from hedgerow.experiment import load
from hedgerow.federation.fleet import ClientResult, Unwatched
from hedgerow.ledger import Ledger
from hedgerow.methods.base import Client, Expected
from hedgerow.model import Model
from hedgerow.runs.directory import RunDirectory
from hedgerow.runs.memory import RoundMemory
from hedgerow.seeds import Seeds
from hedgerow.sketch.blocks import group
from hedgerow.sketch.coordinates import pack
from hedgerow.testing.models import random_llama
from hedgerow.training import first_order
from hedgerow.training.objectives.supervised import Supervised
from hedgerow.wire import Update

PAPER_STEPS = {"optimizer": "sgd", "max_grad_norm": None, "learning_rate": 0.1}


@pytest.fixture
def run(experiment, hedgerow, tmp_path):
    """Run ferret with these options, by default of random coordinates; returns its directory."""

    def start(out="run", training=None, federation=None, **method):
        method = {"name": "ferret", "coordinates": "random", "compression": 64, **method}
        if "budget" in method or method.get("paper"):
            del method["compression"]
        federation = {"rounds": 3, "keep_updates": True, **(federation or {})}
        path = experiment(training=training or {}, federation=federation)
        content = json.dumps(method)
        done = hedgerow("run", path, f"method={content}", "--out", tmp_path / out)
        assert done.code == 0, done.err
        return tmp_path / out

    return start


def delta_of(directory, round):
    """What the run has added to the base after a round, by name."""
    with runs.opened(directory, []) as (experiment, ledger):
        base = Model.load(experiment.model)
        model = runs.model_at(experiment, ledger, round)
    before = dict(base.network.named_parameters())
    return {n: (p - before[n]).detach() for n, p in model.network.named_parameters()}


OPTIONS = {
    "the largest": {"coordinates": "largest"},
    "the largest, both ways": {"coordinates": "largest", "broadcast_compression": 32},
    "the largest, over lora": {
        **{"coordinates": "largest", "over": "lora", "ranks": 2, "compression": 16},
        **{"error_feedback": True, "bits": 2, "broadcast_bits": 8},
    },
    "the largest, owed by the server": {"coordinates": "largest", "broadcast_feedback": True},
    "random": {},
    "32 bits": {"bits": 32, "broadcast_bits": 32, "compression": 4},
    "a budget": {"budget": 900, "bits": 8, "broadcast_bits": 8},
    "dense bases": {"basis": "rademacher", "bits": 4},
    "gaussian": {"basis": "gaussian", "bits": 4},
    "seeds by client": {"seeds": "client"},
    "by norm": {"allocation": "norm"},
    "by norm, dense": {"allocation": "norm", "basis": "uniform", "bits": 32},
    "paper": {"paper": True},
    "server": {"server_learning_rate": 0.5, "anneal": 0.9, "clip": 0.5, "momentum": 0.5},
    "error feedback": {"error_feedback": True},
    "over lora": {"over": "lora", "ranks": 2, "budget": 400},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_choice_runs_and_replays_to_the_same_bits(run, options):
    directory = run(**options)
    assert all(row["eval_loss"] > 0 and row["failed"] == 0 for row in rows_of(directory))
    with runs.opened(directory, []) as (experiment, ledger):
        first, second = (runs.model_at(experiment, ledger, 3) for _ in range(2))
    states = [m.factors or m.network.state_dict() for m in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    experiment = load(directory / "experiment.yaml")
    prepared = local.prepare(experiment, first)
    for _ in experiment.method.models(first, []):
        scores = evaluate(first, prepared.test, experiment.evaluation)
    assert scores["eval_loss"] == pytest.approx(rows_of(directory)[-1]["eval_loss"], abs=1e-6)


def test_the_paper_s_settings_are_defaults_that_one_may_still_change(experiment):
    paper = load(experiment(), ["method={name: ferret, paper: true, clip: 1}"]).method
    assert (paper.basis, paper.bits, paper.seeds, paper.allocation) == (
        "uniform",
        32,
        "client",
        "norm",
    )
    assert (paper.budget, paper.clip) == (4096, 1)
    assert load(experiment(), ["method={name: ferret, paper: true, compression: 8}"]).method


def test_an_update_is_as_many_times_smaller_as_asked(run):
    for compression, bits in ((64, 1), (16, 4), (4, 32)):
        out = run(f"c{compression}-{bits}", compression=compression, bits=bits)
        tensors = load_file(next((out / "updates/round-0001").iterdir()))
        with runs.opened(out, []) as (_, ledger):
            dense = 4 * ledger.base.parameters
        sent = sum(tensors[n].nbytes for n in tensors if n != "seed")
        assert 0.9 < sent / (dense / compression) < 1.03


def test_the_largest_coordinates_are_as_many_times_smaller_as_asked(experiment, hedgerow, tmp_path):
    """But for what each tensor has: a size of its coordinates, and at least one of them."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    wide = random_llama(tmp_path / "wide", **sizes, num_attention_heads=4, num_key_value_heads=4)
    for compression, bits in ((128, 1), (32, 1), (16, 4)):
        out = tmp_path / f"c{compression}-{bits}"
        path = experiment(model={"path": str(wide)}, federation={"rounds": 1})
        method = f"method={{name: ferret, compression: {compression}, bits: {bits}}}"
        kept = "federation.keep_updates=true"
        assert hedgerow("run", path, method, kept, "--out", out).code == 0
        tensors = load_file(next((out / "updates/round-0001").iterdir()))
        with runs.opened(out, []) as (_, ledger):
            dense = 4 * ledger.base.parameters
        sent = sum(each.nbytes for each in tensors.values())
        assert 0.95 < sent / (dense / compression) < 1.1


def test_with_all_coordinates_in_32_bits_ferret_is_fedavg(run, experiment, hedgerow, tmp_path):
    ferret = run(budget=8080, bits=32, broadcast_bits=32, federation={"rounds": 1})
    path = experiment(federation={"rounds": 1})
    assert hedgerow("run", path, "method=fedavg", "--out", tmp_path / "fedavg").code == 0
    ours, theirs = delta_of(ferret, 1), delta_of(tmp_path / "fedavg", 1)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], atol=3e-7), name


def test_shared_seeds_make_a_broadcast_that_does_not_grow_with_clients(run):
    shared, own = run("shared"), run("own", seeds="client")
    entry = [(out / "ledger/0001.safetensors").stat().st_size for out in (shared, own)]
    assert entry[1] > 2 * entry[0]
    assert {n for n in load_file(shared / "ledger/0001.safetensors") if n.endswith("seed")} == {
        "0.seed"
    }


class Postman:
    """A fleet far away: it hands in the updates that others have sent, and has no model."""

    def __init__(self, directory, clients) -> None:
        self._clients, self._updates = clients, directory / "updates"

    def gather(self):
        return self._clients

    def train(self, round, parent, clients, clock):
        for client in clients:
            file = self._updates / f"round-{round:04d}" / f"{client.name}.safetensors"
            yield ClientResult(client, file.read_bytes())

    def advance(self, entry) -> None:
        pass

    def evaluate(self, progress):
        return {}


@pytest.mark.parametrize(
    "method", [{}, {"over": "lora", "ranks": 2, "budget": 400}, {"seeds": "client"}]
)
def test_a_server_needs_no_model(run, tmp_path, method):
    """It aggregates and appends where the model's folder does not exist, to the same bytes."""
    directory = run(**method)
    with runs.opened(directory, []) as (_, ledger):
        base, clients, trained = ledger.base, ledger.read(1).participants, ledger.trained
    nowhere = tmp_path / "no/such/model"
    experiment = load(directory / "experiment.yaml", [f"model.path={nowhere}"])
    assert not nowhere.exists()
    members = [Client(i, c.client, c.num_examples) for i, c in enumerate(clients)]
    with RunDirectory.create(tmp_path / "server", experiment, base, {}, trained) as server:
        federation.run(experiment, Postman(directory, members), server, Unwatched())
    for round in (1, 2, 3):
        name = f"ledger/{round:04d}.safetensors"
        assert (tmp_path / "server" / name).read_bytes() == (directory / name).read_bytes()


def test_a_ledger_is_one_small_file_that_rebuilds_the_weights(run, hedgerow, tmp_path):
    directory, packed = run(), tmp_path / "run.hedgerow"
    assert hedgerow("export", directory, packed, "--to", "ledger").code == 0
    moved = tmp_path / "elsewhere"
    shutil.copytree(load(directory / "experiment.yaml").model.path, moved)
    for source, change, out in ((directory, [], "a"), (packed, [f"model.path={moved}"], "b")):
        done = hedgerow("export", source, tmp_path / out, "--to", "merged", *change)
        assert done.code == 0, done.err
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_altered_ledger_and_one_of_another_base_are_refused(run, hedgerow, tmp_path):
    directory = run()
    other = tmp_path / "other"
    shutil.copytree(load(directory / "experiment.yaml").model.path, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    foreign = hedgerow("export", directory, tmp_path / "x", "--to", "merged", f"model.path={other}")
    assert foreign.code == 2
    assert "is not the base of the ledger" in foreign.err
    entry = directory / "ledger/0002.safetensors"
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    altered = hedgerow("export", directory, tmp_path / "x", "--to", "merged")
    assert altered.code == 2
    assert "0002.safetensors was altered" in altered.err
    assert not (tmp_path / "x").exists()


def test_an_adapter_over_lora_is_what_was_evaluated(run, hedgerow, tmp_path):
    directory = run(over="lora", ranks=2, budget=400)
    done = hedgerow("export", directory, tmp_path / "adapter", "--to", "adapter")
    assert done.code == 0, done.err
    data = ["--data", tmp_path / "test.json", "data.prompt=plain", "data.max_length=64"]
    scores = hedgerow("evaluate", tmp_path / "adapter", *data)
    assert scores.code == 0, scores.err
    expected = rows_of(directory)[-1]["eval_loss"]
    assert f"{expected:.3f}"[:5] in scores.out
    full = hedgerow("export", run("full"), tmp_path / "no", "--to", "adapter")
    assert full.code == 2
    assert "--to merged" in full.err


def test_error_feedback_keeps_what_a_sketch_has_lost(run):
    """Round 1: what is kept and what was sent are together what was trained."""
    directory = run(error_feedback=True, federation={"rounds": 1})
    method = load(directory / "experiment.yaml").method
    kept = RoundMemory(directory / "clients/client-001", 2).load()
    sent = load_file(directory / "updates/round-0001/client-001.safetensors")
    plain = run("plain", bits=32, budget=8080, federation={"rounds": 1})
    exact = load_file(plain / "updates/round-0001/client-001.safetensors")
    shapes = {name: tensor.shape for name, tensor in delta_of(plain, 1).items()}

    def rebuilt(method, tensors):
        pieces = [method.parts.up.decode(tensors, shapes)]
        return dict(method.parts.through.decode(pieces, shapes, torch.device("cpu")))

    estimate = rebuilt(method, sent)
    trained = rebuilt(load(plain / "experiment.yaml").method, exact)
    for name in trained:
        assert torch.allclose(kept[name] + estimate[name], trained[name], atol=1e-6)


def test_a_killed_run_with_error_feedback_goes_on_with_what_clients_kept(
    run, hedgerow, experiment, tmp_path
):
    whole = run("whole", error_feedback=True)
    part = run("part", error_feedback=True, federation={"rounds": 2})
    # As if it was killed in round 3, after one client had trained.
    memory = RoundMemory(part / "clients/client-000", 3)
    memory.save(dict(RoundMemory(part / "clients/client-000", 3).load()))
    options = (
        'method={"name": "ferret", "coordinates": "random", "compression": 64, '
        '"error_feedback": true}'
    )
    path = experiment(federation={"rounds": 3, "keep_updates": True})
    done = hedgerow("run", path, options, "--out", part, "--resume")
    assert done.code == 0, done.err
    name = "ledger/0003.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_momentum_goes_on_in_the_direction_of_past_rounds(run):
    """m_2 = Δ_2 + β m_1: round 2 moves by its own step and by half of round 1's."""
    directory = run(momentum=0.5)
    moved = [delta_of(directory, round) for round in (1, 2)]
    with runs.opened(directory, []) as (experiment, ledger):
        model = Model.load(experiment.model)
        base = {n: p.clone() for n, p in model.network.named_parameters()}
        experiment.method.model_copy(update={"momentum": 0.0}).apply(model, ledger.read(2))
    for name, weight in model.network.named_parameters():
        own = weight - base[name]
        assert torch.allclose(moved[1][name], 1.5 * moved[0][name] + own, atol=1e-6)


def test_a_replay_has_the_bits_that_the_run_had(run, experiment, hedgerow, tmp_path):
    """What the run's own model was at its end, weight by weight, and what its ledger rebuilds."""
    for number, options in enumerate(
        [
            "{name: ferret, compression: 64}",
            "{name: ferret, compression: 64, momentum: 0.5, seeds: client}",
            "{name: ferret, paper: true}",
            "{name: fedkseed}",
        ]
    ):
        dtype = "float32" if "fedkseed" in options else "bfloat16"
        settings = load(experiment(), [f"method={options}", f"model.dtype={dtype}"])
        model = Model.load(settings.model)
        local.run(settings, tmp_path / str(number), Unwatched(), model=model)
        with runs.opened(tmp_path / str(number), []) as (again, ledger):
            rebuilt = runs.model_at(again, ledger, 2)
        pairs = zip(model.network.parameters(), rebuilt.network.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_options_that_an_entry_depends_on_cannot_be_changed_afterwards(run, hedgerow, tmp_path):
    directory = run()
    for change in ("method.basis=rademacher", "method.momentum=0.9", "method.broadcast_bits=4"):
        done = hedgerow("export", directory, tmp_path / "x", "--to", "merged", change)
        assert done.code == 2
        assert "round 1 was made with {'basis': 'hadamard'" in done.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bits", [1, 32])
def test_an_update_that_is_not_finite_is_the_client_s_failure(experiment, hedgerow, tmp_path, bits):
    path = experiment(
        training={"optimizer": "sgd", "max_grad_norm": None, "learning_rate": 3e38, "steps": 1}
    )
    method = f"method={{name: ferret, budget: 100, bits: {bits}}}"
    done = hedgerow("run", path, method, "--out", tmp_path / "run")
    assert done.code == 1
    assert "the update contains NaN or infinity" in done.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            "coordinates: random, compression: 1.0e9",
            "method.compression: 1e+09 is 0 coordinates of 1-bit numbers",
        ),
        ("coordinates: random, compression: 2", "give a larger compression"),
        ("compression: 1.0e9", "`compression`: 1e+09 does not fit the largest coordinates"),
        ("compression: 2", "each: give another, other `bits`, or `coordinates: random`"),
        ("bits: 32", "`bits`: the largest coordinates travel in 1, 2, 4 or 8 bits, not 32"),
        ("broadcast_compression: 64, broadcast_bits: 8", "or `broadcast_bits`, not both"),
        ("broadcast_compression: 1", "`broadcast_compression`: 1 does not fit the largest"),
        (
            "budget: 500, broadcast_compression: 64",
            "`broadcast_compression` counts with `coordinates: largest` alone",
        ),
        (
            "coordinates: random, broadcast_feedback: true",
            "`broadcast_feedback` counts with `coordinates: largest` alone",
        ),
        ("broadcast_bits: 32, broadcast_feedback: true", "a broadcast in 32 bits loses nothing"),
        ("coordinates: largest, clip: 1", "`clip` counts with `coordinates: random` alone"),
        ("budget: 10, compression: 3", "not both"),
        ("bits: 3", "method.bits"),
        ("basis: fourier", "method.basis"),
        ("over: lora, ranks: [4, 2, 1]", "averages adapters of one rank"),
        ("compresion: 8", "did you mean `compression`"),
    ],
)
def test_mistakes_are_one_sentence(experiment, hedgerow, tmp_path, options, says):
    done = hedgerow(
        "run", experiment(), f"method={{name: ferret, {options}}}", "--out", tmp_path / "run"
    )
    assert done.code == 2
    assert says in done.err
    assert done.err.splitlines()[-1].startswith("hedgerow: ")
    assert not (tmp_path / "run").exists()


def with_counts(counts):
    """A whole update with other counts, and zeros for codes and scales."""

    def damage(tensors):
        gammas = [torch.zeros(k) for k in counts(tensors["counts"].tolist())]
        tensors.update(pack(gammas, 1, 0))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("seed"),
        lambda t: t.update(seed=torch.tensor([-1])),
        lambda t: t.update(seed=t["seed"] + 1),
        lambda t: t.update(seed=torch.tensor([1.0])),
        lambda t: t.update(adapter_seed=torch.tensor([1], dtype=torch.int32)),
        lambda t: t.update(counts=t["counts"][:-1]),
        lambda t: t.update(more=torch.ones(3)),
        lambda t: t.update(scales=t["scales"] * 3e38),
        with_counts(lambda counts: counts[:-1]),
        with_counts(lambda counts: [*counts, 1]),
        with_counts(lambda counts: [5000, *counts[1:]]),
        with_counts(lambda counts: [counts[0] - 1, counts[1] + 1, *counts[2:]]),
    ],
)
def test_an_update_that_is_not_what_was_asked_for_is_refused(run, damage):
    directory = run(federation={"rounds": 1})
    data = (directory / "updates/round-0001/client-000.safetensors").read_bytes()
    update = Update.from_bytes(data)
    tensors = dict(update.tensors)
    damage(tensors)
    bad = Update(**{**vars(update), "tensors": tensors})
    with runs.opened(directory, []) as (experiment, ledger):
        expected = Expected(Seeds(0), ledger.trained, experiment.training)
    client = Client(0, update.client, update.num_examples)
    experiment.method.check_update(client, update, expected)
    with pytest.raises(InvalidMessage):
        experiment.method.check_update(client, Update.from_bytes(bad.to_bytes()), expected)


def test_sgd_steps_in_the_backward_pass_are_sgd_s(run, monkeypatch):
    fused = run("fused", training=PAPER_STEPS | {"weight_decay": 0.01})
    monkeypatch.setattr(first_order, "_steps_immediately", lambda job: False)
    usual = run("usual", training=PAPER_STEPS | {"weight_decay": 0.01})
    name = "ledger/0003.safetensors"
    assert (fused / name).read_bytes() == (usual / name).read_bytes()


def test_gradients_never_exist_all_at_once_with_plain_sgd(run, monkeypatch):
    most = 0
    original = Supervised.total

    def watched(objective, network, batch):
        nonlocal most
        loss = original(objective, network, batch)
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: count_gradients(network))
        return loss

    def count_gradients(network):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in network.parameters()))

    monkeypatch.setattr(Supervised, "total", watched)
    run("plain", training=PAPER_STEPS, federation={"rounds": 1})
    assert most <= 1
    run("clipped", training=PAPER_STEPS | {"max_grad_norm": 1.0}, federation={"rounds": 1})
    assert most > 10


def test_a_client_that_missed_rounds_replays_them(experiment, hedgerow, tmp_path):
    """Who has the base and the entries has the weights, whenever it joined."""
    path = experiment(federation={"rounds": 4, "clients_per_round": 1})
    options = "method={name: ferret, compression: 64}"
    assert hedgerow("run", path, options, "--out", tmp_path / "run").code == 0
    with runs.opened(tmp_path / "run", []) as (settings, ledger):
        steadily = runs.model_at(settings, ledger, 2)
        for round in (3, 4):
            settings.method.apply(steadily, ledger.read(round))
        late = runs.model_at(settings, Ledger.open(tmp_path / "run/ledger"), 4)
    for a, b in zip(steadily.network.parameters(), late.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_sketch_with_a_large_error_is_sent_shorter(run):
    """By 1.5/√(1 + ω), with ω = d/K - 1 for a hadamard sketch in 32 bits."""
    options = {"budget": 500, "bits": 32, "federation": {"rounds": 1}}
    whole, shrunk = run("whole", shrink=False, **options), run("shrunk", **options)
    name = "updates/round-0001/client-000.safetensors"
    before, after = load_file(whole / name), load_file(shrunk / name)
    with runs.opened(whole, []) as (_, ledger):
        sizes = [block.size for block in group(ledger.trained)]
    counts = before["counts"].tolist()
    parts = [torch.split(sent["coordinates"], counts) for sent in (before, after)]
    for long, short, size, k in zip(*parts, sizes, counts, strict=True):
        assert torch.allclose(short, long * min(1.0, 1.5 / (size / k) ** 0.5))
