"""What may be a base model: adapters of earlier fine-tunes, and which checkpoints are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.losses import own_loss
from support.models import byte_tokenizer
from support.runs import rows_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import hedgerow as hr
from hedgerow import pretrained
from hedgerow.errors import UserError
from hedgerow.loading import load_tokenizer
from hedgerow.model import Model
from hedgerow.settings import ModelSettings

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
END, TURN = "<|im_end|>", "<|im_start|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_base(folder: Path, config=None, **changes) -> Path:
    """A random model that reads bytes; a Llama whose embeddings are not tied."""
    torch.manual_seed(0)
    config = config or LlamaConfig(**{"vocab_size": 260, **SMALL, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def new_tokenizer():
    """The bytes' tokenizer with two more tokens, of which one is the end, and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": [TURN]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_adapter(folder: Path, base: Path, config=None, *, tokens=False, **options) -> Path:
    """A random adapter, of LoRA with these options; `tokens` adds some, and resizes embeddings."""
    network = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    if tokens:
        network.resize_token_embeddings(len(new_tokenizer()))
        new_tokenizer().save_pretrained(folder)
    lora = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = config or LoraConfig(**{**lora, "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(network, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("untied") / "base", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tied):
    """A plain adapter, for tests that spoil a copy of it."""
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter", tied)


def alone(model, tokenizer, folder: Path) -> float:
    """Loss of a model on the test rows, without hedgerow."""
    return own_loss(model, tokenizer, folder / "test.json")


def run_on(hedgerow, experiment, tmp_path, base, *changes) -> Path:
    run = tmp_path / "run"
    path = experiment(model={"path": str(base)}, training={"steps": 4})
    result = hedgerow("run", path, *changes, "--out", run)
    assert result.code == 0, result.err
    return run


def refusal(hedgerow, experiment, tmp_path, base, *changes, command="run") -> str:
    """The sentence with which a base is refused, before anything is written."""
    out = tmp_path / "refused"
    if command == "run":
        path = experiment(model={"path": str(base)})
        result = hedgerow("run", path, *changes, "--out", out)
    else:
        path = experiment()
        data = ["--data", tmp_path / "test.json", "data.prompt=plain", *changes]
        result = hedgerow("evaluate", base, *data)
    assert result.code == 2, result.err or result.out
    assert not out.exists()
    assert result.err.count("\n") == 1
    return result.err


# --- adapters of earlier fine-tunes ---------------------------------------------------------------

NAMED = "base_model_name_or_path"
ALL = ["q_proj", "lm_head"]
EMBEDDINGS = ["embed_tokens", "lm_head"]
NEW = [258, 259, 260]
KINDS = {
    "rank-stabilised, with patterns": (
        "untied",
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"1.*v_proj": 3}},
    ),
    "some layers": ("tied", {"layers_to_transform": [1]}),
    "saved norms": ("tied", {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved output that is adapted too": ("untied", {"modules_to_save": ["lm_head"]}, ALL),
    "adapted output": ("untied", {"target_modules": ALL}, ALL),
    "adapted output, tied": ("tied", {"target_modules": ALL}),
    "adapted embeddings": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapted embeddings, tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved embeddings, tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "new tokens": ("untied", {"tokens": True}),
    "new tokens, tied": ("tied", {"tokens": True}),
    "new tokens, saved": (
        "untied",
        {"tokens": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "new tokens alone": ("tied", {"tokens": True, "trainable_token_indices": NEW}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_run_exports_and_evaluation_on_an_adapter_agree(
    hedgerow, experiment, tmp_path, tied, untied, kind
):
    which, options, *targets = KINDS[kind]
    base = save_adapter(tmp_path / "own", {"tied": tied, "untied": untied}[which], **options)
    changes = [f"method.targets={json.dumps(names)}" for names in targets]
    run = run_on(hedgerow, experiment, tmp_path, base, *changes)
    rows = rows_of(run)
    tokenizer = new_tokenizer() if options.get("tokens") else byte_tokenizer()
    before = peft.AutoPeftModelForCausalLM.from_pretrained(base)
    assert rows[0]["eval_loss"] == pytest.approx(alone(before, tokenizer, tmp_path), abs=1e-4)
    expected = rows[-1]["eval_loss"]
    assert expected < rows[0]["eval_loss"] - 1e-3
    for to in ("merged", "adapter"):
        result = hedgerow("export", run, tmp_path / to, "--to", to)
        assert result.code == 0, result.err
        data = ["--data", tmp_path / "test.json", "data.prompt=plain", "--json"]
        scored = json.loads(hedgerow("evaluate", tmp_path / to, *data).out)
        assert scored["eval_loss"] == pytest.approx(expected, abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for model in (merged, adapted):
        assert alone(model, tokenizer, tmp_path) == pytest.approx(expected, abs=1e-4)
    own = json.loads((base / "adapter_config.json").read_text())[NAMED]
    assert adapted.peft_config["default"].base_model_name_or_path == own
    assert "base_model: base\n" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_an_adapters_tokenizer_survives_and_others_need_no_hedgerow(
    hedgerow, experiment, tmp_path, untied
):
    """Another process, which never imports hedgerow, computes the loss of the last row."""
    saved = ["embed_tokens", "lm_head"]
    base = save_adapter(tmp_path / "adapter", untied, tokens=True, modules_to_save=saved)
    run = run_on(hedgerow, experiment, tmp_path, base)
    hr.open_run(run).export_merged(tmp_path / "merged")
    hr.open_run(run).export_adapter(tmp_path / "export")
    loaded = load_tokenizer(ModelSettings(path=str(base)))
    for tokenizer in (loaded, hr.open_run(run).tokenizer):
        assert (len(tokenizer), tokenizer.eos_token) == (261, END)
        assert tokenizer.chat_template == TEMPLATE
    script = f"""
import sys
from pathlib import Path
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.path.append({str(Path(__file__).parent)!r})
from support.losses import own_loss
for folder, kind in (
    ({str(tmp_path / "merged")!r}, AutoModelForCausalLM),
    ({str(tmp_path / "export")!r}, AutoPeftModelForCausalLM),
):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.eos_token) == (261, {END!r})
    assert tokenizer.chat_template == {TEMPLATE!r}
    print(own_loss(kind.from_pretrained(folder), tokenizer, Path({str(tmp_path / "test.json")!r})))
assert "hedgerow" not in sys.modules
"""
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    merged, adapter = map(float, output.split())
    assert [merged, adapter] == pytest.approx([rows_of(run)[-1]["eval_loss"]] * 2, abs=1e-4)
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [1, loaded.convert_tokens_to_ids(END)]


def test_an_adapters_embeddings_may_be_fewer_than_its_bases(hedgerow, experiment, tmp_path):
    """As resize_token_embeddings(len(tokenizer)) makes them of a padded vocabulary."""
    padded = save_base(tmp_path / "padded", vocab_size=320)
    base = save_adapter(tmp_path / "adapter", padded, tokens=True)
    run = run_on(hedgerow, experiment, tmp_path, base)
    hr.open_run(run).export_adapter(tmp_path / "export")
    network = AutoModelForCausalLM.from_pretrained(padded)
    network.resize_token_embeddings(261)
    adapted = PeftModel.from_pretrained(network, tmp_path / "export")
    expected = rows_of(run)[-1]["eval_loss"]
    assert alone(adapted, new_tokenizer(), tmp_path) == pytest.approx(expected, abs=1e-4)
    # An adapter that has no embeddings leaves them as they are, padding and all.
    shutil.rmtree(base)
    save_adapter(base, padded)
    new_tokenizer().save_pretrained(base)
    assert Model.load(ModelSettings(path=str(base))).vocabulary_size == 320


def test_a_part_of_a_tokenizer_beside_an_adapter_is_not_passed_over(
    hedgerow, experiment, tmp_path, plain
):
    base = tmp_path / "adapter"
    shutil.copytree(plain, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(ModelSettings(path=str(base))).chat_template == TEMPLATE
    (base / "tokenizer_config.json").write_text("{}")
    said = refusal(hedgerow, experiment, tmp_path, base)
    assert "has no tokenizer (tokenizer.json, say): copy it there" in said


def test_new_tokens_without_embeddings_are_not_made_up(hedgerow, experiment, tmp_path, untied):
    base = save_adapter(tmp_path / "adapter", untied, tokens=True)
    head = "base_model.model.lm_head.weight"
    change_weights(base / "adapter_model.safetensors", lambda tensors: tensors.pop(head))
    said = refusal(hedgerow, experiment, tmp_path, base)
    assert "has no values of lm_head for 1 of the tokens from 260 on" in said
    assert "save_embedding_layers=True" in said


def test_an_adapter_of_experts_is_a_base_as_is_what_a_run_makes_of_it(
    hedgerow, experiment, tmp_path
):
    config = MixtralConfig(**{"vocab_size": 260, **SMALL}, num_local_experts=4)
    base = save_base(tmp_path / "mixtral", config)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": experts}
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    for folder in ("first", "second"):
        run = run_on(hedgerow, experiment, tmp_path, adapter)
        hr.open_run(run).export_adapter(tmp_path / folder)
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder)
        assert alone(adapted, byte_tokenizer(), tmp_path) == pytest.approx(
            rows_of(run)[-1]["eval_loss"], abs=1e-4
        )
        adapter = tmp_path / folder
        shutil.rmtree(run)


def test_an_adapter_of_transposed_layers_is_a_base(hedgerow, experiment, tmp_path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    config = GPT2Config(vocab_size=260, bos_token_id=0, eos_token_id=1, **sizes)
    base = save_base(tmp_path / "gpt2", config)
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    run = run_on(hedgerow, experiment, tmp_path, save_adapter(tmp_path / "in", base, **options))
    hr.open_run(run).export_adapter(tmp_path / "export")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export")
    assert alone(adapted, byte_tokenizer(), tmp_path) == pytest.approx(
        rows_of(run)[-1]["eval_loss"], abs=1e-4
    )


TASK = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(use_dora=True, target_modules=["q_proj"], **TASK), "it has `use_dora`"),
        (LoraConfig(bias="all", target_modules=["q_proj"], **TASK), "it has `bias: all`"),
        (LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"], **TASK), "pissa"),
        (peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], **TASK), "kind IA3"),
        (peft.LoHaConfig(target_modules=["v_proj"], **TASK), "kind LOHA"),
    ],
    ids=["dora", "bias", "pissa", "ia3", "loha"],
)
def test_what_cannot_be_joined_is_exported_merged(
    hedgerow, experiment, tmp_path, tied, config, why
):
    base = save_adapter(tmp_path / "adapter", tied, config)
    run = run_on(hedgerow, experiment, tmp_path, base)
    before = peft.AutoPeftModelForCausalLM.from_pretrained(base)
    first = alone(before, byte_tokenizer(), tmp_path)
    assert rows_of(run)[0]["eval_loss"] == pytest.approx(first, abs=1e-4)
    result = hedgerow("export", run, tmp_path / "out", "--to", "adapter")
    assert result.code == 2
    assert why in result.err
    assert "export the whole model with --to merged" in result.err
    assert not (tmp_path / "out").exists()
    assert hedgerow("export", run, tmp_path / "out", "--to", "merged").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert alone(merged, byte_tokenizer(), tmp_path) == pytest.approx(
        rows_of(run)[-1]["eval_loss"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3, **TASK), "PROMPT_TUNING, which changes no"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK), "PREFIX_TUNING, which changes no"),
        (
            LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)], **TASK),
            "computes something else once it is merged",
        ),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], **TASK), "aLoRA"),
        (
            LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4", **TASK),
            "path_initial_model_for_weight_conversion",
        ),
        (LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"), "for the task SEQ_CLS"),
    ],
    ids=["prompt", "prefix", "replicated", "activated", "random start", "classifier"],
)
def test_what_cannot_be_merged_is_refused(hedgerow, experiment, tmp_path, tied, config, said):
    base = save_adapter(tmp_path / "adapter", tied, config)
    assert said in refusal(hedgerow, experiment, tmp_path, base)
    assert said in refusal(hedgerow, experiment, tmp_path, base, command="evaluate")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({NAMED: "/nowhere/model"}, "an adapter of /nowhere/model, which is not there: set `base_"),
        ({NAMED: "../gone"}, "an adapter of ../gone, which is not there"),
        ({NAMED: None}, "does not name the model it is for"),
        ({NAMED: "acme/tiny-llama"}, "acme/tiny-llama is no folder, and the Hugging Face Hub"),
        ({"peft_type": "SHINY"}, "of the kind SHINY, which peft"),
        ({"peft_type": None}, "does not say its `peft_type`"),
        ({"use_shine": {"by": 2}}, "asks for `use_shine`, which peft"),
        ({"r": "x"}, "cannot be merged into"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "has `megatron_config`"),
    ],
    ids=["gone", "relative", "none", "hub", "kind", "no kind", "newer", "value", "import"],
)
def test_an_adapters_configuration_is_checked(
    hedgerow, experiment, tmp_path, plain, monkeypatch, changes, said
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = tmp_path / "adapter"
    shutil.copytree(plain, base)
    change_json(base / "adapter_config.json", **changes)
    assert said in refusal(hedgerow, experiment, tmp_path, base)
    assert said in refusal(hedgerow, experiment, tmp_path, base, command="evaluate")
    assert "antigravity" not in sys.modules


def test_an_adapter_of_an_adapter_says_to_merge_first(hedgerow, experiment, tmp_path, plain):
    base = tmp_path / "adapter"
    shutil.copytree(plain, base)
    change_json(base / "adapter_config.json", **{NAMED: str(plain)})
    assert "is itself an adapter: merge that" in refusal(hedgerow, experiment, tmp_path, base)
    (base / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not JSON" in refusal(hedgerow, experiment, tmp_path, base)


def test_an_adapter_finds_its_base_beside_itself_and_has_one_fingerprint(tmp_path, tied, plain):
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    # Whatever a newer peft writes without asking for it.
    change_json(adapter / "adapter_config.json", use_shine=None, **{NAMED: "../base"})
    shutil.copytree(tied, tmp_path / "base")
    first, second = (Model.load(ModelSettings(path=str(path))) for path in (adapter, plain))
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != Model.load(ModelSettings(path=str(tied))).fingerprint()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(min(t)), "has no weights for model.layers.0.mlp.down_proj.lora_A"),
        (
            lambda t: t.update({"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(1)}),
            "has weights that its base has no place for, as model.layers.7.x",
        ),
        (lambda t: t[min(t)].fill_(torch.nan), "no finite numbers"),
        (lambda t: t.update({min(t): torch.ones(3, 17)}), "size mismatch"),
    ],
    ids=["missing", "unexpected", "nan", "shape"],
)
def test_an_adapters_weights_are_all_read(hedgerow, experiment, tmp_path, plain, change, said):
    base = tmp_path / "adapter"
    shutil.copytree(plain, base)
    change_weights(base / "adapter_model.safetensors", change)
    assert said in refusal(hedgerow, experiment, tmp_path, base)


def test_an_adapter_that_is_damaged_or_a_pickle_or_beside_a_model(
    hedgerow, experiment, tmp_path, tied, plain
):
    base = tmp_path / "adapter"
    shutil.copytree(plain, base)
    weights = base / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:2000])
    assert "adapter_model.safetensors is damaged" in refusal(hedgerow, experiment, tmp_path, base)
    weights.rename(base / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refusal(hedgerow, experiment, tmp_path, base)
    weights.write_bytes(whole)
    shutil.copy(tied / "model.safetensors", base)
    assert "beside those of an adapter" in refusal(hedgerow, experiment, tmp_path, base)


def test_an_adapter_that_has_changed_since_the_run_is_not_exported(
    hedgerow, experiment, tmp_path, plain
):
    base = tmp_path / "adapter"
    shutil.copytree(plain, base)
    run = run_on(hedgerow, experiment, tmp_path, base)
    change_weights(base / "adapter_model.safetensors", lambda t: t[min(t)].mul_(2))
    result = hedgerow("export", run, tmp_path / "out", "--to", "adapter")
    assert (result.code, "fingerprint" in result.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_exported_without_its_base_only_where_that_is_a_whole_model(
    hedgerow, experiment, tmp_path, tied, plain
):
    for name, base in (("whole", tied), ("adapted", plain)):
        shutil.copytree(base, tmp_path / name)
        run = run_on(hedgerow, experiment, tmp_path, tmp_path / name)
        index = json.loads((run / "ledger" / "ledger.json").read_text())
        assert index["base"].get("adapter_of") == (None if name == "whole" else "base")
        (tmp_path / name).rename(tmp_path / "moved")
        result = hedgerow("export", run, tmp_path / "out", "--to", "adapter")
        assert result.code == (0 if name == "whole" else 2), result.err
        if name == "adapted":
            assert "adapted, the run's base, is not there" in result.err
            moved = f"model.path={tmp_path / 'moved'}"
            assert hedgerow("export", run, tmp_path / "out", "--to", "adapter", moved).code == 0
            assert json.loads(hedgerow("evaluate", run, moved, "--json").out)[
                "eval_loss"
            ] == pytest.approx(rows_of(run)[-1]["eval_loss"], abs=1e-5)
        for folder in ("run", "moved", "out"):
            shutil.rmtree(tmp_path / folder)


def test_an_adapter_on_the_hub_is_a_base(tmp_path, plain, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--acme--lora"
    shutil.copytree(plain, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    there, here = (Model.load(ModelSettings(path=path)) for path in ("acme/lora", str(plain)))
    assert there.fingerprint() == here.fingerprint()
    assert there.name == "acme/lora"


@pytest.mark.parametrize("on_hub", [True, False])
def test_the_files_of_an_adapters_base_are_those_of_its_own_revision(
    tmp_path, tied, plain, monkeypatch, on_hub
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = {}
    for name, folder, revision in (("base", tied, "v1"), ("lora", plain, "v2")):
        cached[name] = tmp_path / f"models--acme--{name}" / "snapshots" / (revision[1] * 40)
        shutil.copytree(folder, cached[name])
        (tmp_path / f"models--acme--{name}" / "refs").mkdir()
        (tmp_path / f"models--acme--{name}" / "refs" / revision).write_text(revision[1] * 40)
    base, adapter = cached["base"], cached["lora"]
    change_json(adapter / "adapter_config.json", base_model_name_or_path="acme/base", revision="v1")
    change_json(base / "config.json", transformers_version="4.0.0")  # a file written anew has ours
    (base / "processor_config.json").write_text("{}")
    (base / "vocab.txt").write_text("")
    place, revision = ("acme/lora", "v2") if on_hub else (str(adapter), None)
    model = Model.load(ModelSettings(path=place, revision=revision))
    (tmp_path / "out").mkdir()
    pretrained.save(model, tmp_path / "out", revision=revision)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_version"] == "4.0.0"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"processor_config.json", "vocab.txt"}


# --- quantized bases, and other checkpoints -------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "shiny"])
def test_a_quantized_base_is_refused_before_round_1(
    hedgerow, experiment, tmp_path, tied, plain, method
):
    base = tmp_path / "base"
    shutil.copytree(tied, base)
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True}
    change_json(base / "config.json", quantization_config=settings)
    (base / "README.md").write_text("---\nbase_model: acme/whole\n---\n")
    why = f"has quantized weights ({method}), to which what is learnt cannot be added exactly: give"
    assert f"{why} the checkpoint that it was made from, acme/whole" in refusal(
        hedgerow, experiment, tmp_path, base
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    change_json(adapter / "adapter_config.json", **{NAMED: str(base)})
    for command in ("run", "evaluate"):
        assert why in refusal(hedgerow, experiment, tmp_path, adapter, command=command)
    rows = ["--data", tmp_path / "test.json", "data.prompt=plain"]
    result = hedgerow("evaluate", base, *rows)
    # What transformers can load is scored; for the others it takes libraries that are not here.
    assert result.code == 0 or "it is not loaded here" in result.err


@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        ({}, lambda t: t.pop("model.norm.weight"), "has no weights for model.norm.weight"),
        ({"vocab_size": 270}, None, "shape (260, 16), where its config.json asks for (270, 16)"),
        ({"num_hidden_layers": 1}, None, "does not account for, as model.layers.1.input_layernorm"),
        ({"num_hidden_layers": 3}, None, "has no weights for model.layers.2.input_layernorm"),
        (
            {},
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
            "does not account for, as model.layers.0.self_attn.q_proj.bias (1 in all)",
        ),
        (
            {},
            lambda t: t.update({"model.layers.0.mlp.up_proj.SCB": torch.ones(24)}),
            "does not account for, as model.layers.0.mlp.up_proj.SCB",
        ),
        ({}, lambda t: t["model.norm.weight"].fill_(torch.inf), "values in model.norm.weight that"),
        (
            {"model_type": "shiny", "auto_map": {"AutoConfig": "x.X"}},
            None,
            "code of its own, which",
        ),
        ({"model_type": "t5"}, None, "has an encoder that reads the prompt"),
        ({"model_type": "vit"}, None, "is a model of the kind vit, which is no causal"),
        ({"model_type": "shiny"}, None, "model type `shiny` but Transformers does not recognize"),
    ],
    ids=[
        "no norm",
        "rows",
        "fewer",
        "more",
        "bias",
        "scale",
        "inf",
        "code",
        "t5",
        "vit",
        "unknown",
    ],
)
def test_a_checkpoint_has_to_be_what_its_configuration_says(
    hedgerow, experiment, tmp_path, untied, config, weights, said
):
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    change_json(base / "config.json", **config)
    if weights is not None:
        change_weights(base / "model.safetensors", weights)
    assert said in refusal(hedgerow, experiment, tmp_path, base)


def test_a_checkpoints_own_parts_are_named(hedgerow, experiment, tmp_path, untied):
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    tower = "visual.blocks.0.weight"
    change_weights(base / "model.safetensors", lambda t: t.update({tower: torch.ones(3)}))
    result = hedgerow("run", experiment(model={"path": str(base)}), "--out", tmp_path / "run")
    assert f"no place for them: 1 of the checkpoint's weights ({tower})" in result.out
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    assert "has no tokenizer (tokenizer.json, say)" in refusal(hedgerow, experiment, tmp_path, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    said = refusal(hedgerow, experiment, tmp_path, base)
    assert "has no weights in safetensors format, and pytorch_model.bin is not read" in said


def test_embeddings_that_are_two_stay_two_whatever_ties_them(
    hedgerow, experiment, tmp_path, untied
):
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    change_json(base / "config.json", tie_word_embeddings=True)
    run = run_on(hedgerow, experiment, tmp_path, base)
    hr.open_run(run).export_merged(tmp_path / "merged")
    assert not AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert alone(merged, byte_tokenizer(), tmp_path) == pytest.approx(
        rows_of(run)[-1]["eval_loss"], abs=1e-4
    )


def test_a_model_of_images_and_text_learns_text(hedgerow, experiment, tmp_path):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={"vocab_size": 260, **SMALL, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    )
    torch.manual_seed(0)
    base = tmp_path / "base"
    Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    run = run_on(hedgerow, experiment, tmp_path, base)
    expected = rows_of(run)[-1]["eval_loss"]
    hr.open_run(run).export_merged(tmp_path / "merged")
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    hr.open_run(run).export_adapter(tmp_path / "adapter")
    kind = Qwen2VLForConditionalGeneration
    merged = kind.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "adapter")
    for model in (merged, adapted):
        assert alone(model, byte_tokenizer(), tmp_path) == pytest.approx(expected, abs=1e-4)


# --- a model beside its tokenizer -----------------------------------------------------------------


def test_a_padding_token_that_the_model_has_not_does_no_harm(hedgerow, experiment, tmp_path):
    base = save_base(tmp_path / "base", vocab_size=259)
    plain = Model.load(ModelSettings(path=str(base)))
    assert (plain.vocabulary_size, plain.pad_id, plain.ends) == (259, 2, [1])
    change = ["evaluation.metrics=[loss, exact_match]", "evaluation.max_new_tokens=4"]
    runs = []
    for name in ("own", "added"):
        tokenizer = byte_tokenizer()
        if name == "added":
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(base)
        runs.append(rows_of(run_on(hedgerow, experiment, tmp_path, base, *change)))
        shutil.rmtree(tmp_path / "run")
    scores = [[row["eval_loss"] for row in rows] for rows in runs]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    change_json(base / "generation_config.json", pad_token_id=259)
    run = run_on(hedgerow, experiment, tmp_path, base)
    hr.open_run(run).export_merged(tmp_path / "merged")
    own = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert own["pad_token_id"] == 0


def test_a_tokenizer_without_padding_needs_none(hedgerow, experiment, tmp_path, tied):
    base = tmp_path / "base"
    shutil.copytree(tied, base)
    change_json(base / "tokenizer_config.json", pad_token=None)
    assert Model.load(ModelSettings(path=str(base))).pad_id == 1
    run_on(hedgerow, experiment, tmp_path, base)


def test_an_answer_ends_at_every_end_that_is_one(tmp_path):
    """The tokenizer's, generation_config's and config's, but no piece of text, and none beyond."""
    base = save_base(tmp_path / "base", vocab_size=261)
    new_tokenizer().save_pretrained(base)
    end, turn = (new_tokenizer().convert_tokens_to_ids(token) for token in (END, TURN))
    model = Model.load(ModelSettings(path=str(base)))
    assert model.ends == [1, end]
    change_json(base / "config.json", eos_token_id=[1, turn, 9999])
    change_json(base / "generation_config.json", eos_token_id=40)  # "(", say
    model = Model.load(ModelSettings(path=str(base)))
    assert model.ends == sorted([1, end, turn])


# --- models in memory -----------------------------------------------------------------------------


def _peft_inside(network):
    return get_peft_model(network, LoraConfig(target_modules=["q_proj"])).get_base_model()


def _quantized(network):
    network.config.quantization_config = {"quant_method": "bitsandbytes"}
    return network


def _mixed(network):
    network.model.layers[0].to(torch.bfloat16)
    return network


def _integers(network):
    weight = network.lm_head.weight
    network.lm_head.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return network


def _not_finite(network):
    network.model.norm.weight.data[0] = torch.nan
    return network


def _encoder(network):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=260, **sizes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_peft_inside, "has an adapter of peft: merge it first"),
        (_quantized, "has quantized weights (bitsandbytes), to which"),
        (_integers, "has quantized weights, to which"),
        (_mixed, "its weights are bfloat16 and float32, give it in one"),
        (_not_finite, "has values in model.norm.weight that are no finite numbers"),
        (_encoder, "has an encoder that reads the prompt, beside its decoder"),
        (lambda network: network.to("meta"), "has no values of model.embed_tokens.weight"),
    ],
)
def test_a_model_in_memory_is_checked_as_one_in_a_folder(tmp_path, untied, change, said):
    network = change(AutoModelForCausalLM.from_pretrained(untied))
    rows = [{"instruction": "Say a", "output": "a"}]
    with pytest.raises(UserError) as error:
        hr.run(
            model=network,
            tokenizer=byte_tokenizer(),
            clients={"a": rows},
            method="flora",
            data={"prompt": "plain", "max_length": 32},
            training={"steps": 1},
            rounds=1,
            out=tmp_path / "run",
        )
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_is_handed_over_as_tokenizer_has_to_be_one(tmp_path, untied):
    network = AutoModelForCausalLM.from_pretrained(untied)
    with pytest.raises(UserError, match="tokenizer= must be a tokenizer of transformers, not str"):
        hr.run(model=network, tokenizer="x", clients={"a": []}, out=tmp_path / "run")
