"""EleutherAI's lm-evaluation-harness (`lm-eval`) on a model in memory.

Tasks, few-shot examples, seeds and metrics are the harness's own, so that scores can be put beside
those that others publish; only the model is ours, with whatever its method has put into it, and, if
asked for, the prompts that it was trained on. See
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, simple_parse_args_string

from hedgerow import bounded
from hedgerow.data import Encoder, in_turns, load_template
from hedgerow.data.templates import TextTemplate
from hedgerow.errors import UserError, did_you_mean, readable, reason_of
from hedgerow.evaluation.answers import generate
from hedgerow.evaluation.cache import keeps_keys_only
from hedgerow.files import check_name, check_place, replacing, to_json
from hedgerow.model import Model
from hedgerow.runs.preparation import notes_on_model
from hedgerow.runs.scoring import Subject, is_model, loaded, mean

_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of the harness's results, under its own names."""


def score_path(
    path: Path,
    overrides: list[str],
    round: int | None,
    client: str | None,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    run_prompt: bool = False,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = False,
    gen_kwargs: str | None = None,
    log_samples: Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Score a run's model after a round, or a model folder, on tasks of the harness.

    Args:
        path: a run directory, a packed ledger, or a model (or adapter) folder.
        overrides: `key.path=value`, on top of the run's experiment.
        tasks: names of tasks, groups or tags, or patterns of them as `mmlu_*`.
        include_path: a folder with task files of one's own, which come before the harness's.
        num_fewshot: examples in each prompt, but for tasks that insist on none.
        limit: so many questions of each task at most; below 1, a share of them.
        run_prompt: put each question into `data.prompt`, as the instruction, with the very tokens
            that a row has in training; answers are those of `hedgerow evaluate`, without white
            space around them.
        apply_chat_template: put each question into the tokenizer's chat template, as the harness's
            option of this name does.
        fewshot_as_multiturn: examples are turns of their own, in either of the two.
        gen_kwargs: changes of how answers are generated, `key=value` with commas, or in JSON.
        log_samples: a new file, for a line of JSON on each question.
        say: told what a run says of its model when it begins, and of the prompts if they are its.

    Returns:
        The harness's `results` (of each task and group, `metric,filter` and
        `metric_stderr,filter`), `n-shot`, `n-samples` … under its own names; and `prompts_cut`, how
        many prompts were cut on the left to fit the model. Where a run has a model for each client,
        all that is under `by_client`, and `results` holds the means.

    Raises:
        UserError: naming what does not fit.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _check_options(path, overrides, run_prompt, apply_chat_template, fewshot_as_multiturn)
    generation = {} if gen_kwargs is None else _generation(gen_kwargs)
    if log_samples is not None:
        _check_new(log_samples)
    manager = _manager(tasks, include_path)
    names = [name for task in tasks for name in _matching(task, manager)]
    with loaded(path, overrides, round, client) as it:
        encoder = _encoder(it, run_prompt, apply_chat_template)
        for note in notes_on_model(it.model, None if encoder is None else encoder.template):
            say(note)
        scores: dict[str | None, dict[str, Any]] = {}
        lines: list[str] = []
        for name in it.models():
            network = _network(it, encoder, run_prompt)
            with _harness_seeds():
                chosen = _load(manager, names)
                _set_generation(chosen["tasks"].values(), generation, it.evaluation.stop)
                for task in chosen["tasks"].values():
                    _set_shots(task, num_fewshot)
                    _check_task(task, network.max_length)
                with redirect_stdout(sys.stderr):  # it says there what it is doing
                    found = evaluate(
                        network,
                        chosen,
                        limit=limit,
                        log_samples=log_samples is not None,
                        apply_chat_template=run_prompt or apply_chat_template,
                        fewshot_as_multiturn=fewshot_as_multiturn,
                    )
            scores[name] = {key: found[key] for key in _KEPT if key in found}
            scores[name]["prompts_cut"] = network.prompts_cut
            lines += _lines(name, found.get("samples") or {})
    if log_samples is not None:
        with replacing(log_samples) as file:
            file.writelines(line.encode(errors="backslashreplace") for line in lines)
    if None in scores:
        return scores[None]
    means = mean([_values(score["results"]) for score in scores.values()])
    return {"results": means, "by_client": scores}


def table(scores: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """The results as rows: task, metric, value, and its standard error where it has one."""
    rows = []
    for task, result in scores["results"].items():
        for key, value in _values({task: result})[task].items():
            metric, _, filter = key.partition(",")
            error = result.get(f"{metric}_stderr,{filter}")
            title = metric if filter == "none" else f"{metric} ({filter})"
            has_error = isinstance(error, float)  # else it is "N/A", or there is none of a mean
            rows.append((result.get("alias", task), title, value, error if has_error else None))
    return rows


class _Network(HFLM):  # type: ignore[misc]
    """The harness's view of a model: it counts what is cut; its bars are for terminals.

    Control tokens are those alone that a chat template writes: what a task's text spells is text.
    """

    prompts_cut = 0
    own: Model
    """The model, as hedgerow knows it."""
    encoder: Encoder
    """Tells a task's text from control tokens."""
    written: dict[str, str]
    """What a chat template has written, with the task's text hidden in it, by how it reads."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        hidden = [
            message | {"content": self.encoder.hidden(message["content"])}
            for message in chat_history
        ]
        text = self._write(hidden, add_generation_prompt)
        shown = self.encoder.shown(text)
        self.written[shown] = text
        return shown

    def _write(self, messages: list[dict[str, str]], generation: bool) -> str:
        """What the chat template makes of messages; with `generation`, an answer is to follow.

        Where it fails with what the system says, that is left out, as the harness does.
        """
        text = self._rendered(messages, generation)
        others = [message for message in messages if message["role"] != "system"]
        if isinstance(text, bounded.Failure) and others:
            text = self._rendered(others, generation)
        if isinstance(text, bounded.Failure):
            raise UserError(f"--apply-chat-template: the tokenizer's chat template fails ({text})")
        return text

    def _rendered(self, messages: list[dict[str, str]], generation: bool) -> str | bounded.Failure:
        try:
            [text] = bounded.render(
                self.tokenizer.get_chat_template(),
                [(messages, generation)],
                self.tokenizer.special_tokens_map | self.chat_template_args,
                continued=not generation,
            )
        except bounded.Exceeded as error:
            raise UserError(
                f"--apply-chat-template: the tokenizer's chat template {error}"
            ) from None
        except ValueError as error:  # of several, none is the default
            return bounded.Failure(reason_of(error))
        return text

    def _hidden(self, requests: Any) -> list[Any]:
        """Requests in which a task's text is hidden from those who look for control tokens."""
        return [replace(each, arguments=tuple(map(self._hide, each.args))) for each in requests]

    def _hide(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument  # options of generation
        return self.written.get(argument) or self.encoder.hidden(argument)

    def loglikelihood(self, requests: Any, **options: Any) -> Any:
        return super().loglikelihood(self._hidden(requests), **options)

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
        requests = self._hidden(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=not sys.stderr.isatty())

    def generate_until(self, requests: Any, **_: Any) -> Any:
        requests = self._hidden(requests)
        if not keeps_keys_only(self.own.network, self.max_length):
            # The harness pads on the left, which some networks take for a part of the text.
            return self._answers(requests)
        return super().generate_until(requests, disable_tqdm=not sys.stderr.isatty())

    def _answers(self, requests: Any) -> list[str]:
        """The answers, as `hedgerow evaluate` has the model give them."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        for options, indices in alike.items():
            asked = normalize_gen_kwargs(json.loads(options), self.max_gen_toks)
            if asked["do_sample"]:
                raise UserError(
                    "--harness: answers that are drawn at random (do_sample) need the prompts of "
                    "the task or --apply-chat-template, and a model of attention alone: set "
                    "--gen-kwargs do_sample=false"
                )
            given, cut = generate(
                self.own,
                [np.array(self.tok_encode(requests[i].args[0]), np.int32) for i in indices],
                asked["max_gen_toks"],
                self.batch_size,
                lambda count: None,
                stop=[text for text in asked["until"] if text],
                ends=self.encoder.ends,
            )
            self.prompts_cut += cut
            for index, answer in zip(indices, given, strict=True):
                answers[index] = answer
        return answers

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        # The last token is predicted, and never read.
        room = self.max_length + 1
        self.prompts_cut += sum(len(head) + len(tail) > room for _, head, tail in requests)
        options["disable_tqdm"] = not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, **options)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        if not self.encoder.is_hidden(string):
            ids: list[int] = super().tok_encode(string, add_special_tokens, **options)
            self.encoder.check(ids, "a prompt")
        elif add_special_tokens is False:  # what follows an empty prompt
            _, ids = self.encoder.pair("", string)
        else:
            ids, _ = self.encoder.pair(string, "")
        return ids

    def tok_batch_encode(
        self, strings: list[str], *, left_truncate_len: int | None = None, **options: Any
    ) -> Any:
        encoded = [self.tok_encode(string) for string in strings]
        if left_truncate_len is not None:
            self.prompts_cut += sum(len(ids) > left_truncate_len for ids in encoded)
            encoded = [ids[-left_truncate_len:] for ids in encoded]
        if not any(map(self.encoder.is_hidden, strings)):
            return super().tok_batch_encode(strings, left_truncate_len=left_truncate_len, **options)
        batch = self.tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]


class _Prompted(_Network):
    """A model whose questions stand in a run's own prompt, token by token as in training."""

    def _write(self, messages: list[dict[str, str]], generation: bool) -> str:
        """The prompt of a conversation; a task's description stands before the first question."""
        texts = [message["content"] for message in messages]
        if messages[0]["role"] == "system":
            texts[:2] = [f"{texts[0].rstrip()}\n\n{texts[1]}"]
        begun = "" if generation else texts.pop()
        return self.encoder.template.prompt(in_turns(texts)) + begun

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        return self.encoder.pair(string, "")[0]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.encoder.pair(context, continuation)

    def generate_until(self, requests: Any, **_: Any) -> Any:
        return [answer.strip() for answer in self._answers(self._hidden(requests))]


class _Tasks(TextTemplate):
    """A task's own prompts, which are whole texts, or the turns of the tokenizer's chat template.

    Args:
        chat: the tokenizer's chat templates, in which the task's texts stand, if they do.
    """

    def __init__(self, chat: Any) -> None:
        super().__init__("{instruction}", "--harness")
        self.written = str(chat or "")


def _network(it: Subject, encoder: Encoder, run_prompt: bool) -> _Network:
    """What the harness is given to evaluate; in the run's prompts, if they are asked for."""
    kind = _Prompted if run_prompt else _Network
    network = kind(
        pretrained=it.model.network,
        tokenizer=it.model.tokenizer,
        batch_size=it.evaluation.batch_size,
    )
    network.own, network.encoder, network.written = it.model, encoder, {}
    return network


def _encoder(it: Subject, run_prompt: bool, apply_chat_template: bool) -> Encoder:
    tokenizer = it.model.tokenizer
    if apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            "--apply-chat-template: the tokenizer has no chat template: leave it out, or use "
            "--prompt run"
        )
    template = (
        load_template(it.data, tokenizer)
        if run_prompt
        else _Tasks(tokenizer.chat_template if apply_chat_template else None)
    )
    return Encoder(template, tokenizer, it.model.vocabulary_size)


def _check_options(
    path: Path,
    overrides: Sequence[str],
    run_prompt: bool,
    apply_chat_template: bool,
    fewshot_as_multiturn: bool,
) -> None:
    """Raise a `UserError` where options exclude each other, or would do nothing."""
    if run_prompt and apply_chat_template:
        raise UserError("--prompt run and --apply-chat-template exclude each other: give one")
    if fewshot_as_multiturn and not (run_prompt or apply_chat_template):
        raise UserError(
            "--fewshot-as-multiturn needs a prompt that knows turns: add --prompt run or "
            "--apply-chat-template"
        )
    keys = [override.partition("=")[0] for override in overrides]
    if run_prompt and is_model(path) and "data.prompt" not in keys:
        raise UserError(
            f"--prompt run: {path} is a model, which no run has trained: name its prompt, as "
            "data.prompt=alpaca"
        )
    for key in keys:
        if key == "data.prompt" and not run_prompt:
            raise UserError(
                "data.prompt does nothing with --harness, whose tasks have their own prompts: add "
                "--prompt run, or leave it out"
            )
        chosen = key == "data.prompt" or (run_prompt and key.startswith("data.template"))
        ours = key.startswith("data.") and not chosen
        if ours or key in ("evaluation.by", "evaluation.every", "evaluation.max_new_tokens"):
            instead = ": see --gen-kwargs" if key == "evaluation.max_new_tokens" else ""
            raise UserError(f"{key} does nothing with --harness: leave it out{instead}")


_GENERATION: dict[str, tuple[Any, str]] = {
    "until": (
        lambda v: all(isinstance(text, str) for text in (v if isinstance(v, list) else [v])),
        "a text, or a list of texts",
    ),
    "max_gen_toks": (lambda v: type(v) is int and v > 0, "a number of tokens above 0"),
    "do_sample": (lambda v: isinstance(v, bool), "true or false"),
    "temperature": (lambda v: type(v) in (int, float) and v >= 0, "a number of at least 0"),
    "top_p": (lambda v: type(v) in (int, float) and 0 < v <= 1, "above 0 and at most 1"),
    "top_k": (lambda v: type(v) is int and v > 0, "a number of tokens above 0"),
}
"""Options of generation: what each may be, and that in words."""


def _generation(text: str) -> dict[str, Any]:
    """Options of generation, from what stands at --gen-kwargs."""
    try:
        parsed = json.loads(text) if text.lstrip().startswith("{") else _pairs(text)
    except ValueError:
        raise UserError(
            f"--gen-kwargs {text}: write key=value with commas, as "
            'max_gen_toks=64,temperature=0.7, or JSON, as {"until": ["\\n"]}'
        ) from None
    for key, value in parsed.items():
        if key not in _GENERATION:
            close = did_you_mean(key, _GENERATION)
            known = ", ".join(_GENERATION)
            raise UserError(f"--gen-kwargs: there is no {key!r}{close} (known: {known})")
        fits, words = _GENERATION[key]
        if not fits(value):
            raise UserError(f"--gen-kwargs: {key} must be {words}, not {value!r}")
    # A task may say itself that it draws nothing, or at which temperature.
    if "temperature" in parsed:
        parsed["temperature"] = float(parsed["temperature"])
        draws = parsed["temperature"] > 0
        if parsed.setdefault("do_sample", draws) != draws:
            raise UserError(
                "--gen-kwargs: do_sample and temperature contradict each other: answers are drawn "
                "at temperatures above 0"
            )
    elif parsed.get("do_sample"):
        parsed["temperature"] = 1.0
    return parsed


def _pairs(text: str) -> dict[str, Any]:
    pairs: dict[str, Any] = simple_parse_args_string(text)
    words = {"true": True, "false": False}
    return {
        key: words.get(value.lower(), value) if isinstance(value, str) else value
        for key, value in pairs.items()
    }


def _set_generation(
    tasks: Iterable[Any], generation: Mapping[str, Any], stop: Sequence[str]
) -> None:
    """Change how tasks have answers generated; what ends an answer of the run, does so here too."""
    generating = [task for task in tasks if task.OUTPUT_TYPE == "generate_until"]
    if generation and not generating:
        raise UserError("--gen-kwargs: no task has answers generated: leave it out")
    for task in generating:
        task.set_config(key="generation_kwargs", value=dict(generation), update=True)
        if stop:
            until = normalize_gen_kwargs(task.get_config("generation_kwargs"))["until"]
            ends = {"until": [*until, *stop]}
            task.set_config(key="generation_kwargs", value=ends, update=True)


def _check_new(file: Path) -> None:
    """Raise a `UserError` where a file is there already, or has no folder to be in."""
    check_name(file, "--log-samples")
    if file.exists():
        raise UserError(f"--log-samples {file} is there already: name a new file")
    if not file.parent.is_dir():
        raise UserError(f"--log-samples {file}: there is no folder {file.parent}: make it first")
    check_place(file.parent, "--log-samples")


def _lines(client: str | None, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A line of JSON on each question of each task."""
    whose = {} if client is None else {"client": client}
    return [
        to_json(
            {"task": task, **whose, **sample}, ensure_ascii=False, default=handle_non_serializable
        )
        + "\n"
        for task, found in samples.items()
        for sample in found
    ]


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows the tasks; the harness's own are thousands of files, read only where needed."""
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: give a folder with task files (YAML)")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path and str(include_path))


def _matching(task: str, manager: TaskManager) -> list[str]:
    names: list[str] = manager.match_tasks([task])
    if not names:
        close = did_you_mean(task, manager.all_tasks)
        raise UserError(
            f"--harness: lm-eval has no task {task!r}{close}; your own are read from --include-path"
        )
    return names


def _load(manager: TaskManager, names: list[str]) -> Any:
    """The tasks with their data, the first row of each put into words."""
    try:
        chosen = manager.load(names)
        for task in chosen["tasks"].values():
            first = next(iter(task.eval_docs))
            task.doc_to_text(first)
            task.doc_to_target(first)
    except Exception as error:  # a task is code and data from anywhere, and may fail in any way
        reason = readable(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        raise UserError(f"--harness: {', '.join(names)} cannot be loaded ({reason})") from None
    return chosen


def _set_shots(task: Any, num_fewshot: int | None) -> None:
    """As `lm_eval --num_fewshot` does: a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _check_task(task: Any, positions: int) -> None:
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--harness: {name} runs code that the model writes: use lm-eval itself")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--harness: {name} needs more than text, which the model cannot read")
    if task.OUTPUT_TYPE == "generate_until":
        longest = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"]
        if longest >= positions:
            raise UserError(
                f"--harness: {name} asks for answers of up to {longest} tokens, which leaves no "
                f"room for a prompt in the model's {positions} positions: give fewer, as "
                f"--gen-kwargs max_gen_toks={max(1, positions // 4)}, or leave it out"
            )


@contextmanager
def _harness_seeds() -> Iterator[None]:
    """The global generators as the harness seeds them, and afterwards as they were."""
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def _values(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The metrics of each task, without their standard errors and what else stands there."""
    return {
        task: {
            key: float(value)
            for key, value in result.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
        for task, result in results.items()
    }
