"""TRL's SFTTrainer as a site of a federation.

    hedgerow flower init EXPERIMENT.yaml app      # the federation's, once
    python federate_trl.py ROWS.json NAME SUPERLINK ROOT_CERTIFICATES KEY [FOLDER]

A script as many have it; the last five lines put it on a federation. Over several GPUs:
`accelerate launch federate_trl.py …`.
"""

import sys

import datasets
from trl import SFTConfig, SFTTrainer

from hedgerow.bundled import MODEL

rows, name, superlink, certificates, key, *folder = sys.argv[1:]
data = datasets.load_dataset("json", data_files=rows, split="train")
trainer = SFTTrainer(
    model=str(MODEL),
    args=SFTConfig(
        per_device_train_batch_size=4,
        max_length=96,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        report_to="none",
        output_dir="trainer",
    ),
    train_dataset=data.rename_columns({"instruction": "prompt", "output": "completion"}),
)

from hedgerow.client import federate  # noqa: E402

where = {"superlink": superlink, "root_certificates": certificates, "private_key": key}
run = federate(trainer, name=name, **where, folder=folder[0] if folder else None)
if trainer.is_world_process_zero():
    run.export_merged(f"tuned-{name}")
