"""What a model answers by itself: greedy or drawn at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from hedgerow.errors import UserError
from hedgerow.evaluation.cache import goes_on_from_state, keeps_keys_only
from hedgerow.evaluation.likelihood import Int64, Tick, batches
from hedgerow.evaluation.metrics import metrics_of
from hedgerow.model import Model, max_positions
from hedgerow.workers import ALONE, Workers

if TYPE_CHECKING:
    from hedgerow.settings import EvaluationSettings

Int32 = npt.NDArray[np.int32]


def check_positions(model: Model, settings: EvaluationSettings) -> None:
    """Raise a `UserError` where an answer alone would fill the model's positions."""
    positions = max_positions(model.network)
    answering = any(metric.needs == "answers" for metric in metrics_of(settings.metrics))
    if settings.max_new_tokens >= positions and answering:
        raise UserError(
            f"`evaluation.max_new_tokens`: {settings.max_new_tokens} leaves no room for a prompt "
            f"in the model's {positions} positions: set at most {positions - 1}"
        )


@dataclass(frozen=True)
class Draw:
    """An answer whose tokens are drawn at random, from softmax(logits / temperature)."""

    temperature: float
    """Above 0."""
    generator: torch.Generator
    """On the CPU, and this answer's own: what it draws depends on no other answer."""


def generate(
    model: Model,
    prompts: Sequence[Int32],
    max_new_tokens: int,
    batch_size: int,
    tick: Tick,
    draws: Sequence[Draw | None] | None = None,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
    workers: Workers = ALONE,
) -> tuple[list[str], int]:
    """The model's answer to each prompt, without special tokens.

    Prompts are cut on the left where prompt and answer would not fit the model's positions.

    Args:
        prompts: token ids, at least one in each.
        draws: how each answer is drawn; None, for one or all, is the greedy answer.
        ends: tokens that end an answer, beside the tokenizer's EOS and those that the model names.
        stop: texts at the first of which an answer ends, before it.
        workers: who take batches side by side.

    Returns:
        The answers, and how many prompts were cut.

    """
    room = max_positions(model.network) - max_new_tokens
    answers = [""] * len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = min(int(lengths.max(initial=0)), room) + max_new_tokens
    pads = keeps_keys_only(model.network, longest)
    with _greedy(model, max_new_tokens, ends) as config:
        if not pads:
            config.use_cache = goes_on_from_state(model.network)

        def answered(batch: Int64) -> list[str]:
            inputs = _pad_left([prompts[i][-room:] for i in batch], config.pad_token_id)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            drawn = _Drawn([draws[i] for i in batch]) if draws else None
            stopped = _Stopped(stop, inputs["input_ids"], model.tokenizer) if stop else None
            tokens = model.network.generate(
                **inputs,
                generation_config=config,
                logits_processor=[drawn] if drawn else None,
                stopping_criteria=[stopped] if stopped else None,
            )
            said = tokens[:, inputs["input_ids"].shape[1] :].tolist()
            texts = model.tokenizer.batch_decode(
                [_to_end(ids, config.eos_token_id or ()) for ids in said],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            return [text[: min(_places(stop, text), default=None)] for text in texts]

        made = _batches(np.minimum(lengths, room), batch_size, pads)
        for batch, texts in zip(made, workers.map(answered, made), strict=True):
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
            tick(len(batch))
    return answers, int((lengths > room).sum())


def _batches(lengths: Int64, batch_size: int, pads: bool) -> list[Int64]:
    """Batches as `likelihood.batches` makes them; of equal lengths where none may be padded."""
    made = batches(lengths, batch_size)
    if pads:
        return made
    places = np.concatenate(made)
    ends = np.flatnonzero(np.diff(lengths[places])) + 1
    return [
        alike[start : start + batch_size]
        for alike in np.split(places, ends)
        for start in range(0, len(alike), batch_size)
    ]


def _to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first that ends them, which may be none that tokenizers call special."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), None)]


def _places(stop: Sequence[str], text: str) -> list[int]:
    """Where each of the stops that are in a text begins."""
    return [place for each in stop if (place := text.find(each)) >= 0]


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Answers in which a stop has come: it saves time, since they are cut in any case."""

    def __init__(self, stop: Sequence[str], prompts: torch.Tensor, tokenizer: Any) -> None:
        self.stop, self.tokenizer = stop, tokenizer
        self.begin = prompts.shape[1]
        # A token is a byte at least, and some at the edge may be parts of characters.
        self.most = max(len(each.encode()) for each in stop) + 8
        self.done = torch.zeros(len(prompts), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        tails = input_ids[:, self.begin :][:, -self.most :]
        texts = self.tokenizer.batch_decode(
            tails, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.done |= torch.tensor([bool(_places(self.stop, text)) for text in texts])
        return self.done.to(input_ids.device)


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Logits whose argmax is a draw: softmax(x) is the law of argmax(x + Gumbel noise)."""

    def __init__(self, draws: Sequence[Draw | None]) -> None:
        self.draws = draws

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, draw in enumerate(self.draws):
            if draw is not None:
                noise = -torch.empty(scores.shape[1]).exponential_(generator=draw.generator).log()
                scores[row] = scores[row] / draw.temperature + noise.to(scores.device)
        return scores


@contextmanager
def _greedy(model: Model, max_new_tokens: int, ends: Sequence[int]) -> Iterator[Any]:
    """A configuration of greedy generation, in which nothing of the model's own is left.

    `generate` fills what it is not given from the model's own configuration, so that sampling
    temperatures or penalties of a chat model would leak in; that one steps aside meanwhile.
    """
    own = model.network.generation_config
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*model.ends, *ends}) or None,
        pad_token_id=model.pad_id,
    )
    model.network.generation_config = config
    try:
        yield config
    finally:
        model.network.generation_config = own


def _pad_left(prompts: Sequence[Int32], pad_id: int) -> dict[str, torch.Tensor]:
    shape = (len(prompts), max(map(len, prompts)))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, -len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        attention_mask[row, -len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
