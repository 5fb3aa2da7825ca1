"""Libraries that an experiment asks for, looked for before anything is loaded.

Otherwise some of them would be missed when clients have trained already.
"""

from __future__ import annotations

from hedgerow import quantized
from hedgerow.data.partition import check_library as check_partition
from hedgerow.evaluation.metrics import check_metrics
from hedgerow.experiment.definition import Experiment
from hedgerow.optional import check_installed
from hedgerow.training.objectives import objective_of
from hedgerow.training.optimizers import optimizer_of
from hedgerow.training.trainers import trainer_of


def check_libraries(experiment: Experiment) -> None:
    """Raise a `UserError` where a run on one machine would miss a library."""
    if experiment.model.quantization is not None:
        quantized.check_library(experiment.model.quantization)
    if experiment.data.partition is not None:
        check_partition(experiment.data.partition)
    training = experiment.training
    for part in (optimizer_of(training), objective_of(training), trainer_of(training)):
        if part is not None:
            part.check_installed()
    check_metrics(experiment.evaluation.metrics)
    if experiment.privacy is not None:
        check_installed("privacy", "cryptography", "dp_accounting")
    check_server_libraries(experiment)


def check_server_libraries(experiment: Experiment) -> None:
    """Raise a `UserError` where a server that has neither model nor data would miss a library."""
    experiment.method.check_installed()
    if experiment.privacy is not None and experiment.privacy.level == "client":
        check_installed("privacy", "cryptography", "dp_accounting")
    if experiment.federation.secure is not None:
        check_installed("federation.secure", "cryptography", "Crypto")
