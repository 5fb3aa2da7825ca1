import logging

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import hedgerow.training.loss as loss_module
from hedgerow.training.loss import batch_loss, token_losses

PAD = 0


@pytest.fixture(params=["llama", "gpt2"])
def network(request):
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()
    # With a padding token in its configuration, GPT-2 would advise a mask.
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    lengths, prompts = [12, 7, 9], [5, 3, 8]
    input_ids = torch.full((3, 12), PAD)
    labels = torch.full((3, 12), -100)
    attention_mask = torch.zeros(3, 12, dtype=torch.int64)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        tokens = torch.randint(1, 64, (length,), generator=generator)
        input_ids[row, :length] = tokens
        labels[row, prompt:length] = tokens[prompt:]
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def test_equals_the_loss_of_transformers(network, batch):
    loss, count = batch_loss(network, batch)
    assert count == 7 + 4 + 1
    torch.testing.assert_close(loss / count, network(**batch).loss)


def test_gradients_equal_those_of_transformers(network, batch):
    loss, count = batch_loss(network, batch)
    parameters = list(network.parameters())
    ours = torch.autograd.grad(loss / count, parameters)
    theirs = torch.autograd.grad(network(**batch).loss, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_network_that_cannot_keep_logits_gives_the_same(network, batch):
    class Plain(torch.nn.Module):
        device = network.device

        def forward(self, input_ids, use_cache):
            return network(input_ids=input_ids, use_cache=use_cache)

    torch.testing.assert_close(batch_loss(Plain(), batch), batch_loss(network, batch))


def test_a_text_comes_to_the_same_beside_longer_ones(batch):
    """Phi-3's frequencies are others for texts of more than so many positions."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        initializer_range=0.5,
        pad_token_id=PAD,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 8,
        },
    )
    network = Phi3ForCausalLM(config).eval()
    together, rows = token_losses(network, batch)  # of 12, 7 and 9 tokens
    assert rows.tolist() == [0] * 7 + [1] * 4 + [2]
    alone = [
        token_losses(network, {"input_ids": ids[None, :length], "labels": labels[None, :length]})
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], (12, 7, 9), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat([losses for losses, _ in alone]))
    together.sum().backward()


def test_losses_are_in_float32_and_know_their_rows(network, batch):
    losses, rows = token_losses(network.to(torch.bfloat16), batch)
    assert losses.dtype == torch.float32
    assert rows.tolist() == [0] * 7 + [1] * 4 + [2]


def test_logits_are_made_only_where_there_are_labels(network, batch):
    made = []
    network.lm_head.register_forward_hook(lambda *call: made.append(tuple(call[2].shape)))
    batch_loss(network, batch)
    assert made == [(1, 7 + 4 + 1, 64)]
    assert not network.lm_head._forward_pre_hooks


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient(network, batch):
    loss, count = batch_loss(network, batch | {"labels": torch.full((3, 12), -100)})
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def test_nothing_is_said_of_the_missing_mask(network, batch, caplog, monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.cache_clear()
    batch_loss(network, batch)
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_some_rows_at_a_time_are_the_same_bits_for_less_memory(
    network, batch, dtype, monkeypatch
):
    network.to(dtype)

    def step():
        saved: dict[int, int] = {}

        def keep(tensor):
            if tensor.shape[-1:] == (64,) and tensor.dtype == torch.float32:
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        network.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses, _ = token_losses(network, batch)
        losses.sum().backward()
        gradient = network.get_output_embeddings().weight.grad.clone()
        return losses.detach(), gradient, sum(saved.values())

    losses, gradient, kept = step()
    monkeypatch.setattr(loss_module, "_AT_ONCE", 64 * 5 + 1)  # five of twelve rows, then as many
    again, same, kept_in_parts = step()
    assert torch.equal(again, losses)
    assert torch.equal(same, gradient)
    if dtype != torch.float32:  # where what is kept for the backward pass is the logits themselves
        assert kept_in_parts < kept
    with torch.no_grad():
        assert torch.equal(token_losses(network, batch)[0], losses)
