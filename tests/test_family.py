"""The family of LoRA methods: each against the plain sums that it stands for, and end to end."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.adapters import SERVER_ROUND, SHAPES, clients, error, exact, updates
from support.models import logits
from support.runs import rows_of
from transformers import AutoModelForCausalLM

from hedgerow.adapters import adapter_pairs
from hedgerow.experiment import load
from hedgerow.lowrank import Factors
from hedgerow.methods import METHODS
from hedgerow.methods.base import Client, ClientRound, Expected, ServerRound, Trained
from hedgerow.methods.factors import draw_adapter
from hedgerow.model import Model
from hedgerow.runs.preparation import prepare
from hedgerow.seeds import Seeds
from hedgerow.settings import ModelSettings, TrainingSettings
from hedgerow.testing.doubles import Forgetful, no_past
from hedgerow.training import adalora
from hedgerow.training.job import Job
from hedgerow.wire import Entry, Participant, Update

EXACT = {
    # Of full rank, or whole energy, so that nothing is cut.
    "flexlora": {"ranks": [8, 3, 2], "targets": ["v_proj", "k_proj"]},
    "florist": {"ranks": [4, 2, 1], "threshold": 1},
    "flora_adalora": {"ranks": [4, 2, 1], "initial": 1},
    "fedex_lora": {"ranks": 3},
    "ffa_lora": {"ranks": [4, 2, 1]},
    "rolora": {"ranks": 3},
    "fedsvd": {"ranks": 3},
    "fed_sb": {"ranks": 3},
}
SIZES = [5, 9, 14]


@pytest.fixture
def model(tiny_model):
    return Model.load(ModelSettings(path=str(tiny_model), device="cpu"))


# --- whatever a method sends, its global model is the average of what the clients trained ---------


def effective(model, modules):
    """The weights as which the linear layers act, adapters and all."""
    network = model.network
    layers = {module: network.get_submodule(module) for module in modules}
    with torch.no_grad():
        return {m: layer(torch.eye(layer.in_features)).T for m, layer in layers.items()}


def global_weights(method, model, modules):
    (weights,) = [effective(model, modules) for _ in method.models(model, [])]
    return weights


@pytest.mark.parametrize("name", EXACT)
def test_the_global_model_is_the_average_of_the_clients_models(model, name):
    method = METHODS[name].model_validate(EXACT[name])
    method.check(model, len(SIZES), TrainingSettings())
    shapes = method.trained_shapes(model)
    expected = Expected(Seeds(7), shapes, TrainingSettings())
    everybody = [Client(i, f"c{i}", n) for i, n in enumerate(SIZES)]
    previous = None
    for round in (1, 2, 3):
        before = global_weights(method, model, shapes)
        present = everybody[: 4 - round]  # fewer each time, and last the largest rank alone
        total = sum(client.num_examples for client in present)
        average = {module: torch.zeros(shape) for module, shape in shapes.items()}
        sent = []
        for client in present:
            client_round = ClientRound(
                client, round, Seeds(7), TrainingSettings(), Forgetful(), no_past
            )
            parameters = method.start(model, client_round)
            if method.rank(client) == method.largest_rank:
                for module, weight in effective(model, shapes).items():
                    torch.testing.assert_close(weight, before[module], rtol=0, atol=1e-6)
            generator = torch.Generator().manual_seed(10 * round + client.index)
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for module, weight in effective(model, shapes).items():
                average[module] += client.num_examples / total * weight
            payload = method.update(model, client_round, Trained(parameters, 1.0))
            tensors = {key: tensor.clone() for key, tensor in payload.tensors.items()}
            whole = [name, round, client.name, "p", client.num_examples, 1.0, tensors]
            sent.append(Update(*whole, payload.about))
            method.check_update(client, sent[-1], expected)
            model.release()
        server_round = ServerRound(round, present, previous, expected, Forgetful())
        tensors, metrics, *_ = method.aggregate(sent, server_round)
        assert metrics["aggregation_error"] < 1e-6
        participants = [
            Participant(c.name, c.num_examples, c.num_examples / total) for c in present
        ]
        previous = Entry(name, round, "p", participants, metrics, tensors)
        method.check_entry(previous, shapes)
        method.apply(model, previous)
        for module, weight in global_weights(method, model, shapes).items():
            torch.testing.assert_close(weight, average[module], rtol=0, atol=2e-6)
            assert (weight - before[module]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd", "fed_sb"])
def test_what_a_method_freezes_the_next_can_train(model, name):
    method = METHODS[name].model_validate({"ranks": 2})
    client_round = ClientRound(
        Client(0, "c", 5), 1, Seeds(0), TrainingSettings(), Forgetful(), no_past
    )
    for _ in range(2):
        parameters = method.start(model, client_round)
        sent = "lora_R" if name == "fed_sb" else "lora_B"
        assert all(p.requires_grad and f".{sent}." in key for key, p in parameters.items())
        trainable = [p for p in model.network.parameters() if p.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in parameters.values()}
        model.release()
        whole = model.attach(method.config(2))
        assert len(whole) == 2 * len(parameters)
        assert all(p.requires_grad for p in whole.values())
        model.release()


# --- FlexLoRA, FLoRIST: what is cut ---------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(clients, st.integers(0, 100))
def test_flexlora_gives_every_rank_its_best_approximation(clients, seed):
    aggregate = METHODS["flexlora"]().aggregate(updates(seed, clients), SERVER_ROUND)
    sums = exact(seed, clients)
    assert aggregate.metrics["aggregation_error"] == pytest.approx(
        error(aggregate, sums), rel=1e-4, abs=1e-6
    )
    for module, (A, B) in adapter_pairs(aggregate.tensors):
        assert len(A) == max(rank for rank, _, _ in clients)
        singular = torch.linalg.svdvals(sums[module])
        for rank in range(1, len(A) + 1):
            left = float((sums[module] - (B[:, :rank] @ A[:rank]).double()).norm())
            assert left == pytest.approx(
                float(singular[rank:].norm()), abs=1e-5 * float(singular[0])
            )


@settings(max_examples=30, deadline=None)
@given(clients, st.floats(0.1, 0.999), st.integers(0, 100))
def test_florist_keeps_the_fewest_components_that_reach_the_threshold(clients, threshold, seed):
    method = METHODS["florist"].model_validate({"threshold": threshold})
    aggregate = method.aggregate(updates(seed, clients), SERVER_ROUND)
    sums = exact(seed, clients)
    cut = whole = 0.0
    for module, pair in adapter_pairs(aggregate.tensors):
        squares = torch.linalg.svdvals(sums[module]).square()
        kept = float(squares[: pair.rank].sum() / squares.sum())
        fewer = float(squares[: pair.rank - 1].sum() / squares.sum())
        assert fewer - 1e-9 <= threshold <= kept + 1e-9
        cut, whole = cut + float(squares[pair.rank :].sum()), whole + float(squares.sum())
    noise = aggregate.metrics["aggregation_error"]
    assert noise == pytest.approx(math.sqrt(cut / whole), rel=1e-3, abs=1e-6)


# --- FedEx-LoRA -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.just(3), st.floats(0.5, 32), st.integers(1, 1000)), min_size=1),
    st.integers(0, 100),
)
def test_fedex_is_exact_by_what_it_merges(clients, seed):
    clients = clients[:5]
    aggregate = METHODS["fedex_lora"]().aggregate(updates(seed, clients), SERVER_ROUND)
    assert aggregate.metrics["aggregation_error"] < 1e-6
    start = {k.removeprefix("start."): t for k, t in aggregate.tensors.items() if "start." in k}
    fedit = METHODS["fedit"]().aggregate(updates(seed, clients), SERVER_ROUND).tensors
    assert all(torch.equal(start[key], fedit[key]) for key in fedit)
    residual = dict(adapter_pairs({k: aggregate.tensors[k] for k in fedit}))
    for module, pair in adapter_pairs(start):
        both = pair.product().double() + residual[module].product().double()
        total = exact(seed, clients)[module]
        assert float((both - total).norm()) < 1e-6 * max(1.0, float(total.norm()))
        assert 1 <= residual[module].rank <= min(*SHAPES[module], 3 * (len(clients) + 1))
        if len(clients) == 1:
            assert residual[module].rank == 1
            assert residual[module].product().abs().max() < 1e-5 * total.abs().max()


# --- one factor -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(clients, st.integers(0, 100))
def test_ffa_averages_b_of_any_rank_on_rows_that_all_share(clients, seed):
    largest = max(rank for rank, _, _ in clients)
    method = METHODS["ffa_lora"].model_validate({"ranks": largest})
    A = {m: p.A for m, p in adapter_pairs(draw_adapter(SHAPES, Seeds(0).torch("adapter"), largest))}
    total = sum(examples for _, _, examples in clients)
    sums = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    sent = []
    for update, (rank, alpha, examples) in zip(updates(seed, clients), clients, strict=True):
        for module, pair in adapter_pairs(update.tensors):
            product = pair.B.double() @ A[module][:rank].double()
            sums[module] += examples / total * alpha / rank * product
        own = {key: tensor for key, tensor in update.tensors.items() if ".lora_B." in key}
        sent.append(Update("ffa_lora", 1, update.client, "p", examples, 1.0, own, update.about))
    aggregate = method.aggregate(sent, SERVER_ROUND)
    assert aggregate.metrics["aggregation_error"] < 1e-6
    assert aggregate.tensors["adapter_seed"].tolist() == [Seeds(0).derive("adapter")]
    for module, total_sum in sums.items():
        B = aggregate.tensors[f"base_model.model.{module}.lora_B.weight"]
        assert B.shape[1] == largest
        assert float((B.double() @ A[module].double() - total_sum).norm()) < 1e-5 * max(
            1.0, float(total_sum.norm())
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 100))
def test_fedsvd_leaves_orthonormal_rows_and_the_same_product(rank, seed):
    pair = dict(adapter_pairs(next(updates(seed, [(rank, 1.0, 1)])).tensors))["model.q"]
    A, B = METHODS["fedsvd"]().refactor(pair)
    torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(B @ A, pair.double().product())
    lengths = B.norm(dim=0)
    assert (lengths[:-1] >= lengths[1:] - 1e-9).all()
    A, _ = METHODS["fedsvd"]().refactor(pair._replace(B=torch.zeros_like(pair.B)))
    torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=torch.float64))


def test_rolora_trains_the_factors_in_turns(model):
    method = METHODS["rolora"].model_validate({"ranks": 2})
    for round, factor in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        parameters = method.start(
            model,
            ClientRound(
                Client(0, "c", 5), round, Seeds(0), TrainingSettings(), Forgetful(), no_past
            ),
        )
        assert all(f".{factor}." in key for key in parameters)
        model.release()


# --- Fed-SB ---------------------------------------------------------------------------------------


def test_the_bases_are_the_weights_leading_singular_vectors(model):
    module = "model.layers.0.self_attn.v_proj"
    weight = model.network.get_submodule(module).weight.detach().clone()
    A, B = model.singular_vectors(module, 3)
    torch.testing.assert_close(A @ A.T, torch.eye(3))
    torch.testing.assert_close(B.T @ B, torch.eye(3))
    core = B.T @ weight @ A.T
    torch.testing.assert_close(core, torch.linalg.svdvals(weight)[:3].diag(), atol=1e-6, rtol=0)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
    model.merge(module, Factors(torch.randn(2, 16), torch.randn(8, 2)))
    changed, _ = model.singular_vectors(module, 3)
    assert not torch.allclose(changed, A)


# --- FLoRA with AdaLoRA ---------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "initial"), [(1, 1.5), (2, 2), (12, 1.5), (3, 1)])
def test_adalora_prunes_to_the_budget_and_sends_what_it_trained(experiment, steps, initial):
    method = METHODS["flora_adalora"].model_validate({"ranks": 3, "initial": initial})
    client, seeds = Client(0, "c", 8), Seeds(0)
    client_round = ClientRound(client, 1, seeds, TrainingSettings(), Forgetful(), no_past)
    prepared = prepare(load(experiment(method={"name": "flora", "ranks": 3})))
    model, data = prepared.model, prepared.shards["client-002"]
    training = TrainingSettings(steps=steps, batch_size=4)
    job = Job(model.network, data, training, 0.01, 2, seeds.numpy("order"), 3)
    shapes = method.trained_shapes(model)
    before = effective(model, shapes)
    trained = method.train(job, client_round, method.start(model, client_round))
    after = effective(model, shapes)
    payload = method.update(model, client_round, trained)
    update = Update("flora_adalora", 1, "c", "p", 8, 1.0, payload.tensors, payload.about)
    method.check_update(client, update, Expected(seeds, shapes, training))
    model.release()
    ranks = {}
    for module, pair in adapter_pairs(update.tensors):
        step = method.scale(3) * pair.product()
        torch.testing.assert_close(step, after[module] - before[module], rtol=0, atol=1e-6)
        ranks[module] = pair.rank
    assert sum(ranks.values()) <= 3 * len(shapes) + len(shapes) - 1
    left = sum(int(t.any(1).sum()) for key, t in update.tensors.items() if ".lora_A." in key)
    assert left == 3 * len(shapes)
    assert initial == 1 or len(set(ranks.values())) > 1


def test_the_regulariser_is_the_distance_from_orthogonality():
    Q, P = torch.randn(2, 5), torch.randn(4, 2)
    distances = [torch.norm(Q @ Q.T - torch.eye(2)), torch.norm(P.T @ P - torch.eye(2))]
    given = adalora.non_orthogonality({"m.lora_A": Q, "m.lora_B": P})
    torch.testing.assert_close(given, torch.stack(distances).mean())
    orthogonal = torch.linalg.qr(P).Q
    assert float(adalora.non_orthogonality({"m.lora_B": orthogonal})) < 1e-6


def test_stacking_is_exact_where_each_matrix_has_a_rank_of_its_own():
    sent, sums = [], {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    for client, ranks in enumerate([(2, 5), (4, 1), (1, 1)]):
        tensors = {}
        for (module, (m, n)), rank in zip(SHAPES.items(), ranks, strict=True):
            A, B = (torch.randn(*shape, generator=generator) for shape in ((rank, n), (m, rank)))
            tensors[f"base_model.model.{module}.lora_A.weight"] = A
            tensors[f"base_model.model.{module}.lora_B.weight"] = B
            sums[module] += (client + 1) / 6 * 2 * (B @ A).double()
        about = {"r": "3", "lora_alpha": "6"}
        sent.append(Update("flora_adalora", 1, f"c{client}", "p", client + 1, 1.0, tensors, about))
    for broadcast, ranks in (("stack", [7, 7]), ("orthogonal", [5, 3])):
        aggregate = METHODS["flora_adalora"](broadcast=broadcast).aggregate(sent, SERVER_ROUND)
        assert error(aggregate, sums) < 1e-6
        assert [pair.rank for _, pair in adapter_pairs(aggregate.tensors)] == ranks


# --- end to end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_a_run_can_be_resumed_and_exported(hedgerow, experiment, tmp_path, tiny_model, name):
    ranks = "[4,2,1]" if isinstance(EXACT[name]["ranks"], list) else "2"
    path = experiment(training={"steps": 3}, federation={"clients_per_round": 2})
    changes = [f"method.name={name}", f"method.ranks={ranks}", "method.dropout=0.1"]
    for folder, rounds, *resume in (("whole", 3), ("parts", 2), ("parts", 3, "--resume")):
        options = [f"federation.rounds={rounds}", "--out", tmp_path / folder, *resume]
        result = hedgerow("run", path, *changes, *options)
        assert result.code == 0, result.err
    whole, parts = (
        {file.name: file.read_bytes() for file in (tmp_path / run / "ledger").iterdir()}
        for run in ("whole", "parts")
    )
    assert whole == parts
    assert all(math.isfinite(row["eval_loss"]) for row in rows_of(tmp_path / "whole"))
    for to in ("adapter", "merged"):
        result = hedgerow("export", tmp_path / "whole", tmp_path / to, "--to", to)
        assert result.code == 0, result.err
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["ffa_lora", "fed_sb"])
def test_there_is_no_adapter_before_the_first_round(hedgerow, experiment, tmp_path, name):
    run = tmp_path / "run"
    changes = [f"method.name={name}", "method.ranks=2", "federation.rounds=1"]
    assert hedgerow("run", experiment(), *changes, "--out", run).code == 0
    result = hedgerow("export", run, tmp_path / "x", "--to", "adapter", "--round", 0)
    assert (result.code, "round 0 is the base model" in result.err) == (2, True)


def test_updates_are_as_small_as_the_method_says(hedgerow, experiment, tmp_path):
    sizes = {}
    for name in ("fedit", "ffa_lora", "rolora", "fed_sb"):
        keep = {"rounds": 2, "keep_updates": True}
        path = experiment(federation=keep, method={"name": name, "ranks": 2})
        run = tmp_path / name
        assert hedgerow("run", path, "--out", run).code == 0
        file = run / "updates" / "round-0002" / "client-000.safetensors"
        tensors = safetensors.torch.load(file.read_bytes())
        sizes[name] = sum(tensor.numel() for tensor in tensors.values())
        modules = len(tensors) if name != "fedit" else len(tensors) // 2
    assert sizes["ffa_lora"] + sizes["rolora"] == sizes["fedit"]
    assert sizes["fed_sb"] == 2 * 2 * modules


def test_fed_sb_needs_as_many_singular_vectors_in_every_matrix(hedgerow, experiment, tmp_path):
    changes = ["method.name=fed_sb", "method.ranks=12", "--out", tmp_path / "run"]
    result = hedgerow("run", experiment(), *changes)
    assert result.code == 2
    assert "has 8 singular vectors, not 12" in result.err
