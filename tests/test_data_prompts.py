import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.data.rows import Row
from hedgerow.data.templates import TextTemplate, load
from hedgerow.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Chat:
    """Renders a chat template as a tokenizer does."""

    eos_token = "<|end|>"

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        texts, _ = render_jinja_template(
            [messages],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
        )
        return texts[0]


def test_alpaca_word_for_word():
    template = load("alpaca", None)
    assert template.prompt(Row("Add.", "2 and 3", "5")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert template.prompt(Row("Add.")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert template.answer(Row("Add.", output="5")) == "5"


@pytest.mark.parametrize(
    ("name", "with_input", "without"),
    [
        (
            "alpaca-short",
            "### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n",
            "### Instruction:\nQ\n\n### Response:\n",
        ),
        ("plain", "Q\n\nC\n\n", "Q\n\n"),
    ],
)
def test_short_templates(name, with_input, without):
    template = load(name, None)
    assert template.prompt(Row("Q", "C")) == with_input
    for row in [Row("Q", " \n"), Row("Q")]:
        assert template.prompt(row) == without


@given(instruction=st.text(), context=st.text())
def test_values_are_never_read_as_templates(instruction, context):
    template = TextTemplate("<{instruction}|{input}>", "test")
    row = Row(instruction + "{input}", context + "{instruction} \\1")
    assert template.prompt(row) == f"<{row.instruction}|{row.input}>"


def test_template_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('{"ask": "{instruction}"{?input}, "of": "{input}"{/input}}\n', encoding="utf-8")
    template = load(str(path), None)
    assert template.prompt(Row("Why?", "sky")) == '{"ask": "Why?", "of": "sky"}\n'
    assert template.prompt(Row("Why?")) == '{"ask": "Why?"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Answer:", r"must hold \{instruction\}"),
        ("{?input}{instruction}{/input}", r"must hold \{instruction\} outside"),
        ("{instruction} {question}", r"\{question\} is not a known placeholder"),
        ("{instruction} {?context}", r"\{\?context\} is not a known placeholder"),
        ("{instruction} {?input}", r"\{\?input\} stands alone"),
        ("{instruction} {/input}", r"\{/input\} stands alone"),
    ],
)
def test_bad_template_files(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"mine\.txt: {message}"):
        load(str(path), None)


def test_unknown_name():
    with pytest.raises(UserError, match=r"alpacca is neither a file .* nor one of alpaca, "):
        load("alpacca", None)


def test_chat():
    template = load("chat", Chat(CHATML))
    row = Row("Add.", "2 and 3", "5")
    assert template.prompt(row) == "<|user|>Add.\n\n2 and 3<|end|>\n<|assistant|>"
    assert template.answer(row) == "5<|end|>"


def test_chat_mistakes():
    for chat_template, message in [
        (None, "has no chat template"),
        (CHATML.replace("<|assistant|>{%", "<|bot|>{%"), "does not continue its own prompt"),
        ("{{ raise_exception('only system') }}", "fails .*only system"),
    ]:
        with pytest.raises(UserError, match=message):
            load("chat", Chat(chat_template))
