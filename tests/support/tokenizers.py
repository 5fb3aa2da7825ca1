"""Tokenizers of every kind, and one of whole words."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hedgerow.bundled import MODEL

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "The answer is 42. Hi there, how are you?\n\nI don't know the tag that ends it all 12345",
    "### Response:\nYes No  maybe",
    "[INST] Hello [/INST] Hi there </s> <s>",
] * 4


def trained(kind, pre_tokenizer, decoder, post_processor=None):
    tokenizer = Tokenizer(kind)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if post_processor:
        tokenizer.post_processor = post_processor
    if isinstance(kind, models.Unigram):
        alphabet = list("abcdefghijklmnopqrstuvwxyz</>|_\n")
        options = {"vocab_size": 150, "unk_token": "<unk>", "initial_alphabet": alphabet}
        trainer = trainers.UnigramTrainer(special_tokens=SPECIAL, **options)
    elif isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
    else:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_])
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(**options):
    return trained(
        models.BPE(),
        pre_tokenizers.ByteLevel(**options),
        decoders.ByteLevel(),
        processors.ByteLevel(trim_offsets=True),
    )


def pieces(scheme):
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return trained(
        models.BPE(unk_token="<unk>", byte_fallback=True),
        pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)]),
    )


def unigram(scheme):
    space = {"prepend_scheme": scheme}
    return trained(models.Unigram(), pre_tokenizers.Metaspace(**space), decoders.Metaspace(**space))


KINDS = {
    "bytes": lambda: wrapped(byte_level(add_prefix_space=False)),
    "bytes, prefix space": lambda: wrapped(byte_level(add_prefix_space=True)),
    "bytes, no words": lambda: wrapped(byte_level(add_prefix_space=False, use_regex=False)),
    "pieces, first": lambda: wrapped(pieces("first")),
    "pieces, always": lambda: wrapped(pieces("always")),
    "pieces, never": lambda: wrapped(pieces("never")),
    "unigram, first": lambda: wrapped(unigram("first")),
    "unigram, always": lambda: wrapped(unigram("always")),
    "slow": ByT5Tokenizer,
    "the demo's": lambda: AutoTokenizer.from_pretrained(MODEL),
}


UNKNOWN, BOS, EOS = 0, 1, 2


def build(special="<s> $A", **tokens):
    """A tokenizer of one id a word (`w0` is 3, `w1` is 4 …) that adds `special`."""
    words = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i + 3 for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=special, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=4,
        **{"eos_token": "</s>", "unk_token": "<unk>"} | tokens,
    )


TOKENIZER = build()


def words(count):
    """A text of so many tokens."""
    return " ".join(f"w{i % 50}" for i in range(count))
