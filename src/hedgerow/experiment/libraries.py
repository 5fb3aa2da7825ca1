"""Libraries that an experiment asks for, looked for before anything is loaded.

Otherwise some of them would be missed when clients have trained already.
"""

from __future__ import annotations

from hedgerow.evaluation.metrics import metrics_of
from hedgerow.experiment.definition import Experiment
from hedgerow.optional import check_installed


def check_libraries(experiment: Experiment) -> None:
    """Raise a `UserError` where a run on one machine would miss a library."""
    if experiment.model.quantization is not None:
        check_installed(f"model.quantization: {experiment.model.quantization}", "bitsandbytes")
    partition = experiment.data.partition
    if partition is not None and partition.kind in ("dirichlet", "shard"):
        check_installed(f"data.partition.kind: {partition.kind}", "flwr_datasets")
    for metric in metrics_of(experiment.evaluation.metrics):
        metric.check()
    if experiment.privacy is not None:
        check_installed("privacy", "cryptography", "dp_accounting")
    check_server_libraries(experiment)


def check_server_libraries(experiment: Experiment) -> None:
    """Raise a `UserError` where a server that has neither model nor data would miss a library."""
    if experiment.privacy is not None and experiment.privacy.level == "client":
        check_installed("privacy", "cryptography", "dp_accounting")
    if experiment.federation.secure is not None:
        check_installed("federation.secure", "cryptography", "Crypto")
