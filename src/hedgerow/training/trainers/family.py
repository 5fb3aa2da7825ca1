"""What trainers of transformers' family have in common: their arguments, and the network's loan."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hedgerow.collector import passing_over
from hedgerow.errors import UserError, reason_of
from hedgerow.lazy import torch, transformers
from hedgerow.settings import TrainingSettings
from hedgerow.training.job import Job

OURS = {
    "learning_rate": "training.learning_rate",
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "max_grad_norm": "training.max_grad_norm",
    "warmup_steps": "training.warmup_steps",
    "lr_scheduler_type": "training.local_schedule",
    "optim": "training.optimizer",
    "weight_decay": "training.weight_decay",
    "router_aux_loss_coef": "training.router_aux_loss_coef",
    "seed": "federation.seed",
    "data_seed": "federation.seed",
    "output_dir": None,
    "save_strategy": None,
    "report_to": "tracking.to",
    "push_to_hub": None,
    "use_cpu": "model.device",
}
"""Arguments that are given in the experiment's own words, and those that a run has no use for."""

_OF_SEVERAL = {"deepspeed", "fsdp", "fsdp_config"}
"""Arguments that need several processes."""


def check_names(arguments: Mapping[str, Any]) -> None:
    """Raise a `UserError` where an argument has a place of its own in the experiment."""
    for key in sorted(arguments.keys() & _OF_SEVERAL):
        raise UserError(
            f"`training.trainer.arguments.{key}`: it divides work among processes, and a run "
            "trains a client in one: leave it out, or federate a script that is launched in "
            "several processes"
        )
    for key in sorted(arguments.keys() & OURS.keys()):
        instead = f"give {OURS[key]}" if OURS[key] else "leave it out, since a run keeps its own"
        raise UserError(f"`training.trainer.arguments.{key}`: {instead}")


def arguments_of(
    kind: type[Any],
    given: Mapping[str, Any],
    training: TrainingSettings,
    folder: str,
    *,
    device: torch.device,
    job: Job | None = None,
    **more: Any,
) -> Any:
    """Arguments of a trainer of transformers' family, for a job.

    Args:
        kind: class of the arguments.
        given: arguments that the experiment gives.
        training: the experiment's settings.
        folder: where it may write.
        device: of the model.
        job: gives seeds and the learning rate of its round; None for arguments to be looked at.
        more: others, which count less than what is given.

    Raises:
        UserError: there is no such argument, a value is wrong, or the device is not the first.
    """
    if device.type == "cuda" and device.index not in (None, 0):
        raise UserError(
            f"training.trainer: it takes the first GPU, and model.device is {device}: give "
            "cuda, and the GPU's number in CUDA_VISIBLE_DEVICES"
        )
    # Under either of its names; `checkpointed` does it.
    words = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(word for word in words if word in kind.__dataclass_fields__)
    own = {
        "output_dir": folder,
        "max_steps": training.steps or 1 if job is None else job.most_steps,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        checkpointing: False,
        "bf16": False,  # which TRL would have by itself
        "learning_rate": training.learning_rate if job is None else job.learning_rate,
        "lr_scheduler_type": schedule_of(training),
        "warmup_steps": training.warmup_steps,
        "max_grad_norm": training.max_grad_norm or 0.0,
        "seed": 0 if job is None else job.dropout_seed % 2**31,
        "data_seed": 0 if job is None else int(job.order.integers(2**31)),
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    with in_a_sentence():
        found = kind(**{**own, **more, **given})
    found._n_gpu = min(found.n_gpu, 1)  # of several it would give each a batch of its own
    return found


def schedule_of(training: TrainingSettings) -> str:
    """Name that transformers has for the schedule within a round."""
    if training.local_schedule == "constant" and training.warmup_steps:
        return "constant_with_warmup"
    return training.local_schedule


def check_output_layer(network: Any, trainer: str) -> None:
    """Raise a `UserError` where the output layer has an adapter, past which TRL's loss goes."""
    if hasattr(network.get_output_embeddings(), "base_layer"):
        raise UserError(
            f"{trainer}: its loss is computed past an adapter of the output layer: leave that out "
            "of method.targets, or take transformers' Trainer"
        )


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Have what a library refuses, most likely for its arguments, be a `UserError`."""
    try:
        yield
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"`training.trainer.arguments`: the trainer does not take them: {reason_of(error)}"
        ) from error


@contextmanager
def lent(network: Any) -> Iterator[None]:
    """Lend a network to a trainer: global randomness and the network's settings come back."""
    devices = [network.device] if network.device.type == "cuda" else []
    states = random.getstate(), np.random.get_state()
    configs = (network.config, network.config.get_text_config(), network.generation_config)
    lendings = [(each, dict(vars(each))) for each in (network, *configs) if each is not None]
    try:
        # Of quantized weights the Trainer would train none but by peft's own models, and TRL would
        # have adapters in bfloat16.
        for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            setattr(network, flag, False)
        with torch.random.fork_rng(devices=devices), passing_over():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for each, own in lendings:  # mixed precision, for one, puts a function around `forward`
            vars(each).clear()
            vars(each).update(own)
        network.zero_grad(set_to_none=True)
        network.eval()


def run(trainer: Any) -> float:
    """Have a trainer train without a word; returns the mean loss of its steps."""
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    found = trainer.train()
    trainer.accelerator.free_memory()
    return float(found.training_loss)
