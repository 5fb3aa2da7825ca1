"""Each kind of chat template: the prompt is that of generation, and every text comes back."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest

from hedgerow.data.chat import ChatTemplate
from hedgerow.data.encoding import Encoder
from hedgerow.data.rows import Message, Row
from hedgerow.data.templates import load
from hedgerow.errors import UserError
from hedgerow.settings import TemplateSettings, TextSettings
from hedgerow.testing.models import byte_tokenizer

from .templates import DATED, REFUSED, TEMPLATES

DAY = datetime.date(2024, 12, 31)
OTHERWISE = {
    "qwen-3": "<think>\n\n</think>\n\n",
    "qwen-3-thinking": "\n</think>\n\n",
    "qwq": "<think>\n",
    "deepseek-r1": "<think>\n",
    "gpt-oss": "<|channel|>final<|message|>",
}
"""Templates that write something else before an answer than in generation, and what."""
NO_GENERATION = ("starchat",)
"""Templates that know of no generation."""
NO_SYSTEM = ("mistral-v1", "gemma")
"""Templates that refuse a system message."""
THINKING = ("qwen-3", "qwen-3-thinking", "qwq", "deepseek-r1")


def tokenizer_of(source: str) -> Any:
    """A tokenizer of bytes whose control tokens are those of a chat template."""
    tokenizer = byte_tokenizer()
    found = set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>|<｜\w+｜>|\[/?[A-Z_]+\]", source))
    if "<|{{ m.role }}|>" in source:
        found |= {"<|user|>", "<|assistant|>", "<|system|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(found)})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = source
    return tokenizer


def chat(name: str, **settings: Any) -> tuple[Any, ChatTemplate, Encoder]:
    tokenizer = tokenizer_of(TEMPLATES[name])
    given = TemplateSettings(**{"date": DAY if name in DATED else None} | settings)
    template = load(TextSettings(prompt="chat", template=given), tokenizer)
    assert isinstance(template, ChatTemplate)
    return tokenizer, template, Encoder(template, tokenizer)


def said(name: str, *texts: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(texts)
    messages = [*([("system", system)] if system else []), *zip(roles, texts, strict=False)]
    if name == "parts":
        return [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in messages]
    return [{"role": role, "content": text} for role, text in messages]


def by_transformers(tokenizer: Any, messages: Any, date: Any = None, **options: Any) -> str:
    """What transformers makes of messages; where a template reads the clock, on that day."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return cls.combine(date or datetime.date.today(), datetime.time(12))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Clock)
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_that_of_generation(name: str) -> None:
    tokenizer, template, encoder = chat(name)
    row = Row("What is it?", "a box", "It is a box.")
    prompt = encoder.examples([row], "rows")[0].prompt
    assert prompt == encoder.prompts([row], "rows")[0]
    options = {"enable_thinking": False} if name == "qwen-3" else {}
    generation = by_transformers(
        tokenizer,
        said(name, "What is it?\n\na box"),
        DAY,
        add_generation_prompt=True,
        **options,
    )
    if name in OTHERWISE and name != "qwen-3":
        text = tokenizer.decode(prompt)
        extra = OTHERWISE[name]
        assert generation in (text + extra, text.removesuffix(extra))
    elif name not in NO_GENERATION:
        assert prompt == plain(tokenizer, generation)
    assert bool(template.notes) == (name in OTHERWISE)
    if template.notes:
        assert repr(OTHERWISE[name]) in template.notes[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer_are_the_conversation_to_its_end(name: str) -> None:
    tokenizer, template, encoder = chat(name)
    row = Row("What is it?", "", "It is a box.")
    example = encoder.examples([row], "rows")[0]
    whole = by_transformers(tokenizer, said(name, "What is it?", "It is a box."), DAY)
    ids = plain(tokenizer, whole)
    mine = example.prompt + example.answer
    if template.ends:
        assert ids[: len(mine)] == mine
        assert mine[-1] == template.ends[0]
        assert tokenizer.convert_ids_to_tokens(mine[-1]) not in ("<think>", "</think>")
    else:
        assert mine == [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(example.answer, skip_special_tokens=True).strip() == "It is a box."
    assert tokenizer.bos_token_id not in mine[1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_earlier_turns_and_the_system_come_back(name: str) -> None:
    tokenizer, _, encoder = chat(name)
    earlier = (Message("user", "Hi"), Message("assistant", "Hello!"))
    row = Row("And now?", "", "Yes.", earlier)
    example = encoder.examples([row], "rows")[0]
    whole = by_transformers(tokenizer, said(name, "Hi", "Hello!", "And now?", "Yes."), DAY)
    mine = example.prompt + example.answer
    assert plain(tokenizer, whole)[: len(mine) - 1] == mine[:-1]
    ruled = Row("And now?", "", "Yes.", (Message("system", "Be brief"), *earlier), number=7)
    if name in NO_SYSTEM:
        with pytest.raises(UserError, match=r"rows: row 7: the tokenizer's chat template fails \("):
            encoder.examples([ruled], "rows")
    else:
        assert "Be brief" in tokenizer.decode(encoder.prompts([ruled], "rows")[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_are_the_template_s(name: str) -> None:
    """A row that spells them gives the tokens of its letters, and the others stay."""
    tokenizer, _, encoder = chat(name)
    spelt = [token for token in tokenizer.all_special_tokens if token != "<pad>"]
    text = " ".join(spelt)
    row = Row(f"a {text} b", "", f"c {text} d", (Message("user", text), Message("assistant", text)))
    ordinary = Row("a b", "", "c d", (Message("user", "x"), Message("assistant", "x")))
    found, plainly = encoder.examples([row, ordinary], "rows")
    assert (found.spelt, plainly.spelt) == (True, False)

    def control(ids: list[int]) -> list[int]:
        return [each for each in ids if each in set(tokenizer.all_special_ids)]

    assert control(found.prompt) == control(plainly.prompt)
    assert control(found.answer) == control(plainly.answer)
    written = tokenizer.decode(found.prompt + found.answer)
    assert written.count(text) == 4
    assert encoder.prompts([row, ordinary], "rows") == [found.prompt, plainly.prompt]


@pytest.mark.parametrize("name", THINKING)
def test_an_answer_keeps_its_own_thoughts(name: str) -> None:
    tokenizer, _, encoder = chat(name)
    answer = "<think>\nA box is a box.\n</think>\n\nIt is a box."
    example = encoder.examples([Row("What is it?", "", answer)], "rows")[0]
    text = tokenizer.decode(example.prompt + example.answer[:-1])
    assert text.endswith(answer)
    assert text.count("<think>") == 1
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert (example.prompt + example.answer).count(think) == 1


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_the_one_that_is_given(name: str) -> None:
    _, template, encoder = chat(name, date=DAY)
    assert template.date == DAY
    tokenizer = encoder.tokenizer
    text = tokenizer.decode(encoder.prompts([Row("What?")], "rows")[0])
    assert "2024" in text
    assert "31" in text
    _, today, _ = chat(name, date=None)
    assert today.date == datetime.date.today()


def test_a_date_of_the_template_s_own_is_no_clock() -> None:
    tokenizer, template, encoder = chat("llama-3.1")
    assert template.date is None
    assert "26 Jul 2024" in tokenizer.decode(encoder.prompts([Row("What?")], "rows")[0])
    tokenizer, template, encoder = chat("llama-3.1", date=DAY)
    assert template.date == DAY
    assert "31 Dec 2024" in tokenizer.decode(encoder.prompts([Row("What?")], "rows")[0])


def test_a_date_that_is_not_written_is_said() -> None:
    _, template, _ = chat("chatml", date=DAY)
    assert template.date is None
    assert template.notes == ("data.template.date: the chat template writes no date",)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_with_is_refused(name: str) -> None:
    source, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        load(TextSettings(prompt="chat"), tokenizer_of(source))
    assert str(caught.value).startswith("`data.prompt`: the tokenizer's chat template ")


@pytest.mark.parametrize(
    ("clock", "written"),
    [
        ("{{ strftime_now('%H:%M:%S') }}", "12:00:00"),
        ("{{ strftime_now('%A, %-d') }}", "Tuesday, 31"),
        ("{% if strftime_now('%Y') | int > 2020 %}{{ 'new' }}{% endif %}", "new"),
        ("{% macro day() %}{{ strftime_now(format='%m/%d') }}{% endmacro %}{{ day() }}", "12/31"),
        ("{% if messages[0].role == 'system' %}{{ strftime_now('%d') }}{% endif %}", ""),
    ],
)
def test_whatever_is_read_of_the_clock_is_that_day_s(clock: str, written: str) -> None:
    tokenizer = tokenizer_of(clock + "\n" + TEMPLATES["chatml"])
    template = load(TextSettings(prompt="chat"), tokenizer)
    assert template.date == datetime.date.today()
    given = TextSettings(prompt="chat", template=TemplateSettings(date=DAY))
    text = load(given, tokenizer).prompt(Row("What?"))
    assert text.startswith(written)


def test_a_template_may_want_a_system() -> None:
    want = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tokenizer_of(want + TEMPLATES["chatml"])
    template = load(TextSettings(prompt="chat"), tokenizer)
    encoder = Encoder(template, tokenizer)
    ruled = Row("What?", "", "It.", (Message("system", "Be brief"),))
    assert tokenizer.decode(encoder.examples([ruled], "rows")[0].answer) == "It.<|im_end|>"
    with pytest.raises(UserError, match=r"rows: row 3: .* fails \(no system\)"):
        encoder.examples([ruled, Row("What?", "", "It.", number=3)], "rows")


def test_a_template_may_forget_what_no_row_has() -> None:
    source = TEMPLATES["chatml"].replace(
        "{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last }}"
    )
    tokenizer = tokenizer_of(source)
    encoder = Encoder(load(TextSettings(prompt="chat"), tokenizer), tokenizer)
    encoder.examples([Row("What?", "", "It.")], "rows")
    earlier = (Message("user", "Hi"), Message("assistant", "Hello!"))
    with pytest.raises(UserError, match=r"rows: row 3: .* leaves out earlier answers"):
        encoder.examples([Row("What?", "", "It.", earlier, number=3)], "rows")


@pytest.mark.parametrize("control", [True, False])
def test_an_answer_ends_without_the_letters_of_a_template(control: bool) -> None:
    """Generation would go through them, and no metric knows them."""
    source = TEMPLATES["falcon"].replace("m.content }}", "m.content }} [END]")
    source = source.replace("[END]", "[END]{{ eos_token }}") if control else source
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    template = load(TextSettings(prompt="chat"), tokenizer)
    assert "'[END]'" in template.notes[0]
    example = Encoder(template, tokenizer).examples([Row("What?", "", "It.")], "rows")[0]
    assert tokenizer.decode(example.answer) == " It.</s>"
