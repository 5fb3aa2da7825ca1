"""Strangers' templates and expressions, in a process of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from matrix.templates import TEMPLATES
from matrix.test_templates import said, tokenizer_of
from support.runs import hear_interrupts

from hedgerow import bounded
from hedgerow.bounded.process import Process

LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
ASKED = [([{"role": "user", "content": "Hello"}], False)]


@pytest.fixture
def short(monkeypatch):
    """Let requests take a second at most."""
    process = Process(seconds=1, memory=200 * 2**20)
    monkeypatch.setattr(bounded, "_process", process)
    return process


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_is_that_of_transformers(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    for messages in (
        said(name, "What <b>is</b> 'é\n?"),
        said(name, "Hi", "Hello", "And?"),
        said(name, "Hi", system="Be brief"),
    ):
        for generation in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation
                )
            except Exception as error:
                text = bounded.Failure(" ".join(str(error).split()))
            [own] = bounded.render(
                TEMPLATES[name], [(messages, generation)], tokenizer.special_tokens_map
            )
            assert (own, type(own)) == (text, type(text))


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ '%1000000000d' % 1 }}", "needs more than 200 MB of memory"),
        ("{{ 'a' * 10 ** 10 }}", "needs more than 200 MB of memory"),
        ("{{ [1] * 10 ** 9 }}", "needs more than 200 MB of memory"),
        ("{{ 'a' | center(10 ** 10) }}", "needs more than 200 MB of memory"),
        (LOOPS, "takes more than 1 seconds of computing"),
        # In one operation, which nothing in a process can interrupt.
        ("{{ 7 ** (7 ** 9) }}", "takes more than 1 seconds of computing"),
        ("{{ 'a' * 10 ** 6 }}", "writes much more than it is given"),
    ],
)
def test_a_template_beyond_its_bounds_is_ended_and_the_next_is_written(short, template, sentence):
    with pytest.raises(bounded.Exceeded, match=sentence):
        bounded.render(template, ASKED, {})
    assert bounded.render("{{ messages[0].content }}", ASKED, {}) == ["Hello"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "maximum recursion depth exceeded"),
        ("{% if", "unexpected 'end of template'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ raise_exception('only \x1b[31m system') }}", r"only  \[31m system"),
        ("{{ raise_exception('a' * 10000) }}", "a{300}$"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_says_why(template, reason):
    written = bounded.render(template, [*ASKED, *ASKED], {})
    assert all(isinstance(text, bounded.Failure) for text in written)
    assert [bool(re.match(reason, text)) for text in written] == [True, True]


def test_one_conversation_that_fails_is_one():
    template = "{{ raise_exception('no') if messages[0].role == 'user' }}{{ messages[0].content }}"
    asked = [([{"role": role, "content": "é\ud800"}], False) for role in ("system", "user", "tool")]
    written = bounded.render(template, asked, {})
    assert written == ["é\ud800", "no", "é\ud800"]
    assert [isinstance(text, bounded.Failure) for text in written] == [False, True, False]


def test_memory_is_that_of_what_is_given(short):
    """A long text may take as much as it needs to be handed on."""
    text = "é" * 40_000_000
    assert bounded.render("{{ messages[0].content }}", [([{"content": text}], False)], {}) == [text]


def test_expressions_are_bounded(short):
    names = ["model.layers.0.self_attn.q_proj", "lm_head"]
    whole, wrong = bounded.matches([".*q_proj", "(lm_"], names, how="fullmatch")
    assert whole == [True, False]
    assert isinstance(wrong, bounded.Failure)
    assert bounded.matches(["lm_"], names, how="match") == [[False, True]]
    with pytest.raises(bounded.Exceeded, match="takes more than 1 seconds"):
        bounded.matches([r"(\w+\.?)+!"], ["a" * 50], how="fullmatch")


def worker_of(process):
    return process._started.process.pid


def test_the_process_needs_no_torch_and_is_one(short):
    for _ in range(3):
        bounded.render("{{ 1 }}", ASKED, {})
        pid = worker_of(short)
    assert worker_of(short) == pid
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_process_that_was_killed_is_started_again(short):
    bounded.render("{{ 1 }}", ASKED, {})
    os.kill(worker_of(short), signal.SIGKILL)
    short._started.process.wait()
    assert bounded.render("{{ 1 }}", ASKED, {}) == ["1"]


PARENT = textwrap.dedent(
    f"""
    import sys
    from hedgerow import bounded
    from hedgerow.bounded.process import Process
    bounded._process = Process(seconds=int(sys.argv[1]))
    asked = {ASKED!r}
    bounded.render("", asked, {{}})
    try:
        print(bounded._process._started.process.pid, flush=True)
        bounded.render({LOOPS!r}, asked, {{}})
    except KeyboardInterrupt:
        print(bounded.render("{{{{ 1 }}}}", asked, {{}}))
    """
)


@pytest.fixture
def parent(request):
    """A process that has a template written that goes on for so long; and its worker's number."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(request.param)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def status(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_until_it_works(pid):
    """Until the process is at the template that goes on and on, so that somebody waits for it."""

    def ticks():
        return sum(int(each) for each in status(pid)[11:13])  # in its own code and in the kernel's

    before = ticks()
    while ticks() < before + 5:
        time.sleep(0.02)


def wait_for_the_end(pid):
    with contextlib.suppress(ProcessLookupError):
        while Path(f"/proc/{pid}/stat").exists():
            if status(pid)[0] == "Z":
                return
            time.sleep(0.05)


@pytest.mark.parametrize("parent", [100], indirect=True)
def test_ctrl_c_ends_who_waits_and_replies_do_not_get_mixed_up(parent):
    process, worker = parent
    wait_until_it_works(worker)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate()
    assert (out, err) == ("['1']\n", "")
    wait_for_the_end(worker)


@pytest.mark.parametrize("parent", [1], indirect=True)
def test_the_process_ends_after_who_has_started_it(parent):
    process, worker = parent
    process.kill()
    process.wait()
    wait_for_the_end(worker)
