"""Mixtures of experts: every expert is trained, and what is exported is what was evaluated."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import hedgerow as hr
from hedgerow.errors import UserError
from hedgerow.testing.models import byte_tokenizer
from hedgerow.training import first_order
from hedgerow.training.checkpointing import checkpointed
from hedgerow.training.objectives.kto import KTO
from hedgerow.training.objectives.supervised import Supervised

ROWS = [{"instruction": f"Say {word}", "output": word} for word in ("cat", "a bird", "three dogs")]
SIZES = {
    "vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
KINDS = ["Mixtral", "Qwen3Moe", "Qwen2Moe", "DeepseekV3", "Olmoe", "GptOss", "GraniteMoe"]


def network(kind):
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{kind}ForCausalLM")(config)
        for weight in made.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.1)
    return made.eval()


@pytest.fixture
def base(tmp_path):
    def make(kind):
        folder = tmp_path / kind
        network(kind).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


def run(folder, out, **method):
    return hr.run(
        model={"path": str(folder)},
        clients={"a": ROWS, "b": ROWS[:2]},
        test=ROWS,
        data={"prompt": "plain", "max_length": 64},
        method=method,
        training={"steps": 2, "batch_size": 2, "learning_rate": 0.01},
        federation={"rounds": 2},
        out=out,
        progress=False,
    )


@torch.no_grad()
def loss_of(network):
    """Loss of the rows, each by itself, without hedgerow."""
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    for row in ROWS:
        prompt = tokenizer(f"{row['instruction']}\n\n")["input_ids"]
        ids = tokenizer(f"{row['instruction']}\n\n{row['output']}")["input_ids"] + [1]
        logits = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= float(logits[place - 1, ids[place]])
            count += 1
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_trained_and_exported(tmp_path, base, kind):
    folder = base(kind)
    done = run(folder, tmp_path / "run", name="flora", ranks=[2, 3])
    loss = done.evaluate()["eval_loss"]
    assert loss < done.metrics["eval_loss"][0] - 0.01
    done.export_merged(tmp_path / "merged")
    done.export_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    of_experts = {n: t for n, t in tensors.items() if ".experts." in n or "_linear." in n}
    # Each expert's part of B has learnt something.
    for name, tensor in of_experts.items():
        if "lora_B" in name and "gate" not in name:
            by_expert = tensor.reshape(len(tensor), -1, 4)
            assert by_expert.abs().amax((0, 1)).gt(0).all(), name
    assert of_experts
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loss_of(merged) == pytest.approx(loss, abs=1e-5)
    adapted = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(adapted, tmp_path / "adapter").eval()
    assert loss_of(adapted) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedit", "ranks": 2},
        {"name": "ferret", "over": "lora", "ranks": 2, "compression": 24},
        {"name": "flora", "ranks": 2, "restart": "zero", "scaling": "adaptive"},
        {"name": "ffa_lora", "ranks": 2},
        {"name": "flexlora", "ranks": 2},
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_every_method_of_adapters_trains_experts(tmp_path, base, method):
    done = run(base("Mixtral"), tmp_path / "run", **method)
    assert done.evaluate()["eval_loss"] < done.metrics["eval_loss"][0]
    done.export_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    learnt = [n for n, t in tensors.items() if ".experts." in n and "lora_B" in n and t.any()]
    assert len(learnt) == 4  # two parameters in each of two layers


@pytest.mark.parametrize("method", ["fed_sb", "flora_adalora"])
def test_a_method_that_cannot_adapt_experts_says_so(tmp_path, base, method, capsys):
    done = run(base("DeepseekV3"), tmp_path / "run", name=method, ranks=2)
    loss = done.evaluate()["eval_loss"]
    from hedgerow.model import Model
    from hedgerow.settings import ModelSettings

    model = Model.load(ModelSettings(path=str(tmp_path / "DeepseekV3")))
    (said,) = [s for s in done.experiment.method.left_out(model) if "experts, which" in s]
    assert "model.layers.*.mlp.experts.down_proj" in said
    # peft takes the shared expert's gate_proj for an expert's of old, unless it is told better.
    done.export_adapter(tmp_path / "adapter")
    adapted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "DeepseekV3")
    adapted = PeftModel.from_pretrained(adapted, tmp_path / "adapter").eval()
    assert loss_of(adapted) == pytest.approx(loss, abs=1e-5)


def test_an_export_is_read_without_hedgerow(tmp_path, base):
    folder = base("Qwen3Moe")
    done = run(folder, tmp_path / "run", name="flora", ranks=2)
    done.export_adapter(tmp_path / "adapter")
    done.export_merged(tmp_path / "merged")
    code = """
import json, sys, torch, transformers, peft
folder, adapter, merged = sys.argv[1:]
ids = torch.arange(3, 30)[None]
load = transformers.AutoModelForCausalLM.from_pretrained
with torch.no_grad():
    one = peft.PeftModel.from_pretrained(load(folder), adapter).eval()(ids).logits
    two, base = load(merged)(ids).logits, load(folder)(ids).logits
assert "hedgerow" not in sys.modules
print(json.dumps([float((one - two).abs().max()), float((base - two).abs().max())]))
"""
    arguments = [folder, tmp_path / "adapter", tmp_path / "merged"]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    apart, learnt = json.loads(result.stdout.splitlines()[-1])
    assert apart < 1e-5
    assert learnt > 1e-3


def test_dropout_and_experts_are_refused(tmp_path, base):
    with pytest.raises(UserError, match=r"method\.dropout=0"):
        run(base("Mixtral"), tmp_path / "run", name="fedit", ranks=2, dropout=0.1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "v_porj"], "did you mean `v_proj`"),
        (["q_proj", "w1", "w3"], "has no 'w1' and 'w3'.*experts are down_proj, gate_up_proj"),
        (["layers.0.self_attn.q_porj"], r"did you mean `layers\.0\.self_attn\.q_proj`"),
        ("Q_Proj", "did you mean `q_proj`"),
        ("all_linear", "did you mean `all-linear`"),
        (["all-linear", "lm_head"], "stands alone"),
        ("(q_proj", "no regular expression"),
        ("q_pro.*", r"matches no whole name.*write '\.\*\(q_pro\.\*\)'"),
        ("q_proj|v_proj", r"write '\.\*\(q_proj\|v_proj\)'"),
        ([".*_proj"], "in a list is no name"),
        (["embed_tokens"], "is not a linear layer"),
        # Of experts all are adapted or none: one alone would silently mean all.
        (["model.layers.0.mlp.experts.down_proj.3"], "holds 4 experts.*without a number"),
        ("", "is left to adapt"),
    ],
)
def test_targets_that_are_not_there_get_a_sentence(tmp_path, base, targets, words):
    with pytest.raises(UserError, match=words):
        run(base("Mixtral"), tmp_path / "run", name="fedit", ranks=2, targets=targets)


@pytest.mark.parametrize(
    "targets", ["q_proj,gate_up_proj", ["q_proj", "experts.gate_up_proj"], r".*(q|gate_up)_proj"]
)
def test_targets_may_name_experts(tmp_path, base, targets):
    done = run(base("Mixtral"), tmp_path / "run", name="fedit", ranks=2, targets=targets)
    done.export_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    ends = {name.rpartition("layers.")[2][2:] for name in config["target_parameters"]}
    assert ends == {"mlp.experts.gate_up_proj"}
    ends = {name.rpartition("layers.")[2][2:] for name in config["target_modules"]}
    assert ends == {"self_attn.q_proj"}


@pytest.mark.parametrize(
    "targets",
    [
        "q_proj, v_proj,",
        "q_proj v_proj",
        "[q_proj, v_proj]",
        ["q_proj,v_proj"],
        [" v_proj", "q_proj"],
    ],
)
def test_names_are_read_however_a_list_of_them_is_written(targets):
    from hedgerow.targets import find

    found = find(network("Mixtral"), targets)
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_proj", "v_proj"}
    assert not found.left_out


@pytest.mark.parametrize("targets", ["All-Linear", ["all-linear"], " all-linear"])
def test_all_linear_is_read_however_it_is_written(targets):
    from hedgerow.targets import find

    made = network("Mixtral")
    assert find(made, targets) == find(made, "all-linear")


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], r".*gate_proj"])
def test_a_name_that_experts_have_as_a_part_of_another_is_said(targets):
    """These would train the shared expert, and half of the others or none, without a word."""
    from hedgerow.targets import find

    (said,) = find(network("Qwen2Moe"), targets).left_out
    assert "mlp.experts.gate_up_proj (2)" in said
    assert "name gate_up_proj, too" in said


def test_an_adapter_of_layers_alone_is_exported_as_of_any_model(tmp_path, base):
    """Servers look for a mixture's layers in `target_modules` alone."""
    folder = base("Mixtral")
    done = run(folder, tmp_path / "run", name="flora", ranks=2, targets=["q_proj", "v_proj"])
    done.export_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4
    assert "target_parameters" not in config
    adapted = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(adapted, tmp_path / "adapter").eval()
    assert loss_of(adapted) == pytest.approx(done.evaluate()["eval_loss"], abs=1e-5)


def test_experts_that_a_router_has_not_chosen_are_adapted_too():
    """Of experts that are modules, as in models of one's own, a short text reaches a few."""
    from hedgerow.targets import find

    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()  # fmt: skip

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(16))

        def forward(self, x):
            return self.experts[3](x)

    for layer in made.model.layers:
        layer.mlp = Mixture()
    found = find(made, "all-linear")
    assert sum(".experts." in name for name in found.modules) == 32
    assert not found.left_out


def test_adalora_trains_beside_layers_without_a_gradient(tmp_path):
    """An indexer only chooses the tokens that are attended to."""
    config = transformers.HYV4Config(**SIZES | {"index_n_heads": 2, "index_head_dim": 8})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.HYV4ForCausalLM(config).eval()
    done = hr.run(
        model=made,
        tokenizer=byte_tokenizer(),
        clients={"a": ROWS},
        test=ROWS,
        data={"prompt": "plain", "max_length": 64},
        method={"name": "flora_adalora", "ranks": 2},
        training={"steps": 2, "batch_size": 2, "learning_rate": 0.05},
        federation={"rounds": 1},
        out=tmp_path / "run",
        progress=False,
    )
    before, after = done.metrics["eval_loss"]
    assert after < before


def test_what_all_linear_leaves_out_is_said_with_its_count(tmp_path, base):
    from hedgerow import targets

    made = network("Mixtral")
    (said,) = targets.find(made, "all-linear").left_out
    assert "model.layers.*.mlp.gate.weight (2)" in said
    # Mamba's dt_proj is read by the mixer, and never called; peft refuses its out_proj.
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=16
    )
    mamba = targets.find(transformers.MambaForCausalLM(config).eval(), "all-linear")
    assert all(name.endswith(("in_proj", "x_proj")) for name in mamba.modules)
    assert any("dt_proj (2)" in said for said in mamba.left_out)
    assert any("out_proj (2)" in said for said in mamba.left_out)


def test_gates_of_recurrent_layers_are_no_experts():
    """Their module has a state that others set, which a wrapper around it would hide."""
    from hedgerow import targets

    config = transformers.RecurrentGemmaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, lru_width=16,
    )  # fmt: skip
    made = transformers.RecurrentGemmaForCausalLM(config).eval()
    found = targets.find(made, "all-linear")
    assert not found.parameters
    assert any("rg_lru.input_gate_weight" in said for said in found.left_out)


def test_a_step_along_transposed_experts_is_what_their_merge_adds(tmp_path):
    """GptOss keeps them as (n, m), so that square ones do not tell by their shape."""
    from hedgerow.lowrank import Factors
    from hedgerow.model import Model
    from hedgerow.training.line_search import _changed

    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": SIZES["hidden_size"]})
    model = Model(transformers.GptOssForCausalLM(config).eval(), byte_tokenizer(), "m")
    module = "model.layers.0.mlp.experts.down_proj.1"
    m, n = model.adapted_shapes("all-linear")[module]
    assert m == n
    pair = Factors(torch.randn(2, n), torch.randn(m, 2))
    weight = model.network.get_parameter(module.rpartition(".")[0])
    before = weight.clone()
    with torch.no_grad(), _changed(model.network, {module: pair}, 1.0):
        stepped = weight.clone()
    assert torch.equal(weight, before)
    model.merge(module, pair)
    torch.testing.assert_close(stepped, weight)
    assert not torch.equal(weight, before)


def test_what_only_training_reads_without_a_call_is_left_out():
    """Gemma 3n clips the weight of one layer in training, and reads it without the adapter."""
    from hedgerow import targets

    config = transformers.Gemma3nTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    made = transformers.Gemma3nForCausalLM(config).eval()
    made.model.layers[0].mlp.train()
    before, random = [m.training for m in made.modules()], torch.get_rng_state()
    found = targets.find(made, "all-linear")
    assert not any("correction_coefs" in name for name in found.modules)
    assert any("altup.correction_coefs (2)" in said for said in found.left_out)
    assert [m.training for m in made.modules()] == before
    assert torch.equal(torch.get_rng_state(), random)


def test_layers_that_training_skips_at_random_are_adapted():
    from hedgerow import targets

    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2,
        word_embed_proj_dim=16, layerdrop=0.99,
    )  # fmt: skip
    made = transformers.OPTForCausalLM(config).eval()
    assert len(targets.find(made, "all-linear").modules) == 4 * 6


def test_the_last_layer_of_a_fused_mixer_is_left_out():
    """Kernels of Mamba-2 read its weight in training; peft refuses it in some architectures."""
    from hedgerow import targets

    config = transformers.BambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=4,
        mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8,
    )  # fmt: skip
    found = targets.find(transformers.BambaForCausalLM(config).eval(), "all-linear")
    assert "model.layers.0.mamba.in_proj" in found.modules
    assert any("model.layers.*.mamba.out_proj: which LoRA cannot" in s for s in found.left_out)


# --- the routers' auxiliary loss ------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss", "GraniteMoe"])
def test_the_routers_loss_counts_in_the_gradient_alone(kind, checkpointing):
    made = network(kind).train().requires_grad_(True)
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    batch, count = {"input_ids": tokens, "labels": tokens}, 2 * 11
    gradients = []
    for coefficient in (0.0, 0.5):
        made.zero_grad()
        with checkpointed(made, checkpointing):
            loss = first_order.backward(
                Supervised(), made, [batch], 2 * count, 1, router=coefficient
            )
        gradients.append((loss, {n: p.grad.clone() for n, p in made.named_parameters()}))
    made.zero_grad()
    auxiliary = made(input_ids=tokens, output_router_logits=True).aux_loss
    # A step of twice as many tokens, of which this batch has half.
    (0.5 * auxiliary / 2).backward()
    assert gradients[0][0] == gradients[1][0]
    own = {n: p.grad for n, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert own
    for name, gradient in own.items():
        difference = gradients[1][1][name] - gradients[0][1][name]
        torch.testing.assert_close(difference, gradient, rtol=1e-3, atol=1e-5)


def test_the_routers_loss_counts_once_beside_a_pass_without_gradients():
    """As KTO has one, of answers to other prompts."""
    made = network("Mixtral").train().requires_grad_(True)
    tokens = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    reference, good = torch.zeros(4), torch.tensor([True, False])
    batch = {"input_ids": tokens, "labels": tokens, "reference": reference, "desirable": good}
    gradients = []
    for coefficient in (0.0, 0.5):
        made.zero_grad()
        first_order.backward(KTO(), made, [batch], 2, 1, router=coefficient)
        gradients.append({n: p.grad.clone() for n, p in made.named_parameters()})
    made.zero_grad()
    (0.5 * made(input_ids=tokens[:2], output_router_logits=True).aux_loss).backward()
    own = {n: p.grad for n, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert own
    for name, gradient in own.items():
        difference = gradients[1][name] - gradients[0][name]
        torch.testing.assert_close(difference, gradient, rtol=1e-3, atol=1e-5)


def test_a_run_with_the_routers_loss_learns_otherwise_and_others_are_refused(tmp_path, base):
    folder = base("Mixtral")
    losses = []
    for coefficient in (0.0, 10.0):
        done = hr.run(
            model={"path": str(folder)},
            clients={"a": ROWS, "b": ROWS[:2]},
            test=ROWS,
            data={"prompt": "plain", "max_length": 64},
            method={"name": "fedit", "ranks": 2},
            training={"steps": 2, "batch_size": 2, "router_aux_loss_coef": coefficient},
            federation={"rounds": 1},
            out=tmp_path / f"run-{coefficient}",
            progress=False,
        )
        losses.append(done.metrics["eval_loss"].iloc[-1])
    assert losses[0] != losses[1]
    words = "training.router_aux_loss_coef: transformers has no auxiliary loss for DeepseekV3"
    with pytest.raises(UserError, match=words):
        hr.run(
            model={"path": str(base("DeepseekV3"))},
            clients={"a": ROWS},
            data={"prompt": "plain", "max_length": 64},
            method={"name": "fedit", "ranks": 2},
            training={"router_aux_loss_coef": 0.01},
            out=tmp_path / "refused",
            progress=False,
        )


def test_a_method_without_gradients_refuses_the_routers_loss(tmp_path, base):
    with pytest.raises(UserError, match="is in gradients alone, of which fedkseed has none"):
        hr.run(
            model={"path": str(base("Mixtral"))},
            clients={"a": ROWS},
            data={"prompt": "plain", "max_length": 64},
            method={"name": "fedkseed"},
            training={"router_aux_loss_coef": 0.01},
            out=tmp_path / "refused",
            progress=False,
        )
