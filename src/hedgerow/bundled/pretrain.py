"""Pretrain the demo's tiny Llama from nothing and write it in Hugging Face format.

The model reads made-up *notebooks*: terse worked examples such as ``backwards: stroum > muorts``
among documents of prose. It so has every skill that the demo's instructions call for, but has
never seen an instruction answered: asked one, it rambles. Federated fine-tuning is left to bring
the skills out. Skills on words are practised on invented words; sums, sequences and opposites are
the demo's own, since such a small model can only know them by having read them.

The bundled model was made by

    python -m hedgerow.bundled.pretrain src/hedgerow/bundled/model --steps 7000

which takes about ten minutes on two cores. Everything is seeded; another build of PyTorch may
still round differently.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hedgerow import spellings
from hedgerow.bundled.tasks import KINDS, WORDS

NAMES = {
    "reverse": ("rev", "backwards", "reversed letters", "from right to left"),
    "upper": ("caps", "capitals", "upper case"),
    "shift": ("inc", "next letters", "letters shifted by one", "encoded by one"),
    "spell": ("dash", "dashes between", "spelled out", "with dashes"),
    "consonants": ("cons", "no vowels", "vowels removed", "without vowels"),
    "ends": ("tips", "first and last", "ends"),
    "swap": ("flip", "swapped words", "changed order", "other way round"),
    "add": ("sum", "added", "total"),
    "next": ("seq", "next number", "continued", "what follows"),
    "opposite": ("anti", "opposite", "contrary"),
}
"""Names of each skill in the notebooks."""

# The slow ones to learn come up twice as often.
WEIGHTS = [2 if kind in ("reverse", "swap", "add", "next", "opposite") else 1 for kind in KINDS]
BEFORE = (": ", " ", "\n", " (", " | ")
AFTER = (" > ", " = ", "\n", ") ", " is ")
VERBS = ("found", "took", "wanted", "saw", "carried", "lost", "painted", "sold", "kept", "hid")
WHERE = ("near", "under", "behind", "with", "before", "without", "beside", "after")
ONSETS = (
    *"bcdfghjklmnprstvwz",
    "br",
    "ch",
    "cl",
    "dr",
    "fl",
    "gr",
    "pl",
    "qu",
    "sh",
    "st",
    "th",
    "tr",
)
VOWELS = (*"aeiouy", "ai", "ea", "ee", "oa", "ou")
CODAS = (*"lmnprtx", "ck", "er", "le", "ll", "nd", "rs", "ss", "st")


def pseudo_word(rng: Random) -> str:
    """An invented word of three to eight letters, sometimes unpronounceable."""
    length = rng.randint(3, 8)
    if rng.random() < 0.3:
        return "".join(rng.choices(ascii_lowercase, k=length))
    word = ""
    while len(word) < length:
        word += rng.choice(ONSETS) + rng.choice(VOWELS)
        if rng.random() < 0.4:
            word += rng.choice(CODAS)
    return word[:length]


def notebook(rng: Random) -> str:
    """A few worked examples of any skills, all in one notation."""
    before, after = rng.choice(BEFORE), rng.choice(AFTER)
    subject_first = rng.random() < 0.3
    lines = []
    for name in rng.choices(list(KINDS), WEIGHTS, k=rng.randint(1, 5)):
        subject = KINDS[name].draw(rng, [pseudo_word(rng), pseudo_word(rng)])
        parts = [rng.choice(NAMES[name]), subject]
        if subject_first:
            parts.reverse()
        lines.append(before.join(parts) + after + KINDS[name].solve(subject))
    return "\n".join(lines)


def prose(rng: Random) -> str:
    """Paragraphs of a line each: what the model takes blank lines to be about."""
    a, b, c, d = rng.sample(WORDS, 4)
    lines = (
        f"The {a} {rng.choice(VERBS)} the {b} {rng.choice(WHERE)} the {c}.",
        f"What {rng.choice(VERBS)} the {c} {rng.choice(WHERE)} the {d}?",
        f"{a}, {b}, {c} and {d}",
        d,
    )
    return "\n\n".join(rng.sample(lines, rng.randint(1, 4)))


def document(rng: Random) -> str:
    """One document of the pretraining text."""
    return prose(rng) if rng.random() < 0.2 else notebook(rng)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes without merges: a token per letter, which is what tasks on letters need."""
    special = ["<pad>", "<s>", "</s>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained network, 0.7 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, size: int, length: int
) -> Iterator[Tensor]:
    """Endless batches of documents run together and cut into rows."""
    ids: list[int] = []
    while True:
        while len(ids) < size * length:
            ids += [*tokenizer(document(rng)).input_ids, tokenizer.eos_token_id]
        yield torch.tensor(ids[: size * length]).view(size, length)
        del ids[: size * length]


@torch.no_grad()
def skill_check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Share of real words and numbers that the model gets right in the notebooks' notation."""
    rng = Random(1)
    tokenizer.padding_side = "left"
    shares = {}
    for name, kind in KINDS.items():
        subjects = [kind.draw(rng, WORDS) for _ in range(50)]
        prompts = [f"{NAMES[name][0]}: {subject} > " for subject in subjects]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answers = tokenizer.batch_decode(
            output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        right = [
            answer.split("\n")[0] == kind.solve(subject)
            for answer, subject in zip(answers, subjects, strict=True)
        ]
        shares[name] = sum(right) / len(right)
    return shares


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / options.steps)) / 2,
    )
    stream = batches(tokenizer, Random(options.seed), options.batch_size, length=96)
    for step in range(1, options.steps + 1):
        ids = next(stream)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0:
            print(
                f"step {step}: loss {loss.item():.3f}, {skill_check(model, tokenizer)}", flush=True
            )

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    spellings.rewrite(options.out / "config.json", spellings.model_config)
    spellings.rewrite_tokenizer(options.out)


if __name__ == "__main__":
    main()
