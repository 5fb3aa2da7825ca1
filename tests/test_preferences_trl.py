"""Losses of preferences beside TRL's, on the same batch and the same reference."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hedgerow.data import Encoder, Row, Spool
from hedgerow.data.preferences import learnt_rows
from hedgerow.data.templates import TEXTS, TextTemplate
from hedgerow.training.objectives.answers import referenced
from hedgerow.training.objectives.dpo import DPO
from hedgerow.training.objectives.kto import KTO
from hedgerow.training.objectives.orpo import ORPO

ROWS = [
    Row("Add 1 + 2", output="3", other="12"),
    Row("Spell cat", output="c-a-t", other="tac, I think"),
    Row("Opposite of hot", "one word", output="cold", other="h"),
    Row("Say it twice", output="it it", other="it"),
]


def llama(seed):
    """A random model of two layers that is sure enough of something to prefer an answer."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@pytest.fixture
def network():
    return llama(seed=0)


@pytest.fixture
def base():
    return llama(seed=1)


def tokenized(learns, loss_on="answer", rows=ROWS):
    encoder = Encoder(TextTemplate(TEXTS["plain"], "plain"), byte_tokenizer())
    rows = learnt_rows(rows, learns, "rows")
    return Spool().tokenize("rows", rows, encoder, 200, loss_on, paired=True)


def parts(examples, index):
    example = examples[index]
    tokens = example.tokens.tolist()
    return tokens[: example.prompt_length], tokens[example.prompt_length :]


def options(tmp_path, **more):
    return {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        **more,
    }


def dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def ours(objective, network, base, examples):
    if objective.refers_to:
        examples = referenced(base, examples, pad_id=0, batch_size=3)
    batch = objective.collate(examples, range(len(examples)), pad_id=0)
    return objective.total(network, batch) / objective.count(batch)


def same(mine, network, theirs, other):
    """Equal losses, and equal gradients of all parameters."""
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-6, rel=1e-6)
    mine.backward()
    theirs.backward()
    others = dict(other.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, others[name].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "smoothing", "theirs"),
    [("sigmoid", 0.0, "sigmoid"), ("ipo", 0.0, "ipo"), ("robust", 0.1, "robust")],
)
def test_dpo_is_that_of_trl(network, base, tmp_path, loss, smoothing, theirs):
    check_dpo(network, base, tmp_path, ROWS, loss, smoothing, theirs)


def test_label_smoothing_is_that_of_trl(network, base, tmp_path):
    # Its `aot` sorts differences of a batch, so that with one pair it is the smoothed sigmoid.
    check_dpo(network, base, tmp_path, ROWS[1:2], "sigmoid", 0.2, "aot")


def check_dpo(network, base, tmp_path, rows, loss, smoothing, theirs):
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    examples, other = tokenized("pairs", rows=rows), copy.deepcopy(network)
    config = DPOConfig(**options(tmp_path, beta=0.3, loss_type=[theirs], label_smoothing=smoothing))
    trainer = DPOTrainer(
        model=other,
        ref_model=base,
        args=config,
        processing_class=byte_tokenizer(),
        train_dataset=dataset(prompt=["a"], chosen=["b"], rejected=["c"]),
    )
    batch = DataCollatorForPreference(pad_token_id=0)(
        [
            {
                "prompt_ids": parts(examples, index)[0],
                "chosen_ids": parts(examples, index)[1],
                "rejected_ids": parts(examples.other, index)[1],
            }
            for index in range(len(examples))
        ]
    )
    objective = DPO(beta=0.3, loss=loss, label_smoothing=smoothing)
    mine = ours(objective, network, base, examples)
    same(mine, network, trainer._compute_loss(other, batch, False), other)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
def test_kto_is_that_of_trl(network, base, tmp_path, weights):
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    network, base = base, network  # so that the divergence is above 0
    examples, other = tokenized("labels"), copy.deepcopy(network)
    assert examples.desirable.tolist() == [True] * 4 + [False] * 4
    config = KTOConfig(
        **options(
            tmp_path,
            beta=0.3,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            train_sampling_strategy="sequential",
        )
    )
    trainer = KTOTrainer(
        model=other,
        ref_model=base,
        args=config,
        processing_class=byte_tokenizer(),
        train_dataset=dataset(prompt=["a", "b"], completion=["b", "c"], label=[True, False]),
    )
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)(
        [
            {
                "prompt_ids": parts(examples, index)[0],
                "completion_ids": parts(examples, index)[1],
                # The batch is the whole client: each has the answer before its own.
                "KL_completion_ids": parts(examples, index - 1)[1],
                "label": bool(examples.desirable[index]),
            }
            for index in range(len(examples))
        ]
    )
    objective = KTO(beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    mine = ours(objective, network, base, examples)
    same(mine, network, trainer._compute_loss(other, batch, False), other)
    assert trainer._metrics["train"]["kl"][-1] > 0, "it counts"


def test_orpo_is_that_of_trl(network, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding

    examples, other = tokenized("pairs", loss_on="all"), copy.deepcopy(network)
    trainer = ORPOTrainer(
        model=other,
        args=ORPOConfig(**options(tmp_path, beta=0.3, max_length=200, remove_unused_columns=False)),
        processing_class=byte_tokenizer(),
        train_dataset=dataset(prompt=["a"], chosen=["b"], rejected=["c"]),
    )
    rows = []
    for index in range(len(examples)):
        row = {}
        for name, part in (("chosen", examples), ("rejected", examples.other)):
            prompt, answer = parts(part, index)
            row[f"{name}_input_ids"] = prompt + answer
            row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
            row[f"{name}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    batch = DPODataCollatorWithPadding(pad_token_id=0)(rows)
    mine = ours(ORPO(beta=0.3), network, None, examples)
    same(mine, network, trainer.compute_loss(other, batch), other)
