"""TRL's SFTTrainer: a new one for each client and round, on one model, with its own collator.

Its loss is a mean over steps, not over tokens as the others' is.
"""

from __future__ import annotations

import transformers
from datasets import Dataset, disable_progress_bars
from hf_trainer import arguments
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from work import Work, in_turns


def main() -> None:
    """Train."""
    work = Work.asked_for()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work.settings["model"])
    network = work.network()

    def train(client: int, round: int) -> float:
        config = SFTConfig(
            **arguments(work),
            max_length=None,  # rows are cut already
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(
            model=network,
            args=config,
            train_dataset=Dataset.from_list(work.rows(client, round)),
            processing_class=tokenizer,
        )
        return trainer.train().training_loss

    in_turns(work, network, train)


if __name__ == "__main__":
    main()
