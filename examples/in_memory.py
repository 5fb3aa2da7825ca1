"""Federated fine-tuning of a model and data that are in memory: a Dataset, a DataFrame, and rows.

    python in_memory.py [OUT]

Everything here may be replaced by your own: any causal language model of transformers, and whatever
holds rows. The model is given back as it was.
"""

import sys

import datasets
import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer

import hedgerow as hr
from hedgerow.bundled import MODEL, tasks

network = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
first, second, third, *_ = tasks.clients().values()

run = hr.run(
    model=network,
    tokenizer=tokenizer,
    clients={
        "north": datasets.Dataset.from_list(first),
        "south": pd.DataFrame(second),
        "west": third,
    },
    test=tasks.test_rows(),
    data={"prompt": "plain", "max_length": 96},
    method=hr.methods.FLoRA(ranks=[16, 8, 4]),
    training={"steps": 5, "learning_rate": 1e-3},
    rounds=2,
    out=sys.argv[1] if len(sys.argv) > 1 else "in-memory",
    resume=True,  # with the same objects it goes on where it was; data are compared by digest
)
print(run.metrics[["round", "eval_loss", "bytes_up"]].to_string(index=False))
print(run.evaluate(first, metrics=["loss"])["eval_loss"], "is the loss on north's own data")
