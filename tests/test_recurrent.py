"""Evaluation of models whose state is more, or other, than the keys and values of tokens.

What is right is a forward pass over each text alone, with no padding and nothing kept.
"""

import numpy as np
import pytest
import torch
import transformers
from support.models import byte_tokenizer

from hedgerow.data import Records, check
from hedgerow.evaluation.answers import generate
from hedgerow.evaluation.cache import goes_on_from_state, keeps_keys_only
from hedgerow.evaluation.choices import log_likelihoods
from hedgerow.evaluation.scores import TestSet, evaluate
from hedgerow.model import Model, max_positions
from hedgerow.settings import EvaluationSettings, TextSettings

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
ATTENTION = BASE | {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
MODELS = {
    "Llama": ATTENTION,
    "Mistral": ATTENTION | {"sliding_window": 8},
    "Gemma2": ATTENTION | {"sliding_window": 8, "head_dim": 8},
    "Lfm2": ATTENTION | {"full_attn_idxs": [1]},
    "Mamba": BASE | {"state_size": 4},
    "Jamba": ATTENTION | MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "MiniMax": ATTENTION
    | {
        "head_dim": 8,
        "num_local_experts": 2,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "RecurrentGemma": ATTENTION
    | {"lru_width": 32, "attention_window_size": 8, "head_dim": 8}
    | {"block_types": ["recurrent", "attention"]},
    "Rwkv": BASE,
    "xLSTM": BASE | {"num_heads": 4} | NATIVE,
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 96},
    "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    # Its positions count the padding.
    "Whisper": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    | {"decoder_ffn_dim": 48, "bos_token_id": 0, "eos_token_id": 1},
}
NAMES = {"OpenAIGPT": "OpenAIGPTLMHeadModel"}
PLAIN = {"Llama", "Mistral", "Gemma2", "Mpt"}

ROWS = [
    {"instruction": "Which?", "choices": ["sea", "a big sky", "no"], "answer": 0},
    {"instruction": "Which one is it of all these?", "choices": ["oak", "fir tree"], "answer": 1},
    {"instruction": "These", "choices": ["x", "yellow", "zebras"], "answer": 2},
    {"instruction": "Other", "choices": ["p", "q r", "s"], "answer": 2},
]


def made(kind, **options):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind] | vocabulary | options)
    network = getattr(transformers, NAMES.get(kind, f"{kind}ForCausalLM"))(config)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.mul_(3)  # far from uniform, so that what is wrong shows
    return Model(network, tokenizer, kind)


@torch.inference_mode()
def log_probabilities(model, tokens):
    output = model.network(input_ids=torch.tensor([tokens]), use_cache=False)
    return output.logits[0].float().log_softmax(-1)


@pytest.fixture(params=MODELS)
def model(request):
    return made(request.param)


def test_what_a_model_keeps_is_told_by_its_cache(model):
    assert keeps_keys_only(model.network, 64) == (model.name in PLAIN)
    assert goes_on_from_state(model.network) == (model.name not in {"Rwkv", "xLSTM"})


def test_positions_that_the_longest_text_scales_are_not_shared():
    network = made("Llama", rope_parameters=LONG).network
    assert keeps_keys_only(network, 64)
    assert not keeps_keys_only(network, 65)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_likelihoods_are_those_of_each_text_alone(model, batch_size):
    settings = EvaluationSettings(metrics=["multiple_choice", "loss"], batch_size=batch_size)
    data = TextSettings(prompt="plain", test="rows.json", max_length=64)
    rows = [row | {"output": row["choices"][row["answer"]]} for row in ROWS]
    checked = check(Records.of(rows, "rows.json"), data.fields)
    test = TestSet.prepare(checked, data, settings, model.tokenizer)
    expected, right, nats, count = [], 0, 0.0, 0
    for row in ROWS:
        prompt = model.tokenizer(row["instruction"] + "\n\n")["input_ids"]
        found = []
        for choice in row["choices"]:
            answer = model.tokenizer(choice, add_special_tokens=False)["input_ids"]
            logs = log_probabilities(model, [*prompt, *answer])
            each = [logs[len(prompt) - 1 + n, token].item() for n, token in enumerate([*answer, 1])]
            found.append(sum(each[:-1]))
            if choice == row["choices"][row["answer"]]:
                nats, count = nats - sum(each), count + len(each)
        expected.append(found)
        right += int(np.argmax(found)) == row["answer"]
    scores = evaluate(model, test, settings)
    assert scores["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert scores["accuracy"] == pytest.approx(100 * right / len(ROWS))
    with torch.inference_mode():
        ours, _ = log_likelihoods(model, test.choices, batch_size, lambda count: None)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_answers_are_those_of_each_prompt_alone(model):
    texts = ["Hi", "A much longer prompt than that", "Ho", "Something in between"]
    prompts = [np.array(model.tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    with torch.inference_mode():
        answers, _ = generate(model, prompts, 6, 4, lambda count: None)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt.tolist()
        for _ in range(6):
            tokens.append(int(log_probabilities(model, tokens)[-1].argmax()))
            if tokens[-1] == 1:
                break
        said = model.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
        assert answer == said


def test_positions_of_mpt_are_known():
    assert max_positions(made("Mpt").network) == 96
