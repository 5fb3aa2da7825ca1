"""Answers have the tokens that they have after their prompts, and rows no control tokens."""

from __future__ import annotations

import pytest
from support.tokenizers import KINDS, SPECIAL, byte_level, wrapped
from tokenizers import processors
from transformers import AutoTokenizer

from hedgerow.bundled import MODEL, tasks
from hedgerow.data.encoding import Encoder
from hedgerow.data.rows import Message, Row
from hedgerow.data.templates import TextTemplate
from hedgerow.errors import UserError

PROMPTS = [
    "{instruction}\n",
    "{instruction}\n\n",
    "{instruction} [/INST] ",
    "{instruction} [/INST]",
    "{instruction}: ",
    "{instruction}",
    "### {instruction}\n### Response:\n",
]
QUESTIONS = ["What?", "12", "the </s> tag", "I do"]
ANSWERS = ["Hi there", "42", " Hi", "\nYes", "n't know", "the tag </s> ends", "</s>", "\n\nYes", ""]
ANSWERS += ["é 你好", "<s>a", "  x"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_give_the_text_again_and_rows_have_no_control_tokens(kind):
    tokenizer = KINDS[kind]()
    begin = Encoder(TextTemplate("{instruction}", "test"), tokenizer)._begin
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for prompt in PROMPTS:
        template = TextTemplate(prompt, "test")
        encoder = Encoder(template, tokenizer)
        rows = [Row(question, "", answer) for question in QUESTIONS for answer in ANSWERS]
        examples = encoder.examples(rows, "rows")
        assert encoder.prompts(rows, "rows") == [example.prompt for example in examples]
        for row, example in zip(rows, examples, strict=True):
            ids = example.prompt[len(begin) :] + example.answer[:-1]
            assert not control & set(ids)
            assert example.answer[-1] == tokenizer.eos_token_id
            text = template.prompt(row) + row.output
            assert example.spelt == any(token in text for token in tokenizer.all_special_tokens)
            if tokenizer.unk_token_id not in ids:
                decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                assert decoded.lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_has_the_tokens_of_the_whole(kind):
    """Wherever the whole text begins with its prompt's tokens."""
    tokenizer = KINDS[kind]()
    for prompt in PROMPTS:
        template = TextTemplate(prompt, "test")
        encoder = Encoder(template, tokenizer)
        rows = [Row("What?", "", answer) for answer in ANSWERS if "<" not in answer]
        for row, example in zip(rows, encoder.examples(rows, "rows"), strict=True):
            text = template.prompt(row)
            alone = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole = tokenizer(text + row.output, add_special_tokens=False)["input_ids"]
            assert example.prompt[len(encoder._begin) :] == alone
            if whole[: len(alone)] == alone:
                assert example.answer[:-1] == whole[len(alone) :]


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_of_a_template_have_their_context(kind):
    """Beside a row that spells one, all else has the tokens that it has without."""
    tokenizer = KINDS[kind]()
    template = TextTemplate("{instruction} there.</s>Hi\n", "test")
    encoder = Encoder(template, tokenizer)
    spelt, ordinary = encoder.examples([Row("z </s> z", "", "Hi"), Row("z z", "", "Hi")], "rows")
    assert spelt.prompt.count(tokenizer.eos_token_id) == 1
    place = ordinary.prompt.index(tokenizer.eos_token_id)
    after = len(ordinary.prompt) - place
    assert spelt.prompt[-after:] == ordinary.prompt[-after:]
    assert spelt.answer == ordinary.answer


@pytest.mark.shared
def test_an_answer_after_a_newline_has_no_second_space(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")

    def tokens(prompt, answer):
        encoder = Encoder(TextTemplate(prompt, "test"), tokenizer)
        example = encoder.examples([Row("one", "", answer)], "rows")[0]
        return tokenizer.convert_ids_to_tokens(example.answer)

    assert tokens("{instruction}\n", "Hi there")[:2] == ["H", "i"]
    assert tokens("{instruction} [/INST] ", "Hi there")[:2] == ["H", "i"]
    assert tokens("{instruction} [/INST]", " Hi there")[:2] == ["▁H", "i"]
    assert "▁" not in "".join(tokens("{instruction}\n", "the")[:1])


def test_the_demo_s_tokens_are_those_of_prompt_and_answer_alone():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoder = Encoder(TextTemplate("{instruction}\n\n", "test"), tokenizer)
    rows = [Row(row["instruction"], "", row["output"]) for row in tasks.test_rows()[:200]]
    for row, example in zip(rows, encoder.examples(rows, "rows"), strict=True):
        answer = tokenizer(row.output, add_special_tokens=False)["input_ids"]
        assert example.answer == [*answer, tokenizer.eos_token_id]


def adding(single):
    """A tokenizer that adds special tokens to each text."""
    tokenizer = byte_level(add_prefix_space=False)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return wrapped(tokenizer)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "<s> <s> $A"])
@pytest.mark.parametrize("text", ["{instruction}\n", "<s>{instruction}\n"])
def test_a_begin_stands_once_and_an_end_at_the_end(single, text):
    tokenizer = adding(single)
    encoder = Encoder(TextTemplate(text, "test"), tokenizer)
    example = encoder.examples([Row("a", "", "b")], "rows")[0]
    begins = 2 if single.startswith("<s> <s>") else int("<s>" in single + text)
    ids = example.prompt + example.answer
    assert ids[:begins] == [tokenizer.bos_token_id] * begins
    assert tokenizer.bos_token_id not in ids[begins:]
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_a_token_without_an_embedding_is_named():
    tokenizer = wrapped(byte_level(add_prefix_space=False))
    size = len(tokenizer)
    tokenizer.add_tokens(["frobnicate"])
    encoder = Encoder(TextTemplate("{instruction}", "test"), tokenizer, size)
    encoder.examples([Row("a", "", "b", number=1)], "ward.json")
    said = rf"ward\.json: row 2 has the token 'frobnicate' \(number {size}\).* has {size:,}\)"
    with pytest.raises(UserError, match=said):
        encoder.examples(
            [Row("a", "", "b", number=1), Row("a", "", "frobnicate", number=2)], "ward.json"
        )
    with pytest.raises(UserError, match=said):
        encoder.prompts([Row("frobnicate", number=2)], "ward.json")


def test_a_row_cannot_know_the_names_that_control_tokens_have_meanwhile():
    tokenizer = wrapped(byte_level(add_prefix_space=False))
    encoder = Encoder(TextTemplate("{instruction}\n", "test"), tokenizer)
    hidden = encoder._careful._hidden
    assert hidden != Encoder(encoder.template, tokenizer)._careful._hidden
    assert len(set(hidden.values())) == len(SPECIAL)


def test_earlier_turns_are_read_as_text_too():
    tokenizer = wrapped(byte_level(add_prefix_space=False))
    encoder = Encoder(TextTemplate("Q: {instruction}\nA: ", "test"), tokenizer)
    history = (Message("user", "what is </s>?"), Message("assistant", "an end, </s>"))
    example = encoder.examples([Row("so?", "", "yes", history)], "rows")[0]
    assert example.spelt
    assert (example.prompt + example.answer).index(tokenizer.eos_token_id) == (
        len(example.prompt + example.answer) - 1
    )
    assert tokenizer.decode(example.prompt) == ("Q: what is </s>?\nA: an end, </s>\n\nQ: so?\nA: ")


def test_a_token_that_cannot_be_read_as_text_is_refused_where_a_row_spells_it(monkeypatch):
    tokenizer = wrapped(byte_level(add_prefix_space=False))
    encoder = Encoder(TextTemplate("{instruction}\n", "test"), tokenizer)
    monkeypatch.setattr(encoder._careful, "_unreadable", {"<s>"})
    encoder.examples([Row("a </s>", "", "b")], "rows")
    with pytest.raises(UserError, match="row 3 spells <s>, which this tokenizer cannot read but"):
        encoder.examples([Row("a <s>", "", "b", number=3)], "rows")
