"""transformers' Trainer: a new one for each client and round, on one model.

Its loss is a mean over steps, not over tokens as the others' is.
"""

from __future__ import annotations

import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from work import Work, in_turns


class Rows(Dataset):
    """A client's rows of a round."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]


def arguments(work: Work) -> dict[str, object]:
    """Arguments of a client's Trainer, or of TRL's, which has the same."""
    settings = work.settings
    return {
        "output_dir": str(work.out / "trainer"),
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": settings["max_grad_norm"],
        "weight_decay": 0.0,
        # The rows are in their order already.
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def main() -> None:
    """Train."""
    work = Work.asked_for()
    transformers.logging.set_verbosity_error()
    network = work.network()

    def train(client: int, round: int) -> float:
        trainer = Trainer(
            model=network,
            args=TrainingArguments(**arguments(work)),
            train_dataset=Rows(work.rows(client, round)),
            data_collator=work.padded,
        )
        return trainer.train().training_loss

    in_turns(work, network, train)


if __name__ == "__main__":
    main()
