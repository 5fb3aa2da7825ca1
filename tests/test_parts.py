"""Parts of methods: codecs, server optimisers, what clients keep, and runs made of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.runs import ledger_bytes, rows_of

from hedgerow.adapters import adapter_pairs
from hedgerow.errors import InvalidMessage, UserError
from hedgerow.experiment import load
from hedgerow.methods import METHODS, FLoRA
from hedgerow.methods.base import Client, Expected
from hedgerow.methods.composed import Composed
from hedgerow.methods.parts import rice, transforms
from hedgerow.methods.parts.bits import FewBits
from hedgerow.methods.parts.mean import Mean
from hedgerow.methods.parts.server_optimizers import SERVER_OPTIMIZERS
from hedgerow.methods.parts.top_k import TopK
from hedgerow.methods.parts.transforms import TRANSFORMS
from hedgerow.methods.parts.values import Values
from hedgerow.seeds import Seeds
from hedgerow.settings import TrainingSettings
from hedgerow.sketch import coordinates, cpu, layout
from hedgerow.testing import check_method
from hedgerow.wire import kinds


def values_of(tensors):
    shapes = {name: tuple(each.shape) for name, each in tensors.items()}
    return Values(shapes, lambda: ((name, each.clone()) for name, each in tensors.items()))


def normal(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


# --- codecs ---------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.data())
def test_rice_codes_give_back_every_set_of_places(total, data):
    places = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=200)))
    coded = rice.encode(np.array(places), total)
    assert rice.decode(coded, len(places), total).tolist() == places
    assert len(coded.binary) == rice.binary_size(len(places), total)
    assert len(coded.unary) <= rice.most_unary(len(places), total)


def test_rice_codes_take_about_the_entropy():
    """Places of 1 in 64: H(1/64)/(1/64) = 7.4 bits each; Sattler et al. name 1% above it."""
    draws = np.flatnonzero(np.random.default_rng(0).random(1 << 20) < 1 / 64)
    coded = rice.encode(draws, 1 << 20)
    bits = 8 * sum(len(each) for each in coded) / len(draws)
    p = len(draws) / (1 << 20)
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p
    assert entropy < bits < 1.03 * entropy


@pytest.mark.parametrize("change", ["cut", "more", "beyond", "padding"])
def test_gaps_that_nobody_encodes_are_refused(change):
    places = np.array([3, 9, 200])
    coded = rice.encode(places, 256)
    if change == "cut":
        coded = coded._replace(unary=torch.zeros_like(coded.unary))
    elif change == "more":
        coded = coded._replace(unary=torch.cat([coded.unary, torch.tensor([1], dtype=torch.uint8)]))
    elif change == "padding":
        coded.binary[-1] |= 128
    total = 201 if change != "beyond" else 100
    with pytest.raises(InvalidMessage):
        rice.decode(coded, 3, total if change == "beyond" else 256)


SHAPES = [(70, 3), (5,), (64,), (1,), (2, 2, 40)]


@pytest.mark.parametrize("group", ["tile", "all"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_largest_values_arrive_and_no_others(group, bits):
    tensors = normal(*SHAPES)
    codec = TopK(k=3, tile=16, group=group, bits=bits)
    values = values_of(tensors)
    coded = codec.encode(values, 0)
    assert kinds(coded) == codec.kinds(values.shapes, kinds(coded))
    codec.check(coded, values.shapes)
    decoded = dict(codec.decode(coded, values.shapes, 0))
    flat = torch.cat([each.flatten() for each in tensors.values()])
    sent = torch.cat([decoded[name].flatten() for name in tensors])
    assert {name: each.shape for name, each in decoded.items()} == {
        name: each.shape for name, each in tensors.items()
    }
    if group == "all":
        count = len(flat) * 3 // 16
        assert set(sent.nonzero().flatten().tolist()) == set(
            flat.abs().topk(count).indices.tolist()
        )
    else:
        first = tensors["0"].flatten().split(16)[0]
        found = decoded["0"].flatten()[:16].nonzero().flatten().tolist()
        assert set(found) == set(first.abs().topk(3).indices.tolist())
    where = sent != 0
    assert torch.equal(sent[where].sign(), flat[where].sign())
    for name, each in decoded.items():
        chosen = each != 0
        if not chosen.any():
            continue
        # The sizes of a tensor's values have their own mean, in however few bits.
        assert torch.allclose(each[chosen].abs().mean(), tensors[name][chosen].abs().mean())
    if bits == 8:
        assert torch.allclose(sent[where], flat[where], atol=0.02)


@pytest.mark.parametrize(
    "codec",
    [
        FewBits(bits=1),
        FewBits(bits=2),
        TopK(k=7, tile=100),
        TopK(k=40, tile=1000, transform="hadamard"),
    ],
    ids=repr,
)
def test_the_size_of_the_pieces_changes_no_bit(codec, monkeypatch):
    """Sizes end within a group, a tile and a byte."""
    values = normal((3 * 4096 + 300,), (70, 300), (5,), seed=3)
    whole = codec.encode(values_of(values), 5)
    decoded = dict(codec.decode(whole, values_of(values).shapes, 5))
    monkeypatch.setattr(coordinates, "_PIECE", layout.TILE)
    monkeypatch.setattr(rice, "_PIECE", 8)
    monkeypatch.setattr(cpu, "CHUNK", layout.TILE)
    again = codec.encode(values_of(values), 5)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    shapes = values_of(values).shapes
    assert all(torch.equal(each, decoded[name]) for name, each in codec.decode(whole, shapes, 5))


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.floats(0.1, 9), st.integers(1, 4)), min_size=1, max_size=5
    ),
    st.sampled_from([None, 0.3]),
)
def test_updates_that_wait_have_the_mean_of_those_that_are_folded_in(clients, rate):
    """On a basis a client may have more coordinates than another; bits are equal."""
    waiting, folded = Mean(waits=True), Mean()
    for index, (basis, weight, length) in enumerate(clients):
        values = values_of(normal((length,), (3,), seed=index))
        folded.add((basis,), values, weight)
        waiting.add((basis,), values, weight)
    found, expected = (
        [(basis, dict(values), values.shapes) for basis, values in mean.means(rate)]
        for mean in (waiting, folded)
    )
    for (basis, values, shapes), (other, whole, same) in zip(found, expected, strict=True):
        assert basis == other
        assert shapes == same
        assert all(torch.equal(each, whole[name]) for name, each in values.items())
    assert waiting.alone == folded.alone


def test_updates_wait_where_they_take_less_than_their_sum():
    """31 of one bit a number, and their scales, are as long as a sum in float32."""
    method = METHODS["fedavg"](up={"name": "bits", "bits": 1})
    expected = Expected(Seeds(0), {"a": (64, 1024), "b": (300,)}, TrainingSettings())
    most = max(n for n in range(40) if method._waiting_holds(n, expected) is not None)
    assert 29 <= most <= 32
    asked = [Client(index, f"c{index}", 1) for index in range(40)]
    few, many = (method.aggregate_holds(asked[:n], expected) for n in (most, most + 1))
    assert 0 < few.sums < many.sums + many.message == 4 * (64 * 1024 + 300)
    assert method._waiting_holds(2, replace(expected, noisy=True)) is None


@pytest.mark.parametrize("options", [{}, {"coordinates": "random", "seeds": "client"}], ids=repr)
def test_whether_updates_wait_changes_no_bit(options, run, monkeypatch):
    method = {"name": "ferret", **options}
    waiting = ledger_bytes(run("wait", method, "federation.rounds=2"))
    asked = []
    monkeypatch.setattr(Composed, "_waiting_holds", lambda *a: asked.append(a))
    assert ledger_bytes(run("fold", method, "federation.rounds=2")) == waiting
    assert asked


def test_fewer_bits_lose_as_much_as_they_say():
    tensors = normal((4096,), (64, 64))
    for bits in (1, 2, 4):
        codec, values = FewBits(bits=bits), values_of(tensors)
        decoded = dict(codec.decode(codec.encode(values, 7), values.shapes, 7))
        lost = sum(float((decoded[n] - tensors[n]).square().sum()) for n in tensors)
        size = sum(float(each.square().sum()) for each in tensors.values())
        assert lost / size == pytest.approx(codec.error, rel=0.15)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(128, 96), (300,), (7, 11), (1,), (2, 3, 50)])
def test_a_transform_keeps_lengths_and_is_undone(name, shape):
    tensor, transform = normal(shape)["0"], TRANSFORMS[name]
    values = transform.forward(tensor, 5)
    assert values.shape == (tensor.numel(),)
    assert values.norm() == pytest.approx(float(tensor.norm()), rel=1e-5)
    assert torch.allclose(transform.backward(values, shape, 5), tensor, atol=1e-5)


def test_a_cosine_transform_is_scipys():
    """Pieces of 43 × 64 of a matrix of 86 × 128, one after another."""
    tensor = normal((86, 128))["0"]
    pieces = tensor.numpy().reshape(2, 43, 2, 64).transpose(0, 2, 1, 3)
    expected = scipy.fft.dctn(pieces, axes=(2, 3), norm="ortho")
    assert np.allclose(TRANSFORMS["dct"].forward(tensor, 0), expected.reshape(-1), atol=1e-5)


def test_an_inverse_cosine_transform_adds_in_one_order_everywhere(monkeypatch):
    """One wave after another, in plain float32 arithmetic, however much is done at once."""
    values = normal((96 * 64,))["0"]
    rebuilt = TRANSFORMS["dct"].backward(values, (96, 64), 0)
    total = values.view(2, 48, 64).numpy()
    for size, axis in ((48, 1), (64, 2)):
        waves = transforms._cosines(size).numpy()
        parts = np.split(total, size, axis)
        total = np.zeros_like(total)
        for part, wave in zip(parts, waves, strict=True):
            total += part * (wave[:, None] if axis == 1 else wave)
    assert np.array_equal(rebuilt.view(2, 48, 64), total)
    monkeypatch.setattr("hedgerow.methods.parts.transforms.AT_ONCE", 1)
    assert torch.equal(TRANSFORMS["dct"].backward(values, (96, 64), 0), rebuilt)


@pytest.mark.parametrize("group", ["tile", "all"])
def test_the_largest_of_rotated_values_are_unbiased(group):
    """Their mean over rotations is what was sent, and their error what the codec says."""
    tensor = normal((64, 64))["0"] * torch.linspace(0, 2, 64)
    codec = TopK(k=32, tile=512, group=group, bits=1, transform="hadamard")
    mean, error = torch.zeros(64, 64), []
    for seed in range(200):
        values = values_of({"x": tensor})
        decoded = dict(codec.decode(codec.encode(values, seed), values.shapes, seed))["x"]
        mean += decoded / 200
        error.append(float((decoded - tensor).square().sum() / tensor.square().sum()))
    assert np.mean(error) == pytest.approx(codec.error, rel=0.1)
    # Of independent errors, the mean over 200 has 1/200.
    left = float((mean - tensor).square().sum() / tensor.square().sum())
    assert left < 1.5 * codec.error / 200


@pytest.mark.parametrize(("size", "bits"), [(0.01, 1), (0.25, 1), (1.0, 1), (1.0, 2), (2.0, 4)])
def test_as_many_of_the_largest_are_sent_as_fit(size, bits):
    """Within 2% of the bits that are given for each value, but for what every tensor has."""
    values = values_of(normal((1024, 512)))
    coded = TopK.within(size, bits).encode(values, 3)
    used = 8 * sum(each.numel() * each.element_size() for each in coded.values()) / (1024 * 512)
    assert 0.96 * size < used < 1.02 * size


@pytest.mark.parametrize("size", [1e-5, 3.0])
def test_no_share_fits_too_few_or_too_many_bits(size):
    with pytest.raises(ValueError, match="bits for each"):
        TopK.within(size, 1)


@pytest.mark.parametrize("codec", [FewBits(bits=2), TopK(k=1, tile=4)])
def test_what_is_not_finite_is_no_update(codec):
    with pytest.raises(ValueError, match="finite"):
        codec.encode(values_of({"x": torch.tensor([1.0, float("nan"), 2.0, 3.0])}), 0)


# --- server optimisers ----------------------------------------------------------------------------


def reference(name, changes, eta, beta=0.9, beta2=0.99, tau=1e-3):
    """Algorithm 2 of arXiv 2003.00295 in float64, one coordinate after another."""
    w, m, v = np.zeros(3), np.zeros(3), np.full(3, tau**2)
    for change in changes.double().numpy():
        if name in ("sgd", "sign"):
            w = w + eta * (np.sign(change) if name == "sign" else change)
        elif name in ("momentum", "nesterov"):
            m = beta * m + change
            w = w + eta * (change + beta * m if name == "nesterov" else m)
        else:
            m = beta * m + (1 - beta) * change
            square = change**2
            v = {
                "adam": beta2 * v + (1 - beta2) * square,
                "yogi": v - (1 - beta2) * square * np.sign(v - square),
                "adagrad": v + square,
            }[name]
            w = w + eta * m / (np.sqrt(v) + tau)
    return w


@pytest.mark.parametrize("name", ["sgd", "sign", "momentum", "nesterov", "adam", "yogi", "adagrad"])
def test_a_server_optimiser_is_the_papers(name):
    changes = normal((5, 3), seed=3)["0"] * 0.01
    beta = 0.0 if name == "adagrad" else 0.9
    optimizer, state, w = SERVER_OPTIMIZERS[name](learning_rate=0.5), {}, torch.zeros(3)
    for change in changes:
        w = w + optimizer.step(change.clone(), state)
    expected = torch.from_numpy(reference(name, changes, 0.5, beta=beta))
    assert torch.allclose(w.double(), expected, rtol=1e-5)
    assert sorted(state) == sorted(optimizer.slots)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "yogi", "adagrad"])
def test_a_linear_step_is_the_optimisers(name):
    """What stacks step by, and what numbers step by; the adaptive ones have none."""
    optimizer, state = SERVER_OPTIMIZERS[name](learning_rate=0.5), {}
    linear = optimizer.linear
    if name in ("adam", "yogi", "adagrad"):
        assert linear is None
        return
    before = torch.zeros(3)
    for change in normal((5, 3), seed=4)["0"]:
        step = linear.of_change * change + linear.of_momentum * before
        torch.testing.assert_close(optimizer.step(change.clone(), state), step)
        before = linear.decay * before + change


# --- runs -----------------------------------------------------------------------------------------

HALF = {"name": "sgd", "learning_rate": 0.5}
COMPOSED = {
    "fedavg, adam": {"name": "fedavg", "server": {"name": "adam", "learning_rate": 0.001}},
    "ferret, nesterov": {"name": "ferret", "compression": 32, "server": "nesterov"},
    "fedavg, top-k": {
        **{"name": "fedavg", "up": {"name": "top_k", "k": 4, "tile": 64}, "error_feedback": 0.9},
        **{"down": "bits", "broadcast_feedback": True, "weights": "uniform"},
    },
    "fedit, top-k": {
        **{"name": "fedit", "ranks": 2, "up": {"name": "top_k", "k": 8, "tile": 64}},
        **{"error_feedback": True, "server": "nesterov"},
    },
    "rolora, bits": {"name": "rolora", "ranks": 2, "up": "bits", "error_feedback": 0.9},
    "fed_sb, adam": {"name": "fed_sb", "ranks": 2, "server": {"name": "adam"}},
    "sparseloco": {"name": "sparseloco", "up": {"name": "top_k", "k": 4, "tile": 64}},
    "stc": {"name": "stc", "server": {"name": "momentum", "momentum": 0.5}},
    "fedavg, gathered bits": {"name": "fedavg", "up": {"name": "bits", "bits": 2}, "gather": True},
    "diloco": {"name": "diloco"},
    "demo_sgd": {"name": "demo_sgd"},
    "scaffold": {"name": "scaffold"},
    "fedavg, rotated": {
        **{"name": "fedavg", "error_feedback": True, "broadcast_feedback": True},
        "up": {"name": "top_k", "k": 9, "tile": 256, "group": "all", "transform": "hadamard"},
        "down": {"name": "top_k", "k": 9, "tile": 256, "transform": "hadamard"},
    },
    "flora, 8 bits and a carried cut": {
        **{"name": "flora", "ranks": [4, 2, 1], "upload_bits": 8},
        **{"compress": {"rank": 6, "bits": 8, "carry": True}},
    },
    "flora, nesterov": {
        **{"name": "flora", "ranks": [4, 2, 1], "compress": True, "server": "nesterov"},
    },
    "flora own, momentum": {
        **{"name": "flora", "ranks": 2, "restart": "own", "compress": {"rank": 3, "carry": False}},
        **{"server": {"name": "momentum", "momentum": 0.5}},
    },
    "flexlora, momentum": {"name": "flexlora", "ranks": [4, 2, 1], "server": "momentum"},
    "fedex_lora, sgd": {"name": "fedex_lora", "ranks": 2, "server": HALF},
}
STACKED = {
    "flora": {"name": "flora", "ranks": [4, 2, 1]},
    "flora zero": {"name": "flora", "ranks": [4, 2, 1], "restart": "zero"},
    "flora own": {"name": "flora", "ranks": [4, 2, 1], "restart": "own"},
    "flexlora": {"name": "flexlora", "ranks": [4, 2, 1]},
    "florist": {"name": "florist", "ranks": [4, 2, 1]},
    "fedex_lora": {"name": "fedex_lora", "ranks": 2},
    "flora_adalora": {"name": "flora_adalora", "ranks": [4, 2, 1]},
}


@pytest.fixture
def run(experiment, hedgerow, tmp_path):
    """Run a method; returns the run's directory."""

    def start(out, method, *overrides, code=0, **sections):
        path = experiment(**sections)
        content = yaml.safe_load(path.read_text()) | {"method": method}
        path.write_text(yaml.safe_dump(content))
        done = hedgerow("run", path, *overrides, "--out", tmp_path / out)
        assert done.code == code, done.err
        return tmp_path / out if code == 0 else done.err

    return start


def entries(directory):
    return [file.read_bytes() for file in sorted((directory / "ledger").glob("*.safetensors"))]


@pytest.mark.parametrize("name", COMPOSED)
def test_a_run_goes_on_with_the_same_bytes(name, run):
    """Server's state, what is owed, and moments: all are there after a stop."""
    method = COMPOSED[name]
    has_moments = METHODS[method["name"]].model_validate(method).keeps_optimizer is not None
    keep = ["training.keep_optimizer=true"] if has_moments else []
    whole = run("whole", method, *keep, federation={"rounds": 3})
    run("part", method, *keep, federation={"rounds": 2})
    part = run("part", method, *keep, "--resume", federation={"rounds": 3})
    assert entries(part) == entries(whole)


def test_what_is_owed_of_rotated_values_stays_bounded(run):
    """Unbiased estimates have errors longer than what they are of; fed back whole, they grow."""
    rounds = {"federation": {"rounds": 12}}
    directory = run("run", COMPOSED["fedavg, rotated"], "training.keep_optimizer=false", **rounds)
    for folder in ("server", "clients/client-000"):
        first, last = (
            load_file(directory / folder / f"00{round}.safetensors") for round in (11, 12)
        )
        for name, owed in last.items():
            assert owed.norm() < 2 * first[name].norm() + 0.1
            assert owed.abs().max() < 1.0


@pytest.mark.parametrize("name", COMPOSED)
def test_a_run_s_ledger_rebuilds_its_model(name, run, hedgerow):
    directory = run("run", COMPOSED[name])
    done = hedgerow("evaluate", directory, "--json")
    assert done.code == 0, done.err
    expected = rows_of(directory)[-1]["eval_loss"]
    assert json.loads(done.out)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def product_of(directory, hedgerow, out):
    """The change of each matrix by a run, from its exported adapter."""
    done = hedgerow("export", directory, out, "--to", "adapter")
    assert done.code == 0, done.err
    settings = json.loads((out / "adapter_config.json").read_text())
    pairs = adapter_pairs(load_file(out / "adapter_model.safetensors"))
    scale = settings["lora_alpha"] / settings["r"]
    return {module: scale * pair.double().product() for module, pair in pairs}


@pytest.mark.parametrize("name", STACKED)
def test_half_a_step_is_half_of_the_change(name, run, hedgerow, tmp_path):
    """Whether the sum is merged, or an adapter that clients go on from."""
    changes = {}
    for rate in (None, 1.0, 0.5):
        server = {} if rate is None else {"server": {"name": "sgd", "learning_rate": rate}}
        directory = run(f"{rate}", STACKED[name] | server, federation={"rounds": 1})
        changes[rate] = product_of(directory, hedgerow, tmp_path / f"adapter-{rate}")
    for module, whole in changes[None].items():
        assert float(whole.norm()) > 0
        torch.testing.assert_close(changes[1.0][module], whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(changes[0.5][module], whole / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [n if n in ("flora", "flexlora") else pytest.param(n, marks=pytest.mark.slow) for n in STACKED],
)
def test_a_stacked_method_with_a_server_step_keeps_its_promises(name):
    options = STACKED[name] | {"server": HALF}
    check_method(METHODS[options["name"]].model_validate(options))


def test_momentum_of_a_cut_stack_keeps_its_promises():
    check_method(FLoRA(ranks=[4, 2, 1], compress=True, server="momentum"))


def test_the_server_s_momentum_is_not_what_it_owes(run):
    """Both are kept of every parameter, and neither changes the other."""
    method = {"name": "fedavg", "server": "momentum", "down": "top_k", "broadcast_feedback": True}
    directory = run("run", method, federation={"rounds": 2})
    kept = load_file(directory / "server/0002.safetensors")
    for name in (key.removesuffix("/owed") for key in kept if key.endswith("/owed")):
        assert not torch.equal(kept[f"{name}/momentum"], kept[f"{name}/owed"])
    plain = run("plain", {"name": "fedavg", "server": "momentum"}, federation={"rounds": 1})
    first = load_file(plain / "ledger/0001.safetensors")
    again = load_file(directory / "server/0001.safetensors")
    for name, change in first.items():
        assert torch.equal(again[f"{name}/momentum"], change)


def test_scaffolds_control_variates_are_the_papers(run):
    """Option II of arXiv 1910.06378, with two of three clients: from outside, in float64."""
    steps, rate = 3, 0.05
    sgd = {"optimizer": "sgd", "max_grad_norm": None, "steps": steps, "learning_rate": rate}
    federation = {"rounds": 3, "clients_per_round": 2, "keep_updates": True}
    directory = run("run", {"name": "scaffold"}, training=sgd, federation=federation)
    own, common = {}, {}
    for round in (1, 2, 3):
        folder = directory / f"updates/round-{round:04d}"
        changes = {}
        for file in folder.glob("*.safetensors"):
            sent = {name: each.double() for name, each in load_file(file).items()}
            before = own.get(file.stem, {})
            for name in (name for name in sent if not name.startswith("control.")):
                c, c_k = common.get(name, 0), before.get(name, 0)
                after = c_k - c - sent[name] / (steps * rate)
                changes.setdefault(name, []).append(after - c_k)
                assert torch.allclose(sent[f"control.{name}"], after - c_k, atol=1e-4)
                own.setdefault(file.stem, {})[name] = after
        entry = load_file(directory / f"ledger/{round:04d}.safetensors")
        for name, each in changes.items():
            step = sum(each) / 2 * (2 / 3)
            common[name] = common.get(name, 0) + step
            assert torch.allclose(entry[f"control.{name}"].double(), step, atol=1e-4)
    for client, variates in own.items():
        last = sorted((directory / "clients" / client).glob("*.safetensors"))[-1]
        kept = load_file(last)
        for name, c_k in variates.items():
            assert torch.allclose(kept[f"control/{name}"].double(), c_k, atol=1e-4)


def test_what_is_gathered_is_what_was_sent(run):
    method = COMPOSED["fedavg, gathered bits"]
    directory = run("run", method, federation={"rounds": 1, "keep_updates": True})
    entry = load_file(directory / "ledger/0001.safetensors")
    for index in range(3):
        sent = load_file(directory / f"updates/round-0001/client-{index:03d}.safetensors")
        for name, tensor in sent.items():
            assert torch.equal(entry[f"{index}.{name}"], tensor)


def test_another_method_has_its_own_default(run):
    """A resolved file says what held for its method; what somebody chose against it stays."""
    resolved = run("run", {"name": "fedavg"}, federation={"rounds": 1}) / "experiment.yaml"
    assert load(resolved).training.keep_optimizer
    for name, kept in (("fedkseed", False), ("fedit", False), ("ferret", True)):
        assert load(resolved, [f"method={name}"]).training.keep_optimizer == kept
    assert not load(resolved, ["training.optimizer=sgd"]).training.keep_optimizer
    assert load(resolved, ["method=fedit", "training.keep_optimizer=true"]).training.keep_optimizer


def test_options_of_another_method_that_do_not_count_are_left_out(experiment):
    """A file for FLoRA has ranks; Ferret over all weights has none, over an adapter it has."""
    path = experiment(method={"name": "flora", "ranks": 2})
    assert load(path, ["method.name=ferret"]).method.ranks == 16
    assert load(path, ["method.name=ferret", "method.over=lora"]).method.ranks == 2
    with pytest.raises(UserError, match="`ranks` counts with"):
        load(path, ["method.name=ferret", "method.ranks=2"])
    # As a comparison of both has it, what all methods are given comes first.
    assert load(path, ["method.ranks=3", "method.name=ferret"]).method.ranks == 16
    with pytest.raises(UserError, match="`ranks` counts with"):
        load(path, ["method.name=fedavg", "method={name: ferret, ranks: 2}"])
    path.write_text(path.read_text().replace("ranks", "rnks"))
    with pytest.raises(UserError, match="did you mean `ranks`"):
        load(path, ["method.name=ferret"])


def test_options_of_parts_are_given_one_by_one(experiment):
    changes = ["method=fedavg", "method.server=adam", "method.server.learning_rate=0.1"]
    method = load(experiment(), [*changes, "method.up=top_k", "method.up.k=9"]).method
    assert (method.server.name, method.server.learning_rate, method.up.k) == ("adam", 0.1, 9)


OLD = {
    "warm flora under sgd": ({"name": "flora"}, {"optimizer": "sgd"}, {}),
    "idle ranks": ({"name": "ferret", "ranks": 2}, {}, {"ranks": 16, "weights": "size"}),
    "over an adapter": ({"name": "ferret", "over": "lora", "ranks": 2}, {}, {"ranks": 2}),
    "clipped after the rate": (
        *({"name": "ferret", "clip": 1.0, "server_learning_rate": 4.0}, {}, {"clip": 0.25}),
    ),
    "of the paper": ({"name": "ferret", "paper": True}, {}, {"weights": "size"}),
}


@pytest.mark.parametrize(("method", "training", "becomes"), OLD.values(), ids=OLD)
def test_a_run_of_the_version_before_is_what_it_was(
    method, training, becomes, experiment, tmp_path
):
    """What keys meant that its file does not have, and what its idle ones did not."""
    content = yaml.safe_load(experiment().read_text())
    content |= {"method": method, "training": content["training"] | training}
    content["data"] = load(experiment()).data.model_dump(mode="json")
    content["model"] = {"path": load(experiment()).model.path}
    (tmp_path / "old/ledger").mkdir(parents=True)
    (tmp_path / "old/ledger/ledger.json").write_text("{}")
    (tmp_path / "old/experiment.yaml").write_text(yaml.safe_dump(content))
    old = load(tmp_path / "old/experiment.yaml")
    assert not old.training.keep_optimizer
    assert {key: getattr(old.method, key) for key in becomes} == becomes


def test_kept_moments_are_those_of_one_long_training(run):
    """One client that keeps its moments for three rounds of two steps takes six steps."""
    training = {"optimizer": "adamw", "batch_size": 100, "learning_rate": 0.01}
    one = ["federation.clients_per_round=1", "data.clients=[client_0.json]"]
    method = {"name": "fedavg"}

    def end(out, keep, rounds, steps):
        settings = {"training": training | {"steps": steps}, "federation": {"rounds": rounds}}
        keep = f"training.keep_optimizer={str(keep).lower()}"
        return rows_of(run(out, method, keep, *one, **settings))[-1]["eval_loss"]

    long = end("long", False, rounds=1, steps=6)
    assert end("kept", True, rounds=3, steps=2) == pytest.approx(long, abs=2e-3)
    assert abs(end("anew", False, rounds=3, steps=2) - long) > 5e-3


@pytest.mark.parametrize("ranks", [2, [4, 2, 1]])
@pytest.mark.parametrize("name", ["fedit", "zero_padding", "rolora", "ffa_lora", "fed_sb"])
def test_changes_in_many_bits_are_the_factors(name, ranks, run):
    """Eight bits, undone, are what clients would have sent, and SGD at rate 1 is no step else."""
    if name in ("fedit", "rolora", "fed_sb") and ranks != 2:
        pytest.skip("it has one rank")
    options = {"name": name, "ranks": ranks}
    # AdamW would make large steps of tiny differences.
    sections = {"training": {"optimizer": "sgd", "learning_rate": 0.2}, "federation": {"rounds": 3}}
    plain = run("plain", options, **sections)
    coded = {"up": {"name": "bits", "bits": 8}, "weights": "size"}
    coded |= {"server": "sgd"} if ranks == 2 else {}
    coded = run("coded", options | coded, **sections)
    for round in (1, 2, 3):
        a, b = (load_file(each / f"ledger/{round:04d}.safetensors") for each in (plain, coded))
        assert a.keys() == b.keys()
        for key in a:
            off = (a[key].double() - b[key].double()).abs().max()
            # B and R are all change; A is what was drawn, and little of it.
            most = 1e-3 if ".lora_A." in key else 0.05 * float(a[key].abs().max())
            assert off <= most, (round, key)


def test_fedprox_draws_clients_back(run):
    """μ = 0 is FedAvg to the bit; under plain SGD, one step is too, and two are as by hand."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 10.0, "batch_size": 100}

    def moved(out, mu, steps, epochs=None):
        method = {"name": "fedprox", "mu": mu} if mu is not None else {"name": "fedavg"}
        settings = {"training": sgd | {"steps": steps}, "federation": {"rounds": 1}}
        return load_file(run(out, method, **settings) / "ledger/0001.safetensors")

    plain, none = moved("plain", None, 2), moved("none", 0.0, 2)
    first, drawn = moved("first", 0.5, 1), moved("drawn", 0.5, 2)
    again = moved("again", None, 1)
    for name in plain:
        assert torch.equal(plain[name], none[name])
        assert torch.equal(first[name], again[name])
        # The second step is shorter by η μ (w - w_t) = 0.25 of the first one.
        assert torch.allclose(drawn[name], plain[name] - 0.25 * first[name], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "overrides", "says"),
    [
        ({"name": "fedkseed"}, ["training.keep_optimizer=true"], "fedkseed has no moments"),
        ({"name": "flexlora"}, ["training.keep_optimizer=true"], "flexlora has no moments"),
        (
            {"name": "fedavg"},
            ["training.optimizer=sgd", "training.keep_optimizer=true"],
            "sgd has no moments to keep",
        ),
        ({"name": "ferret", "ranks": 4}, [], "`ranks` counts with `over: lora` alone"),
        ({"name": "ferret", "server": "adm"}, [], "did you mean"),
        ({"name": "ferret", "server": "adam", "momentum": 0.9}, [], "not both"),
        ({"name": "fedavg", "up": "topk"}, [], "did you mean `top_k`"),
        ({"name": "fedavg", "up": {"name": "top_k", "k": 9, "tile": 8}}, [], "must be below"),
        ({"name": "fedavg", "error_feedback": True}, [], "`up` loses nothing"),
        ({"name": "fedavg", "server": {"name": "sgd", "momentum": 0.9}}, [], "momentum"),
        ({"name": "fedavg", "up": "plain", "error_feedback": True}, [], "`up` loses nothing"),
        (
            {"name": "fedavg", "down": "plain", "broadcast_feedback": True},
            [],
            "`down` loses nothing",
        ),
        ({"name": "diloco", "server": {"momentum": 0.5}}, [], "needs a name"),
        ({"name": "scaffold", "server": "sgd"}, [], "scaffold steps by the mean change itself"),
        ({"name": "sparseloco", "up": {"k": 32}}, [], "needs a name"),
        ({"name": "ferret", "error_feedback": True, "shrink": False}, [], "leave `shrink: false`"),
        (
            {"name": "fedsvd", "ranks": 2, "up": "bits", "error_feedback": True},
            [],
            "`error_feedback`: fedsvd makes new factors",
        ),
        ({"name": "fedsvd", "ranks": 2, "server": "sgd"}, [], "makes new factors in each round"),
        ({"name": "zero_padding", "ranks": [4, 2, 1], "server": "sgd"}, [], "of one rank"),
        ({"name": "fedavg", "gather": True}, [], "give `up`, and no `down`"),
        ({"name": "flora", "server": "momentum"}, [], "bound the broadcast, with `compress: true`"),
        ({"name": "flora", "server": "adam"}, [], "give sgd, or bound the broadcast"),
        ({"name": "flora", "compress": True, "server": "adam"}, [], "sgd, momentum or nesterov"),
        (
            {"name": "flora", "compress": {"energy": 0.9}, "server": "nesterov"},
            [],
            "whose rank nothing bounds",
        ),
        ({"name": "flexlora", "server": "yogi"}, [], "give sgd, momentum or nesterov"),
        ({"name": "florist", "server": "nesterov"}, [], "take flora with `compress`, or give sgd"),
        ({"name": "fedex_lora", "server": "adagrad"}, [], "never multiplied out: give sgd"),
    ],
)
def test_parts_that_do_not_fit_are_one_sentence(
    method, overrides, says, experiment, hedgerow, tmp_path
):
    path = experiment()
    content = yaml.safe_load(path.read_text()) | {"method": method}
    path.write_text(yaml.safe_dump(content))
    done = hedgerow("run", path, *overrides, "--out", tmp_path / "run")
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "run").exists()


def test_an_update_in_two_bits_is_as_small_as_it_should_be(run):
    directory = run("run", COMPOSED["sparseloco"], federation={"rounds": 1, "keep_updates": True})
    sent = load_file(next((directory / "updates/round-0001").iterdir()))
    size = load(directory / "experiment.yaml").method.up
    total = sum(each.nbytes for each in sent.values())
    places = len(np.unpackbits(sent["unary"].numpy()).nonzero()[0])
    assert size.k / size.tile <= places / 8080 < 1.1 * size.k / size.tile
    assert total < 8080 * 4 / 20


def test_kernels_are_loaded_before_processes_are_forked(
    hedgerow, experiment, tmp_path, monkeypatch
):
    """Or each of them would load them in each round."""
    loaded = []
    monkeypatch.setattr(TopK, "load_kernels", lambda self: loaded.append(os.getpid()))
    path, out = experiment(federation={"rounds": 2}), tmp_path / "out"
    asked = ["method={name: sparseloco, up: {name: top_k, k: 4, tile: 64}}", "--workers", "2"]
    assert hedgerow("run", path, *asked, "--out", out).code == 0
    assert loaded == [os.getpid()] * 2


def test_the_largest_are_sought_by_a_kernel_that_is_loaded():
    TopK().load_kernels()
    assert cpu._largest.signatures
