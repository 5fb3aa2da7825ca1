"""EleutherAI's lm-evaluation-harness (`lm-eval`) on a model in memory.

Tasks, few-shot examples, seeds and metrics are the harness's own, so that scores can be put beside
those that others publish; only the model is ours, with whatever its method has put into it. See
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from hedgerow.errors import UserError, did_you_mean, readable
from hedgerow.runs.scoring import loaded, mean

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
) -> dict[str, Any]:
    """Score a run's model after a round, or a model folder, on tasks of the harness.

    Args:
        path: a run directory, a packed ledger, or a model (or adapter) folder.
        overrides: `key.path=value`, on top of the run's experiment.
        tasks: names of tasks, groups or tags, or patterns of them as `mmlu_*`.
        include_path: a folder with task files of one's own, which come before the harness's.
        num_fewshot: examples in each prompt, but for tasks that insist on none.
        limit: so many questions of each task at most; below 1, a share of them.

    Returns:
        The harness's `results` (of each task and group, `metric,filter` and
        `metric_stderr,filter`), `n-shot`, `n-samples` … under its own names; and `prompts_cut`, how
        many prompts were cut on the left to fit the model. Where a run has a model for each client,
        all that is under `by_client`, and `results` holds the means.

    Raises:
        UserError: naming what does not fit.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include_path)
    names = [name for task in tasks for name in _matching(task, manager)]
    with loaded(path, overrides, round, client) as it:
        scores: dict[str | None, dict[str, Any]] = {}
        for name in it.models():
            network = _Network(
                pretrained=it.model.network,
                tokenizer=it.model.tokenizer,
                batch_size=it.evaluation.batch_size,
            )
            with _harness_seeds():
                chosen = _load(manager, names)
                for task in chosen["tasks"].values():
                    _set_shots(task, num_fewshot)
                    _check_task(task, network.max_length)
                with redirect_stdout(sys.stderr):  # it says there what it is doing
                    found = evaluate(network, chosen, limit=limit, log_samples=False)
            scores[name] = {key: found[key] for key in _KEPT if key in found}
            scores[name]["prompts_cut"] = network.prompts_cut
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
    """The harness's view of a model: it counts what is cut; its bars are for terminals."""

    prompts_cut = 0

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=not sys.stderr.isatty())

    def generate_until(self, requests: Any, **_: Any) -> Any:
        return super().generate_until(requests, disable_tqdm=not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        # The last token is predicted, and never read.
        room = self.max_length + 1
        self.prompts_cut += sum(len(head) + len(tail) > room for _, head, tail in requests)
        options["disable_tqdm"] = not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, **options)

    def tok_batch_encode(
        self, strings: list[str], *, left_truncate_len: int | None = None, **options: Any
    ) -> Any:
        if left_truncate_len is not None:
            lengths = [len(self.tok_encode(string)) for string in strings]
            self.prompts_cut += sum(length > left_truncate_len for length in lengths)
        return super().tok_batch_encode(strings, left_truncate_len=left_truncate_len, **options)


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
                f"room for a prompt in the model's {positions} positions: leave it out"
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
